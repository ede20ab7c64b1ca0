"""What MrT5 is compared with: gates that chance or punctuation decides, and two ways to pool neighbouring bytes.

Paper:  Kallini et al., MrT5, ICLR 2025 (arXiv 2410.20771); boundary prediction after Nawrot et al., "Efficient
        Transformers with Dynamic Token Pooling", ACL 2023 (arXiv 2211.09761).
Source: jkallini/mrt5, `models/modeling_mrt5.py`, `models/modeling_bpt5.py`.
Kind:   prune (`ByteRandom`, `ByteFixed`) and merge (`BoundaryPooling`, `ConvPooling`); the latter two learn. Lengths
        depend on the data (static capacity, valid mask, counts in `aux`), but for convolutions.
Needs:  features; `ByteFixed` the ids of the bytes, `ByteRandom` and `BoundaryPooling` a PRNG key (or their seed).

All reduce before one block, the same as MrT5's by default. The gates have a soft form (`hard=False`) as MrT5 has.

Where we decide, so that a row does not depend on the rows beside it nor on its padding:
- Random gates: the released code draws one rate for the batch and one permutation of all of its places, padding too;
  here each row draws its rate and which of its own tokens go.
- Fixed gates: the released code counts the lengths of segments over all rows of a batch together, which is right for
  one row alone; here each row has its own.
- Boundary prediction: the number of trials in the prior's loss is a row's own tokens; the released code counts padding.
- Convolutions: windows run over a row's own tokens, of which floor(n / stride) are left, at least one; the released
  code's windows run into the padding.
"""

import abc
import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array, Bool, Float, Int

from tokjax import schedules
from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.llm.gates import SCALE, check_capacity, counted, default_layer, harden, inside, soften
from tokjax.reducers.vit.controls import pool_cells
from tokjax.reducers.vit.mergers import linear, own_rngs
from tokjax.reducers.vit.staged import drawn
from tokjax.relax import straight_through
from tokjax.signals import Signals
from tokjax.token_map import Plan, SoftMap, behind_prefix, rows
from tokjax.tokens import Tokens

# ByT5's ids of end, tab, line feed, space and ASCII punctuation: a byte's value plus 3.
SEPARATORS = (1, 12, 13, *range(35, 51), *range(61, 68), *range(94, 100), *range(126, 130))
OTHER = 1 << 16  # a second draw of the same layer


def _layer(layer: int | None, info: ModelInfo) -> int:
    layer = default_layer(info) if layer is None else layer
    if not 0 <= layer < info.depth:
        raise ValueError(f"layer={layer}: must be in 0 to {info.depth - 1}, the blocks of this model")
    return layer


@dataclasses.dataclass(frozen=True)
class _Gate(abc.ABC):
    """A gate without parameters in the soft or the hard form.

    Attributes:
        layer: block before which tokens go; None: as of MrT5.
        hard: whether to delete; else to bias.
        capacity: slots behind the prefix in the hard form; None: as many as can be needed.
    """

    layer: int | None = None
    hard: bool = True
    capacity: int | None = None

    def __post_init__(self) -> None:
        check_capacity(self.capacity)

    def hooks(self, info: ModelInfo) -> list[Hook]:
        layer = _layer(self.layer, info)
        placed = dataclasses.replace(self, layer=layer)
        return [Hook("before_block", layer, placed, "plan" if self.hard else "soften")]

    @abc.abstractmethod
    def stays(self, tokens: Tokens, signals: Signals) -> Bool[Array, "B n"] | None:
        """Which tokens stay; None: all."""

    def slots(self, n: int) -> int | None:
        """The capacity for rows of n tokens."""
        return self.capacity

    def _gate(self, tokens: Tokens, signals: Signals) -> tuple[Array, dict[str, Array]] | None:
        stays = self.stays(tokens, signals)
        if stays is None:
            return None
        gate = jnp.where(stays, 0.0, SCALE)
        return gate, {"gate": gate, **counted(gate, inside(tokens), SCALE / 2)}

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        made = self._gate(tokens, signals)
        if made is None:
            return None
        gate, noted = made
        plan = harden(tokens, gate, threshold=SCALE / 2, capacity=self.slots(gate.shape[1]), overflow="tail")
        return plan.replace(aux={**noted, **plan.aux})

    def soften(self, tokens: Tokens, signals: Signals) -> Plan | None:
        made = self._gate(tokens, signals)
        return None if made is None else soften(tokens, made[0]).replace(aux=made[1])


