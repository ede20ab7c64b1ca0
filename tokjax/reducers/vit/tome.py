"""ToMe: merge the r most similar token pairs in every block.

Paper:  Bolya et al., "Token Merging: Your ViT but Faster", ICLR 2023 (arXiv 2210.09461).
Source: facebookresearch/ToMe, `tome/merge.py`, `tome/utils.py`, `tome/patch/{timm,mae}.py`.
Kind:   hard merge, training-free; static length N - min(r, (N - prefix) // 2) a block.
Needs:  attention keys of the same block.

Where we decide:
- Sorts are stable and ties go to the lower index; the published argsort is not stable.
- Zero vectors are guarded (norm at least 1e-6); the published code turns them, and with them whole rows, into NaN.
- Un-merging is membership transposed, also with a distillation token, where the published function is wrong.
- The published timm patch drops LayerScale and q/k norm of newer models; here they stay, and keys are those after
  the norm.
- Padded rows (not in the published code): each row merges min(r, (its patches) // 2) pairs among its own valid tokens.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import schedules
from tokjax.hooks import Hook, ModelInfo
from tokjax.signals import Signals, mean_key
from tokjax.token_map import HardMap, Plan, behind_prefix, first_true, rows
from tokjax.tokens import Tokens

Matching = Literal["bipartite", "kth", "random"]


def unit(metric: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """Rows of length one, float32; zero rows stay zero, and equal rows stay equal, so that ties are exact."""
    metric = jax.lax.stop_gradient(metric).astype(jnp.float32)
    # One bit less in the squares keeps XLA from fusing them into the sum, which its CPU code does in some rows only.
    squares = jax.lax.reduce_precision(metric * metric, exponent_bits=8, mantissa_bits=22)
    return metric / jnp.maximum(jnp.sqrt(squares.sum(-1, keepdims=True)), 1e-6)


def similarity(a: Float[Array, "B n D"], b: Float[Array, "B m D"]) -> Float[Array, "B n m"]:
    return jnp.einsum("bnd,bmd->bnm", a, b, precision="highest")


def pair_scores(metric: Float[Array, "B N D"], prefix: int = 0) -> Float[Array, "B A E"]:
    """Cosine similarity of even (senders, A) with odd tokens (receivers, E); -inf where the prefix would take part."""
    metric = unit(metric)  # step 2
    scores = similarity(metric[:, ::2], metric[:, 1::2])  # step 3
    return scores.at[:, : (prefix + 1) // 2].set(-jnp.inf).at[:, :, : prefix // 2].set(-jnp.inf)  # step 4


def proposals(scores: Float[Array, "B A E"]) -> tuple[Float[Array, "B A"], Int[Array, "B A"]]:
    """Similarity of every sender to its best receiver, and which one that is, the lower index on ties."""
    best = scores.max(-1)
    return best, first_true(scores == best[..., None])


def join(
    metric: Float[Array, "B N D"], keep: Int[Array, "B M"], moved: Int[Array, "B R"], prefix: int = 0
) -> tuple[HardMap, Float[Array, "B R"]]:
    """Every moved token goes to the most similar one that stays behind the prefix; also how similar it is.

    An index of N is nobody, in either list. Of equal similarities the first slot counts.
    """
    n, m = metric.shape[1], keep.shape[1]
    features = unit(metric)
    scores = similarity(rows(features, moved), rows(features, keep))
    open_ = (jnp.arange(m) >= prefix) & (keep < n)
    best, partner = proposals(jnp.where(open_[:, None], scores, -jnp.inf))
    somebody = moved < n
    merge = HardMap(keep, moved, jnp.where(somebody, partner, m), num_in=n)
    return merge, jnp.where(somebody & jnp.isfinite(best), best, 0)


def bipartite(
    metric: Float[Array, "B N D"],
    r: int,
    *,
    prefix: int = 0,
    valid: Bool[Array, "B N"] | None = None,
    counts: Int[Array, "B"] | None = None,
) -> HardMap | None:
    """Balanced bipartite soft matching: the r strongest proposals of even tokens to odd ones are merged.

    Output order: the prefix, the even tokens that stay (in place order behind a prefix, else from most to least
    similar), the odd tokens in place order; behind them, in padded rows, empty slots. None if nothing can be merged.
    `counts`: what each padded row merges, at most r; None: r.
    """
    batch, n, _ = metric.shape
    r = min(r, (n - prefix) // 2)  # step 1
    if r <= 0:
        return None
    if valid is not None:
        return _bipartite_padded(metric, r, prefix, valid, r if counts is None else counts[:, None])
    scores = pair_scores(metric, prefix)
    best, partner = proposals(scores)  # step 5: every sender proposes to its best receiver
    order = jnp.argsort(-best, axis=-1, stable=True)  # step 6: the r strongest proposals are taken
    sent, stay = order[:, :r], order[:, r:]
    if prefix:  # step 7: place order, so that the prefix comes first
        stay = jnp.sort(stay, -1)
    senders, receivers = (prefix + 1) // 2, prefix // 2  # of the prefix
    first = jnp.broadcast_to(jnp.arange(prefix), (batch, prefix))
    received = jnp.broadcast_to(jnp.arange(1, n, 2), (batch, n // 2))
    keep = jnp.concatenate([first, 2 * stay[:, senders:], received[:, receivers:]], 1)
    slot = jnp.take_along_axis(partner, sent, 1) - receivers + prefix + stay.shape[1] - senders
    return HardMap(keep, 2 * sent, slot, num_in=n)


def _bipartite_padded(metric, r: int, prefix: int, valid, counts) -> HardMap:
    """The same steps with a count of its own for every row: valid tokens first, everybody else masked."""
    batch, n, _ = metric.shape
    place = jnp.argsort(~valid, axis=-1, stable=True)  # valid tokens in their order, then the others
    count = valid.sum(1)[:, None]
    scores = pair_scores(rows(metric, place), prefix)
    even, odd = jnp.arange(0, n, 2), jnp.arange(1, n, 2)
    scores = jnp.where((even < count)[:, :, None] & (odd < count)[:, None], scores, -jnp.inf)
    best, partner = proposals(scores)
    order = jnp.argsort(-best, axis=-1, stable=True)
    merged = jnp.minimum(counts, (count - prefix) // 2)
    sending = jnp.arange(r) < merged
    sent = jnp.where(sending, order[:, :r], len(even))

    gone = jax.vmap(lambda row: jnp.zeros(len(even), bool).at[row].set(True, mode="drop"))(sent)
    senders, receivers = (prefix + 1) // 2, prefix // 2
    stay = jnp.broadcast_to(jnp.arange(senders, len(even)), (batch, len(even) - senders)) if prefix else order
    stays = ~jnp.take_along_axis(gone, stay, 1) & (2 * stay < count)
    first = jnp.broadcast_to(jnp.arange(prefix), (batch, prefix))
    received = jnp.broadcast_to(odd[receivers:], (batch, len(odd) - receivers))
    candidates = jnp.concatenate([first, 2 * stay, received], 1)
    alive = jnp.concatenate([first >= 0, stays, received < count], 1)

    rank = jnp.cumsum(alive, -1) - 1
    taken = jnp.argsort(~alive, axis=-1, stable=True)[:, : n - r]
    keep = jnp.where(jnp.take_along_axis(alive, taken, 1), jnp.take_along_axis(candidates, taken, 1), n)
    slots = jnp.arange(n - r)
    keep = jnp.where(merged > 0, keep, jnp.where(slots < count, slots, n))  # nothing merges: nothing changes place
    slot = rows(rank, prefix + stay.shape[1] - receivers + rows(partner, sent))
    into = jnp.where(sending, slot, n - r)
    moved = jnp.where(sending, 2 * sent, n)
    return HardMap(rows(place, keep, fill=n), rows(place, moved, fill=n), into, num_in=n)


def kth(metric: Float[Array, "B N D"], k: int) -> HardMap | None:
    """Of every k consecutive tokens the last receives, and every other token merges into its best receiver.

    A tail of N mod k tokens is dropped, as in the published code. None if k <= 1 or N < k.
    """
    batch, n, _ = metric.shape
    groups = n // k if k > 1 else 0
    if groups == 0:
        return None
    place = jnp.arange(groups * k).reshape(groups, k)
    senders, receivers = place[:, :-1].reshape(-1), place[:, -1]
    keep, moved = (jnp.broadcast_to(i, (batch, len(i))) for i in (receivers, senders))
    return join(metric, keep, moved)[0]


def random(metric: Float[Array, "B N D"], r: int, uniform: Float[Array, "B N"]) -> HardMap | None:
    """The r tokens with the smallest draws merge into their most similar other token. None if r <= 0."""
    n = metric.shape[1]
    r = min(r, n - 1)
    if r <= 0:
        return None
    order = jnp.argsort(uniform, axis=-1, stable=True)
    return join(metric, order[:, r:], order[:, :r])[0]


@dataclasses.dataclass(frozen=True)
class ToMe:
    """Token merging between attention and MLP.

    Attributes:
        r: tokens removed in a block, at most half of those that are not in the prefix; a tuple gives a number for
            each block, zeros behind its end. The paper uses 13 for ViT-S/B at 224 px, 7 for L, 16 for MAE-B, 8 for
            MAE-L, 7 for MAE-H.
        inflect: slope of the schedule in [-1, 1]; -1 is the paper's decreasing one.
        layers: blocks that merge; None: all.
        matching: "bipartite", or one of the paper's ablations: "kth" (merges all but every k-th token), "random".
        k: of the kth matching.
        how: "size" averages weighted by size, "mean" gives every token the same weight.
        proportional: whether attention counts a token size times. None: yes, but not in models that pool by a mean over
            patches with CLS unused (MAE's fine-tuned models, for which the published patch has it off).
        seed: of the random matching, where the call has no key.
        layer: set by `hooks`.
    """

    r: int | tuple[int, ...] = 13
    inflect: float = 0.0
    layers: tuple[int, ...] | None = None
    matching: Matching = "bipartite"
    k: int = 2
    how: Literal["size", "mean"] = "size"
    proportional: bool | None = None
    seed: int = 0
    layer: int = 0

    def __post_init__(self):
        counts = self.r if isinstance(self.r, tuple) else (self.r,)
        if any(r < 0 for r in counts):
            raise ValueError(f"r={self.r}: must be at least 0")
        if not -1 <= self.inflect <= 1:
            raise ValueError(f"inflect={self.inflect}: must be in [-1, 1]")
        if self.matching not in get_args(Matching):
            raise ValueError(f"matching={self.matching!r}: must be one of {', '.join(get_args(Matching))}")
        if self.k < 1:
            raise ValueError(f"k={self.k}: must be at least 1")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        counts = schedules.per_block(self.r, info.depth, self.inflect)
        most = info.length - info.prefix
        if max(counts) > most:
            raise ValueError(f"r={self.r}: must be at most {most}, the number of patch tokens")
        layers = range(info.depth) if self.layers is None else schedules.at_layers(self.layers, info.depth)
        proportional = info.pooling != "size_mean" if self.proportional is None else self.proportional
        one = dataclasses.replace(self, inflect=0.0, layers=None, proportional=proportional)
        return [
            Hook("after_attention", i, dataclasses.replace(one, r=counts[i], layer=i))
            for i in layers
            if counts[i] > 0 or self.matching == "kth"
        ]

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        if not isinstance(self.r, int):
            raise ValueError(f"r={self.r}: a plan takes one number; `hooks` spreads a tuple over the blocks")
        p, metric = tokens.prefix, mean_key(signals)
        if self.matching == "bipartite":
            merge = bipartite(metric, self.r, prefix=p, valid=tokens.valid)
        elif tokens.valid is not None:
            raise ValueError(f"matching={self.matching!r}: takes no padded rows; only 'bipartite' does")
        elif self.matching == "kth":
            merge = kth(metric[:, p:], self.k)
        else:
            keys = signals.context.row_keys(tokens.batch, self.layer, self.seed)
            merge = random(
                metric[:, p:], self.r, jax.vmap(lambda key: jax.random.uniform(key, (tokens.length - p,)))(keys)
            )
        if merge is None:
            return None
        if self.matching != "bipartite":
            merge = behind_prefix(merge, p)
        return Plan(merge, size=merge, how=self.how, proportional=self.proportional)
