"""SiT's token slimming: every output token is a softmax mixture of all patch tokens.

Paper:  Zong et al., "Self-slimmed Vision Transformer", ECCV 2022 (arXiv 2111.12624), the token slimming module.
Source: JoakimHaurum/TokenReduction, `models/sit.py` (Haurum et al., "Which Tokens to Use?", ICCVW 2023).
Kind:   soft merge, learned; static length.
Needs:  features before the block.

Steps: weights = Linear(GELU(Linear(LN(z)))), from C over C/2 to the number of outputs; softmax over the tokens, with a
learned factor on the logits; the outputs mix the tokens themselves, not their norm. CLS is not touched.

The paper's reverse module and its distillation belong to training and are not in the benchmark's code, nor here.
Sizes are not tracked. Cost: C * C/2 + C/2 * k a token, and k * n * C for the mixture.
"""

from collections.abc import Sequence

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.hooks import ModelInfo
from tokjax.reducers.vit.mergers import Merger, Mergers, layer_norm, linear, own_rngs, softmax_over_tokens


class Slimming(Merger):
    """One slimming module."""

    def __init__(self, width: int, count: int, *, rngs: nnx.Rngs):
        self.count = count
        self.norm = layer_norm(width, 1e-5, rngs)
        self.hidden, self.out = linear(width, width // 2, rngs), linear(width // 2, count, rngs)
        self.scale = nnx.Param(jnp.ones((), jnp.float32))

    def weights(
        self, z: Float[Array, "B n C"], valid: Bool[Array, "B n"] | None
    ) -> tuple[Float[Array, "B k n"], Float[Array, "B n C"]]:
        hidden = nnx.gelu(self.hidden(self.norm(z)), approximate=False)
        return softmax_over_tokens(self.out(hidden) * self.scale[...], valid), z


class SiT(Mergers):
    """Token slimming before some blocks.

    Args:
        info: of the model.
        keep_rate: location j leaves int(keep_rate**(j+1) * patches) tokens.
        layers: blocks before which it merges; None: three evenly spread ones, 3, 6, 9 of 12.
        kept: tokens that a location leaves, in place of keep_rate.
        seed: of the initial parameters.
    """

    def __init__(
        self,
        info: ModelInfo,
        keep_rate: float = 0.7,
        layers: Sequence[int] | None = None,
        kept: int | Sequence[int] | None = None,
        seed: int = 0,
    ):
        rngs = own_rngs(seed)
        super().__init__(info, lambda count: Slimming(info.width, count, rngs=rngs), keep_rate, layers, kept)
