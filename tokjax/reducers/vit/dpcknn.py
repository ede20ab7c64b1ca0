"""DPC-KNN: density peaks are cluster centres, and every token is averaged into its nearest one.

Paper:  Du et al., "Study on density peaks clustering based on k-nearest neighbors", Knowledge-Based Systems 2016; for
        tokens: Zeng et al., "Not All Tokens Are Equal" (TCFormer), CVPR 2022 (arXiv 2204.08680).
Source: zengwang430521/TCFormer, `tcformer_utils.py`; JoakimHaurum/TokenReduction, `models/dpcknn.py`.
Kind:   hard merge, training-free; static length.
Needs:  features before the block.

Steps, on the patch tokens:
1. Euclidean distances / sqrt(C).
2. Density: exp(-mean of the squared distances to the k nearest tokens, itself included).
3. Peak distance: to the nearest token of higher density; without one, the largest distance in the image.
4. Centres: the largest density * peak distance, from largest to smallest.
5. Every token goes to its nearest centre, the first on ties; centres stay with themselves.
6. The tokens of a cluster are averaged.

Where we decide:
- TCFormer weighs tokens by exp of a learned score; here every token counts once, or by its size (`how="size"`).
  `clusters` gives the map for other weights: `Plan(map, how="size")` on tokens whose `size` is the weight.
- The published tie-break adds 1e-6 * uniform noise to the density. Without noise (default) equally dense tokens are no
  peaks to each other, and ties go to the lower index.
- More than 25 tokens: the published distance of a token to itself is about 1e-3; here it is zero.
- The published code normalises its aggregation weights and throws the result away; they do not touch the tokens.

All-equal tokens have no peaks: every score is zero and centres come in index order.
Cost: n^2 C multiplications, and about twenty passes over n x n distances.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.reducers.vit.staged import Tabled, drawn, noted, others
from tokjax.signals import Signals
from tokjax.token_map import HardMap, Plan, behind_prefix, first_true, rows
from tokjax.tokens import Tokens


def distances(z: Float[Array, "B n C"]) -> Float[Array, "B n n"]:
    """Euclidean, float32, no gradient; zero on the diagonal."""
    z = jax.lax.stop_gradient(z).astype(jnp.float32)
    square = jnp.square(z).sum(-1)
    squared = square[:, :, None] + square[:, None] - 2 * jnp.einsum("bnc,bmc->bnm", z, z, precision="highest")
    return jnp.sqrt(jnp.where(jnp.eye(z.shape[1], dtype=bool), 0, jnp.maximum(squared, 0)))


def density(distance: Float[Array, "B n n"], neighbours: int) -> Float[Array, "B n"]:
    """Step 2; infinite distances are no neighbours, and a token with fewer than k has the mean of those it has."""
    left = jnp.full(distance.shape[:2], min(neighbours, distance.shape[2]), jnp.float32)
    wanted, total = left, jnp.zeros_like(left)
    for _ in range(min(neighbours, distance.shape[2])):  # the smallest value, with its copies
        low = distance.min(-1)
        here = distance == low[..., None]
        taken = jnp.where(jnp.isfinite(low), jnp.minimum(here.sum(-1), left), 0)
        total += taken * jnp.square(jnp.where(jnp.isfinite(low), low, 0))
        left -= taken
        distance = jnp.where(here, jnp.inf, distance)
    return jnp.exp(-total / jnp.maximum(wanted - left, 1))


def nearest(distance: Float[Array, "B K n"]) -> Int[Array, "B n"]:
    """Which of the centres is nearest to every token, the first on ties."""
    return first_true(distance == distance.min(1, keepdims=True), axis=1)


def clusters(
    z: Float[Array, "B n C"],
    k: int,
    *,
    neighbours: int = 5,
    noise: Float[Array, "B n"] | None = None,
    valid: Bool[Array, "B n"] | None = None,
    counts: Int[Array, "B"] | None = None,
) -> HardMap:
    """Steps 1 to 5: k centres in order, with everybody else moving into their slots.

    Args:
        z: tokens without the prefix.
        k: centres.
        neighbours: of the density.
        noise: added to the density.
        valid: None: all.
        counts: of each padded row, in place of k.
    """
    batch, n, width = z.shape
    inside = jnp.ones((batch, n), bool) if valid is None else valid
    both = inside[:, :, None] & inside[:, None]
    apart = distances(z if valid is None else jnp.where(valid[..., None], z, 0)) * width**-0.5
    near = jnp.where(both, apart, jnp.inf)
    dense = density(near, neighbours)
    dense = dense if noise is None else dense + noise
    widest = jnp.where(both, apart, 0).max((1, 2))[:, None]
    peak = jnp.where(dense[:, None] > dense[:, :, None], near, jnp.inf).min(-1)
    score = jnp.where(inside, dense * jnp.where(jnp.isfinite(peak), peak, widest), -jnp.inf)
    centre = jnp.argsort(-score, axis=-1, stable=True)[:, :k]
    if counts is not None:
        centre = jnp.where(jnp.arange(k) < counts[:, None], centre, n)

    to = nearest(rows(near, centre, fill=jnp.inf))
    moved = others(centre, n, inside)
    return HardMap(centre, moved, rows(to, moved, fill=k), num_in=n)


@dataclasses.dataclass(frozen=True)
class DPCKNN(Tabled):
    """Clusters before some blocks; settings as of `Tabled`.

    Attributes:
        neighbours: of the density.
        how: "mean" counts every token once, "size" by its size.
        proportional: whether later attention counts a cluster as many times as it has tokens; the published one does
            not.
        noise: of the published tie-break, 1e-6 there; 0: none.
        seed: of the noise, where the call has no key.
    """

    neighbours: int = 5
    how: Literal["mean", "size"] = "mean"
    proportional: bool = False
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.neighbours < 1:
            raise ValueError(f"neighbours={self.neighbours}: must be at least 1")
        if self.how not in ("mean", "size"):
            raise ValueError(f"how={self.how!r}: must be 'mean' or 'size'")
        if self.noise < 0:
            raise ValueError(f"noise={self.noise}: must be at least 0")

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        p, n, k = tokens.prefix, tokens.length - tokens.prefix, self.most(tokens)
        if k >= n:
            return None
        noise = None
        if self.noise:
            noise = self.noise * drawn(tokens, signals, self.location, self.seed)[:, p:]
        valid = None if tokens.valid is None else tokens.valid[:, p:]
        counts = None if valid is None else self.row_counts(tokens)
        found = clusters(tokens.x[:, p:], k, neighbours=self.neighbours, noise=noise, valid=valid, counts=counts)
        if valid is not None and counts is not None:  # a row that keeps all of its tokens keeps their order
            every = jnp.argsort(~valid, axis=-1, stable=True)[:, :k]
            every = jnp.where(jnp.arange(k) < counts[:, None], every, n)
            whole = (counts >= valid.sum(1))[:, None]
            found = found.replace(keep=jnp.where(whole, every, found.keep))
        found, tracked = behind_prefix(found, p), self.proportional or tokens.size is not None
        return Plan(
            found,
            size=found if tracked else None,
            how=self.how,
            proportional=self.proportional if tracked else None,
            carry=noted(tokens),
        )