@dataclasses.dataclass(frozen=True)
class ByteRandom(_Gate):
    """Deletes a random subset of int(r n) of n tokens, with r drawn from a normal distribution for every row.

    Attributes:
        rate: mean of r, in [0, 1).
        spread: its standard deviation.
        seed: where the call has no key.

    By default the capacity has room for three standard deviations; what is beyond goes from the tail and is counted.

    Raises:
        ValueError: a value out of range.
    """

    rate: float = 0.5
    spread: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate={self.rate}: must be in [0, 1)")
        if not 0 <= self.spread < math.inf:
            raise ValueError(f"spread={self.spread}: must be at least 0 and finite")

    def slots(self, n: int) -> int:
        room = math.ceil((1 - self.rate + 3 * self.spread) * n)
        return max(1, min(n, room)) if self.capacity is None else self.capacity

    def stays(self, tokens: Tokens, signals: Signals) -> Bool[Array, "B n"] | None:
        if self.rate == self.spread == 0:
            return None
        layer, valid = self.layer or 0, inside(tokens)
        keys = signals.context.row_keys(tokens.batch, layer + OTHER, self.seed)
        rate = self.rate + self.spread * jax.vmap(jax.random.normal)(keys)
        count = jnp.floor(jnp.clip(rate, 0, 1) * valid.sum(1))
        draw = jnp.where(valid, drawn(tokens, signals, layer, self.seed)[:, tokens.prefix :], 2.0)
        rank = jnp.argsort(jnp.argsort(draw, axis=1, stable=True), axis=1)
        return (rank >= count[:, None]) & valid


@dataclasses.dataclass(frozen=True)
class ByteFixed(_Gate):
    """Deletes the ends of words: a segment starts at every separator, and its first ceil((1 - amount) n) bytes stay.

    Without ids in the context nothing is deleted.

    Attributes:
        amount: share to delete of a segment, in [0, 1).
        separators: ids that start a segment, those of space and punctuation in ByT5's vocabulary.

    Raises:
        ValueError: an amount out of range.
    """

    amount: float = 0.5
    separators: tuple[int, ...] = SEPARATORS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.amount < 1:
            raise ValueError(f"amount={self.amount}: must be in [0, 1)")

    def stays(self, tokens: Tokens, signals: Signals) -> Bool[Array, "B n"] | None:
        ids, position = signals.context.ids, tokens.position
        if ids is None or position is None or not self.amount:
            return None
        return self.of_ids(rows(ids, position[:, tokens.prefix :]), inside(tokens))

    def of_ids(self, ids: Int[Array, "B n"], valid: Bool[Array, "B n"]) -> Bool[Array, "B n"]:
        """Which tokens stay."""
        n = ids.shape[1]
        starts = jnp.isin(ids, jnp.array(self.separators)) & valid
        segment = jnp.where(valid, jnp.cumsum(starts, 1), n + 1)
        length = jax.vmap(lambda of: jnp.zeros(n + 1, jnp.int32).at[of].add(1, mode="drop"))(segment)
        before = jnp.cumsum(length, 1) - length
        place = jnp.cumsum(valid, 1) - 1 - rows(before, segment)
        kept = jnp.array([schedules.kept(1 - self.amount, count) for count in range(n + 1)])
        return (place < kept[rows(length, segment)]) & valid


# Pooling


def boundaries(drawn: Float[Array, "B n"], valid: Bool[Array, "B n"]) -> Float[Array, "B n"]:
    """Those of the tokens that are no padding, with one more at the last of them."""
    later = jnp.cumsum(valid[:, ::-1], 1)[:, ::-1] - valid
    return jnp.where(valid & (later == 0), 1.0, drawn * valid)


