"""Controls: what any method must beat at the same cost. Random dropping, strided dropping, average pooling.

Kind:   prune (random, strided) and merge (pooling) without looking at the content; static lengths.
Needs:  nothing; random dropping draws from the call's key, or from its seed where the call has none.

They reduce at the same site (between attention and MLP) and with the same counts as Top-K, so that budgets can be
equal.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
import numpy as np

from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit.staged import Staged, drawn, ranked, select
from tokjax.signals import Signals
from tokjax.token_map import HardMap, Plan, behind_prefix
from tokjax.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Random(Staged):
    """Keeps a random subset of the patch tokens, in place order; every row draws its own.

    Attributes:
        seed: where the call has no key.
        layer: set by `hooks`, so that locations draw independently.
    """

    seed: int = 0
    layer: int = 0

    def hooks(self, info: ModelInfo) -> list[Hook]:
        return [
            dataclasses.replace(hook, reducer=dataclasses.replace(hook.reducer, layer=hook.layer))
            for hook in super().hooks(info)
        ]

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        n, p = tokens.length, tokens.prefix
        k = self.count(n - p)
        if k >= n - p:
            return None
        order = ranked(tokens, drawn(tokens, signals, self.layer, self.seed))
        if tokens.valid is None:
            return Plan(select(tokens, jnp.sort(order[:, :k], -1)), how="keep")
        counts = self.row_counts(tokens)
        first = jnp.where(jnp.arange(k) < counts[:, None], order[:, :k], n)
        return Plan(select(tokens, jnp.sort(first, -1)), how="keep")


@dataclasses.dataclass(frozen=True)
class Strided(Staged):
    """Keeps evenly spaced patch tokens: of n, k stay, number i being token (2i+1)n // 2k."""

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        n, p = tokens.length, tokens.prefix
        k = self.count(n - p)
        if k >= n - p:
            return None
        if tokens.valid is None:
            chosen = jnp.broadcast_to((2 * np.arange(k) + 1) * (n - p) // (2 * k) + p, (tokens.batch, k))
            return Plan(select(tokens, chosen), how="keep")
        counts, order = self.row_counts(tokens), ranked(tokens, jnp.zeros((tokens.batch, n)))
        patches = (tokens.count() - p)[:, None]
        step = (2 * jnp.arange(k) + 1) * patches // jnp.maximum(2 * counts, 1)[:, None]
        chosen = jnp.take_along_axis(order, jnp.minimum(step, n - p - 1), 1)
        return Plan(select(tokens, chosen, counts), how="keep")


@dataclasses.dataclass(frozen=True)
class AvgPool(Staged):
    """Averages runs of neighbouring patch tokens: of n, k means stay, token t going to number t k // n.

    With a `window`, cells of the patch grid instead, where the tokens still stand on it (smaller cells at the far
    edges).

    Attributes:
        window: patches down and across; pools at the first location only.
        proportional: whether later attention counts a mean as many times as it has tokens; plain pooling does not.
    """

    window: tuple[int, int] | None = None
    proportional: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.window is not None and (len(self.window) != 2 or min(self.window) < 1):
            raise ValueError(f"window={self.window}: must be two numbers of at least 1")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        hooks = super().hooks(info)
        return hooks if self.window is None else hooks[:1]

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        n, p, tracked = tokens.length - tokens.prefix, tokens.prefix, self.proportional or tokens.size is not None
        if self.window is not None:
            cell, k = self._cells(tokens, signals)
        else:
            k = self.count(n)
            cell = np.arange(n) * k // n
        if k >= n:
            return None
        if tokens.valid is None:
            pooled = pool_cells(jnp.broadcast_to(cell, (tokens.batch, n)), jnp.ones((tokens.batch, n), bool), k)
        else:
            inside, counts = tokens.valid[:, p:], self.row_counts(tokens)[:, None]
            rank = jnp.cumsum(inside, -1) - 1
            pooled = pool_cells(rank * counts // jnp.maximum(inside.sum(1, keepdims=True), 1), inside, k)
        pooled = behind_prefix(pooled, p)
        return Plan(pooled, size=pooled if tracked else None, proportional=self.proportional if tracked else None)

    def _cells(self, tokens: Tokens, signals: Signals) -> tuple[np.ndarray, int]:
        grid, n = signals.context.grid, tokens.length - tokens.prefix
        if grid is None or grid[0] * grid[1] != n or tokens.valid is not None:
            raise ValueError(f"window={self.window}: needs all patches of a grid; here are {n} tokens on grid {grid}")
        (h, w), (down, across) = grid, self.window or (1, 1)
        row, column = np.divmod(np.arange(n), w)
        return row // down * -(-w // across) + column // across, -(-h // down) * -(-w // across)


def pool_cells(cell: Int[Array, "B N"], inside: Bool[Array, "B N"], k: int, most: int | None = None) -> HardMap:
    """Tokens that are inside go to their cell, one of k; the first of each stays, the others move into it.

    `most` moved tokens at the most; None: n - k, where no cell is empty.
    """
    n = cell.shape[1]
    most = n - k if most is None else most
    place = jnp.arange(n)

    def row(cell, inside):
        cell = jnp.where(inside, cell, k)
        first = jnp.full(k, n).at[cell].min(place, mode="drop")
        moves = inside & (first.at[cell].get(mode="fill", fill_value=n) != place)
        moved = jnp.argsort(~moves, stable=True)[:most]
        return first, jnp.where(moves[moved], moved, n), jnp.where(moves[moved], cell[moved], k)

    keep, moved, into = jax.vmap(row)(cell, inside)
    return HardMap(keep, moved, into, num_in=n)
