"""LLaMA models whose weights golden files name `w<layer>_<part>`, in torch's layout, without an embedding."""

import numpy as np

import tokjax
from tokjax.models.decoder import DecoderConfig

INPUTS = ("w*_*", "w_norm", "num_heads", "rms_eps", "rope_theta", "K")


def model(arrays: dict) -> tokjax.Model:
    depth = sum(name.endswith("_ln1") for name in arrays)
    width, hidden = arrays["w0_gate"].T.shape
    heads = int(arrays["num_heads"])
    config = DecoderConfig(
        vocab_size=2,
        width=width,
        hidden=hidden,
        depth=depth,
        heads=heads,
        head_width=arrays["w0_q"].shape[0] // heads,
        kv_heads=arrays["w0_k"].shape[0] * heads // arrays["w0_q"].shape[0],
        norm_eps=float(arrays["rms_eps"]),
        rope_base=float(arrays["rope_theta"]),
        tied=True,
        bos_id=None,
        eos_ids=(),
    )

    def joined(*names: str) -> dict:
        return {"kernel": np.concatenate([arrays[name].T for name in names], 1)}

    def block(layer: int) -> dict:
        w = f"w{layer}_"
        attention = {"q": joined(w + "q"), "kv": joined(w + "k", w + "v"), "proj": joined(w + "o")}
        mlp = {"fc1": joined(w + "gate", w + "up"), "fc2": joined(w + "down")}
        norms = {f"norm{i}": {"scale": arrays[f"{w}ln{i}"]} for i in (1, 2)}
        return {"attn": attention, "mlp": mlp, **norms}

    params = {
        "embedding": np.zeros((2, width), np.float32),
        "blocks": {layer: block(layer) for layer in range(depth)},
        "norm": {"scale": arrays["w_norm"]},
    }
    made = tokjax.build(config)
    return made.with_params({**made.params, "model": params})
