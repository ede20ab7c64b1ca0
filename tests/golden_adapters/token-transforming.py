"""Token transforming, our own construction: anchors, assignments, maps and sizes of both modes."""

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.reducers.vit.token_transforming import TokenTransforming
from tokjax.reducers.vit.tome import similarity, unit
from tokjax.signals import Signals, importance
from tokjax.token_map import Plan, apply, identity, rows
from tokjax.tokens import Tokens

INPUTS = (
    *("metric", "x", "attention", "size_in", "num_out", "num_protected"),
    *("tau_f64", "theta_f64", "mode_is_mass", "anchor_hard"),
)
TOLERANCE = {"*tau0001*/W": (0.0, 1e-4), "*": (0.0, 1e-5)}  # a temperature of 0.001 is sharp


def run(case, arrays):
    batch, n, _ = arrays["x"].shape
    theta = float(arrays["theta_f64"])
    reducer = TokenTransforming(
        r=n - int(arrays["num_out"]),
        tau=float(arrays["tau_f64"]),
        theta=None if theta <= -2 else theta,
        anchor_hard=bool(arrays["anchor_hard"]),
        mode="mass" if arrays["mode_is_mass"] else "row",
    )

    @jax.jit
    def all_of(x, size, metric, attention):
        tokens = Tokens(x, size=size, prefix=int(arrays["num_protected"]))
        signals = Signals(key=metric[:, :, None], weights=attention)
        plan = reducer.plan(tokens, signals)
        if plan is None:
            whole = identity(batch, n)
            plan = Plan(whole, size=whole)
        out, every = apply(plan, tokens), jnp.broadcast_to(jnp.eye(n), (batch, n, n))
        return {
            "importance": importance(tokens, signals),
            "anchors": plan.map.anchor,
            "similarity": similarity(unit(metric), rows(unit(metric), plan.map.anchor)),
            "assignment": plan.size.membership().swapaxes(1, 2),
            "W": apply(plan, Tokens(every, size=size)).x,
            "size_out": out.size,
            "y": out.x,
        }

    return all_of(*(np.asarray(arrays[name]) for name in ("x", "size_in", "metric", "attention")))
