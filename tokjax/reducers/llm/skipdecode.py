"""SkipDecode: the later a token of a text is made, the fewer blocks run for it; the same ones for a whole batch.

Paper:  Del Corro et al., "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM
        Inference", 2023.
Source: none is published. The paper says what counts: a depth that falls linearly with the column between two bounds,
        never rises, and is made of a few lower blocks and the upper ones.
Kind:   depth, for models that were fine-tuned with it. Shapes are static; which blocks run is decided in the loop.
Needs:  a token's column, nothing else.

Because depth never rises and every set of blocks contains the later ones, a token finds the keys of all earlier ones in
every block that it runs, and nothing is computed again: the cache stays as it is. Because it depends on the column
only, which all rows share, a batch skips blocks as one.

Where we decide: halves are rounded up; the prompt runs the most blocks, which is the whole model if `n_max` is; the
lower blocks come first, before the gap; depth falls over the tokens that there is room for behind the prompt.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
import numpy as np

from tokjax.hooks import Hook, ModelInfo


@dataclasses.dataclass(frozen=True)
class SkipDecode:
    """A depth that falls linearly from `n_max` to `n_min` blocks over the new tokens.

    Attributes:
        speedup: mean depth is so many times below the model's, as far as whole blocks allow; `n_max` is then three
            quarters of n_max + n_min, at most all blocks. The paper has 2 to 5.
        n_max: blocks of the prompt and of the first new token; None: by `speedup`.
        n_min: blocks of the last one; None: by `speedup`.
        warmup: w, of them the lowest, the others being the uppermost of the model.
        length: new tokens over which depth falls, later ones have `n_min`; None: as many as there is room for.
        prompt: columns of the prompt in a text that is read as a whole, as in training; rows then begin with their
            padding. While a prompt is read and gone on with its own columns count.

    Raises:
        ValueError: a field out of range; the message names it, its value and what is allowed.
    """

    speedup: float = 2.0
    n_max: int | None = None
    n_min: int | None = None
    warmup: int = 1
    length: int | None = None
    prompt: int = 0

    def __post_init__(self):
        if not 1 <= self.speedup < np.inf:
            raise ValueError(f"speedup={self.speedup}: must be at least 1 and finite")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: must be at least 0")
        if self.length is not None and self.length < 1:
            raise ValueError(f"length={self.length}: must be at least 1, or None")
        if self.prompt < 0:
            raise ValueError(f"prompt={self.prompt}: must be at least 0")
        if (self.n_max is None) != (self.n_min is None):
            raise ValueError(f"n_max={self.n_max}, n_min={self.n_min}: give both or none")
        if self.n_max is None or self.n_min is None:
            return
        if self.n_min < self.warmup:
            raise ValueError(f"n_min={self.n_min}: must be at least warmup={self.warmup}")
        if self.n_max < max(self.n_min, 1):
            raise ValueError(f"n_max={self.n_max}: must be at least n_min={self.n_min}, and 1")

    def bounds(self, depth: int) -> tuple[int, int]:
        """Most and fewest blocks, in a model of L = `depth`.

        Raises:
            ValueError: more than L.
        """
        if self.n_max is None or self.n_min is None:
            least = max(self.warmup, 1)
            both = max(round(2 * depth / self.speedup), 2 * least)
            few = max(both - min(round(0.75 * both), depth), least)
            most = both - few
        else:
            most, few = self.n_max, self.n_min
        if max(most, few) > depth:
            name = "warmup" if self.n_max is None else "n_max"
            raise ValueError(f"{name}={getattr(self, name)}: must be at most the {depth} blocks of the model")
        return most, few

    def budgets(self, depth: int, length: int) -> Int[np.ndarray, "length"]:
        """Blocks n(t) of the first `length` new tokens, where depth falls over as many."""
        most, few = self.bounds(depth)
        u = np.arange(length) / max(length - 1, 1)
        return np.floor((1 - u) * most + u * few + 0.5).astype(np.int32)

    def expected(self, depth: int, length: int) -> float:
        """Blocks of the whole model over those that run, for `length` new tokens."""
        return depth * length / int(self.budgets(depth, length).sum())

    def hooks(self, info: ModelInfo) -> list[Hook]:
        if self.bounds(info.depth) == (info.depth, info.depth):
            return []
        return [Hook("depth", 0, SkipDecodeSchedule(self, info.depth), "active")]


@dataclasses.dataclass(frozen=True)
class SkipDecodeSchedule:
    """SkipDecode in a model of so many blocks."""

    method: SkipDecode
    depth: int

    def budget(self, column: Int[Array, "*columns"], prompt: int | None, end: int) -> Int[Array, "*columns"]:
        """Blocks of the tokens of these columns.

        Args:
            column: NumPy gives NumPy.
            prompt: columns of the prompt; None: the method's own.
            end: column up to which there is room.
        """
        prompt = self.method.prompt if prompt is None else prompt
        length = max(end - prompt, 1) if self.method.length is None else self.method.length
        xp: Any = jnp if isinstance(column, jax.Array) else np
        return xp.asarray(self.method.budgets(self.depth, length))[xp.clip(column - prompt, 0, length - 1)]

    def active(self, column: Int[Array, "*columns"], prompt: int | None, end: int) -> Bool[Array, "L *columns"]:
        """Which blocks run: the lowest `warmup`, and from the top as many as are left."""
        budget, warmup = self.budget(column, prompt, end), self.method.warmup
        block: Any = np.arange(self.depth).reshape(-1, *(1,) * np.ndim(column))
        return (block < warmup) | (block >= self.depth - (budget - warmup))


def speedups(info: ModelInfo) -> list[float]:
    """One for every sum of both bounds, from the cheapest."""
    return [2 * info.depth / both for both in range(2 * SkipDecode.warmup, 2 * info.depth + 1)]
