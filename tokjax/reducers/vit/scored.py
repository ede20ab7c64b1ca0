"""Scored: any score of importance with any matcher.

Kind:   hard merge, or prune; training-free; static length prefix + ceil(keep_rate * patches now).
Needs:  by score: the CLS row of the attention, keys, all rows of the attention (entropy), a key of the call (random);
        by matcher: keys.

Methods of this field are mostly a score (which tokens matter) and a matcher (which ones stay, and where the others go),
published in a few combinations. Here both are free:

score, the highest stays:
- "cls_attention": how much CLS attends to the token (EViT, Liang et al. 2022), or how much it receives without a CLS.
- "key_norm": length of its key over all heads (Devoto et al. 2024 keep the shortest: `highest=False`).
- "energy": how isolated its key is, the negative energy of PiToMe (Tran et al. 2024) at a fixed margin.
- "entropy": how focused its own attention is, negative entropy, mean over heads.
- "random": nothing.

match, by the cosine of keys averaged over heads (ToMe, Bolya et al. 2023):
- "bipartite": the best tokens stay.
- "greedy": the best token, then always the one that is farthest from all chosen ones (max-min, as in DivPrune, Alvar et
  al. 2025), its distance weighted by its score.
- "density": centres of clusters, by density times distance to the next denser token (density peaks, Rodriguez & Laio
  2014, with a Gaussian whose variance is a tenth of the mean square distance), weighted by its score.
Every other token merges into the most similar one that stays, or is dropped.

The construction is ours; the weight of a score is its rank, from 1 for the best down to 1/n, so that scores of any
scale combine. Kept tokens leave in place order. Ties go to the lower index. Padded rows have their own counts.

Cost for n patches of which k stay: a sort of n and n k similarities of D channels; greedy and density have all n^2 of
them, greedy a loop of k steps over n tokens; energy adds n^2 of them too, entropy all rows of the attention, 128 at a
time.
"""

from collections.abc import Callable
import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit import pitome
from tokjax.reducers.vit.staged import Staged, drawn, others, ranked, select
from tokjax.reducers.vit.tome import join, similarity, unit
from tokjax.signals import Signals, attention_rows, importance, mean_key
from tokjax.token_map import Plan, first_true
from tokjax.tokens import Tokens

Score = Literal["cls_attention", "key_norm", "energy", "entropy", "random"]
Match = Literal["bipartite", "greedy", "density"]


def entropy(signals: Signals, block: int = 128) -> Float[Array, "B N"]:
    """Entropy of every token's own attention, mean over heads; rows are made `block` at a time."""
    n = (signals.need("key") if signals.weights is None else signals.weights).shape[1 if signals.weights is None else 2]

    def of(take: Int[Array, "Q"]) -> Float[Array, "B Q"]:
        a = attention_rows(signals, take)
        return -(a * jnp.log(jnp.maximum(a, 1e-30))).sum(-1).mean(1)

    whole = n // block * block
    parts = []
    if whole:
        blocks = jax.lax.map(of, jnp.arange(whole).reshape(-1, block))
        parts.append(jnp.moveaxis(blocks, 0, 1).reshape(blocks.shape[1], whole))
    if whole < n:
        parts.append(of(jnp.arange(whole, n)))
    return jnp.concatenate(parts, 1)


def greedy(
    metric: Float[Array, "B n D"], weight: Float[Array, "B n"], valid: Bool[Array, "B n"], k: int
) -> Int[Array, "B k"]:
    """k tokens: the first by weight, then always the farthest from those before, 1 - cosine times its weight."""
    n = weight.shape[1]
    features = unit(metric)
    distance = jnp.maximum(1 - similarity(features, features), 0)

    def step(i, state):
        chosen, nearest, free = state
        far = jnp.where(free, nearest * weight, -1)
        pick = first_true(far == far.max(-1, keepdims=True))
        row = jnp.take_along_axis(distance, pick[:, None, None], 1)[:, 0]
        nearest = jnp.where(i == 0, row, jnp.minimum(nearest, row))
        free &= jnp.arange(n) != pick[:, None]
        return jax.lax.dynamic_update_index_in_dim(chosen, pick, i, 1), nearest, free

    start = jnp.zeros((weight.shape[0], k), jnp.int32), jnp.ones_like(weight), valid
    return jax.lax.fori_loop(0, k, step, start)[0]


