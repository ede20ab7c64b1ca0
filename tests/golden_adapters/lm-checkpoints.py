"""Vectors of `lm-checkpoints`: whole language models from their files, by the `model_type` of their configuration."""

import json
from pathlib import Path
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import tokjax
from tokjax.data.corruption import shift_right
from tokjax.models.bert import Encoding
from tokjax.models.decoder import DecoderConfig, Prompts, rotate, turns
from tokjax.models.t5 import Seq2Seq
from tokjax.train.losses import cross_entropy

INPUTS = (
    *("param/*", "input_ids", "attention_mask", "labels", "config_json"),
    "token_type_ids",
    *("position_ids", "mrope_section", "rope_theta", "query_in", "key_in"),
)
TOLERANCE = {"bert_*/*": (1e-5, 1e-5), "generate/*_ids": (0, 0), "qwen2vl_mrope/*": (1e-5, 1e-5), "*": (1e-4, 1e-4)}
EXCUSED = dict.fromkeys(
    ("token_type", "*_grid_thw", "spatial_merge_size", "position_delta"),
    "positions of images and videos are given: finding them is a matter of vision-language models",
)


# What stands at padding is of no meaning.
def _there(inputs: dict) -> np.ndarray:
    return (inputs["attention_mask"] == 1)[..., None]


def _at_logits(inputs: dict) -> np.ndarray:
    """A decoder's stand at the same places; not so those of an encoder with a decoder, or a classifier."""
    return np.bool_(True) if {"labels", "token_type_ids"} & inputs.keys() else _there(inputs)


COMPARE = {"encoder_hidden_state_*": _there, "hidden_state_*": _there, "logits": _at_logits}


def run(case: Path, arrays: dict) -> dict:
    if case.stem.startswith("qwen2vl_mrope"):
        return run_sections(arrays)
    config = json.loads(arrays["config_json"].tobytes())
    with tempfile.TemporaryDirectory() as folder:
        tensors = {n.removeprefix("param/"): np.asarray(a) for n, a in arrays.items() if n.startswith("param/")}
        save_file(tensors, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = tokjax.load(folder)
    return RUN[config["model_type"]](model, arrays)


def run_t5(model: tokjax.Model, arrays: dict) -> dict:
    labels = jnp.asarray(arrays["labels"])
    inputs = Seq2Seq(
        jnp.asarray(arrays["input_ids"]),
        jnp.asarray(shift_right(arrays["labels"])),
        jnp.asarray(arrays["attention_mask"] == 1),
    )

    @jax.jit
    def outputs(params):
        out = model.forward(params, inputs, states=True)
        flat = out.logits.reshape(-1, out.logits.shape[-1]), labels.reshape(-1)
        return out, cross_entropy(*flat, flat[1] != -100)

    out, loss = outputs(model.params)
    results = {"logits": out.logits, "loss": loss}
    stacks = (
        ("encoder", inputs.ids, out.states, out.encoder),
        ("decoder", inputs.decoder_ids, out.decoder_states, out.decoder),
    )
    for side, ids, states, last in stacks:
        embedded = model.params["model"]["embedding"][ids]
        every = [embedded, *(tokens.x for tokens in states[:-1]), last.x]  # the last one after the final norm
        results |= {f"{side}_hidden_state_{i}": x for i, x in enumerate(every)}
    return results | generations(model, inputs, arrays)


def generations(model: tokjax.Model, inputs: Seq2Seq | Prompts, arrays: dict) -> dict:
    """`generate/greedy_ids`, `generate/beam<K>_<length penalty>_ids` and `_scores`."""
    results = {}
    for name in arrays:
        if not (found := re.fullmatch(r"(generate/(?:greedy|beam(\d+)_([\d.]+)))_ids", name)):
            continue
        beams = {"beams": int(found[2]), "length_penalty": float(found[3])} if found[2] else {}
        tokens = arrays[name].shape[-1]
        out = model.generate(inputs.ids, valid=inputs.valid, max_tokens=tokens, **beams)
        results[name] = out.beam_ids if beams else out.ids
        if beams:
            results[f"{found[1]}_scores"] = out.beam_scores
    return results


def run_decoder(model: tokjax.Model, arrays: dict) -> dict:
    ids, mask = arrays["input_ids"], arrays["attention_mask"] == 1
    inputs = Prompts(jnp.asarray(ids), jnp.asarray(mask))

    @jax.jit
    def outputs(params):
        module = model.module(params)
        embedded = module.embed(inputs).x
        out = model.forward(params, inputs, states=True)
        last = out.features if model.config.embed_width is None else module.project_out(out.features)
        return out.logits, [embedded, *(tokens.x for tokens in out.states[:-1]), last]

    logits, states = outputs(model.params)
    results = {"logits": logits, **{f"hidden_state_{i}": x for i, x in enumerate(states)}}
    if "decode_row0_logits" not in arrays:
        return results | generations(model, inputs, arrays)
    end = int(mask[0].sum())  # the file's row has no padding behind it

    @jax.jit
    def decoded(params, ids):
        step, cache, logits = model.module(params).begin(ids, length=1)
        token = jnp.argmax(logits, -1)
        return token, step(cache, token)[0]

    token, following = decoded(model.params, jnp.asarray(ids[:1, :end]))
    results |= {"decode_row0_next_token": token, "decode_row0_logits": following}
    return results | generations(model, inputs, arrays)


def run_bert(model: tokjax.Model, arrays: dict) -> dict:
    ids, types, mask = (jnp.asarray(arrays[name]) for name in ("input_ids", "token_type_ids", "attention_mask"))
    inputs = Encoding(ids, types, mask == 1)

    @jax.jit
    def outputs(params):
        return model.module(params).embed(inputs).x, model.forward(params, inputs, states=True)

    embedded, out = outputs(model.params)
    results = {"logits": out.logits} if model.config.num_classes else {"pooled": out.pooled}
    return {**results, **{f"hidden_state_{i}": x for i, x in enumerate([embedded, *(t.x for t in out.states)])}}


def run_sections(arrays: dict) -> dict:
    """Rotary positions of three axes."""
    width = arrays["query_in"].shape[-1]
    config = DecoderConfig(
        heads=arrays["query_in"].shape[1],
        kv_heads=arrays["key_in"].shape[1],
        head_width=width,
        rope_base=float(arrays["rope_theta"]),
        rope_sections=tuple(map(int, arrays["mrope_section"])),
    )
    turn = turns(config, jnp.moveaxis(jnp.asarray(arrays["position_ids"]), 0, -1))
    by_head = tuple(part[:, None] for part in turn)
    rotated = {f"{name}_out": rotate(jnp.asarray(arrays[f"{name}_in"]), by_head) for name in ("query", "key")}
    return {**rotated, **{name: jnp.tile(part, 2) for name, part in zip(("cos", "sin"), turn, strict=True)}}


RUN = {
    "bert": run_bert,
    "t5": run_t5,
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma", "gemma2", "opt"), run_decoder),
}
