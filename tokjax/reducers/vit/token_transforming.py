"""Token transforming: a soft matrix takes all tokens to a few, every token to several of them.

Paper:  the idea is that of Zeng, Yu, Kong, Tang, "Token Transforming: A Unified and Training-Free Token Compression
        Framework for Vision Transformer Acceleration", 2025 (arXiv 2506.05709; before, as "M2M-TAG").
Source: none is public. What is known is that tokens are reduced by an explicit many-to-many matrix, of which pruning
        and merging are special forms, without training. The rule below is our own construction: it is no reproduction,
        and its results say nothing about the paper's.
Kind:   soft many-to-many merge, training-free; static length N - r a block.
Needs:  attention keys, the CLS row of the attention; without prefix tokens, the attention that a token receives.
Cost:   M r similarities and a softmax over them; the r tokens that go are multiplied with M slots. With soft anchors or
        in mode "row" M N of both.

The M most attended tokens are anchors and stay in place order. Mode "mass": every other token spreads its mass over the
anchors by the softmax of its cosine similarities over a temperature, and an anchor becomes the mean of what it holds,
weighted by mass. At tau -> 0 this is a merge into the nearest anchor; with a threshold above 1 it is plain pruning.
Mode "row": every anchor pools over all tokens by a softmax over them (log sizes added), as attention does; for their
sizes the columns are normalised instead, so that `plan.size.unmerge` is the way back there.

Edge cases: nothing flows into protected tokens, nor out of them in mode "mass" (in mode "row" anchors pool over them
too, and they give size away for it); zero vectors have similarity 0 to all; at least one patch stays. Padded rows keep
T - r of their own T patches, and padding takes part in nothing.
"""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import schedules
from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit.staged import behind, ranked, select
from tokjax.reducers.vit.tome import similarity, unit
from tokjax.signals import Signals, importance, mean_key
from tokjax.token_map import Plan, SoftMap, SpreadMap, TokenMap, rows
from tokjax.tokens import MASKED, Tokens

Mode = Literal["mass", "row"]