def density(
    metric: Float[Array, "B n D"], weight: Float[Array, "B n"], valid: Bool[Array, "B n"], k: int
) -> Int[Array, "B k"]:
    """k centres: the highest density times distance to the next denser token, times weight."""
    n = weight.shape[1]
    features = unit(metric)
    distance = jnp.maximum(1 - similarity(features, features), 0)  # half the square distance of unit vectors
    pairs = valid[:, None] & valid[:, :, None]
    count = jnp.maximum(valid.sum(1), 1).astype(jnp.float32)[:, None]
    spread = jnp.where(pairs, distance, 0).sum((1, 2))[:, None, None] / count[..., None] ** 2
    near = jnp.exp(-5 * distance / jnp.maximum(spread, 1e-6))
    dense = jnp.where(pairs, near, 0).sum(-1) / count
    place = jnp.arange(n)
    above = (dense[:, None] > dense[..., None]) | ((dense[:, None] == dense[..., None]) & (place < place[:, None]))
    apart = jnp.where(above & pairs, distance, jnp.inf).min(-1)
    peak = jnp.where(pairs, distance, 0).max(-1)
    centre = dense * jnp.where(jnp.isfinite(apart), apart, peak) * weight
    return jnp.argsort(-jnp.where(valid, centre, -1), axis=-1, stable=True)[:, :k]


MATCHERS: dict[Match, Callable[..., Int[Array, "B k"]]] = {"greedy": greedy, "density": density}


@dataclasses.dataclass(frozen=True)
class Scored(Staged):
    """A score and a matcher, between attention and MLP; keep_rate, layers and kept as of `Staged`.

    Attributes:
        score: what makes a token important.
        match: which tokens stay, given the score.
        highest: whether a high score is a good one.
        rest: what happens to the others, "merge" or "drop".
        how: "size" averages weighted by size, "mean" gives every token the same weight.
        margin: of the energy, a cosine.
        seed: of random scores, where the call has no key.
        layer: set by `hooks`.
    """

    score: Score = "cls_attention"
    match: Match = "bipartite"
    highest: bool = True
    rest: Literal["merge", "drop"] = "merge"
    how: Literal["size", "mean"] = "size"
    margin: float = 0.5
    seed: int = 0
    layer: int = 0

    def __post_init__(self):
        super().__post_init__()
        choices = {
            "score": get_args(Score),
            "match": get_args(Match),
            "rest": ("merge", "drop"),
            "how": ("size", "mean"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if not -1 <= self.margin < 1:
            raise ValueError(f"margin={self.margin}: must be in [-1, 1)")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        return [
            dataclasses.replace(hook, reducer=dataclasses.replace(hook.reducer, layer=hook.layer))
            for hook in super().hooks(info)
        ]

    def scores(self, tokens: Tokens, signals: Signals) -> Float[Array, "B N"]:
        """Of every token, float32, no gradient; those of the prefix mean nothing."""
        p, valid = tokens.prefix, tokens.valid
        if self.score == "cls_attention":
            score = importance(tokens, signals)
        elif self.score == "key_norm":
            score = jnp.sqrt((signals.need("key").astype(jnp.float32) ** 2).sum((2, 3)))
        elif self.score == "energy":
            patches = None if valid is None else valid[:, p:]
            score = jnp.pad(-pitome.energy(mean_key(signals)[:, p:], self.margin, valid=patches), ((0, 0), (p, 0)))
        elif self.score == "entropy":
            score = -entropy(signals)
        else:
            score = drawn(tokens, signals, self.layer, self.seed)
        return jax.lax.stop_gradient(score if self.highest else -score)

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        n, p = tokens.length, tokens.prefix
        k = self.count(n - p)
        if k >= n - p:
            return None
        order = ranked(tokens, self.scores(tokens, signals))
        counts = None if tokens.valid is None else self.row_counts(tokens)
        if self.match == "bipartite":
            chosen = order[:, :k]
        else:
            valid = jnp.ones((tokens.batch, n - p), bool) if tokens.valid is None else tokens.valid[:, p:]
            here = jnp.maximum(valid.sum(1, keepdims=True), 1)
            weight = (here - jnp.argsort(order, -1)).astype(jnp.float32) / here  # 1 for the best, 1 / n for the last
            chosen = MATCHERS[self.match](mean_key(signals)[:, p:], weight, valid, k) + p
        if counts is not None:
            chosen = jnp.where(jnp.arange(k) < counts[:, None], chosen, n)
        kept = select(tokens, jnp.sort(chosen, -1))
        if self.rest == "drop":
            return Plan(kept, how="keep")
        merge, _ = join(mean_key(signals), kept.keep, others(kept.keep, n, tokens.valid), p)
        return Plan(merge, size=merge, how=self.how)
