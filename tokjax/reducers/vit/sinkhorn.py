"""Sinkhorn: soft clusters by entropic optimal transport between patch tokens and learned centres.

Source: JoakimHaurum/TokenReduction, `models/sinkhorn.py` (Haurum et al., "Which Tokens to Use?", ICCVW 2023), after
        Cuturi, "Sinkhorn Distances", NeurIPS 2013 (arXiv 1306.0895).
Kind:   soft merge, learned; static length.
Needs:  features before the block.

Steps:
1. Tokens and centres are brought to length one.
2. Similarities / eps, then a few log-domain Sinkhorn steps towards uniform marginals.
3. The outputs are the transport plan times the normalised tokens: a weighted sum, not divided by the weights.

Where we follow the code:
- Both marginals are uniform with the value 1 / (k + n), so that their masses k / (k + n) and n / (k + n) do not agree.
  As the tokens' side is updated last, the weights of each token add up to one and those of each centre only roughly
  to n / k. Reproduced.
- The published forward pass writes the normalised centres back, without a gradient through the normalisation. Here the
  parameters stay as they are, with the gradient of the normalised centres passed straight through.

Sizes are not tracked. Cost: 2 * k * n * C, and `iters` passes over the k x n weights.
"""

from collections.abc import Sequence

from flax import nnx
import jax
from jax.nn import logsumexp
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.hooks import ModelInfo
from tokjax.reducers.vit.mergers import Merger, Mergers, own_rngs
from tokjax.tokens import MASKED


def unit(x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
    """Rows of length one; zero rows stay zero, with a finite gradient."""
    return x / jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def transport(
    similarity: Float[Array, "B k n"], eps: float, iters: int, valid: Bool[Array, "B n"] | None = None
) -> Float[Array, "B k n"]:
    """Step 2: weights of every output, zero at invalid tokens."""
    batch, k, n = similarity.shape
    inside = jnp.ones((batch, 1, n), bool) if valid is None else valid[:, None]
    z = jnp.where(inside, similarity / eps, MASKED)
    mass = jnp.log(k + inside.sum(-1, keepdims=True).astype(jnp.float32))
    u, v = jnp.zeros((batch, k, 1)), jnp.zeros((batch, 1, n))
    for _ in range(iters):
        u = -mass - logsumexp(z + v, -1, keepdims=True)
        v = jnp.where(inside, -mass - logsumexp(z + u, 1, keepdims=True), 0)
    return jnp.where(inside, jnp.exp(z + u + v + mass), 0)


class Centres(Merger):
    """One set of centres."""

    def __init__(self, width: int, count: int, eps: float = 1.0, iters: int = 3, *, rngs: nnx.Rngs):
        self.count, self.eps, self.iters = count, eps, iters
        self.centres = nnx.Param(jax.random.normal(rngs.params(), (count, width), jnp.float32))

    def normalised(self) -> Float[Array, "k C"]:
        """The centres at length one, as the published code stores them."""
        centres = self.centres[...]
        return centres + jax.lax.stop_gradient(unit(centres) - centres)

    def weights(
        self, z: Float[Array, "B n C"], valid: Bool[Array, "B n"] | None
    ) -> tuple[Float[Array, "B k n"], Float[Array, "B n C"]]:
        z = unit(z)
        similarity = jnp.einsum("kc,bnc->bkn", self.normalised(), z, precision="highest")
        return transport(similarity, self.eps, self.iters, valid), z


class Sinkhorn(Mergers):
    """Soft clusters before some blocks.

    Args:
        info: of the model.
        keep_rate: location j leaves int(keep_rate**(j+1) * patches) tokens.
        layers: blocks before which it merges; None: three evenly spread ones, 3, 6, 9 of 12.
        kept: tokens that a location leaves, in place of keep_rate.
        eps: strength of the entropy, the benchmark's 1.
        iters: Sinkhorn steps, the benchmark's 3.
        seed: of the initial parameters.

    Raises:
        ValueError: eps not above 0, or fewer than one step.
    """

    def __init__(
        self,
        info: ModelInfo,
        keep_rate: float = 0.7,
        layers: Sequence[int] | None = None,
        kept: int | Sequence[int] | None = None,
        eps: float = 1.0,
        iters: int = 3,
        seed: int = 0,
    ):
        if not eps > 0:
            raise ValueError(f"eps={eps}: must be above 0")
        if iters < 1:
            raise ValueError(f"iters={iters}: must be at least 1")
        rngs = own_rngs(seed)
        super().__init__(info, lambda count: Centres(info.width, count, eps, iters, rngs=rngs), keep_rate, layers, kept)