def segment_weights(ends: Float[Array, "B n"], valid: Bool[Array, "B n"], segments: int) -> Float[Array, "B S n"]:
    """The matrix of segment means; a boundary ends its segment, and its gradient comes from all that follow."""
    away = (jnp.cumsum(ends, 1) - ends)[:, None] - jnp.arange(segments)[:, None]
    own = jnp.where((jnp.abs(away) < 0.5) & valid[:, None], 1 - away, 0)
    return own / (own.sum(-1, keepdims=True) + 1e-9)


def prior_loss(ends: Float[Array, "B n"], trials: Int[Array, "B"], prior: float) -> Float[Array, "B"]:
    """Minus the log-probability of so many boundaries under Binomial(trials, prior), for each trial."""
    count, trials = ends.sum(1), trials.astype(jnp.float32)
    ways = gammaln(trials + 1) - gammaln(count + 1) - gammaln(trials - count + 1)
    chance = ways + count * math.log(prior) + (trials - count) * math.log1p(-prior)
    return jnp.where(trials > 0, -chance / jnp.maximum(trials, 1), 0)


class Predictor(nnx.Module):
    """Logits of boundaries: a small MLP on normalised features."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        xavier, below = nnx.initializers.xavier_uniform(), nnx.initializers.constant(-1.0)
        self.inner, self.out = (
            nnx.Linear(a, b, kernel_init=xavier, bias_init=below, precision="highest", rngs=rngs)
            for a, b in ((width, hidden), (hidden, 1))
        )

    def __call__(self, u: Float[Array, "B n C"]) -> Float[Array, "B n"]:
        return self.out(nnx.gelu(self.inner(u), approximate=False))[..., 0]


def relaxed_bernoulli(
    logits: Float[Array, "*n"], noise: Float[Array, "*n"], temperature: float
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """A soft draw in (0, 1), and whether it is above a half, with the gradient of the soft one; `noise`: uniform."""
    eps = jnp.finfo(jnp.float32).eps
    noise = jnp.clip(noise, eps, 1 - eps)
    soft = nnx.sigmoid((jnp.log(noise) - jnp.log1p(-noise) + logits) / temperature)
    return soft, straight_through((soft > 0.5).astype(jnp.float32), soft)


class BoundaryPooling(nnx.Module):
    """Segments that end at predicted boundaries become the means of their tokens, at the place of their first.

    Args:
        info: of the model.
        prior: share of tokens that shall be boundaries, in (0, 1); 1: nothing is pooled.
        layer: block before which it pools; None: as of MrT5.
        capacity: slots behind the prefix; None: as many as tokens. Surplus segments go from the tail, `overflow` in
            `aux` counts them.
        temperature: of the relaxed draw, which is made in evaluation too.
        hidden: width of the predictor; None: that of the model's own gated MLP.
        weight: of `loss/boundary` [B], the prior's loss.
        soft: whether means are a matrix through which the predictor learns; the values are the same.
        seed: of the initial parameters, and of draws where the call has no key.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        info: ModelInfo,
        prior: float = 0.2,
        layer: int | None = None,
        capacity: int | None = None,
        temperature: float = 0.5,
        hidden: int | None = None,
        weight: float = 1.0,
        soft: bool = False,
        seed: int = 0,
    ):
        if not 0 < prior <= 1:
            raise ValueError(f"prior={prior}: must be in (0, 1]")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature}: must be above 0 and finite")
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight={weight}: must be at least 0 and finite")
        check_capacity(capacity)
        self.width, self.layer, self.prior, self.capacity = info.width, _layer(layer, info), prior, capacity
        self.temperature, self.weight, self.soft, self.seed = temperature, weight, soft, seed
        rngs = own_rngs(seed)
        hidden = max(1, info.mlp_macs // (3 * info.width)) if hidden is None else hidden
        self.norm = nnx.RMSNorm(info.width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.predictor = Predictor(info.width, hidden, rngs)

    def hooks(self, info: ModelInfo) -> list[Hook]:
        _check_width(info, self.width)
        return [Hook("before_block", self.layer, self)]

    def plan(self, tokens: Tokens, signals: Signals, noise: Float[Array, "B n"] | None = None) -> Plan | None:
        """`noise`: uniform, where it is not given that of a row's own tokens."""
        if self.prior == 1:
            return None
        n, p, valid = tokens.length - tokens.prefix, tokens.prefix, inside(tokens)
        if noise is None:
            noise = drawn(tokens, signals, self.layer, self.seed)[:, p:]
        logits = self.predictor(self.norm(tokens.x[:, p:].astype(jnp.float32)))
        ends = boundaries(relaxed_bernoulli(logits, noise, self.temperature)[1], valid)
        slots = n if self.capacity is None else min(self.capacity, n)
        found = jax.lax.stop_gradient(ends).sum(1).round().astype(jnp.int32)
        left = jnp.minimum(found, slots)
        segment = (jnp.cumsum(ends, 1) - ends).round().astype(jnp.int32)
        pooled = pool_cells(segment, valid & (segment < slots), slots, most=n)
        there = jnp.concatenate([jnp.ones((tokens.batch, p), bool), jnp.arange(slots) < left[:, None]], 1)
        aux = {"tokens": valid.sum(1, dtype=jnp.int32), "segments": left, "overflow": found - left}
        if not self.soft:
            return Plan(behind_prefix(pooled, p), how="mean", valid=there, aux=aux)
        means = SoftMap(segment_weights(ends, valid, slots), pooled.keep)
        loss = self.weight * prior_loss(ends, valid.sum(1), self.prior)
        return Plan(behind_prefix(means, p), how="sum", valid=there, aux={**aux, "loss/boundary": loss})


class ConvPooling(nnx.Module):
    """Windows of neighbouring tokens become one by a convolution and a GELU, at the place of their first.

    Args:
        info: of the model.
        stride: tokens of a window; the published 2, 3 and 4. 1: nothing is pooled.
        layer: block before which it pools; None: as of MrT5.
        seed: of the initial parameters.

    Raises:
        ValueError: a stride below 1, or that is not whole.
    """

    def __init__(self, info: ModelInfo, stride: int = 2, layer: int | None = None, seed: int = 0):
        if stride < 1 or stride != int(stride):
            raise ValueError(f"stride={stride}: must be a whole number of at least 1")
        self.width, self.layer, self.stride = info.width, _layer(layer, info), stride
        rngs = own_rngs(seed)
        self.norm = nnx.RMSNorm(info.width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.conv = linear(stride * info.width, info.width, rngs)

    def hooks(self, info: ModelInfo) -> list[Hook]:
        _check_width(info, self.width)
        return [Hook("before_block", self.layer, self)]

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        n, p, valid, stride = tokens.length - tokens.prefix, tokens.prefix, inside(tokens), self.stride
        if stride == 1:
            return None
        slots = max(1, n // stride)
        own = valid.sum(1)
        left = jnp.minimum(own, jnp.maximum(1, own // stride))
        cell = (jnp.cumsum(valid, 1) - 1) // stride
        pooled = behind_prefix(pool_cells(cell, valid & (cell < left[:, None]), slots, most=n), p)
        # Windows of each row's own tokens, zeros behind the last one.
        order = jnp.argsort(~valid, axis=1, stable=True)[:, : slots * stride]
        order = jnp.where(jnp.arange(order.shape[1]) < own[:, None], order + p, tokens.length)
        order = jnp.pad(order, ((0, 0), (0, slots * stride - order.shape[1])), constant_values=tokens.length)
        u = rows(self.norm(tokens.x.astype(jnp.float32)), order)
        y = nnx.gelu(self.conv(u.reshape(tokens.batch, slots, stride * self.width)), approximate=False)
        put = jax.vmap(lambda x, at, y: x.at[at].set(y, mode="drop"))
        return Plan(pooled, how="keep", x=put(tokens.x.astype(jnp.float32), pooled.keep[:, p:], y))


def _check_width(info: ModelInfo, width: int) -> None:
    if info.width != width:
        raise ValueError(f"width={info.width}: these parameters were made for width={width}")
