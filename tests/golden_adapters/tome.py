"""ToMe: the matchings, schedules, whole tiny models, MAE's pooling and the pictures of merged regions."""

import dataclasses
from functools import partial
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from tokjax import schedules, viz
from tokjax.hooks import Hook
from tokjax.models import layers
from tokjax.models.vit import ViT, ViTConfig
from tokjax.reducers.vit import tome
from tokjax.signals import mean_key
from tokjax.token_map import Plan, apply, identity, rows, source
from tokjax.tokens import Tokens

INPUTS = (
    *("metric", "x", "size_in", "r", "class_token", "distill_token", "k", "uniform"),
    *("num_layers", "inflect_f64", "list_input", "list_num_layers"),
    *("num_heads", "layernorm_eps_f64", "prop_attn", "r_schedule", "block0_in", "w_*"),
    *("size", "num_patches", "image_u8", "source", "patch_size"),
)
TOLERANCE = {
    "membership_sum": (0.0, 0.0),
    "source_out": (0.0, 0.0),
    "final_source": (0.0, 0.0),
    "colormap_f64": (0.0, 1e-12),
    "rendered_u8": (0.0, 1.0),  # one grey level
    **dict.fromkeys(("block*", "logits", "final_size"), (0.0, 1e-4)),  # a whole model
    "*": (0.0, 1e-5),
}


def run(case, arrays):
    kind = next(kind for prefix, kind in CASES.items() if case.stem.startswith(prefix))
    ours = kind(arrays)
    return {name: value for name, value in ours.items() if name in arrays}


