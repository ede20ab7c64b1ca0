"""Top-K: keep the tokens that CLS attends to, drop the others.

Paper:  the baseline of Liang et al., "EViT", ICLR 2022 (no fusion), and of Haurum et al., "Which Tokens to Use?",
        ICCVW 2023.
Source: youweiliang/evit, `evit.py` without `fuse_token`; JoakimHaurum/TokenReduction, `models/topk.py`.
Kind:   prune, training-free; static length prefix + ceil(keep_rate * patches now).
Needs:  the CLS row of the attention; without prefix tokens, the attention that a token receives.

Where we decide: counts follow EViT's code (of the tokens that are left); `kept` gives the benchmark's tables, whose
code has 196 patches hard-coded. A count of all tokens does nothing (the benchmark's code fails there).
"""

from collections.abc import Sequence
import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from tokjax import schedules
from tokjax.hooks import Hook, ModelInfo
from tokjax.signals import Signals, importance
from tokjax.token_map import HardMap, Plan
from tokjax.tokens import Tokens


def ranked(tokens: Tokens, score: Float[Array, "B N"], counts: Int[Array, "B"] | None = None) -> Int[Array, "B P"]:
    """Tokens behind the prefix from best to worst, ties to the lower index, padding last.

    Rows that keep all of their tokens, told by `counts`, keep them in place order, as unpadded rows do.
    """
    if counts is not None:
        score = jnp.where((counts < tokens.count() - tokens.prefix)[:, None], score, 0)
    if tokens.valid is not None:
        score = jnp.where(tokens.valid, score, -jnp.inf)
    return jnp.argsort(-score[:, tokens.prefix :], axis=-1, stable=True) + tokens.prefix


def row_counts(tokens: Tokens, count) -> Int[Array, "B"]:
    """count(patches) for every row's own valid patches; from a table, since counts are rounded in double precision."""
    table = np.array([count(patches) for patches in range(tokens.length - tokens.prefix + 1)], np.int32)
    return jnp.asarray(table)[tokens.count() - tokens.prefix]


def select(tokens: Tokens, chosen: Int[Array, "B K"], counts: Int[Array, "B"] | None = None) -> HardMap:
    """Keeps the prefix and the chosen tokens, in this order; of each row only the first `counts`, the rest is empty."""
    n, batch = tokens.length, tokens.batch
    if counts is not None:
        chosen = jnp.where(jnp.arange(chosen.shape[1]) < counts[:, None], chosen, n)
    prefix = jnp.broadcast_to(jnp.arange(tokens.prefix), (batch, tokens.prefix))
    nobody = jnp.zeros((batch, 0), jnp.int32)
    return HardMap(jnp.concatenate([prefix, chosen], 1), nobody, nobody, n)


@dataclasses.dataclass(frozen=True)
class TopK:
    """Pruning by CLS attention, between attention and MLP.

    Attributes:
        keep_rate: share of the patch tokens that stay at each location, in (0, 1]; the paper uses 0.9 to 0.5.
        layers: blocks that prune; None: three evenly spread ones, 3, 6, 9 of 12.
        kept: patch tokens that stay at each location, in place of keep_rate.
    """

    keep_rate: float = 0.7
    layers: tuple[int, ...] | None = None
    kept: int | tuple[int, ...] | None = None

    def __post_init__(self):
        check_rate(self.keep_rate, self.kept)

    def hooks(self, info: ModelInfo) -> list[Hook]:
        return located(self, info)

    def count(self, patches: int) -> int:
        return count(self, patches)

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        patches = tokens.length - tokens.prefix
        k = self.count(patches)
        if k >= patches:
            return None
        counts = None if tokens.valid is None else row_counts(tokens, self.count)
        order = ranked(tokens, importance(tokens, signals), counts)
        return Plan(select(tokens, order[:, :k], counts), how="keep")


def check_rate(keep_rate: float, kept: int | Sequence[int] | None) -> None:
    """Raises ValueError for a keep rate outside (0, 1] or a count below 1."""
    if not 0 < keep_rate <= 1:
        raise ValueError(f"keep_rate={keep_rate}: must be in (0, 1]")
    if kept is not None and any(k < 1 for k in ((kept,) if isinstance(kept, int) else kept)):
        raise ValueError(f"kept={kept}: must be at least 1")


def count(reducer, patches: int) -> int:
    """Patch tokens that a reducer with `keep_rate` and `kept` leaves of `patches`."""
    if reducer.kept is None:
        return min(schedules.kept(reducer.keep_rate, patches), patches)
    if not isinstance(reducer.kept, int):
        raise ValueError(f"kept={reducer.kept}: a plan takes one number; `hooks` spreads a tuple over the locations")
    return min(reducer.kept, patches)


def located(reducer, info: ModelInfo) -> list[Hook]:
    """One hook a location, each with its own count, for a reducer with `keep_rate`, `layers` and `kept`."""
    layers = schedules.at_layers(reducer.layers, info.depth)
    kept = reducer.kept if isinstance(reducer.kept, tuple) else (reducer.kept,) * len(layers)
    if len(kept) != len(layers):
        raise ValueError(f"kept={kept}: must have one number for each of layers={layers}")
    changes = [{"kept": k, "layers": None} for k in kept]
    if any(field.name == "layer" for field in dataclasses.fields(reducer)):
        changes = [{**change, "layer": layer} for change, layer in zip(changes, layers, strict=True)]
    return [
        Hook("after_attention", layer, dataclasses.replace(reducer, **change))
        for layer, change in zip(layers, changes, strict=True)
    ]
