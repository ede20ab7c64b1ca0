"""Prompt merging: neighbours in a prompt whose keys are alike become one token, in a decoder, without training.

Paper:  the library's own addition, after Bolya et al., "Token Merging: Your ViT but Faster", ICLR 2023.
Source: none.
Kind:   hard merge, training-free; static length.
Needs:  attention keys of the same block.

What a causal model asks for beyond ToMe:
- A merged token has the order and the position of its last member, so that only queries that see all members see it,
  and its own query sees all that they see. Its size is a bias of log(size) on its key, in the cache too.
- Tokens keep the order of the text, and only neighbours merge: a token between two would lose what it sees.
- Never merged: the first tokens (the start of the text, on which much attention rests), the last one, from which the
  next token is told, kinds that are special, prefix tokens, padding.
- What merges is decided from left to right, by keys that are read already: a token can take its neighbour in, but
  changes no output before it, and prompts of one length that begin alike keep caches that begin alike. ToMe's choice,
  of the r most similar pairs of a whole text, would let a token change what stands before it.
- Padded rows merge the share of their own tokens.

    fast = tokjax.reduce(decoder, "prompt_merging", keep_rate=0.75)
    out = fast.generate(prompts, max_tokens=64)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit.tome import unit
from tokjax.signals import Signals, in_text, mean_key
from tokjax.token_map import HardMap, Plan, rows
from tokjax.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class PromptMerging:
    """Merging of neighbours behind some blocks of a decoder.

    Attributes:
        keep_rate: share that is left of the tokens which may merge, from 0.5, where all pairs do, to 1.
        layers: behind so many blocks each; FastV drops behind two.
        first: tokens at the start of a text that never merge.
        special: kinds that never merge, see `tokjax.tokens.Tokens.kind`.
        others: tokens of those kinds that a row has at most; of more, the later ones are like any others. Needed with
            `special`: there is a slot for each pair that they keep from merging.
        window: pairs that one pair is compared with, the last ones up to it; merging may run so many pairs ahead of
            its share, or fall so many behind.

    Raises:
        ValueError: a field out of range; the message names it, its value and what is allowed.
    """

    keep_rate: float = 0.75
    layers: tuple[int, ...] = (2,)
    first: int = 1
    special: tuple[int, ...] = ()
    others: int = 0
    window: int = 8

    def __post_init__(self):
        if not 0.5 <= self.keep_rate <= 1:
            raise ValueError(f"keep_rate={self.keep_rate}: must be in [0.5, 1]")
        if not self.layers or any(layer < 1 for layer in self.layers) or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers={self.layers}: must be different numbers of blocks, at least 1")
        for name, least in (("first", 0), ("others", 0), ("window", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if bool(self.special) != bool(self.others):
            raise ValueError(f"special={self.special}, others={self.others}: give both or none")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        if max(self.layers) > info.depth:
            raise ValueError(f"layers={self.layers}: must be at most the {info.depth} blocks of the model")
        return [Hook("after_block", layer - 1, self) for layer in sorted(self.layers) if self.keep_rate < 1]

    def share(self, pairs: int) -> list[int]:
        """Of the first 0, 1, ..., `pairs` pairs so many merge, give or take what runs ahead or falls behind."""
        return [math.floor(2 * (1 - self.keep_rate) * pair + 1e-6) for pair in range(pairs + 1)]

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        n, start = tokens.length, self.first
        pairs = max(0, n - tokens.prefix - start - 1) // 2
        share = self.share(pairs)
        r, m = share[pairs], n - share[max(0, pairs - self.others)]
        if m == n:
            return None
        # 1. Pairs of neighbours in the text; those that may merge come first.
        valid = jnp.ones(tokens.x.shape[:2], bool) if tokens.valid is None else tokens.valid
        body = valid & (jnp.arange(n) >= tokens.prefix)
        place = in_text(tokens, body)
        may = (jnp.arange(n) < body.sum(1)[:, None] - 1) & ~self.protected(tokens, place)
        may = may[:, start : start + 2 * pairs].reshape(-1, pairs, 2).all(-1)
        two = place[:, start : start + 2 * pairs].reshape(-1, pairs, 2)
        early, late = jnp.moveaxis(rows(two, jnp.argsort(~may, axis=-1, stable=True)), -1, 0)
        count = may.sum(1)
        # 2. Those that merge, chosen from left to right.
        metric = unit(mean_key(signals))
        alike = (rows(metric, early) * rows(metric, late)).sum(-1)
        there = jnp.arange(pairs) < count[:, None]
        merges = there & self.chosen(jnp.where(there, alike, -jnp.inf), count, jnp.asarray(share))
        # 3. The early one moves into the slot of the late one; what is left stands in the order of the text.
        gone = jax.vmap(lambda slots, go: jnp.zeros(n, bool).at[slots].set(go))(early, merges)
        left = body & ~gone
        filled = jnp.arange(m - tokens.prefix) < left.sum(1)[:, None]
        rest = jnp.where(filled, in_text(tokens, left)[:, : m - tokens.prefix], n)
        first = jnp.broadcast_to(jnp.arange(tokens.prefix), (tokens.batch, tokens.prefix))
        keep = jnp.concatenate([first, rest], 1).astype(jnp.int32)
        slot = jax.vmap(lambda kept: jnp.full(n, m, jnp.int32).at[kept].set(jnp.arange(m), mode="drop"))(keep)
        which = jnp.argsort(~merges, axis=-1, stable=True)[:, :r]
        moving = jnp.take_along_axis(merges, which, 1)
        moved = jnp.where(moving, jnp.take_along_axis(early, which, 1), n)
        into = jnp.where(moving, rows(slot, jnp.take_along_axis(late, which, 1)), m)
        merge = HardMap(keep, moved, into, n)
        full = tokens.valid is None and not self.others
        return Plan(merge, size=merge, valid=None if full else rows(valid, keep), proportional=True)

    def protected(self, tokens: Tokens, place: Int[Array, "B N"]) -> Bool[Array, "B N"]:
        """Which of the tokens in the order of the text are special, as far as there are slots for them."""
        if not self.special:
            return jnp.zeros((), bool)
        if tokens.kind is None:
            raise ValueError(f"special={self.special}: the tokens of this model have no kinds")
        special = jnp.isin(rows(tokens.kind, place), jnp.asarray(self.special))
        return special & (jnp.cumsum(special, 1) <= self.others)

    def chosen(self, alike: Float[Array, "B P"], count: Int[Array, "B"], share: Int[Array, "P1"]) -> Bool[Array, "B P"]:
        """Pairs that are among the most similar ones of their window, as many of a row's `count` as its share says."""
        rate, pairs = 2 * (1 - self.keep_rate), alike.shape[1]
        before = [jnp.pad(alike, ((0, 0), (k, 0)), constant_values=-jnp.inf)[:, :pairs] for k in range(self.window)]
        better = sum((one > alike).astype(jnp.int32) for one in before)
        step = jnp.arange(1, pairs + 1)
        hit = better < rate * jnp.minimum(step, self.window)
        # So many have merged by each pair: one more where it hits, within bounds on either side of the share.
        total, left = share[count][:, None], count[:, None] - step
        low = jnp.maximum(share[1:] - self.window, total - jnp.maximum(left, 0))
        high = jnp.minimum(share[1:] + self.window, total)
        _, *bounds = jax.lax.associative_scan(_then, (hit.astype(jnp.int32), *jnp.broadcast_arrays(low, high)), axis=1)
        merged = jnp.clip(jnp.cumsum(hit, 1), *bounds)
        return jnp.diff(merged, axis=1, prepend=0) > 0


def _then(first: tuple[Array, Array, Array], second: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Two steps `x -> clip(x + more, low, high)` as one."""
    more, low, high = second
    return first[0] + more, jnp.clip(first[1] + more, low, high), jnp.clip(first[2] + more, low, high)


def rates(info: ModelInfo) -> list[float]:
    """Rates that merge one pair less each, from all pairs of a text as long as the model's example."""
    pairs = max(1, (info.length - info.prefix - PromptMerging.first - 1) // 2)
    return [1 - merged / (2 * pairs) for merged in range(pairs, -1, -1)]
