"""What reducers with a keep rate share: how many tokens stay at which blocks, in padded rows too, and which ones.

Counts are those of EViT's code (Liang et al. 2022): ceil(keep_rate * tokens left), in double precision.
"""

from collections.abc import Callable
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from tokjax import schedules
from tokjax.hooks import Hook, ModelInfo, Where
from tokjax.signals import Signals
from tokjax.token_map import HardMap, Plan, rows
from tokjax.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Staged:
    """A reducer that keeps a share of the tokens behind the prefix at some blocks, between attention and MLP.

    Attributes:
        keep_rate: share that stays at each location, in (0, 1].
        layers: blocks that reduce; None: three evenly spread ones, 3, 6, 9 of 12.
        kept: tokens that stay at each location, in place of keep_rate.

    Raises:
        ValueError: a keep rate outside (0, 1], a count below 1, or counts that do not fit the locations.
    """

    keep_rate: float = 0.7
    layers: tuple[int, ...] | None = None
    kept: int | tuple[int, ...] | None = None

    def __post_init__(self):
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep_rate={self.keep_rate}: must be in (0, 1]")
        counts = self.kept if isinstance(self.kept, tuple) else () if self.kept is None else (self.kept,)
        if any(k < 1 for k in counts):
            raise ValueError(f"kept={self.kept}: must be at least 1")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        """One hook a location, each with its own count."""
        layers = schedules.at_layers(self.layers, info.depth)
        kept = self.kept if isinstance(self.kept, tuple) else (self.kept,) * len(layers)
        if len(kept) != len(layers):
            raise ValueError(f"kept={kept}: must have one number for each of layers={layers}")
        return [
            Hook("after_attention", layer, dataclasses.replace(self, kept=k, layers=None))
            for layer, k in zip(layers, kept, strict=True)
        ]

    def count(self, patches: int) -> int:
        """Tokens that stay of `patches`."""
        if self.kept is None:
            return min(schedules.kept(self.keep_rate, patches), patches)
        if not isinstance(self.kept, int):
            raise ValueError(f"kept={self.kept}: a plan takes one number; `hooks` spreads a tuple over the locations")
        return min(self.kept, patches)

    def row_counts(self, tokens: Tokens) -> Int[Array, "B"]:
        """`count` of every row's own valid tokens; from a table, since counts are rounded in double precision."""
        table = np.array([self.count(patches) for patches in range(tokens.length - tokens.prefix + 1)], np.int32)
        return jnp.asarray(table)[tokens.count() - tokens.prefix]


@dataclasses.dataclass(frozen=True)
class Tabled(Staged):
    """Counts of the "Which Tokens to Use?" benchmark: of the patches at the input, not of those that are left.

    Location j keeps int(keep_rate**(j+1) * patches), in double precision, and at least one. In padded rows the patches
    are each row's own, which a hook at the input notes in the carry (`InputPatches`).

    Attributes:
        location: j, set by `hooks`.
        patches: at the input, set by `hooks`; None: as many as a plan meets.
    """

    location: int = 0
    patches: int | None = None
    where: ClassVar[Where] = "before_block"

    def hooks(self, info: ModelInfo) -> list[Hook]:
        """The note of the patches at the input, and one hook a location."""
        return noting(self.located(info))

    def located(self, info: ModelInfo) -> list[Hook]:
        """One hook a location; none where nothing would go."""
        layers, patches = schedules.at_layers(self.layers, info.depth), info.length - info.prefix
        if isinstance(self.kept, tuple) and len(self.kept) != len(layers):
            raise ValueError(f"kept={self.kept}: must have one number for each of layers={layers}")
        return [
            Hook(self.where, layer, dataclasses.replace(self, layers=None, location=j, patches=patches))
            for j, layer in enumerate(layers)
            if self.reduces(patches, j)
        ]

    def reduces(self, patches: int, location: int) -> bool:
        """Whether a location leaves fewer of `patches` at the input than those before it."""
        return self.count(patches, location) < min([patches, *(self.count(patches, j) for j in range(location))])

    def count(self, patches: int, location: int | None = None) -> int:
        """Tokens that stay of `patches` at the input."""
        return tabled(self.keep_rate, self.kept, patches, self.location if location is None else location)

    def most(self, tokens: Tokens) -> int:
        """`count` of an unpadded row."""
        return self.count(tokens.length - tokens.prefix if self.patches is None else self.patches)

    def row_counts(self, tokens: Tokens) -> Int[Array, "B"]:
        """`count` of every row's own patches, at most those that it still has."""
        patches = tokens.length - tokens.prefix if self.patches is None else self.patches
        table = np.array([self.count(n) if n else 0 for n in range(patches + 1)], np.int32)
        return jnp.minimum(jnp.asarray(table)[input_patches(tokens)], tokens.count() - tokens.prefix)


