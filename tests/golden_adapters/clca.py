"""CLCA: tiny models with a cache around EViT, Top-K, ToMe and nothing, and the head that reads several depths."""

import dataclasses

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
    wrapper = CLCA(
        cfg.info,
        reducer=REDUCERS[case.stem.split("_")[0]],
        keep_rate=round(float(arrays["keep_rate"][0]), 6),
        layers=tuple(arrays["reduction_loc"].tolist()),
        cache=bool(arrays["clc"]),
        num_clr=carriers,
        head=bool(arrays["cla"]),
        expand=0 if older else 2,
    )
    graphdef, state = nnx.split({"model": nnx.eval_shape(lambda: ViT(cfg, rngs=nnx.Rngs(0))), "clca": wrapper})
    learned = nnx.to_pure_dict(state).get("clca", {})
    if carriers:  # their position vectors stand behind those of the patches
        learned["clr"] = jnp.asarray(arrays["param.clr"]) + params["pos_embed"][:, -carriers:]
        params["pos_embed"] = params["pos_embed"][:, :-carriers]
    if head is not None:
        learned["head"] = {"over_depth": head[0], "norm": head[3], "out": head[4]} if older else classifier(head)
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
    if head is not None and not older:
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
