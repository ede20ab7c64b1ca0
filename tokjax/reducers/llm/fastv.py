"""FastV: drop prompt tokens that the last one hardly attends to, once, behind an early block of a decoder.

Paper:  Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024.
Source: pkunlp-icler/FastV, `src/FastV/llava-hf/transformers/src/transformers/models/llama/modeling_llama.py` (with a
        cache: dropped once, at prefill, which is what we do) and `src/transformers/.../modeling_llama.py` (without one:
        chosen anew for every new token, or hidden by a mask).
Kind:   prune, training-free; static length.
Needs:  one row of the attention, the last token's.

Where we decide: the published code takes the choice of row 0 for the whole batch and drops the mask of padding with it;
here every row has its own last token, counts and mask. Positions stay those of the text, so that a step behind the
prompt goes on with its true position. Text tokens that a VLM protects are whatever is not of `kind`; without `kind` and
`span` all tokens but the last may go. Counts are rounded half to even, as Python does.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
import numpy as np

from tokjax.hooks import Hook, ModelInfo
from tokjax.signals import Signals, in_text, last_row, last_slot, slot_order
from tokjax.token_map import HardMap, Plan
from tokjax.tokens import MASKED, Tokens


@dataclasses.dataclass(frozen=True)
class FastV:
    """Pruning behind `layer` blocks by the last token's attention in the last of them.

    Attributes:
        layer: K, of blocks that all tokens pass; the paper has 2.
        keep_rate: share of the candidates that stay; the paper removes 25, 50 or 75 percent.
        kept: so many stay, in every row or one number a row; None: by `keep_rate`.
        span: candidates are the tokens from the first to before the second position; numbers below 0 count from each
            row's end, and 0 in the second place is it.
        kind: candidates are the tokens of this kind.
        others: slots for what is no candidate, needed with `kind`. Where a row has more, fewer candidates stay; `aux`
            tells how many tokens found no slot at all.
        masked: nothing is dropped, but later blocks do not see the keys: the same numbers at no gain.

    Raises:
        ValueError: a field out of range; the message names it, its value and what is allowed.
    """

    layer: int = 2
    keep_rate: float = 0.5
    kept: int | tuple[int, ...] | None = None
    span: tuple[int, int] | None = None
    kind: int | None = None
    others: int | None = None
    masked: bool = False

    def __post_init__(self):
        if self.layer < 1:
            raise ValueError(f"layer={self.layer}: must be at least 1")
        if not 0 <= self.keep_rate <= 1:
            raise ValueError(f"keep_rate={self.keep_rate}: must be in [0, 1]")
        if any(kept < 0 for kept in self.every_kept):
            raise ValueError(f"kept={self.kept}: must be at least 0")
        if self.span is not None and self.kind is not None:
            raise ValueError(f"span={self.span}, kind={self.kind}: give one of both")
        if self.span is not None:
            start, stop = self.span
            if (start < 0 and stop > 0) or (start >= 0 and 0 < stop <= start) or (start < 0 and start >= stop):
                raise ValueError(f"span={self.span}: must be (first, last + 1), the second behind the first")
        if self.kind is not None and not self.masked and (self.others is None or self.others < 1):
            raise ValueError(f"others={self.others}: must be at least 1 where candidates are told by kind={self.kind}")

    @property
    def every_kept(self) -> tuple[int, ...]:
        return () if self.kept is None else (self.kept,) if isinstance(self.kept, int) else self.kept

    def hooks(self, info: ModelInfo) -> list[Hook]:
        if self.layer > info.depth:
            raise ValueError(f"layer={self.layer}: must be at most the {info.depth} blocks of the model")
        if self.kept is None and self.keep_rate == 1:
            return []
        return [Hook("after_block", self.layer - 1, self)]

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        n, order = tokens.length, slot_order(tokens)
        valid = jnp.ones(tokens.x.shape[:2], bool) if tokens.valid is None else tokens.valid
        most, others = self.capacities(tokens)
        if others + most >= n and not self.masked:
            return None
        # 1. What may go, and how many of it stay.
        candidate = valid & self.candidates(tokens, order)
        counts = candidate.sum(1)
        if self.kept is None:
            counts = jnp.asarray([round(self.keep_rate * count) for count in range(n + 1)])[counts]
        else:
            counts = jnp.minimum(jnp.asarray(self.kept), counts)
        beside = (valid & ~candidate).sum(1)
        if not self.masked:
            counts = jnp.minimum(counts, jnp.maximum(others + most - beside, 0))
        # 2. The last token's attention, mean over heads; of equal ones the first.
        score = jax.lax.stop_gradient(last_row(tokens, signals)).mean(1)
        best = jnp.argsort(-jnp.where(candidate, score, -1.0), axis=-1, stable=True)
        rank = jnp.argsort(best, axis=-1, stable=True)
        stays = valid & (~candidate | (rank < counts[:, None]))
        if self.masked:
            hidden = jnp.where(stays, 0.0 if tokens.key_bias is None else tokens.key_bias, MASKED)
            return Plan(key_bias=hidden)
        # 3. They stay in the order of the text; surplus slots are empty.
        m, left = others + most, stays.sum(1)
        keep = in_text(tokens, stays)[:, :m]
        filled = jnp.arange(m) < left[:, None]
        nobody = jnp.zeros((tokens.batch, 0), jnp.int32)
        full = tokens.valid is None and self.kind is None and not isinstance(self.kept, tuple)
        aux = {} if self.kind is None else {"overflow": jnp.maximum(left - m, 0)}
        map = HardMap(jnp.where(filled, keep, n), nobody, nobody, n)
        return Plan(map, how="keep", valid=None if full else filled, aux=aux)

    def capacities(self, tokens: Tokens) -> tuple[int, int]:
        """Slots for candidates that stay, and for all other tokens, in the longest row."""
        n, first = tokens.length, tokens.prefix
        if self.kind is not None:
            beside = self.others or 0
        elif self.span is None:
            beside = first + 1
        else:
            start, stop = self.bounds(n)
            beside = n - max(0, int(min(stop, n - 1)) - max(int(start), first))
        width = max(0, n - beside)
        if self.kept is not None:
            return min(max(self.every_kept), width), beside
        return round(self.keep_rate * width), beside

    def bounds(self, count):
        """First position of the span and the one behind it, in rows of `count` tokens."""
        assert self.span is not None
        start, stop = self.span
        return (start + count if start < 0 else start), (stop + count if stop <= 0 else stop)

    def candidates(self, tokens: Tokens, order: Int[Array, "B N"]) -> Bool[Array, "B N"]:
        """Tokens that may go; never the last one, nor those of the prefix."""
        place = jnp.arange(tokens.length)
        free = (place >= tokens.prefix) & (place != last_slot(tokens)[:, None])
        if self.kind is not None:
            if tokens.kind is None:
                raise ValueError(f"kind={self.kind}: the tokens of this model have no kinds; give a span")
            return free & (tokens.kind == self.kind)
        if self.span is None:
            return free
        start, stop = self.bounds(tokens.count()[:, None])
        return free & (order >= start) & (order < stop)


def rates(info: ModelInfo) -> list[float]:
    """Rates that keep one token more each, from the fewest."""
    free = info.length - info.prefix - 1
    return [float(np.float64(k) / free) for k in range(free + 1)]