def tabled(keep_rate: float, kept: int | tuple[int, ...] | None, patches: int, location: int) -> int:
    """Tokens that stay at a location, of so many patches at the input; see `Tabled`."""
    if kept is None:
        return max(1, schedules.kept_table(keep_rate, patches, location + 1)[location])
    return min(kept[location] if isinstance(kept, tuple) else kept, patches)


@dataclasses.dataclass(frozen=True)
class InputPatches:
    """Notes how many patches every row has, at the input: later on, other reducers may have changed the tokens."""

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        return None if NOTE in tokens.carry else Plan(carry=noted(tokens))


NOTE = "patches"
NOTING = Hook("input", 0, InputPatches())


def noting(hooks: list[Hook]) -> list[Hook]:
    """Hooks of a reducer that reads `input_patches`, with the one that notes them."""
    return [NOTING, *hooks] if hooks else []


def input_patches(tokens: Tokens) -> Int[Array, "B"]:
    """Valid tokens behind the prefix that every row had at the input; has now, where nothing was noted there."""
    return tokens.carry.get(NOTE, tokens.count() - tokens.prefix)


def noted(tokens: Tokens) -> dict[str, Array]:
    """What a plan leaves in the carry: plans that are applied by hand, without hooks, note what the first one meets."""
    return {NOTE: input_patches(tokens)}


def ranked(tokens: Tokens, score: Float[Array, "B N"], counts: Int[Array, "B"] | None = None) -> Int[Array, "B P"]:
    """Tokens behind the prefix from best to worst, ties to the lower index, padding last.

    Rows that keep all of their tokens, told by `counts`, keep them in place order, as unpadded rows do.
    """
    if counts is not None:
        score = jnp.where((counts < tokens.count() - tokens.prefix)[:, None], score, 0)
    if tokens.valid is not None:
        score = jnp.where(tokens.valid, score, -jnp.inf)
    return jnp.argsort(-score[:, tokens.prefix :], axis=-1, stable=True) + tokens.prefix


def behind(tokens: Tokens, order: Int[Array, "B P"], counts: Int[Array, "B"], number: int) -> Int[Array, "B R"]:
    """The `number` tokens of an order behind each row's own first `counts`; N where the row has no more."""
    place = counts[:, None] + jnp.arange(number)
    inside = place < tokens.count()[:, None] - tokens.prefix
    return jnp.where(inside, jnp.take_along_axis(order, jnp.minimum(place, order.shape[1] - 1), 1), tokens.length)


def others(keep: Int[Array, "B M"], n: int, valid: Bool[Array, "B N"] | None) -> Int[Array, "B N-M"]:
    """Every (valid) token of n that is not kept, in place order; N where a row has no more."""
    stays = jax.vmap(lambda row: jnp.zeros(n, bool).at[row].set(True, mode="drop"))(keep)
    out = stays if valid is None else stays | ~valid
    moved = jnp.argsort(out, axis=-1, stable=True)[:, : n - keep.shape[1]]  # a full row has most
    return moved if valid is None else jnp.where(jnp.take_along_axis(out, moved, 1), n, moved)


def drawn(
    tokens: Tokens, signals: Signals, salt: int, seed: int, sample: Callable[..., Array] = jax.random.uniform
) -> Float[Array, "B N"]:
    """A draw for every token: number i is for valid token i of its row, wherever the padding stands."""
    keys = signals.context.row_keys(tokens.batch, salt, seed)
    draws = jax.vmap(lambda key: sample(key, (tokens.length,)))(keys)
    return draws if tokens.valid is None else rows(draws, jnp.cumsum(tokens.valid, -1) - 1)


def select(tokens: Tokens, chosen: Int[Array, "B K"], counts: Int[Array, "B"] | None = None) -> HardMap:
    """Keeps the prefix and the chosen tokens, in this order; of each row only the first `counts`, the rest is empty."""
    n, batch = tokens.length, tokens.batch
    if counts is not None:
        chosen = jnp.where(jnp.arange(chosen.shape[1]) < counts[:, None], chosen, n)
    prefix = jnp.broadcast_to(jnp.arange(tokens.prefix), (batch, tokens.prefix))
    nobody = jnp.zeros((batch, 0), jnp.int32)
    return HardMap(jnp.concatenate([prefix, chosen], 1), nobody, nobody, n)
