"""ATS: sample tokens by the significance that CLS gives them; easy images keep fewer.

Paper:  Fayyaz et al., "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022 (arXiv 2111.15667).
Source: JoakimHaurum/TokenReduction, `models/ats.py` (variant "benchmark", of Haurum et al., "Which Tokens to Use?",
        ICCVW 2023); adaptivetokensampling/ATS, `libs/models/ats_block.py` (variant "official").
Kind:   prune, training-free; the length depends on the data: static capacity, valid mask, counts in `aux`.
Needs:  the CLS row of the attention and the values; without prefix tokens, the attention that a token receives.

Steps:
1. Significance of a token: the attention that CLS pays to it, times the norm of its value.
2. Cumulative sum of the normalised significance, in sequence order (benchmark) or from the least significant token
   to the most significant one (official).
3. Evenly spaced points on [0, 1]; each takes the token whose cumulative sum is nearest. Significant tokens cover long
   stretches and are taken many times, others never.
4. Every token that was taken stays once, in the order of step 2.

Where we decide:
- Published code selects query rows inside the attention; here whole tokens are selected right behind it, which gives
  the same tokens, and a block's attention is paid in full. Later blocks gain alike.
- The published distance of more than 25 points comes from a matrix product and is off by up to 1e-3; here it is exact.
  Distances that differ by less than 3e-7 are ties, which go to the first token: below that only rounding decides.
- The official code drops a largest index of 1 (its padding value), which is a slip and not followed. Its attention
  adds 1e-6 / N to every weight and masks by a policy; here masked keys have weight zero, a difference below 1e-6.
- The official normalisation subtracts the smallest cumulative sum: zero as soon as a row has an empty slot, else the
  least significant token's own, which therefore never stays in a full row. This is followed, so that the law of padding
  holds for the benchmark variant only.
- Behind another reducer the number of samples is still a share of the patches at the input, which a hook notes there;
  a `plan` by hand, without that hook, counts the patches that the first one meets.
- A `capacity` below the number of samples drops the least significant of the surplus; `aux` has `sampled`, the tokens
  that stay, and `overflow`, those that found no slot.
- Without CLS the norm is taken over all heads in both variants.

Cost: two passes over the `[samples, N]` distances of a row and two sorts of N, four with a capacity; no matrix product.
"""

import dataclasses
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from tokjax import schedules
from tokjax.hooks import Hook, ModelInfo, Where
from tokjax.reducers.vit.staged import Tabled, input_patches, noted, select
from tokjax.signals import Signals, attention_rows, column_mean
from tokjax.token_map import Plan, first_true, rows
from tokjax.tokens import Tokens

Variant = Literal["benchmark", "official"]
TIE = 3e-7


