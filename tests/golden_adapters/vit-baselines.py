"""Baselines on vision transformers: blocks that prune between attention and MLP, and EViT's keep-rate ramp."""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from tokjax import schedules, signals
from tokjax.hooks import Hook
from tokjax.models.transformer import Block
from tokjax.models.vit import ViTConfig
from tokjax.reducers.vit.evit import EViT
from tokjax.reducers.vit.topk import TopK
from tokjax.token_map import Plan, identity
from tokjax.tokens import Tokens

INPUTS = (
    *("x", "keep_rate", "fuse", "num_heads", "param.*"),
    *("iters_per_epoch", "start_epoch", "shrink_epochs", "base_keep_rate"),
)
TOLERANCE = {"*": (0.0, 1e-5)}


def run(case, arrays):
    kind = next(kind for prefix, kind in CASES.items() if case.stem.startswith(prefix))
    ours = kind(arrays)
    return {name: value for name, value in ours.items() if name in arrays}


def decimal(rate):
    """0.7, where the vectors have its float32 neighbour: counts are rounded up."""
    return round(float(rate), 6)


@dataclasses.dataclass(frozen=True)
class Noted:
    """A reducer, with what it saw and decided."""

    reducer: Any

    def plan(self, tokens, seen):
        plan = self.reducer.plan(tokens, seen)
        plan = Plan(identity(tokens.batch, tokens.length), how="keep") if plan is None else plan
        notes = {"x": tokens.x, "cls": signals.cls_attention(seen), "keep": plan.map.keep, "dest": plan.map.dest()}
        return plan.replace(aux=notes)


def pruning_block(arrays):
    x, make = arrays["x"], EViT if arrays["fuse"] else TopK
    width, hidden = x.shape[2], len(arrays["param.mlp.fc1.bias"])
    cfg = ViTConfig(
        width=width,
        heads=int(arrays["num_heads"]),
        mlp_ratio=(hidden + 0.5) / width,  # the config truncates the product
    )
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Block(cfg, rngs=nnx.Rngs(0))))
    reducer = make(decimal(arrays["keep_rate"]))
    hooks = [Hook("after_attention", 0, Noted(reducer))]

    @jax.jit
    def forward(params, x):
        tokens, _ = nnx.merge(graphdef, params)(Tokens(x, prefix=1), hooks)
        return tokens.x, tokens.aux["00.after_attention.Noted"]

    out, notes = forward(block_params(arrays), x)
    k, dest = reducer.count(x.shape[1] - 1), np.asarray(notes["dest"])[:, 1:]
    return {
        "cls_attention": notes["cls"][:, 1:],
        "kept_index": notes["keep"][:, 1 : 1 + k] - 1,  # counted without CLS
        "removed_index_ascending": np.stack([np.flatnonzero(row > k) for row in dest]),
        "n_kept": k,
        "x_after_attention": notes["x"],
        "block_output": out,
    }


def block_params(arrays):
    """The parameters of a block as a tree; in the vectors kernels lie transposed under `weight`."""
    tree = {}
    for name, value in arrays.items():
        first, _, path = name.partition("param.")
        if first or not path:
            continue
        *parents, leaf = path.split(".")
        here = tree
        for parent in parents:
            here = here.setdefault(parent, {})
        if leaf == "weight":
            leaf = "kernel" if value.ndim == 2 else "scale"
        here[leaf] = jnp.asarray(value.T)
    return tree


def keep_rate_schedule(arrays):
    epochs, steps = arrays["keep_rate_per_epoch_iter"].shape
    rates = [
        schedules.keep_rate_ramp(
            iteration,
            int(arrays["iters_per_epoch"]),
            base=decimal(arrays["base_keep_rate"]),
            start_epoch=int(arrays["start_epoch"]),
            epochs=int(arrays["shrink_epochs"]),
        )
        for iteration in range(epochs * steps)
    ]
    return {"keep_rate_per_epoch_iter": np.reshape(rates, (epochs, steps))}


CASES = {"evit_keep_rate": keep_rate_schedule, "evit": pruning_block, "topk": pruning_block}
