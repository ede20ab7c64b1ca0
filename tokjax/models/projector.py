"""Heads of self-supervised training: perceptrons with batch norm that are thrown away behind it.

Sources: Chen et al. 2020, arXiv 2002.05709 (SimCLR); Grill et al. 2020, arXiv 2006.07733 (BYOL).
"""

from collections.abc import Sequence
import itertools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.models import layers


class BatchNorm(nnx.Module):
    """Mean 0 and variance 1 of every channel over the valid rows of the batch, then scale and bias.

    Under `jit` the batch is that of all devices. There are no moving statistics: outside of training nobody reads them.
    """

    def __init__(self, width: int, eps: float = 1e-5):
        self.scale, self.bias, self.eps = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width)), eps

    def __call__(self, x: Float[Array, "B C"], valid: Bool[Array, "B"]) -> Float[Array, "B C"]:
        x, count = x.astype(jnp.float32), jnp.maximum(valid.sum(), 1)

        def mean(values: Array) -> Array:
            return jnp.where(valid[:, None], values, 0).sum(0) / count

        centred = x - mean(x)
        return centred * jax.lax.rsqrt(mean(centred**2) + self.eps) * self.scale[...] + self.bias[...]


class Projector(nnx.Module):
    """Linear layers with batch norm and ReLU between them.

    Args:
        widths: channels from the input to the output, two at least.
        bias: whether the linear layers have one.
        rngs: of the initial weights.

    Raises:
        ValueError: fewer widths, or one below 1.
    """

    def __init__(self, widths: Sequence[int], *, bias: bool, rngs: nnx.Rngs):
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths={tuple(widths)}: must be two or more numbers of at least 1")
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.linear = nnx.List(
            [
                layers.linear(n, m, bias=bias, dtype="float32", rngs=rngs, init=init)
                for n, m in itertools.pairwise(widths)
            ]
        )
        self.norm = nnx.List([BatchNorm(width) for width in widths[1:-1]])

    def __call__(self, x: Float[Array, "B C"], valid: Bool[Array, "B"]) -> Float[Array, "B E"]:
        """Embeddings in float32; what an invalid row holds changes no other."""
        x = jnp.where(valid[:, None], x.astype(jnp.float32), 0)
        for linear, norm in zip(self.linear[:-1], self.norm, strict=True):
            x = jax.nn.relu(norm(linear(x), valid))
        return self.linear[-1](x)
