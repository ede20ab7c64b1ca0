"""SwiftKV in small LLaMA models: first projections, whole texts, caches, losses with gradients, and going on."""

import functools
import re

from contract_setup import QUICK
import jax
import jax.numpy as jnp
import numpy as np

import tokjax
from tokjax.models.decoder import DecoderConfig
from tokjax.train.losses import swift_kv

INPUTS = (
    *("param/*", "input_ids", "loss_mask", "num_key_value_layers", "key_value_group_size", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "rope_theta", "decode_input_tokens"),
)
TOLERANCE = {"init/*": (0, 1e-7), "*hidden*": (0, 2e-4), "grad/*": (0, 5e-4), "*": (0, 1e-4)}
_SWIFT = re.compile(r"(?:init|grad)/model\.(?:layers\.(\d+)\.self_attn\.([qkv])_proj|norm)_swiftkv\.(weight|bias)")


def run(case, arrays):
    config, teacher = teacher_of(arrays)
    layer, group = int(arrays["num_key_value_layers"]), int(arrays["key_value_group_size"])
    first = tokjax.reduce(teacher, "swiftkv", layer=layer, group=group, shares="reference")
    student = first.with_params({"model": with_swift(first.params["model"], arrays, first.config.kv_source)})
    ids, steps = arrays["input_ids"], arrays["decode_input_tokens"]
    answer = arrays["loss_mask"] == 1

    def loss(params, wanted):
        out = student.forward(params, ids, states=True)
        total, terms = swift_kv(out.logits, wanted.logits, out.states[-2].x, wanted.states[-2].x, answer)
        return total, (out, terms)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def outputs(params, whole):
        wanted = teacher.forward(whole, ids, states=True)
        (total, (out, terms)), gradient = jax.value_and_grad(loss, has_aux=True)(params, wanted)
        module = student.module(params)
        read = module.prefill(ids, student.hooks, capacity=len(steps))
        step, cache, logits = module.steps(student.hooks), read.cache, []
        for token in steps:
            one, cache = step(cache, jnp.asarray(token))
            logits.append(one)
        entering = [module.embed(ids).x, *(tokens.x for tokens in out.states[:-1])]
        normed = module.norm_kv(entering[layer]) if layer < config.depth else None
        return wanted, out, total, terms, gradient["model"], read, jnp.stack(logits), entering, normed

    wanted, out, total, terms, gradient, read, logits, entering, normed = outputs(student.params, teacher.params)
    results = {
        **{f"student_hidden_{i}": x for i, x in enumerate(entering)},
        "student_hidden_after_final_norm": out.features,
        "teacher_hidden_before_last_layer": wanted.states[-2].x,
        "teacher_logits": wanted.logits,
        "student_logits": out.logits,
        "swiftkv_normed_hidden": normed,
        "logits_loss": terms["logits"],
        "hidden_loss": terms["hidden"],
        "total_loss": total,
        "prefill_last_logits": read.logits,
        "decode_logits": logits,
    }
    for i, (at, buffer) in enumerate(read.cache.layers):
        held = read.cache.groups[at]
        results[f"cache_key_rope_layer_{i}"] = held.keys[buffer][:, :, : held.prompt]
        results[f"cache_value_layer_{i}"] = held.values[buffer][:, :, : held.prompt]
    for name in arrays:
        if (found := _SWIFT.fullmatch(name)) is not None:
            results[name] = part(gradient if name.startswith("grad/") else first.params["model"], *found.groups())
    return {name: value for name, value in results.items() if name in arrays}


def teacher_of(arrays):
    """The model with the original projections."""
    named = tensors(arrays)
    depth = sum(name.endswith("input_layernorm.weight") for name in named)
    width, heads = named["embed_tokens.weight"].shape[1], int(arrays["num_attention_heads"])
    biased = "layers.0.self_attn.q_proj.bias" in named
    config = DecoderConfig(
        vocab_size=len(named["embed_tokens.weight"]),
        width=width,
        hidden=len(named["layers.0.mlp.up_proj.weight"]),
        depth=depth,
        heads=heads,
        kv_heads=int(arrays["num_key_value_heads"]),
        head_width=width // heads,
        norm_eps=float(arrays["rms_norm_eps"]),
        rope_base=float(arrays["rope_theta"]),
        qkv_bias=biased,
        tied="lm_head.weight" not in named,
        bos_id=None,
        eos_ids=(),
    )

    def block(i):
        def linear(*names):
            return joined(named, *(f"layers.{i}.{name}" for name in names))

        attention = ("q_proj",), ("k_proj", "v_proj"), ("o_proj",)
        q, kv, proj = (linear(*(f"self_attn.{name}" for name in names)) for names in attention)
        mlp = {"fc1": linear("mlp.gate_proj", "mlp.up_proj"), "fc2": linear("mlp.down_proj")}
        names = {"norm1": "input", "norm2": "post_attention"}
        norms = {own: {"scale": named[f"layers.{i}.{name}_layernorm.weight"]} for own, name in names.items()}
        return {"attn": {"q": q, "kv": kv, "proj": proj}, "mlp": mlp, **norms}

    params = {
        "embedding": named["embed_tokens.weight"],
        "blocks": {i: block(i) for i in range(depth)},
        "norm": {"scale": named["norm.weight"]},
    }
    if not config.tied:
        params["head"] = {"kernel": named["lm_head.weight"].T}
    return config, tokjax.build(config).with_params({"model": params})


def tensors(arrays):
    """The file's parameters by their names within the model."""
    given = {name: jnp.asarray(value) for name, value in arrays.items() if name.startswith("param/")}
    return {name.removeprefix("param/").removeprefix("model."): value for name, value in given.items()}


def joined(named, *names):
    """Projections side by side, in our layout."""
    out = {"kernel": jnp.concatenate([named[f"{name}.weight"].T for name in names], 1)}
    if f"{names[0]}.bias" in named:
        out["bias"] = jnp.concatenate([named[f"{name}.bias"] for name in names])
    return out


def with_swift(params, arrays, source):
    """The same with the file's projections of the later blocks, and its norm."""
    named, blocks = tensors(arrays), dict(params["blocks"])
    for i in blocks:
        attention, name = dict(blocks[i]["attn"]), f"layers.{i}.self_attn"
        if f"{name}.q_proj_swiftkv.weight" in named:
            attention["q"] = joined(named, f"{name}.q_proj_swiftkv")
            if source[i] == i:
                attention["kv"] = joined(named, f"{name}.k_proj_swiftkv", f"{name}.v_proj_swiftkv")
            blocks[i] = {**blocks[i], "attn": attention}
    if "norm_kv" not in params:
        return params
    return {**params, "blocks": blocks, "norm_kv": {"scale": named["norm_swiftkv.weight"]}}


def part(params, layer, which, kind):
    """A tensor by the published names."""
    if layer is None:
        return params["norm_kv"]["scale"]
    leaf = params["blocks"][int(layer)]["attn"]["q" if which == "q" else "kv"]["kernel" if kind == "weight" else "bias"]
    leaf = np.asarray(leaf).T  # [outputs, inputs], or [outputs]
    return leaf if which == "q" else np.split(leaf, 2)["kv".index(which)]
