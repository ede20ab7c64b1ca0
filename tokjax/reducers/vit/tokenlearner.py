"""TokenLearner: attention maps over the image, one for each output token.

Paper:  Ryoo et al., "TokenLearner: Adaptive Space-Time Tokenization for Videos", NeurIPS 2021 (arXiv 2106.11297).
Source: google-research/scenic, `projects/token_learner/model.py`.
Kind:   soft merge, learned; static length.
Needs:  features before the block; "v1" also the whole patch grid.

Version "v1.1" (the code's default): maps = Dense(S)(GELU(Dense(64)(LN(z)))), softmax over the positions.
Version "v1": LN, three 3x3 convolutions to S channels with GELU and one without, sigmoid; outputs are sums over the
positions, or means (`how="mean"`). Both use the tanh GELU and mix the tokens themselves, not their norm.
`Fuser` brings the outputs back to all positions, where a model wants that.

Sizes are not tracked; CLS, which the paper's models lack, is not touched.
Cost (v1.1): 64 * (C + S) a token, and S * n * C for the mixture.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax import schedules
from tokjax.hooks import ModelInfo
from tokjax.reducers.vit.mergers import Merger, Mergers, layer_norm, linear, own_rngs, softmax_over_tokens

Version = Literal["v1.1", "v1"]
BOTTLENECK = 64


class Masks(nnx.Module):
    """A small MLP from features to logits of S maps."""

    def __init__(self, width: int, maps: int, *, rngs: nnx.Rngs):
        self.hidden, self.out = linear(width, BOTTLENECK, rngs), linear(BOTTLENECK, maps, rngs)

    def __call__(self, x: Float[Array, "B n C"]) -> Float[Array, "B n S"]:
        return self.out(nnx.gelu(self.hidden(x), approximate=True))


class DenseMaps(Merger):
    """Version 1.1."""

    def __init__(self, width: int, count: int, *, rngs: nnx.Rngs):
        self.count = count
        self.norm, self.masks = layer_norm(width, 1e-6, rngs), Masks(width, count, rngs=rngs)

    def weights(
        self, z: Float[Array, "B n C"], valid: Bool[Array, "B n"] | None
    ) -> tuple[Float[Array, "B k n"], Float[Array, "B n C"]]:
        return softmax_over_tokens(self.masks(self.norm(z)), valid), z


class ConvMaps(Merger):
    """Version 1, on the whole grid of patches."""

    def __init__(
        self, width: int, count: int, grid: tuple[int, int], how: Literal["sum", "mean"] = "sum", *, rngs: nnx.Rngs
    ):
        self.count, self.grid, self.how = count, grid, how
        self.norm = layer_norm(width, 1e-6, rngs)
        inputs = (width, *(count,) * 3)
        self.convs = nnx.List(
            [nnx.Conv(c, count, (3, 3), use_bias=False, precision="highest", rngs=rngs) for c in inputs]
        )

    def weights(
        self, z: Float[Array, "B n C"], valid: Bool[Array, "B n"] | None
    ) -> tuple[Float[Array, "B k n"], Float[Array, "B n C"]]:
        b, n, c = z.shape
        if valid is not None or n != self.grid[0] * self.grid[1]:
            raise ValueError(f"version='v1': needs all patches of the grid {self.grid} and no valid mask; here are {n}")
        maps = self.norm(z).reshape(b, *self.grid, c)
        for conv in self.convs[:-1]:
            maps = nnx.gelu(conv(maps), approximate=True)
        maps = nnx.sigmoid(self.convs[-1](maps)).reshape(b, n, self.count).swapaxes(1, 2)
        return maps / n if self.how == "mean" else maps, z


class Fuser(nnx.Module):
    """Mixes learned tokens with each other and spreads them over the original positions."""

    def __init__(self, width: int, tokens: int, *, rngs: nnx.Rngs):
        self.norm1, self.norm2, self.norm = (layer_norm(width, 1e-6, rngs) for _ in range(3))
        self.across = nnx.Linear(
            tokens, tokens, kernel_init=nnx.initializers.zeros, precision="highest", rngs=rngs
        )  # over the token axis
        self.masks = Masks(width, tokens, rngs=rngs)

    def __call__(self, learned: Float[Array, "B S C"], original: Float[Array, "B n C"]) -> Float[Array, "B n C"]:
        """What the encoder adds to the original tokens."""
        mixed = self.norm2(self.across(self.norm1(learned).swapaxes(1, 2)).swapaxes(1, 2))
        spread = nnx.sigmoid(self.masks(self.norm(original)))
        return jnp.einsum("bns,bsc->bnc", spread, mixed, precision="highest")


class TokenLearner(Mergers):
    """Learned maps before some blocks.

    Args:
        info: of the model.
        keep_rate: location j leaves int(keep_rate**(j+1) * patches) tokens.
        layers: blocks before which it merges; None: three evenly spread ones, 3, 6, 9 of 12, for "v1" the first of
            them. The paper's ViT-B has `layers=(9,), kept=16`.
        kept: tokens that a location leaves, in place of keep_rate.
        version: "v1.1" or "v1", see above.
        how: of "v1": "sum" or "mean" over the positions.
        seed: of the initial parameters.

    Raises:
        ValueError: an unknown version or how, or "v1" at several locations or without a grid.
    """

    def __init__(
        self,
        info: ModelInfo,
        keep_rate: float = 0.7,
        layers: Sequence[int] | None = None,
        kept: int | Sequence[int] | None = None,
        version: Version = "v1.1",
        how: Literal["sum", "mean"] = "sum",
        seed: int = 0,
    ):
        if version not in get_args(Version):
            raise ValueError(f"version={version!r}: must be one of {', '.join(get_args(Version))}")
        if how not in ("sum", "mean"):
            raise ValueError(f"how={how!r}: must be 'sum' or 'mean'")
        grid, rngs = info.grid, own_rngs(seed)
        if version == "v1.1":
            super().__init__(info, lambda count: DenseMaps(info.width, count, rngs=rngs), keep_rate, layers, kept)
            return
        if grid is None:
            raise ValueError("version='v1': needs a model with a grid of patches")
        layers = schedules.stages(info.depth)[:1] if layers is None else layers
        if len(layers) > 1:
            raise ValueError(f"layers={tuple(layers)}: version='v1' needs the whole grid: give one block")
        super().__init__(info, lambda count: ConvMaps(info.width, count, grid, how, rngs=rngs), keep_rate, layers, kept)
