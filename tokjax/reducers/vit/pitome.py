"""PiToMe: rank tokens by an energy, protect the isolated ones, merge those that stand in crowds.

Paper:  Tran, Nguyen et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024
        (arXiv 2405.16148).
Source: hchautran/PiToMe, `algo/pitome/merge.py`, `algo/pitome/patch/*.py`.
Kind:   hard merge, training-free; static length N - floor(T - T * keep_rate) a block, T tokens behind the prefix.
Needs:  attention keys of the same block, or the hidden states, by variant.
Cost:   one T x T similarity with an exponential for each entry, a sort of T; the matching adds at most T^2 / 4.

A token's energy is the mean of a soft-thresholded cosine similarity to all tokens, itself included. Candidates of high
energy are split by rank into senders and receivers, and every sender joins its most similar receiver. The published
code has one patch for each model, which differ in metric, margin, matching, site and weighting: `VARIANTS` lists them.

Where we follow the code against the text:
- The energy above the margin is x - margin (the paper's equation has x).
- Margins differ by model (the paper has 0.9 - 0.9 l/L), and only BLIP-2 has proportional attention.
- Text models use a Gaussian kernel and the upper half as senders, which the code's comments prefer to the paper's.

Where we decide:
- Sorts are stable and ties go to the lower index. Energies are summed in fixed point, so that tokens whose similarities
  differ only in order tie exactly.
- The published plan protects one token at most and may merge a distillation token; here the whole prefix is protected.
- Nothing to merge keeps the input order, and at most half of the tokens merge; the published code fails in both cases.
- The BLIP patch reads its list of rates from the end, so that it leaves the last block alone, not the first as was
  meant: `variant="blip"` does what was meant, `layers=range(L - 1)` what is done.
- Means that the published text and LLaVA patches take over tokens (sizes restart at one in every layer) stay means;
  sizes are counted on, but nothing reads them.
- Padded rows: padding has no energy and gives none to others, and every row merges by its own number of tokens (in the
  published text patches padding takes part in both). A merged token is valid if any part of it is.

Tokens leave in order of energy: nothing that reads a grid may follow without their positions.
"""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from tokjax import schedules
from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit import tome
from tokjax.signals import Signals, mean_key
from tokjax.token_map import HardMap, Plan, behind_prefix, rows
from tokjax.tokens import Tokens