def bipartite(arrays):
    metric, prefix = arrays["metric"], int(arrays["class_token"]) + int(arrays["distill_token"])

    @partial(jax.jit, static_argnames="r")
    def all_of(metric, x, size, r):
        merge = tome.bipartite(metric, r, prefix=prefix)
        decided = {}
        if merge is None:
            merge = identity(*metric.shape[:2])
        else:
            scores = tome.pair_scores(metric, prefix)
            best, partner = tome.proposals(scores)
            decided = {"scores_even_odd": scores, "node_max": best, "node_idx": partner}
        weighted = apply(Plan(merge, size=merge), Tokens(x, size=size))
        plain = apply(Plan(merge, size=merge), Tokens(x).traced())
        return merge, decided | {
            "metric_unit": tome.unit(metric),
            "dst_idx": rows(merge.keep, merge.into) // 2,  # the slot's own token is odd: number b is 2b + 1
            "src_idx": merge.moved // 2,
            "merged_mean": apply(Plan(merge, how="mean"), Tokens(x)).x,
            "merged_sum": merge.sum(x),
            "merged_amax": merge.max(x),
            "merged_amin": merge.min(x),
            "membership_sum": merge.membership(),
            "x_wavg": weighted.x,
            "size_out": weighted.size[..., None],
            "x_wavg_unit": plain.x,
            "size_out_unit": plain.size[..., None],
            "source_out": source(plain.origin, plain.length),
            "unmerged": merge.unmerge(weighted.x),
        }

    merge, ours = all_of(metric, arrays["x"], arrays["size_in"][..., 0], r=int(arrays["r"]))
    keep = np.asarray(merge.keep)
    stays = [row[row % 2 == 0] // 2 for row in keep]
    return ours | {"r_effective": merge.moved.shape[1], "unm_idx": np.stack(stays)}


def kth(arrays):
    k = int(arrays["k"])
    ours = merged(lambda metric: tome.kth(metric, k), arrays)
    n = arrays["metric"].shape[1]
    ours["unmerged"] = ours["unmerged"][:, : n // k * k if k > 1 else n]  # the published function forgets the tail
    return ours


def random(arrays):
    return merged(lambda metric: tome.random(metric, int(arrays["r"]), arrays["uniform"]), arrays)


def merged(match, arrays):
    @jax.jit
    def all_of(metric, x):
        merge = match(metric)
        merge = identity(*metric.shape[:2]) if merge is None else merge
        unit = tome.unit(metric)
        out = apply(Plan(merge, size=merge), Tokens(x))
        return {
            "a_idx": merge.moved,
            "b_idx": merge.keep,
            "dst_idx": merge.into,
            "scores": tome.similarity(rows(unit, merge.moved), rows(unit, merge.keep)),
            "merged_mean": apply(Plan(merge, how="mean"), Tokens(x)).x,
            "x_wavg": out.x,
            "size_out": out.size[..., None],
            "unmerged": merge.unmerge(out.x),
        }

    return all_of(arrays["metric"], arrays["x"])


def parse_r(arrays):
    ours = {}
    if "schedule_padded_minus1" in arrays:
        table = np.full(arrays["schedule_padded_minus1"].shape, -1)
        for row, depth, r, inflect in zip(table, arrays["num_layers"], arrays["r"], arrays["inflect_f64"], strict=True):
            row[:depth] = schedules.per_block(int(r), int(depth), float(inflect))
        ours["schedule_padded_minus1"] = table
    if "list_input" in arrays:
        counts = tuple(arrays["list_input"].tolist())  # entries beyond the last block stay there, though unread
        ours["list_schedule"] = schedules.per_block(counts, max(int(arrays["list_num_layers"]), len(counts)))
    for name in arrays:
        if match := re.fullmatch(r"int_(\d+)_(\d+)layers", name):
            ours[name] = schedules.per_block(*map(int, match.groups()))
    return ours


@dataclasses.dataclass(frozen=True)
class Probe:
    """A hook that changes nothing and notes what it sees."""

    def plan(self, tokens, signals):
        metric = {} if signals.key is None else {"metric": mean_key(signals)}
        return Plan(aux={"x": tokens.x, "size": tokens.sizes()[..., None], **metric})


def tiny_vit(arrays):
    x, depth = arrays["block0_in"], len(arrays["r_schedule"])
    patches, width = x.shape[1] - 1, x.shape[2]
    cfg = ViTConfig(
        image_size=(1, patches),
        patch_size=1,
        width=width,
        depth=depth,
        heads=int(arrays["num_heads"]),
        mlp_ratio=(len(arrays["w_block0_fc1_bias"]) + 0.5) / width,  # the config truncates the product
        num_classes=len(arrays["w_head_bias"]),
        norm_eps=float(arrays["layernorm_eps_f64"]),
    )
    graphdef, state = nnx.split(ViT(cfg, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    params |= {"norm": part(arrays, "w_norm"), "head": part(arrays, "w_head"), "blocks": {}}
    for i in range(depth):
        qkv, proj, fc1, fc2 = (part(arrays, f"w_block{i}_{name}") for name in ("qkv", "proj", "fc1", "fc2"))
        norm1, norm2 = (part(arrays, f"w_block{i}_{name}") for name in ("norm1", "norm2"))
        attn, mlp = {"qkv": qkv, "proj": proj}, {"fc1": fc1, "fc2": fc2}
        params["blocks"][i] = {"norm1": norm1, "attn": attn, "norm2": norm2, "mlp": mlp}

    counts = tuple(min(int(r), patches) for r in arrays["r_schedule"])
    reducer = tome.ToMe(r=counts, proportional=bool(arrays["prop_attn"]))
    probes = [
        Hook(where, i, Probe()) for i in range(depth) for where in ("before_block", "after_attention", "after_block")
    ]
    hooks = probes + reducer.hooks(cfg.info)

    @jax.jit
    def forward(params, x):
        model = nnx.merge(graphdef, params)
        out = model.encode(Tokens(x, prefix=cfg.prefix).traced(), hooks)
        return out.logits, out.tokens

    logits, tokens = forward(params, x)
    ours = {
        "logits": logits,
        "final_source": source(tokens.origin, tokens.length),
        "final_size": tokens.sizes()[..., None],
        "source_argmax_group_of_patch": np.stack(
            [viz.groups_of(row, cfg.prefix) for row in np.asarray(source(tokens.origin, tokens.length))]
        ),
    }
    for i in range(depth):
        before, between, after = (
            tokens.aux[f"{i:02d}.{where}.Probe"] for where in ("before_block", "after_attention", "after_block")
        )
        ours |= {f"block{i}_out": after["x"], f"block{i}_size": after["size"]}
        ours |= {f"block{i}_in": before["x"], f"block{i}_metric": between["metric"]}
    return ours


def part(arrays, name):
    """Kernel or scale and bias of one layer; kernels lie transposed in the vectors."""
    kernel = arrays.get(f"{name}_kernel_torch_out_in")
    first = {"scale": jnp.asarray(arrays[f"{name}_scale"])} if kernel is None else {"kernel": jnp.asarray(kernel.T)}
    return first | {"bias": jnp.asarray(arrays[f"{name}_bias"])}


def mae_pool(arrays):
    tokens = Tokens(jnp.asarray(arrays["x"]), size=jnp.asarray(arrays["size"][..., 0]), prefix=1)
    return {"pooled": layers.pool(tokens, "size_mean")}


def visualisation(arrays):
    groups = viz.groups_of(arrays["source"][0])
    count = groups.max() + 1
    return {
        "num_groups": count,
        "colormap_f64": viz.region_colors(count),
        "rendered_u8": viz.merged_regions(arrays["image_u8"], groups, int(arrays["patch_size"])),
    }


CASES = {
    "bsm": bipartite,
    "kth": kth,
    "random": random,
    "parse_r": parse_r,
    "tiny_vit": tiny_vit,
    "mae_pool": mae_pool,
    "visualisation": visualisation,
}
