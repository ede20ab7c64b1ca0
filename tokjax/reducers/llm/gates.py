"""Two forms of one decision: a gate on every token, as a bias on later keys (soft), or tokens that are gone (hard).

A gate is 0 where a token stays and far below 0 where it goes. Soft, every token is computed and those with a low gate
are hardly attended to; a gradient reaches the gate through this bias. Hard, they leave the sequence, and those that
stay are attended to in full.

Source: jkallini/mrt5, `models/modeling_mrt5.py`.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.hooks import ModelInfo
from tokjax.reducers.vit.staged import select
from tokjax.token_map import Plan, first_true
from tokjax.tokens import Tokens

Compat = Literal["positions", "reference"]
Overflow = Literal["gate", "tail"]
SCALE = -30.0  # the gate of a token that is surely deleted


def default_layer(info: ModelInfo) -> int:
    """The block before which bytes go: after 3 of 12 or more, after a quarter of fewer."""
    return min(3, max(1, info.depth // 4), info.depth - 1)


def check_capacity(capacity: int | None) -> None:
    """Refuses what is no number of slots.

    Raises:
        ValueError: a capacity below 1, or that is not whole.
    """
    if capacity is not None and (capacity < 1 or capacity != int(capacity)):
        raise ValueError(f"capacity={capacity}: must be a whole number of at least 1")


def inside(tokens: Tokens) -> Bool[Array, "B n"]:
    """Which tokens behind the prefix are no padding."""
    if tokens.valid is None:
        return jnp.ones((tokens.batch, tokens.length - tokens.prefix), bool)
    return tokens.valid[:, tokens.prefix :]


def mean_inside(x: Float[Array, "B n"], valid: Bool[Array, "B n"]) -> Float[Array, ""]:
    """Mean over all tokens of the batch that are no padding, each counting alike; 0 without any."""
    return jnp.where(valid, x, 0).sum() / jnp.maximum(valid.sum(), 1)


def deleted(gate: Float[Array, "B n"], valid: Bool[Array, "B n"], threshold: float) -> Int[Array, "B"]:
    """How many tokens of every row count as deleted: those with a gate below the threshold, padding left out."""
    return ((gate < threshold) & valid).sum(1, dtype=jnp.int32)


def counted(gate: Float[Array, "B n"], valid: Bool[Array, "B n"], threshold: float) -> dict[str, Int[Array, "B"]]:
    """Of every row the numbers of `tokens` and of those `deleted`, and `starved`: 1 where all of them would go."""
    starved = valid.any(1) & ~((gate > threshold) & valid).any(1)
    counts = {"tokens": valid.sum(1, dtype=jnp.int32), "deleted": deleted(gate, valid, threshold)}
    return {**counts, "starved": starved.astype(jnp.int32)}


def soften(tokens: Tokens, gate: Float[Array, "B n"]) -> Plan:
    """The gates of the tokens behind the prefix, added to what later attention adds to the logits of these keys."""
    gate = jnp.pad(gate, ((0, 0), (tokens.prefix, 0)))
    return Plan(key_bias=gate if tokens.key_bias is None else tokens.key_bias + gate)


def harden(
    tokens: Tokens,
    gate: Float[Array, "B n"],
    *,
    threshold: float,
    capacity: int | None = None,
    overflow: Overflow = "gate",
    compat: Compat = "positions",
    renumber: bool = False,
) -> Plan:
    """Only the tokens whose gate is above the threshold, in order, at the front of `capacity` slots.

    A row that would lose all of its tokens keeps the first. Gates do not go on to later blocks.

    Args:
        tokens: of any batch; padding goes.
        gate: of the tokens behind the prefix.
        threshold: a gate that equals it is below.
        capacity: slots behind the prefix; None: as many as tokens.
        overflow: who goes where more stay than there are slots: those with the lowest gates (of equal ones the later),
            or those at the tail.
        compat: "positions": empty slots are zeros; "reference": copies of the row's first token, as in the released
            code, whose score regulariser sees them.
        renumber: whether the tokens that stay stand at 0, 1, ... from here on, and not where they stood.

    Returns:
        A plan whose `aux` counts the `overflow` of every row.
    """
    n, p, valid = tokens.length - tokens.prefix, tokens.prefix, inside(tokens)
    keep = valid & (gate > threshold)
    starved = valid.any(1) & ~keep.any(1)
    keep |= starved[:, None] & (jnp.arange(n) == first_true(valid)[:, None])
    found, slots = keep.sum(1, dtype=jnp.int32), n if capacity is None else min(capacity, n)
    if slots < n:
        worth = jnp.where(keep, gate if overflow == "gate" else 0.0, -jnp.inf)
        best = jnp.argsort(-worth, axis=1, stable=True)
        keep &= jnp.argsort(best, axis=1) < slots
    stays = jnp.minimum(found, slots)
    chosen = select(tokens, jnp.argsort(~keep, axis=1, stable=True)[:, :slots] + p, stays)
    if compat == "reference":
        chosen = chosen.replace(keep=jnp.where(chosen.keep == tokens.length, p, chosen.keep))
    there = jnp.concatenate([jnp.ones((tokens.batch, p), bool), jnp.arange(slots) < stays[:, None]], 1)
    place = jnp.broadcast_to(jnp.arange(p + slots, dtype=jnp.int32), there.shape)
    renumbered = place if renumber and tokens.position is not None else None
    return Plan(chosen, how="keep", valid=there, position=renumbered, aux={"overflow": found - stays})
