"""CLCA: tiny models with a cache around EViT, Top-K, ToMe and nothing, and the head that reads several depths."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch_params

from tokjax.hooks import Hook
from tokjax.models.vit import ViT
from tokjax.reducers.vit.clca import CLCA
from tokjax.token_map import Plan

INPUTS = ("images", "keep_rate", "reduction_loc", "num_heads", "patch_size", "num_clr", "clc", "cla", "param.*")
TOLERANCE = {"*": (1e-4, 2e-5)}
REDUCERS = {"evit": "evit", "topk": "topk", "tome": "tome", "vit": None}


@dataclasses.dataclass(frozen=True)
class Probe:
    """Changes nothing and notes the features."""

    def plan(self, tokens, signals):
        return Plan(aux={"x": tokens.x})


def run(case, arrays):
    cfg, params, images = torch_params.vit(arrays)
    depth, carriers = cfg.depth, int(arrays["num_clr"])
    head = torch_params.tree(arrays, "param.ifa_head.").get(0)
    older = head is not None and "kernel" in head[0]  # it begins with a linear layer, the other one with a norm
    wrappers = [
        CLCA(
            cfg.info,
            reducer=REDUCERS[case.stem.split("_")[0]],
            keep_rate=round(float(arrays["keep_rate"][0]), 6),
            layers=tuple(arrays["reduction_loc"].tolist()),
            cache=bool(arrays["clc"]),
            num_clr=carriers,
            head=bool(arrays["cla"]),
            expand=0 if older else 2,
            learning=learning,
        )
        for learning in (False, True)
    ]
    plain, learning = (
        nnx.split({"model": nnx.eval_shape(lambda: ViT(cfg, rngs=nnx.Rngs(0))), "clca": w}) for w in wrappers
    )
    learned = nnx.to_pure_dict(plain[1]).get("clca", {})
    if carriers:  # their position vectors stand behind those of the patches
        learned["clr"] = jnp.asarray(arrays["param.clr"]) + params["pos_embed"][:, -carriers:]
        params["pos_embed"] = params["pos_embed"][:, :-carriers]
    if head is not None:
        learned["head"] = {"over_depth": head[0], "norm": head[3], "out": head[4]} if older else classifier(head)
        params["norm"] = {"scale": jnp.ones(cfg.width), "bias": jnp.zeros(cfg.width)}  # nobody reads it

    @functools.partial(jax.jit, static_argnums=0)
    def forward(graphdef, learned):
        parts = nnx.merge(graphdef, {"model": params, "clca": learned} if learned else {"model": params})
        probes = [Hook(where, i, Probe()) for i in range(depth) for where in ("before_block", "after_block")]
        out = parts["model"](images, [*probes, *parts["clca"].hooks(cfg.info)])
        return out.logits, out.tokens.aux

    ours = {}
    if "logits_train_mode" in arrays:
        # Statistics in the file are those behind a pass in training mode, logits of evaluation those before it. Another
        # pass moves them by as much again, less a tenth of the first move.
        ours["logits_train_mode"], notes = forward(learning[0], learned)
        for name, new in notes["00.readout.CLCA"]["statistics"]["head"].items():
            norm = learned["head"][name]
            learned["head"][name] = norm | {key: (1.9 * norm[key] - new[key]) / 0.9 for key in new}
    ours["logits"], notes = forward(plain[0], learned)
    for i in range(depth):
        ours[f"block{i}.in"] = notes[f"{i:02d}.before_block.Probe"]["x"]
        ours[f"block{i}.out"] = notes[f"{i:02d}.after_block.Probe"]["x"]
    return {name: value for name, value in ours.items() if name in arrays}


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