@dataclasses.dataclass(frozen=True)
class TokenTransforming:
    """Many-to-many merging between attention and MLP; the defaults are ours.

    Attributes:
        r: tokens removed in a block; a tuple gives a number for each block, zeros behind its end.
        inflect: slope of the schedule in [-1, 1], as ToMe's.
        layers: blocks that reduce; None: all.
        tau: temperature of the similarities.
        theta: tokens less similar than this to every anchor are dropped; None: none are. Of mode "mass".
        anchor_hard: whether anchors keep all of their mass, in mode "mass".
        mode: "mass" or "row", see above.
        proportional: whether attention counts a token size times. None: yes, but not in models that pool by a mean
            weighted by size.
    """

    r: int | tuple[int, ...] = 13
    inflect: float = 0.0
    layers: tuple[int, ...] | None = None
    tau: float = 0.1
    theta: float | None = None
    anchor_hard: bool = True
    mode: Mode = "mass"
    proportional: bool | None = None

    def __post_init__(self):
        counts = self.r if isinstance(self.r, tuple) else (self.r,)
        if any(r < 0 for r in counts):
            raise ValueError(f"r={self.r}: must be at least 0")
        if not -1 <= self.inflect <= 1:
            raise ValueError(f"inflect={self.inflect}: must be in [-1, 1]")
        if not 1e-4 <= self.tau < math.inf:
            raise ValueError(f"tau={self.tau}: must be at least 0.0001")
        if self.theta is not None and math.isnan(self.theta):
            raise ValueError(f"theta={self.theta}: must be a number or None")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r}: must be one of {', '.join(get_args(Mode))}")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        counts = schedules.per_block(self.r, info.depth, self.inflect)
        layers = range(info.depth) if self.layers is None else schedules.at_layers(self.layers, info.depth)
        proportional = info.pooling != "size_mean" if self.proportional is None else self.proportional
        one = dataclasses.replace(self, inflect=0.0, layers=None, proportional=proportional)
        return [Hook("after_attention", i, dataclasses.replace(one, r=counts[i])) for i in layers if counts[i]]

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        if not isinstance(self.r, int):
            raise ValueError(f"r={self.r}: a plan takes one number; `hooks` spreads a tuple over the blocks")
        n, p = tokens.length, tokens.prefix
        kept = max(n - p - self.r, 1)
        if kept >= n - p:
            return None
        counts = None
        if tokens.valid is not None:
            patches = tokens.count() - p
            counts = jnp.minimum(jnp.maximum(patches - self.r, 1), patches)
        order = ranked(tokens, importance(tokens, signals))  # 1: the most attended are anchors, in place order
        chosen = order[:, :kept]
        if counts is not None:
            chosen = jnp.where(jnp.arange(kept) < counts[:, None], chosen, n)
        anchors = select(tokens, jnp.sort(chosen, -1), counts).keep
        metric = unit(mean_key(signals))
        if self.mode == "row":
            pooled, sizes = self._rows(tokens, metric, anchors)
            return Plan(pooled, size=sizes, how="sum", proportional=self.proportional)
        spread: TokenMap
        if self.anchor_hard:
            spread = self._hard(tokens, metric, anchors, order, counts)
        else:
            spread = self._soft(tokens, metric, anchors)
        return Plan(spread, size=spread, proportional=self.proportional)

    def _shares(
        self, scores: Float[Array, "B R M"], anchors: Int[Array, "B M"], tokens: Tokens
    ) -> Float[Array, "B R M"]:
        """How tokens that are not protected spread over the anchors: rows sum to one, or are zero."""
        free = (jnp.arange(scores.shape[2]) >= tokens.prefix) & (anchors < tokens.length)
        free = free[:, None]
        share = jnp.where(free, jax.nn.softmax(jnp.where(free, scores / self.tau, MASKED), -1), 0)  # 3
        if self.theta is None:
            return share
        near = jnp.where(free, scores, -jnp.inf).max(-1, keepdims=True) >= self.theta  # 4: too far from all anchors
        return jnp.where(near, share, 0)

    def _hard(self, tokens, metric, anchors, order, counts) -> SpreadMap:
        """Anchors stay whole, the others spread."""
        others = order[:, anchors.shape[1] - tokens.prefix :]
        if counts is not None:  # every row's others begin behind its own anchors
            others = behind(tokens, order, counts, others.shape[1])
        scores = similarity(rows(metric, others), rows(metric, anchors))  # 2
        share = self._shares(scores, anchors, tokens)
        return SpreadMap(anchors, others, share.swapaxes(1, 2), tokens.length)

    def _soft(self, tokens, metric, anchors) -> SoftMap:
        """Anchors spread as well; only protected tokens stay whole."""
        n, p = tokens.length, tokens.prefix
        scores = similarity(metric, rows(metric, anchors))
        share = self._shares(scores, anchors, tokens)
        if tokens.valid is not None:
            share = jnp.where(tokens.valid[..., None], share, 0)
        whole = jnp.eye(n, anchors.shape[1])  # 5
        share = jnp.where(jnp.arange(n)[:, None] < p, whole, share)
        return SoftMap(share.swapaxes(1, 2), anchors)

    def _rows(self, tokens, metric, anchors) -> tuple[SoftMap, SoftMap]:
        """Each anchor pools over all tokens; how features move, and how sizes do."""
        n, p = tokens.length, tokens.prefix
        size = tokens.sizes() if tokens.valid is None else jnp.where(tokens.valid, tokens.sizes(), 0)
        mass = jnp.where(size > 0, jnp.log(jnp.where(size > 0, size, 1)), MASKED)
        scores = similarity(rows(metric, anchors), metric) / self.tau + jax.lax.stop_gradient(mass)[:, None]
        pooled = jax.nn.softmax(scores, -1)
        alone = (anchors == n) | (jnp.arange(anchors.shape[1]) < p)
        if tokens.valid is not None:  # rows of one patch stay as they are
            alone |= tokens.count()[:, None] <= p + 1
        pooled = jnp.where(alone[..., None], jax.nn.one_hot(anchors, n), pooled)
        total = pooled.sum(1, keepdims=True)
        share = jnp.where(total > 0, pooled / jnp.where(total > 0, total, 1), 0)
        return SoftMap(pooled, anchors), SoftMap(share, anchors)
