"""Token maps as matrices: chains of merges, proportional attention, un-merging, and many maps of one token set."""

from functools import partial
import re

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.models import layers
from tokjax.reducers.diffusion.tomesd import ToMeSD
from tokjax.reducers.vit import tome
from tokjax.reducers.vit.controls import AvgPool
from tokjax.reducers.vit.gtp import GTP
from tokjax.reducers.vit.pitome import PiToMe
from tokjax.reducers.vit.topk import TopK
from tokjax.signals import AttentionRule, Context, Signals
from tokjax.token_map import Plan, SoftMap, apply, compose, identity, source
from tokjax.tokens import Tokens

INPUTS = (
    *("x0", "r_schedule", "class_token", "key_proj", "positions_in"),
    *("q", "k", "v", "membership", "size_in", "x", "y", "attention", "grid_side", "gtp_graph"),
)
TOLERANCE = {"*membership": (0.0, 0.0), "*source": (0.0, 0.0), "*": (0.0, 1e-5)}
UNUSED = "un-merging is membership transposed, never a pseudo-inverse"
EXCUSED = {"pinv_*": UNUSED, "unmerge_pinv_weighted": UNUSED}


def run(case, arrays):
    kind = next(kind for prefix, kind in CASES.items() if case.stem.startswith(prefix))
    floats = {name: x for name, x in arrays.items() if isinstance(x, np.ndarray) and x.dtype.kind == "f"}
    ours = jax.jit(lambda floats: kind(case.stem, arrays | floats))(floats)
    return {name: value for name, value in ours.items() if name in arrays}


def effect(plan, length, size=None):
    """The matrix that features are multiplied by, as what a plan makes of the identity."""
    batch = plan.map.anchor.shape[0]
    every = jnp.broadcast_to(jnp.eye(length), (batch, length, length))
    return apply(plan, Tokens(every, size=size)).x


def chain(stem, arrays):
    x0, prefix = jnp.asarray(arrays["x0"]), int(arrays["class_token"])
    batch, n, width = x0.shape
    tokens, total, ours = Tokens(x0, prefix=prefix).traced(), identity(batch, n), {}
    for layer, r in enumerate(arrays["r_schedule"].tolist()):
        project = arrays["key_proj"][layer]
        if "vitlike" in stem:  # what a block would do before its merge
            query, key, bias = (tokens.x @ project)[:, :, None], tokens.x[:, :, None], tokens.attention_bias()
            bias = None if bias is None else bias[:, None, None]
            attended = layers.attention(Signals(query, key, key, bias, rule=AttentionRule(width**-0.5)))
            tokens = tokens.replace(x=tokens.x + jnp.tanh(attended[:, :, 0] @ project))
        before, metric = tokens, tokens.x @ project
        merge = tome.bipartite(metric, r, prefix=prefix) or identity(batch, tokens.length)
        plan = Plan(merge, size=merge)
        tokens, total = apply(plan, tokens), compose(merge, total)
        ours |= {
            f"l{layer}_x_before_merge": before.x,
            f"l{layer}_metric": metric,
            f"l{layer}_membership": merge.membership(),
            f"l{layer}_W": effect(plan, before.length, before.size),
            f"l{layer}_x_after_merge": tokens.x,
            f"l{layer}_size": tokens.sizes()[..., None],
            f"l{layer}_source": source(tokens.origin, tokens.length),
        }
        if "vitlike" in stem:
            tokens = tokens.replace(x=tokens.x + 0.1 * jnp.tanh(tokens.x))
    plan = Plan(total, size=total)
    if "positions_in" in arrays:
        places = jnp.broadcast_to(jnp.asarray(arrays["positions_in"]), (batch, n, 2))
        ours["positions_out_mean"] = apply(plan, Tokens(places)).x
    return ours | {
        "W_total": effect(plan, n),
        "final_source": total.membership(),
        "final_size": total.sum(jnp.ones((batch, n, 1))),
        "final_x": tokens.x,
        "group_of_input": total.dest(),
        "broadcast_unmerge": total.unmerge(tokens.x),
        "token_mean_per_group_from_x0": apply(plan, Tokens(x0)).x,
    }


def soft(membership):
    membership = jnp.asarray(membership)
    return SoftMap(membership, membership.argmax(-1))


