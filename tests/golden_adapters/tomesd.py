"""ToMe for Stable Diffusion: partitions and matchings of a grid, the gate of blocks, and whole transformer blocks."""

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import hooks as hk
from tokjax.hooks import ModelInfo
from tokjax.reducers.diffusion import tomesd
from tokjax.reducers.vit.tome import proposals, similarity, unit
from tokjax.signals import Context, Signals
from tokjax.token_map import Plan, apply, rows
from tokjax.tokens import Tokens

INPUTS = (
    *("metric", "x", "h", "w", "sx", "sy", "r_requested", "no_rand", "rand_cell_choice"),
    *("latent_h", "latent_w", "tokens", "max_downsample"),
    *("context", "ratio_f64", "merge_*attn", "merge_mlp", "layernorm_eps_f64", "w_*"),
    *("src_token_idx_reference_order", "dst_token_idx_reference_order", "sorted_equals_reference_order"),
)
TOLERANCE = {"membership_*": (0.0, 0.0), "*": (0.0, 1e-5)}


def run(case, arrays):
    kind = next(kind for prefix, kind in CASES.items() if case.stem.startswith(prefix))
    ours = kind(arrays)
    return {name: value for name, value in ours.items() if name in arrays}


def on_grid(arrays):
    grid = int(arrays["h"]), int(arrays["w"])
    stride = int(arrays["sy"]), int(arrays["sx"])
    r = int(arrays["r_requested"])

    @jax.jit
    def all_of(metric, x, choice):
        chosen = tomesd.destinations(choice, grid, stride)[None]
        found = tomesd.match(metric, chosen, r)
        sources = jnp.broadcast_to(tomesd.partition(chosen, x.shape[1]), (len(x), x.shape[1] - chosen.shape[1]))
        features = unit(metric)
        best, _ = proposals(
            similarity(rows(features, sources), rows(features, jnp.broadcast_to(chosen, (len(x), chosen.shape[1]))))
        )
        merged = apply(Plan(found, how="mean"), Tokens(x)).x
        return (
            {
                "dst_token_idx_sorted": chosen[0],
                "src_token_idx_sorted": sources[0],
                "merged_src_tokens": found.moved,
                "their_dst_tokens": rows(found.keep, found.into),
                "unmerged_src_tokens": found.keep[:, : found.num_out - chosen.shape[1]],
                "representative_of_token": rows(found.keep, found.dest()),
                "unmerge_of_merged_mean": found.unmerge(merged),
            },
            best,
            merged,
            found.membership(),
        )

    ours, best, merged, membership = all_of(arrays["metric"], arrays["x"], arrays["rand_cell_choice"])
    unmerged = ours["unmerged_src_tokens"].shape[1]
    # Published lists are in an order of their own: the same numbers, by the tokens that they belong to.
    of_source = np.searchsorted(ours["src_token_idx_sorted"], arrays["src_token_idx_reference_order"])
    of_chosen = unmerged + np.searchsorted(ours["dst_token_idx_sorted"], arrays["dst_token_idx_reference_order"])
    slots = np.concatenate([np.arange(unmerged), of_chosen])
    return ours | {
        "r_effective": ours["merged_src_tokens"].shape[1],
        "node_max_reference_order": best[:, of_source],
        "merged_mean_reference_order": merged[:, slots],
        "group_count_reference_order": membership.sum(-1, keepdims=True)[:, slots],
        "membership_reference_order": membership[:, slots],
    }


def gates(arrays):
    columns = [arrays[name].tolist() for name in ("latent_h", "latent_w", "tokens", "max_downsample", "ratio_f64")]
    table = []
    for h, w, tokens, most, rate in zip(*columns, strict=True):
        factor = tomesd.downsampled((h, w), tokens)
        applied = tomesd.gate((h, w), tokens, most) is not None
        down, across = tomesd.gate((h, w), tokens, factor)  # where a block does not reduce it has a grid, too
        table.append((factor, applied, across, down, tomesd.removed(rate, tokens)))
    names = ("downsample", "applied", "grid_w", "grid_h", "r")
    return dict(zip(names, np.array(table, np.int64).T, strict=True))


def block(arrays):
    """A transformer block of a U-Net: self-attention, cross-attention, MLP, each behind a norm without parameters."""
    grid, eps = (int(arrays["h"]), int(arrays["w"])), float(arrays["layernorm_eps_f64"])
    n, width = arrays["x"].shape[1:]
    reducer = tomesd.ToMeSD(
        merge_rate=float(arrays["ratio_f64"]),
        sx=int(arrays["sx"]),
        sy=int(arrays["sy"]),
        use_rand=not arrays["no_rand"],
        merge_attn=bool(arrays["merge_attn"]),
        merge_crossattn=bool(arrays["merge_crossattn"]),
        merge_mlp=bool(arrays["merge_mlp"]),
    )
    hooks = reducer.hooks(ModelInfo(1, width, 1, n, grid=grid))
    w = {name[2:].removesuffix("_torch_out_in"): arrays[name].T for name in arrays if name.startswith("w_")}

    def attention(x, context, name):
        q, k, v = (y @ w[f"{name}_w{part}"] for y, part in ((x, "q"), (context, "k"), (context, "v")))
        return jax.nn.softmax(q @ k.swapaxes(1, 2) * width**-0.5) @ v @ w[f"{name}_wo"]

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + eps)

    @jax.jit
    def forward(x, context):
        outside = Signals(context=Context(grid=grid))
        tokens, _ = hk.reduce(hooks, "before_block", 0, Tokens(x), outside)

        def branch(where, tokens, module):
            y, after = hk.around(
                hooks, where, 0, tokens.replace(x=norm(tokens.x)), outside, lambda part: module(part.x)
            )
            return after.replace(x=tokens.x + y)

        tokens = branch("around_attention", tokens, lambda x: attention(x, x, "attn1"))
        tokens = branch("around_cross_attention", tokens, lambda x: attention(x, context, "attn2"))
        tokens = branch("around_mlp", tokens, lambda x: jax.nn.gelu(x @ w["ff1"], approximate=False) @ w["ff2"])
        return tokens.x

    return {"block_out": forward(arrays["x"], arrays["context"])}


CASES = {"grid": on_grid, "gate": gates, "block": block}
