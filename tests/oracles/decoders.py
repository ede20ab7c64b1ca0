"""Writes `golden/lm-checkpoints/{gemma,gemma2,mistral,opt,qwen2,llama}_*`: decoders that have no published vectors.

Run by hand, with torch and transformers (4.55 was used, whose configurations have the older layout of rotary settings):

    python tests/oracles/decoders.py vectors tests/golden/lm-checkpoints

With these vectors it also checks that transformers reads what is saved here, in two steps, as neither environment needs
the packages of the other:

    python tests/oracles/decoders.py save tests/golden/lm-checkpoints FOLDER     # with tokjax
    python tests/oracles/decoders.py check tests/golden/lm-checkpoints FOLDER    # with torch and transformers

Arrays as of the other models there, with padding on the right; `generate/<how>_ids` are new tokens, padded behind their
end, of the same texts (transformers was given them with padding on the left, which it needs), and
`generate/beam<K>_<length penalty>_scores` the scores of the K texts of every row.
"""

import json
from pathlib import Path
import sys
import tempfile
from typing import Any

import numpy as np

try:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError:  # to save
    torch: Any = None

NEW, VOCABULARY = 7, 23
ENDS = (12, 7, 9)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 6}
CASES = {
    "gemma_mqa": ("gemma", {**GATED, "num_key_value_heads": 1, "hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2_windows": (
        "gemma2",
        {**GATED, "sliding_window": 4, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 2.0},
    ),
    "mistral_window": ("mistral", {**GATED, "sliding_window": 4, "rope_theta": 1e3}),
    "qwen2_windows": ("qwen2", {**GATED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "llama_biases_linear": (
        "llama",
        {**GATED, "attention_bias": True, "mlp_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ),
    "opt_post_norm": (
        "opt",
        {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 10, "do_layer_norm_before": False, "pad_token_id": 1},
    ),
}
BEAMS = {"gemma2_windows": [(3, 1.0)], "llama_biases_linear": [(2, 2.0)]}


def model(kind: str, fields: dict) -> Any:
    config = AutoConfig.for_model(kind, **fields)
    config._attn_implementation = "eager"
    made = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():  # a tied table has one name
            noise = torch.randn(parameter.shape, generator=generator)
            gain = "norm" in name and name.endswith("weight") and not kind.startswith("gemma")
            wide = 1.0 if "embed_tokens" in name or "lm_head" in name else 0.4
            if made.config.tie_word_embeddings:  # or every token would be followed by itself
                wide = 0.3 if "embed_tokens" in name else 0.8
            parameter.copy_(torch.round((1 + 0.1 * noise if gain else wide * noise) * 64) / 64)
    return made


def arrays(made: Any, searches: list[tuple[int, float]]) -> dict[str, np.ndarray]:
    config, generator = made.config, torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    for row, end in enumerate(ENDS):
        ids[row, end:], mask[row, end:] = config.pad_token_id, 0
    with torch.no_grad():
        out = made(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    aliases = ["lm_head.weight"] * config.tie_word_embeddings
    results = {f"param/{name}": value for name, value in made.state_dict().items() if name not in aliases}
    results |= {"input_ids": ids.int(), "attention_mask": mask.int(), "logits": out.logits}
    results |= {f"hidden_state_{i}": x for i, x in enumerate(out.hidden_states)}
    left, there = (torch.stack([x[row].roll(12 - end) for row, end in enumerate(ENDS)]) for x in (ids, mask))
    given = {"input_ids": left, "attention_mask": there, "max_new_tokens": NEW, "return_dict_in_generate": True}
    results["generate/greedy_ids"] = padded(made.generate(**given, do_sample=False, num_beams=1).sequences, config)
    for beams, penalty in searches:
        found = made.generate(
            **given, num_beams=beams, num_return_sequences=beams, length_penalty=penalty, output_scores=True
        )
        name = f"generate/beam{beams}_{penalty}"
        results[f"{name}_ids"] = padded(found.sequences, config).reshape(len(ids), beams, NEW)
        results[f"{name}_scores"] = found.sequences_scores.reshape(len(ids), beams)
    return {name: value.numpy() for name, value in results.items()}


def padded(sequences: Any, config) -> Any:
    """Without the prompt, and with padding behind the end."""
    new = torch.nn.functional.pad(sequences[:, 12:], (0, NEW + 12 - sequences.shape[1])).int()
    behind = (new == config.eos_token_id).cumsum(-1) - (new == config.eos_token_id).int() > 0
    return new.masked_fill(behind, config.pad_token_id)


def vectors(golden: Path) -> None:
    for name, (kind, fields) in CASES.items():
        made = model(kind, fields)
        config = {**made.config.to_diff_dict(), **fields, "model_type": kind}
        config["tie_word_embeddings"] = made.config.tie_word_embeddings
        text = json.dumps(config, indent=1).encode()
        stored = arrays(made, BEAMS.get(name, []))
        np.savez_compressed(golden / f"{name}.npz", **stored, config_json=np.frombuffer(text, np.uint8))


def save(golden: Path, folder: Path) -> None:
    from safetensors.numpy import save_file

    import tokjax

    for name in CASES:
        file = np.load(golden / f"{name}.npz")
        with tempfile.TemporaryDirectory() as there:
            tensors = {key.removeprefix("param/"): file[key] for key in file if key.startswith("param/")}
            save_file(tensors, Path(there) / "model.safetensors")
            (Path(there) / "config.json").write_bytes(file["config_json"].tobytes())
            tokjax.save(tokjax.load(there), folder / name)


def check(golden: Path, folder: Path) -> None:
    for name in CASES:
        file = np.load(golden / f"{name}.npz")
        made, report = AutoModelForCausalLM.from_pretrained(
            folder / name, output_loading_info=True, attn_implementation="eager"
        )
        assert not any(report.values()), report
        ids, mask = (torch.tensor(file[key]).long() for key in ("input_ids", "attention_mask"))
        with torch.no_grad():
            logits = made.eval()(ids, attention_mask=mask).logits.numpy()
        difference = np.abs(logits - file["logits"])[file["attention_mask"] == 1].max()
        print(name, f"{difference:.1e}")
        assert difference < 2e-5


if __name__ == "__main__":
    {"vectors": vectors, "save": save, "check": check}[sys.argv[1]](*map(Path, sys.argv[2:]))