def significance(tokens: Tokens, signals: Signals, variant: Variant = "benchmark") -> Float[Array, "B P"]:
    """Step 1, of the tokens behind the prefix; zero where they are invalid. Not normalised, no gradient."""
    value = jax.lax.stop_gradient(signals.need("value")).astype(jnp.float32)
    whole = jnp.sqrt(jnp.square(value).sum((-2, -1)))
    if not tokens.prefix:
        score = column_mean(signals, tokens.valid) * whole
    else:
        paid = attention_rows(signals, slice(0, 1))[:, :, 0]  # [B,H,N]
        if variant == "official":
            score = paid.sum(1) * whole
        else:
            norm = jnp.sqrt(jnp.square(value).sum(-1))
            norm = jnp.repeat(norm, paid.shape[1] // norm.shape[2], axis=2)  # grouped queries share values
            score = jnp.einsum("bhn,bnh->bn", paid, norm, precision="highest")
    if tokens.valid is not None:
        score = jnp.where(tokens.valid, score, 0)
    return jax.lax.stop_gradient(score)[:, tokens.prefix :]


def normalised(score: Float[Array, "B P"]) -> Float[Array, "B P"]:
    """Shares of the significance; the published guard keeps an all-zero row finite."""
    return score / (score.sum(-1, keepdims=True) + 1e-6)


def cumulative(score: Float[Array, "B P"]) -> Float[Array, "B P"]:
    """Step 2 of the official variant, of ascending scores: from 0 to 1."""
    total = jnp.cumsum(score, -1)
    low = total[:, :1]
    span = total[:, -1:] - low
    return (total - low) / jnp.where(span > 0, span, 1)


def sample_points(samples: int | Int[Array, "B 1"], most: int) -> Float[Array, "#B most"]:
    """Step 3 of the benchmark variant: (2i + 1) / 2K for i < K - 1, with K = samples + 1."""
    return (2 * jnp.arange(most, dtype=jnp.float32)[None] + 1) / (2 * (samples + 1))


def nearest(
    points: Float[Array, "#B S"], total: Float[Array, "B P"], inside: Float[Array, "B P"] | None = None
) -> Int[Array, "B S"]:
    """The place whose cumulative sum is nearest to each point, the first on ties; only those inside count."""
    distance = jnp.abs(points[:, :, None] - total[:, None])
    if inside is not None:
        distance = jnp.where(inside[:, None], distance, jnp.inf)
    return first_true(distance <= distance.min(-1, keepdims=True) + TIE)


@dataclasses.dataclass(frozen=True)
class ATS(Tabled):
    """Adaptive sampling between attention and MLP; settings as of `Tabled`, whose counts are numbers of samples.

    Attributes:
        variant: "benchmark" draws int(keep_rate**(j+1) * patches) samples at location j, by default in three blocks;
            "official" draws int(keep_rate * patches) in every block from depth / 4 on (the paper: keep_rate 1).
        capacity: slots behind the prefix at each location; None: as many as samples, so that nothing overflows.
    """

    variant: Variant = "benchmark"
    capacity: int | tuple[int, ...] | None = None
    where: ClassVar[Where] = "after_attention"

    def __post_init__(self):
        super().__post_init__()
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant={self.variant!r}: must be one of {', '.join(get_args(Variant))}")
        slots = self.capacity if isinstance(self.capacity, tuple) else (self.capacity,)
        if any(c is not None and c < 1 for c in slots):
            raise ValueError(f"capacity={self.capacity}: must be at least 1")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        layers = self.layers
        if layers is None and self.variant == "official":
            layers = tuple(range(info.depth // 4, info.depth))
        layers = schedules.at_layers(layers, info.depth)
        if isinstance(self.capacity, tuple) and len(self.capacity) != len(layers):
            raise ValueError(f"capacity={self.capacity}: must have one number for each of layers={layers}")
        return super(ATS, dataclasses.replace(self, layers=layers)).hooks(info)

    def count(self, patches: int, location: int | None = None) -> int:
        even = self.variant == "official" and self.kept is None
        return super().count(patches, 0 if even else location)

    def reduces(self, patches: int, location: int) -> bool:
        return self.variant == "official" or super().reduces(
            patches, location
        )  # samples of all tokens are fewer tokens

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        n, p = tokens.length - tokens.prefix, tokens.prefix
        most, official = self.most(tokens), self.variant == "official"
        patches = n if self.patches is None else self.patches
        if n <= 1 or not self.reduces(patches, self.location):
            return None
        score = significance(tokens, signals, self.variant)
        inside = jnp.ones(score.shape, bool) if tokens.valid is None else tokens.valid[:, p:]
        key = jnp.where(inside, score, -1) if official else ~inside
        order = jnp.argsort(key, axis=-1, stable=True)  # official: empty slots first, else last
        score, inside = jnp.take_along_axis(score, order, 1), jnp.take_along_axis(inside, order, 1)
        rooms = range(patches + 1)  # of a row that had so many patches at the input: its samples, whether it is reduced
        own = input_patches(tokens)
        samples = jnp.asarray(np.array([self.count(n) if n else 0 for n in rooms], np.int32))[own]
        reduces = jnp.asarray(np.array([n > 0 and self.reduces(n, self.location) for n in rooms]))[own]

        if official:
            total = cumulative(score)
            first = jnp.where(total > 0, total, jnp.inf).min(-1, keepdims=True)
            first = jnp.where(jnp.isfinite(first), first, 1)
            step = jnp.arange(most) / jnp.maximum(samples[:, None] - 1, 1)
            points = first + (1 - first) * step
        else:
            total = jnp.cumsum(normalised(score), -1)
            points = sample_points(samples[:, None], most)
        taken = nearest(points, total, inside)
        taken = jnp.where(jnp.arange(most) < samples[:, None], taken, n)
        chosen = jax.vmap(lambda row: jnp.zeros(n, bool).at[row].set(True, mode="drop"))(taken) & inside
        chosen = jnp.where(reduces[:, None], chosen, inside)

        # Step 4, and the cap.
        slots = self.capacity[self.location] if isinstance(self.capacity, tuple) else self.capacity
        slots = min(most if slots is None else slots, n)
        found = chosen.sum(-1, dtype=jnp.int32)
        if slots < min(most, n):
            best = jnp.argsort(jnp.where(chosen, -score, 1), axis=-1, stable=True)
            chosen &= jnp.argsort(best, axis=-1) < slots
        stays = jnp.minimum(found, slots)
        place = jnp.argsort(~chosen, axis=-1, stable=True)[:, :slots]
        keep = select(tokens, rows(order, place) + p, stays)
        first = jnp.ones((tokens.batch, p), bool)
        valid = jnp.concatenate([first, jnp.arange(slots) < stays[:, None]], 1)
        aux = {"sampled": stays, "overflow": found - stays}
        return Plan(keep, how="keep", valid=valid, carry=noted(tokens), aux=aux)
