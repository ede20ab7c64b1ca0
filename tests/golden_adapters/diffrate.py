"""DiffRate: the merge of a sorted sequence, whole tiny models with given rates, and the counts of searched logits."""

import dataclasses
from functools import partial

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch_params

from tokjax.bench.flops import vit_macs
from tokjax.hooks import Hook
from tokjax.models.vit import ViT
from tokjax.reducers.vit import diffrate, tome
from tokjax.reducers.vit.staged import ranked, select
from tokjax.signals import cls_attention, importance
from tokjax.token_map import Plan, apply, source
from tokjax.tokens import Tokens

INPUTS = (
    *("patch_number", "granularity", "logits", "prune_logits.*", "merge_logits.*"),
    *("x", "size", "kept_number"),
    *("images", "param.*", "prune_kept", "merge_kept", "num_heads", "patch_size"),
)
TOLERANCE = {"eval_logits": (1e-5, 2e-5), "eval.block*": (1e-5, 2e-5), "*": (1e-5, 1e-5)}
LATER = "belongs to the search of rates by gradient, which is training; here rates are given"
EXCUSED = {
    **dict.fromkeys(("token_probability", "last_token_number", "mask_*", "cotangent", "grad_*"), LATER),
    **dict.fromkeys(
        ("x_after_training", "size_after_training", "train_logits", "train_flops", "train_mask_final"), LATER
    ),
    **dict.fromkeys(("train_labels", "train_loss_*", "train.block*", "target_gflops_f64"), LATER),
}


def run(case, arrays):
    kind = next(kind for prefix, kind in CASES.items() if case.stem.startswith(prefix))
    ours = kind(arrays)
    return {name: value for name, value in ours.items() if name in arrays}


def rate(arrays):
    patches, granularity = int(arrays["patch_number"]), int(arrays["granularity"])
    return {
        "candidates": diffrate.candidates(patches, granularity).astype(np.float32),
        "probs": diffrate.chances(arrays["logits"]),
        "expected_kept_patches": diffrate.expected(arrays["logits"], patches, granularity),
        "kept_tokens_incl_cls": diffrate.searched(arrays["logits"], patches, granularity),
    }


def merge(arrays):
    kept = int(arrays["kept_number"])

    @jax.jit
    def all_of(x, size):
        place = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        merge, similar = tome.join(x, place[:, :kept], place[:, kept:], prefix=1)
        plan = Plan(merge, size=merge.replace(weight=similar), how="mean")
        out = apply(plan, Tokens(x, size=size, prefix=1).traced())
        return {
            "dst_index": merge.into,
            "node_max": similar,
            "x_merged": out.x,
            "size_merged_inference": out.size[..., None],
            "source_merged": source(out.origin, out.length),
            "uncompressed_x": merge.unmerge(out.x),
        }

    return all_of(arrays["x"], arrays["size"][..., 0])


@dataclasses.dataclass(frozen=True)
class Sort:
    """The published code sorts the tokens in every block, also where it leaves none out."""

    def plan(self, tokens, signals):
        return Plan(select(tokens, ranked(tokens, importance(tokens, signals))), how="keep")


@dataclasses.dataclass(frozen=True)
class Probe:
    """Changes nothing and notes what it sees."""

    def plan(self, tokens, signals):
        cls = {} if signals.key is None else {"cls": cls_attention(signals)[:, 1:]}
        return Plan(aux={"x": tokens.x, "size": tokens.sizes()[..., None], **cls})


def tiny_vit(arrays, pooling):
    cfg, params, images = torch_params.vit(arrays, pooling=pooling, fc_norm=pooling != "cls")
    depth = cfg.depth
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: ViT(cfg, rngs=nnx.Rngs(0))))
    kept = {name: tuple(arrays[name].tolist()) for name in ("prune_kept", "merge_kept")}
    reducing = diffrate.DiffRate(**kept).hooks(cfg.info)
    where = {hook.layer: hook for hook in reducing}
    hooks = []
    for i in range(depth):
        hooks += [Hook("after_attention", i, Probe()), where.get(i, Hook("after_attention", i, Sort()))]
        hooks += [Hook("after_block", i, Probe())]

    @jax.jit
    def forward(params, images):
        out = nnx.merge(graphdef, params)(images, hooks, trace=True)
        return out.logits, out.tokens

    logits, tokens = forward(params, images)
    notes = tokens.aux
    before = [notes[f"{i:02d}.after_attention.Probe"] for i in range(depth)]
    after = [notes[f"{i:02d}.after_block.Probe"] for i in range(depth)]
    lengths = [[note["x"].shape[1] for note in side] for side in (before, after)]
    flops = partial(
        vit_macs, width=cfg.width, patch=cfg.patch_size, num_patches=cfg.num_patches, classes=cfg.num_classes
    )
    ours = {
        "eval_logits": logits,
        "eval_flops": flops(*lengths, convention="diffrate"),
        "eval.source": source(tokens.origin, tokens.length),
    }
    for kind in ("prune", "merge"):
        counts = [searched(arrays[f"{kind}_logits.{i}"], cfg.num_patches, arrays["granularity"]) for i in range(depth)]
        ours[f"train_{kind}_kept"] = np.array(counts)
    for i in range(depth):
        ours |= {f"eval.block{i}.cls_attn_mean": before[i]["cls"]}
        ours |= {f"eval.block{i}.out": after[i]["x"], f"eval.block{i}.size": after[i]["size"]}
    return ours


def searched(logits, patches, granularity):
    """A block that is never compressed has one candidate."""
    return diffrate.searched(logits, patches, int(granularity) if len(logits) > 1 else patches + 1)


CASES = {
    "ddp": rate,
    "merge": merge,
    "vit_deit": partial(tiny_vit, pooling="cls"),
    "vit_mae": partial(tiny_vit, pooling="size_mean"),
}