def prop_attention(stem, arrays):
    query, key, value = (jnp.asarray(arrays[name]).swapaxes(1, 2) for name in "qkv")
    groups, rule = soft(arrays["membership"]), AttentionRule(query.shape[-1] ** -0.5)
    size = groups.sum(jnp.ones((query.shape[0], groups.num_in)))
    bias = Tokens(key, size=size).attention_bias()
    merged = Signals(query, key, value, bias[:, None, None], rule=rule)
    expanded = Signals(query, groups.unmerge(key), groups.unmerge(value), rule=rule)
    return {
        "size": size,
        "logit_bias": bias,
        "out_proportional": layers.attention(merged).swapaxes(1, 2),
        "out_expanded": layers.attention(expanded).swapaxes(1, 2),
    }


def unmerge(stem, arrays):
    groups, size = soft(arrays["membership"]), jnp.asarray(arrays["size_in"])
    by_size = effect(Plan(groups, size=groups), groups.num_in, size)
    return {
        "size_out": apply(Plan(groups, size=groups), Tokens(jnp.asarray(arrays["x"]), size=size)).size,
        "W_weighted": by_size,
        "W_uniform": effect(Plan(groups, how="mean"), groups.num_in),
        "unmerge_broadcast": groups.unmerge(jnp.asarray(arrays["y"])),
        "projector_broadcast": groups.unmerge(by_size),
    }


def zoo(stem, arrays):
    tokens = Tokens(jnp.asarray(arrays["x"]), prefix=1)
    signals = Signals(weights=jnp.asarray(arrays["attention"]), context=Context(grid=(int(arrays["grid_side"]),) * 2))
    patches, ours = Tokens(tokens.x[:, 1:]), {}
    for name in arrays:
        _, _, method = name.partition("_")
        if match := re.fullmatch(r"tome_r(\d+)", method):
            merge = tome.bipartite(tokens.x, int(match[1]), prefix=1)
            ours |= outcome(method, Plan(merge, size=merge), tokens)
        elif match := re.fullmatch(r"pitome_ratio(\d+)_margin(\d+)", method):
            rate, margin = (int(number) / 100 for number in match.groups())
            of = partial(PiToMe, rate, margin=margin, metric="hidden")
            named = {method: of(matching="ordered"), "pitome_bsm": of(matching="bipartite")}
            named["pitome_prune"] = of(matching="ordered", how="prune")
            for kind, reducer in named.items():
                ours |= outcome(kind, reducer.plan(tokens, signals), tokens)
            ours["size_pitome"] = ours[f"size_{method}"]
        elif match := re.fullmatch(r"gtp_P(\d+)_alpha(\d+)", method):
            every = jnp.broadcast_to(jnp.arange(patches.length), (tokens.batch, patches.length))
            graph = {"gtp": {"graph": jnp.asarray(arrays["gtp_graph"]), "row": every}}
            reducer = GTP(int(match[1]), alpha=int(match[2]) / 10)
            plan = reducer.plan(tokens.replace(carry=graph), signals)
            ours |= outcome(method, plan, tokens)
            ours |= {"gtp_kept": plan.map.keep[:, 1:], "gtp_propagated": plan.map.moved}
        elif match := re.fullmatch(r"topk(\d+)_cls_attention_prune", method):
            plan = TopK(kept=int(match[1])).plan(tokens, signals)
            kept = jnp.sort(plan.map.keep, -1)  # these vectors list them in place order
            ours |= outcome(method, plan.replace(map=plan.map.replace(keep=kept)), tokens)
            ours |= {f"topk{match[1]}_kept": kept}
        elif match := re.fullmatch(r"avgpool(\d+)x(\d+)", method):
            window = int(match[1]), int(match[2])
            ours |= outcome(method, AvgPool(window=window).plan(tokens, signals), tokens)
        elif match := re.fullmatch(r"kth(\d+)_patches_only", method):
            merge = tome.kth(patches.x, int(match[1]))
            ours |= outcome(method, Plan(merge, size=merge), patches)
        elif match := re.fullmatch(r"tomesd_r(\d+)_patches_only_mean", method):
            reducer = ToMeSD(int(match[1]) / patches.length, use_rand=False)
            ours |= outcome(method, Plan(reducer.map(patches, signals.context), how="mean"), patches)
    return ours


def outcome(method, plan, tokens):
    out = apply(plan, tokens)
    return {
        f"W_{method}": effect(plan, tokens.length),
        f"y_{method}": out.x,
        f"size_{method}": out.sizes()[..., None],
    }


CASES = {"chain": chain, "prop_attention": prop_attention, "unmerge": unmerge, "zoo": zoo}
