"""DiffRate: the merge of a sorted sequence, rates and their gradients, tiny models with given and with learned ones."""

import dataclasses
from functools import partial

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch_params

from tokjax import relax
from tokjax.bench.flops import vit_macs
from tokjax.hooks import Hook, losses
from tokjax.models.vit import ViT
from tokjax.reducers.vit import diffrate, tome
from tokjax.reducers.vit import diffrate_search as search
from tokjax.reducers.vit.staged import ranked, select
from tokjax.signals import cls_attention, importance
from tokjax.token_map import Plan, apply, source
from tokjax.tokens import Tokens

INPUTS = (
    *("patch_number", "granularity", "logits", "prune_logits.*", "merge_logits.*", "last_token_number", "cotangent"),
    *("x", "size", "kept_number"),
    *("images", "param.*", "prune_kept", "merge_kept", "num_heads", "patch_size"),
    *("train_labels", "target_gflops_f64"),
)
TOLERANCE = {
    "*_logits": (1e-5, 2e-5),
    "*.block*": (1e-5, 2e-5),
    "grad_*": (1e-3, 1e-7),
    "*": (1e-5, 1e-5),
}


def run(case, arrays):
    kind = next(kind for prefix, kind in CASES.items() if case.stem.startswith(prefix))
    ours = kind(arrays)
    return {name: value for name, value in ours.items() if name in arrays}


def rate(arrays):
    patches, granularity = int(arrays["patch_number"]), int(arrays["granularity"])
    counts, length = search.candidates(patches, granularity), patches + 1

    def kept(logits):
        return relax.ste_ceil(relax.expected_count(logits, counts), search.SLACK) + 1

    def mask(logits, last):
        told, probability = kept(logits)[None, None], relax.kept_probability(logits, counts + 1, length)[None]
        return search.kept_mask(told, last, probability)[0]

    @jax.jit
    def all_of(logits, last, cotangent):
        return {
            "probs": jax.nn.softmax(logits),
            "expected_kept_patches": relax.expected_count(logits, counts),
            "kept_tokens_incl_cls": kept(logits).astype(int),
            "token_probability": relax.kept_probability(logits, counts + 1, length),
            "mask_full": mask(logits, length),
            "mask_partial": mask(logits, last),
            "grad_kept_wrt_logits": jax.grad(kept)(logits),
            "grad_maskdot_wrt_logits": jax.grad(lambda logits: mask(logits, last) @ cotangent)(logits),
        }

    ours = all_of(*(jnp.asarray(arrays[name]) for name in ("logits", "last_token_number", "cotangent")))
    return {"candidates": counts.astype(np.float32), **ours}


