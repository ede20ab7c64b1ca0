"""PiToMe: energies, the ordered, bipartite and text matchings, lengths and margins."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.reducers.vit import pitome, tome
from tokjax.token_map import Plan, apply, behind_prefix, rows, source
from tokjax.tokens import Tokens

INPUTS = (
    *("metric", "x", "size_in", "attention_mask", "ratio_f64", "margin_f64", "alpha_f64", "class_token"),
    *("num_layers", "tokens_in", "margin_base_f64", "margin_slope_f64"),
)
TOLERANCE = {
    "energy": (0.0, 1e-6),
    "margins_f64": (0.0, 1e-12),
    "sigma_f64": (0.0, 1e-12),
    **dict.fromkeys(("membership_sum", "source_out", "attention_mask_out"), (0.0, 0.0)),
    "*": (0.0, 1e-5),
}


def run(case, arrays):
    kind = next(kind for prefix, kind in CASES.items() if case.stem.startswith(prefix))
    ours = kind(arrays)
    return {name: value for name, value in ours.items() if name in arrays}


def merged(arrays, matching, kernel="elu"):
    prefix, margin = int(arrays["class_token"]), float(arrays["margin_f64"])
    r = pitome.removed(float(arrays["ratio_f64"]), arrays["metric"].shape[1] - prefix)
    settings = {"kernel": kernel, "alpha": float(arrays.get("alpha_f64", 1.0))}

    @jax.jit
    def all_of(metric, x, size, mask):
        metric = metric[:, prefix:]
        score = pitome.energy(metric, margin, **settings)
        order = pitome.ranked(score)
        inner = matching(metric, order, r)
        merge = behind_prefix(inner, prefix)
        weighted = apply(Plan(merge, size=merge), Tokens(x, size=size, valid=mask > 0))
        plain = apply(Plan(merge, size=merge, how="mean"), Tokens(x).traced())
        unit = tome.unit(metric)
        return (
            inner,
            order,
            {
                "cosine": tome.similarity(unit, unit),
                "energy": score,
                "energy_order": order,
                "merged_mean": apply(Plan(merge, how="mean"), Tokens(x)).x,
                "x_wavg": weighted.x,
                "size_out": weighted.size[..., None],
                "x_wavg_unit": plain.x,
                "size_out_unit": plain.size[..., None],
                "source_out": source(plain.origin, plain.length),
                "membership_sum": merge.membership(),
                "pruned": apply(Plan(merge, how="keep"), Tokens(x)).x,
                "attention_mask_out": weighted.valid,
            },
        )

    x = arrays["x"]
    ones = np.ones(x.shape[:2], np.float32)
    size = arrays["size_in"][..., 0] if "size_in" in arrays else ones
    merge, order, ours = all_of(arrays["metric"], x, size, arrays.get("attention_mask", ones))
    ours |= {"r": r, "sigma_f64": 1 - margin}
    return jax.tree.map(np.asarray, merge), np.asarray(order), ours


def pair_scores(arrays, a, b):
    unit = tome.unit(jnp.asarray(arrays["metric"][:, int(arrays["class_token"]) :]))
    return tome.similarity(rows(unit, a), rows(unit, b))


def ordered(arrays, halves=False):
    matching = partial(pitome.ordered, halves=halves)
    merge, _, ours = merged(arrays, matching, kernel="gaussian" if halves else "elu")
    r = merge.moved.shape[1]
    protected = merge.keep.shape[1] - r
    a, b = merge.moved, merge.keep[:, protected:]
    return ours | {
        "a_idx": a,
        "b_idx": b,
        "protected_idx": merge.keep[:, :protected],
        "dst_idx": merge.into - protected,
        "pair_scores": pair_scores(arrays, a, b),
    }


def bsm(arrays):
    merge, order, ours = merged(arrays, pitome.bipartite)
    a, b = order[:, ::2], order[:, 1::2]
    stay = merge.keep.shape[1] - b.shape[1]
    scores = pair_scores(arrays, a, b)

    def place(tokens):  # among the senders
        return (tokens[:, :, None] == a[:, None]).argmax(-1)

    return ours | {
        "a_idx": a,
        "b_idx": b,
        "pair_scores": scores,
        "node_max": tome.proposals(scores)[0],
        "unm_idx": place(merge.keep[:, :stay]),
        "src_idx": place(merge.moved),
        "dst_idx": merge.into - stay,
    }


def schedule(arrays):
    counts = np.full(arrays["token_counts_padded_minus1"].shape, -1)
    margins = np.full(arrays["margins_f64"].shape, np.nan)
    settings = (arrays[name].tolist() for name in (*INPUTS[-4:], "ratio_f64"))
    for i, (depth, tokens, base, slope, rate) in enumerate(zip(*settings, strict=True)):
        margins[i, :depth] = pitome.margins(base, slope, depth)
        counts[i, : depth + 1] = 1 + np.array(pitome.lengths(rate, tokens - 1, depth))  # with CLS
    return {"token_counts_padded_minus1": counts, "margins_f64": margins}


CASES = {"ordered": ordered, "bsm": bsm, "text": partial(ordered, halves=True), "length_margin": schedule}
