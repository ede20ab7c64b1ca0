"""CLCA: tiny models with a cache around EViT, Top-K, ToMe and nothing, and the head that reads several depths."""

import dataclasses
from pathlib import Path
import runpy

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from tokjax.hooks import Hook
from tokjax.models.vit import ViT, ViTConfig
from tokjax.reducers.vit.clca import CLCA
from tokjax.token_map import Plan

torch_tree = runpy.run_path(str(Path(__file__).with_name("diffrate.py")))["torch_tree"]

INPUTS = ("images", "keep_rate", "reduction_loc", "num_heads", "patch_size", "num_clr", "clc", "cla", "param.*")
TOLERANCE = {"*": (1e-4, 2e-5)}
REDUCERS = {"evit": "evit", "topk": "topk", "tome": "tome", "vit": None}


@dataclasses.dataclass(frozen=True)
class Probe:
    """Changes nothing and notes the features."""

    def plan(self, tokens, signals):
        return Plan(aux={"x": tokens.x})


def run(case, arrays):
    params, images = torch_tree(arrays), arrays["images"].transpose(0, 2, 3, 1)
    depth, carriers = len(params["blocks"]), int(arrays["num_clr"])
    cfg = ViTConfig(
        image_size=images.shape[1:3],
        patch_size=int(arrays["patch_size"]),
        width=params["pos_embed"].shape[-1],
        depth=depth,
        heads=int(arrays["num_heads"]),
        num_classes=len(params["head"]["bias"]),
    )
    wrapper = CLCA(
        cfg.info,
        reducer=REDUCERS[case.stem.split("_")[0]],
        keep_rate=round(float(arrays["keep_rate"][0]), 6),
        layers=tuple(arrays["reduction_loc"].tolist()),
        cache=bool(arrays["clc"]),
        num_clr=carriers,
        head=bool(arrays["cla"]),
    )
    graphdef, state = nnx.split({"model": nnx.eval_shape(lambda: ViT(cfg, rngs=nnx.Rngs(0))), "clca": wrapper})
    learned = nnx.to_pure_dict(state).get("clca", {})
    head = params.pop("ifa_head", None)
    if carriers:  # their position vectors stand behind those of the patches
        learned["clr"] = params.pop("clr") + params["pos_embed"][:, -carriers:]
        params["pos_embed"] = params["pos_embed"][:, :-carriers]
    if head is not None:
        learned["head"] = classifier(head[0])
        params["norm"] = {"scale": jnp.ones(cfg.width), "bias": jnp.zeros(cfg.width)}  # nobody reads it

    @jax.jit
    def forward(params, learned, images):
        parts = nnx.merge(graphdef, {"model": params, "clca": learned} if learned else {"model": params})
        probes = [Hook(where, i, Probe()) for i in range(depth) for where in ("before_block", "after_block")]
        out = parts["model"](images, [*probes, *parts["clca"].hooks(cfg.info)], states=True)
        return out.logits, out.tokens.aux, out.states

    def read(learned, states, batch=False):
        merged = nnx.merge(graphdef, {"model": params, "clca": learned})["clca"]
        cls = merged.read(states)
        return merged.head(cls, batch=batch), merged.head.moments(cls)

    logits, notes, states = forward(params, learned, images)
    ours = {"logits": logits}
    if head is not None:
        # Where there was a pass in training mode, running statistics are those behind it, and logits those before it.
        ours["logits_train_mode"], moments = read(learned, states, batch=True)
        for name, (mean, var) in zip(("norm1", "norm2"), moments, strict=True):
            norm = learned["head"][name]
            if "logits_train_mode" in arrays:
                learned["head"][name] = norm | {"mean": before(norm["mean"], mean), "var": before(norm["var"], var)}
        ours["logits"], _ = read(learned, states)
    for i in range(depth):
        ours[f"block{i}.in"] = notes[f"{i:02d}.before_block.Probe"]["x"]
        ours[f"block{i}.out"] = notes[f"{i:02d}.after_block.Probe"]["x"]
    return {name: value for name, value in ours.items() if name in arrays}


def before(running, batch):
    return (running - 0.1 * batch) / 0.9


def classifier(head):
    """Batch norm, convolution over depth, batch norm, GELU, convolution of one."""
    kernel = np.asarray(head[1]["kernel"]).T  # [kC, 1, T], as stored
    width = len(head[0]["bias"])
    return {
        "norm1": norm(head[0]),
        "over_depth": jnp.asarray(kernel.reshape(width, -1, kernel.shape[-1])),
        "bias": head[1]["bias"].reshape(width, -1),
        "norm2": norm(head[2]),
        "out": {"kernel": head[4]["kernel"].reshape(-1, len(head[4]["bias"])), "bias": head[4]["bias"]},
    }


def norm(layer):
    names = {"scale": "scale", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return {ours: layer[theirs] for ours, theirs in names.items()}