def merge(arrays):
    kept = int(arrays["kept_number"])

    @jax.jit
    def all_of(x, size):
        place = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        merge, similar = tome.join(x, place[:, :kept], place[:, kept:], prefix=1)
        plan = Plan(merge, size=merge.replace(weight=similar), how="mean")
        tokens = Tokens(x, size=size, prefix=1).traced()
        out, at = apply(plan, tokens), jnp.full((len(x), 1), kept)
        masked = apply(search.merged(tokens, place, at, jnp.full_like(at, x.shape[1])), tokens)
        return {
            "dst_index": merge.into,
            "node_max": similar,
            "x_merged": out.x,
            "size_merged_inference": out.size[..., None],
            "source_merged": source(out.origin, out.length),
            "x_after_training": masked.x,
            "size_after_training": masked.size[..., None],
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


def watched(reducing, depth):
    """Hooks that reduce with those around them that look on, and with the sorting of blocks that have none."""
    where = {hook.layer: hook for hook in reducing if hook.where == "after_attention"}
    hooks = [hook for hook in reducing if hook.where != "after_attention"]
    for i in range(depth):
        hooks += [Hook("after_attention", i, Probe()), where.get(i, Hook("after_attention", i, Sort()))]
        hooks += [Hook("after_block", i, Probe())]
    return hooks


def seen(kind, notes, depth):
    ours, lengths = {}, ([], [])
    for i in range(depth):
        before, after = notes[f"{i:02d}.after_attention.Probe"], notes[f"{i:02d}.after_block.Probe"]
        ours |= {f"{kind}.block{i}.cls_attn_mean": before["cls"]}
        ours |= {f"{kind}.block{i}.out": after["x"], f"{kind}.block{i}.size": after["size"]}
        for side, note in zip(lengths, (before, after), strict=True):
            side.append(note["x"].shape[1])
    return ours, lengths


def tiny_vit(arrays, pooling):
    cfg, params, images = torch_params.vit(arrays, pooling=pooling, fc_norm=pooling != "cls")
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: ViT(cfg, rngs=nnx.Rngs(0))))
    kept = {name: tuple(arrays[name].tolist()) for name in ("prune_kept", "merge_kept")}
    reducing = watched(diffrate.DiffRate(**kept).hooks(cfg.info), cfg.depth)

    @jax.jit
    def forward(params, images):
        out = nnx.merge(graphdef, params)(images, reducing, trace=True)
        return out.logits, out.tokens

    logits, tokens = forward(params, images)
    ours, lengths = seen("eval", tokens.aux, cfg.depth)
    flops = partial(
        vit_macs, width=cfg.width, patch=cfg.patch_size, num_patches=cfg.num_patches, classes=cfg.num_classes
    )
    ours |= {
        "eval_logits": logits,
        "eval_flops": flops(*lengths, convention="diffrate"),
        "eval.source": source(tokens.origin, tokens.length),
    }
    return ours | training(arrays, cfg, graphdef, params, images)


def training(arrays, cfg, graphdef, params, images):
    fixed = tuple(i for i in range(cfg.depth) if arrays[f"prune_logits.{i}"].size == 1)  # they have one candidate
    reducer = search.DiffRateSearch(
        cfg.info,
        gmacs=float(arrays["target_gflops_f64"]),
        granularity=int(arrays["granularity"]),
        protected=fixed,
        masked=True,
    )
    graph, _ = nnx.split(reducer)
    stages = {
        j: {kind: jnp.asarray(arrays[f"{kind}_logits.{stage.layer}"]) for kind in ("prune", "merge")}
        for j, stage in enumerate(reducer.stages)
    }

    def loss(rates, params, images, labels):
        hooks = watched(nnx.merge(graph, rates).hooks(cfg.info), cfg.depth)
        out = nnx.merge(graphdef, params)(images, hooks)
        cls = -jnp.take_along_axis(jax.nn.log_softmax(out.logits), labels[:, None], 1).mean()
        return cls + losses(out.tokens.aux)["flops"], (out.logits, out.tokens, cls)

    rates, labels = {"stages": stages}, jnp.asarray(arrays["train_labels"])
    (_, (logits, tokens, cls)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(rates, params, images, labels)
    notes = tokens.aux["00.input.DiffRateSearch"]
    ours, _ = seen("train", tokens.aux, cfg.depth)
    table = reducer.table(rates)
    ours |= {
        "train_logits": logits,
        "train_flops": notes["macs"],
        "train_mask_final": tokens.gate,
        "train_loss_cls": cls,
        "train_loss_flops": notes["loss/flops"] / reducer.weight,
    }
    for kind in ("prune", "merge"):
        ours[f"train_{kind}_kept"] = np.array(table[f"{kind}_kept"])
        ours |= {f"grad_{kind}_logits.{i}": np.zeros(1) for i in fixed}  # no parameter of ours
        ours |= {f"grad_{kind}_logits.{s.layer}": grads["stages"][j][kind] for j, s in enumerate(reducer.stages)}
    return ours


CASES = {
    "ddp": rate,
    "merge": merge,
    "vit_deit": partial(tiny_vit, pooling="cls"),
    "vit_mae": partial(tiny_vit, pooling="size_mean"),
}