Matching = Literal["ordered", "halves", "bipartite", "tome"]
Kernel = Literal["elu", "gaussian"]
Metric = Literal["keys", "hidden"]
How = Literal["size", "mean", "prune"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a published patch does; the margin of block l of L is `margin - slope * l / L`.

    `late` matches in place of `matching` in the second half of the blocks: from ceil(L/2) on, or behind it.
    """

    margin: float
    slope: float
    matching: Matching
    late: Matching | None = None
    late_from: Literal["half", "behind half"] = "half"
    metric: Metric = "keys"
    kernel: Kernel = "elu"
    how: How = "size"
    where: Literal["after_attention", "after_block"] = "after_attention"
    proportional: bool = False
    first: int = 0  # block that merges
    number: int | None = None  # of blocks that merge; None: all from the first on


VARIANTS = {
    "deit": Variant(0.75, 0.75, "bipartite", late="ordered"),
    "mae": Variant(0.75, 0.75, "ordered", late="bipartite"),
    "blip": Variant(0.9, 0.9, "ordered", metric="hidden", first=1),
    "blip2": Variant(0.75, 0.4, "ordered", proportional=True),
    "clip": Variant(0.95, 0.95, "ordered", metric="hidden"),
    "llava": Variant(  # the CLIP tower of LLaVA
        0.9, 0.9, "tome", "ordered", "behind half", metric="hidden", how="mean", where="after_block"
    ),
    "text": Variant(0.9, 0.25, "halves", kernel="gaussian", how="mean", number=3),  # BERT and DistilBERT
}


def removed(keep_rate: float, tokens: int) -> int:
    """Tokens that one block merges away, floor(T - T * keep_rate) in double precision, at most half of them."""
    return min(math.floor(tokens - tokens * keep_rate), tokens // 2) if keep_rate < 1 else 0


def lengths(keep_rate: float, tokens: int, depth: int) -> tuple[int, ...]:
    """Tokens behind the prefix before each of so many blocks that merge, and behind the last one."""
    left = [tokens]
    for _ in range(depth):
        left.append(left[-1] - removed(keep_rate, left[-1]))
    return tuple(left)


def margins(margin: float, slope: float, depth: int) -> tuple[float, ...]:
    """The margin of every block."""
    return tuple(margin - slope * layer / depth for layer in range(depth))


def energy(
    metric: Float[Array, "B T D"],
    margin: float,
    *,
    kernel: Kernel = "elu",
    alpha: float = 1.0,
    valid: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """How crowded the place of a token is: mean of f(cosine similarity) over all (valid) tokens, itself included.

    f(s) is s - margin above the margin and alpha (exp(s - margin) - 1) below ("elu"), or the density at 1 - s of a
    normal distribution with deviation 1 - margin ("gaussian").
    """
    unit = tome.unit(metric)
    z = tome.similarity(unit, unit) - margin
    if kernel == "elu":
        f, most, factor = jnp.where(z > 0, z, alpha * (jnp.exp(jnp.minimum(z, 0)) - 1)), max(1, alpha, 1 - margin), 1.0
    else:
        sigma = 1 - margin
        f, most, factor = jnp.exp(-(((sigma - z) / sigma) ** 2) / 2), 1, 1 / (sigma * math.sqrt(2 * math.pi))
    if valid is not None:
        f = jnp.where(valid[:, None], f, 0)
    # Sums of whole numbers are exact: neither the order of the tokens nor padding between them decides a tie.
    bits = 30 - math.ceil(math.log2(metric.shape[1] * most))
    total = jnp.round(f * 2.0**bits).astype(jnp.int32).sum(-1).astype(jnp.float32) * 2.0**-bits
    count = metric.shape[1] if valid is None else jnp.maximum(valid.sum(-1, keepdims=True), 1)
    return total / count * factor


def ranked(
    score: Float[Array, "B T"], valid: Bool[Array, "B T"] | None = None, merged: Int[Array, "B 1"] | None = None
) -> Int[Array, "B T"]:
    """Tokens from the highest score to the lowest, padding last; rows that merge nothing in place order."""
    if merged is not None:
        score = jnp.where(merged > 0, score, 0)
    if valid is not None:
        score = jnp.where(valid, score, -jnp.inf)
    return jnp.argsort(-score, axis=-1, stable=True)


Count = int | Int[Array, "B 1"]


def ordered(
    metric: Float[Array, "B T D"],
    order: Int[Array, "B T"],
    r: int,
    *,
    halves: bool = False,
    count: Count | None = None,
    merged: Count | None = None,
) -> HardMap:
    """Of the 2r first tokens of an order, senders and receivers by turns, every sender joins its best receiver.

    Output order: the tokens behind the 2r first, then the receivers, both in this order.

    Args:
        metric: whose cosine similarity matches.
        order: of the tokens, see `ranked`.
        r: senders, at most T // 2.
        halves: whether the first r are the senders, the next r the receivers.
        count: valid tokens of every row; None: all.
        merged: senders of every row, at most r; None: r.
    """
    t = metric.shape[1]
    count, merged = t if count is None else count, r if merged is None else merged

    def receiver(number):  # its rank
        return number + merged if halves else 2 * number + 1

    number = jnp.arange(r)
    senders, receivers = _at(order, number if halves else 2 * number), _at(order, receiver(number))
    unit = tome.unit(metric)
    scores = tome.similarity(rows(unit, senders), rows(unit, receivers))
    sending = jnp.broadcast_to(number < merged, senders.shape)
    scores = jnp.where(sending[:, None], scores, -jnp.inf)
    slot, protected = jnp.arange(t - r), count - 2 * merged
    kept = _at(order, jnp.where(slot < protected, 2 * merged + slot, receiver(slot - protected)))
    into = jnp.where(sending, protected + tome.proposals(scores)[1], t - r) if r else senders
    return HardMap(jnp.where(slot < count - merged, kept, t), jnp.where(sending, senders, t), into, num_in=t)


def bipartite(
    metric: Float[Array, "B T D"],
    order: Int[Array, "B T"],
    r: int,
    *,
    count: Count | None = None,
    merged: Count | None = None,
) -> HardMap:
    """All tokens are senders and receivers by turns of an order; the r strongest proposals are merged.

    Output order: the senders that stay, from most to least similar, then the receivers as ordered. Arguments as of
    `ordered`.
    """
    t = metric.shape[1]
    count, merged = t if count is None else count, r if merged is None else merged
    unit, a, b = rows(tome.unit(metric), order), order[:, ::2], order[:, 1::2]
    inside = jnp.broadcast_to(jnp.arange(t) < count, order.shape)
    scores = tome.similarity(unit[:, ::2], unit[:, 1::2])
    scores = jnp.where(inside[:, ::2, None] & inside[:, None, 1::2], scores, -jnp.inf)
    best, partner = tome.proposals(scores)
    strongest = jnp.argsort(-best, axis=-1, stable=True)

    number = jnp.arange(r)
    sending = jnp.broadcast_to(number < merged, (order.shape[0], r))
    slot, stay = jnp.arange(t - r), (count + 1) // 2 - merged
    kept = jnp.where(slot < stay, _at(a, _at(strongest, merged + slot)), _at(b, slot - stay))
    if not isinstance(merged, int):  # a row that merges nothing stays as it is
        kept = jnp.where(merged > 0, kept, order[:, : t - r])
    into = jnp.where(sending, stay + _at(partner, strongest[:, :r]), t - r)
    moved = jnp.where(sending, _at(a, strongest[:, :r]), t)
    return HardMap(jnp.where(slot < count - merged, kept, t), moved, into, num_in=t)


def _at(order: Int[Array, "B T"], place: Int[Array, "*B K"]) -> Int[Array, "B K"]:
    place = jnp.clip(place, 0, order.shape[1] - 1)
    return jnp.take_along_axis(order, jnp.broadcast_to(place, (order.shape[0], place.shape[-1])), 1)


@dataclasses.dataclass(frozen=True)
class PiToMe:
    """Merging by energy, with the settings of a published patch; fields that are None are those of the variant.

    Attributes:
        keep_rate: share of the tokens behind the prefix that a block keeps, at least one half, the published `ratio`; 1
            keeps all. A tuple gives a share for each block, ones behind its end. The published scripts use 0.9125 to
            classify images, 0.9 to 0.975 for retrieval, 0.85 to 0.975 for questions, and 0.505 to 0.85 in three blocks
            of text models.
        variant: "deit" (any ViT), "mae", "blip", "blip2", "clip", "llava", "text"; see `VARIANTS`.
        layers: blocks that merge.
        margin: of the energy at block 0.
        slope: by how much the margin falls over the blocks.
        matching: "ordered" (protects all but the 2r tokens of highest energy), "halves" (the same, split into an upper
            and a lower half), "bipartite" (protects none; energy only decides who may send), "tome" (ToMe's, without
            energy).
        metric: "keys" (mean over heads) or "hidden" (the residual stream).
        kernel: of the energy, "elu" or "gaussian".
        alpha: depth of the ELU.
        how: "size" averages weighted by size, "mean" gives every token the same weight, "prune" drops the senders.
        proportional: whether attention counts a token size times.
    """

    keep_rate: float | tuple[float, ...] = 0.9125
    variant: str = "deit"
    layers: tuple[int, ...] | None = None
    margin: float | None = None
    slope: float | None = None
    matching: Matching | None = None
    metric: Metric | None = None
    kernel: Kernel | None = None
    alpha: float = 1.0
    how: How | None = None
    proportional: bool | None = None

    def __post_init__(self):
        rates = self.keep_rate if isinstance(self.keep_rate, tuple) else (self.keep_rate,)
        if not all(0.5 <= rate <= 1 for rate in rates):
            raise ValueError(f"keep_rate={self.keep_rate}: must be in [0.5, 1]")
        choices = {"matching": Matching, "metric": Metric, "kernel": Kernel, "how": How}
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r}: must be one of {', '.join(VARIANTS)}")
        for name, kind in choices.items():
            value = getattr(self, name)
            if value is not None and value not in get_args(kind):
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(get_args(kind))}")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha={self.alpha}: must be at least 0")
        kernel, margin = self.kernel or VARIANTS[self.variant].kernel, self._margins(1)[0]
        if not -1 <= margin <= 1 or (kernel == "gaussian" and margin == 1):
            raise ValueError(f"margin={margin}: must be in [-1, 1], below 1 for the gaussian kernel")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        """One hook a block that merges, with its own rate, margin and matching."""
        published = VARIANTS[self.variant]
        if self.layers is not None:
            layers = schedules.at_layers(self.layers, info.depth)
        else:
            last = info.depth if published.number is None else min(published.first + published.number, info.depth)
            layers = tuple(range(published.first, last))
        rates = self.keep_rate if isinstance(self.keep_rate, tuple) else (self.keep_rate,) * info.depth
        rates = (*rates, *(1.0,) * (info.depth - len(rates)))
        return [
            Hook(published.where, layer, self._settled(layer, info.depth, rates[layer]))
            for layer in layers
            if rates[layer] < 1
        ]

    def _margins(self, depth: int) -> tuple[float, ...]:
        published = VARIANTS[self.variant]
        margin = published.margin if self.margin is None else self.margin
        return margins(margin, published.slope if self.slope is None else self.slope, depth)

    def _settled(self, layer: int, depth: int, keep_rate: float) -> "PiToMe":
        """The settings of one block, none of them None."""
        published = VARIANTS[self.variant]
        late = (depth + 1) // 2 if published.late_from == "half" else depth // 2 + 1
        matching = published.late if published.late is not None and layer >= late else published.matching

        def chosen(name: str):
            return getattr(published, name) if getattr(self, name) is None else getattr(self, name)

        return dataclasses.replace(
            self,
            keep_rate=keep_rate,
            layers=None,
            margin=self._margins(depth)[layer],
            slope=0.0,
            matching=self.matching or matching,
            **{name: chosen(name) for name in ("metric", "kernel", "how", "proportional")},
        )

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        if isinstance(self.keep_rate, tuple):
            raise ValueError(
                f"keep_rate={self.keep_rate}: a plan takes one number; `hooks` spreads a tuple over the blocks"
            )
        if None in (self.margin, self.matching, self.metric, self.kernel, self.how, self.proportional):
            return self._settled(0, 1, self.keep_rate).plan(tokens, signals)
        p, n = tokens.prefix, tokens.length
        metric = mean_key(signals) if self.metric == "keys" else jax.lax.stop_gradient(tokens.x)
        merge = self._tome(metric, tokens) if self.matching == "tome" else self._by_energy(metric[:, p:], tokens)
        if merge is None:
            return None
        if self.how == "prune":
            nobody = jnp.zeros((tokens.batch, 0), jnp.int32)
            return Plan(HardMap(merge.keep, nobody, nobody, n), how="keep", proportional=self.proportional)
        return Plan(merge, size=merge, how=self.how or "size", proportional=self.proportional)

    def _counts(self, most: int) -> Int[Array, "K"]:
        """`removed` for every number of tokens, from a table, since it rounds in double precision."""
        assert not isinstance(self.keep_rate, tuple)
        return jnp.asarray(np.array([removed(self.keep_rate, count) for count in range(most + 1)], np.int32))

    def _by_energy(self, metric: Float[Array, "B T D"], tokens: Tokens) -> HardMap | None:
        assert not isinstance(self.keep_rate, tuple)
        t, p = metric.shape[1], tokens.prefix
        r = removed(self.keep_rate, t)
        if r == 0:
            return None
        valid = count = merged = None
        if tokens.valid is not None:
            valid, count = tokens.valid[:, p:], (tokens.count() - p)[:, None]
            merged = self._counts(t)[count]
        assert self.margin is not None
        assert self.kernel is not None
        score = energy(metric, self.margin, kernel=self.kernel, alpha=self.alpha, valid=valid)  # 1: energy
        order = ranked(score, valid, merged)  # 2: from crowds to isolated tokens
        if self.matching == "bipartite":  # 3: match
            merge = bipartite(metric, order, r, count=count, merged=merged)
        else:
            merge = ordered(metric, order, r, halves=self.matching == "halves", count=count, merged=merged)
        return behind_prefix(merge, p)

    def _tome(self, metric: Float[Array, "B N D"], tokens: Tokens) -> HardMap | None:
        """ToMe's matching; the rate is of all tokens, the prefix included."""
        assert not isinstance(self.keep_rate, tuple)
        r = removed(self.keep_rate, tokens.length)
        counts = None if tokens.valid is None else self._counts(tokens.length)[tokens.count()]
        return tome.bipartite(metric, r, prefix=tokens.prefix, valid=tokens.valid, counts=counts)
