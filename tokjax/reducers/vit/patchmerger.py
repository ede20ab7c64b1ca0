"""PatchMerger: learned queries attend to the normalised patch tokens, and their answers are the new tokens.

Paper:  Renggli et al., "Learning to Merge Tokens in Vision Transformers", 2022 (arXiv 2202.12015).
Source: JoakimHaurum/TokenReduction, `models/patchmerger.py` (Haurum et al., "Which Tokens to Use?", ICCVW 2023);
        lucidrains/vit-pytorch, `vit_with_patch_merger.py`.
Kind:   soft merge, learned; static length.
Needs:  features before the block.

Steps: z' = LN(z); weights = softmax over the tokens of Q z'^T; the outputs are weights times z', the normalised tokens.
CLS is put back in front.

Where the two codes differ: vit-pytorch scales the logits by C**-0.5 (`scaled=True`), the benchmark does not (default).
Sizes are not tracked. Cost: 2 * k * n * C.
"""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.hooks import ModelInfo
from tokjax.reducers.vit.mergers import Merger, Mergers, layer_norm, own_rngs, softmax_over_tokens


class Queries(Merger):
    """One set of queries."""

    def __init__(self, width: int, count: int, scaled: bool = False, *, rngs: nnx.Rngs):
        self.count, self.scale = count, width**-0.5 if scaled else 1.0
        self.norm = layer_norm(width, 1e-5, rngs)
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (count, width), jnp.float32))

    def weights(
        self, z: Float[Array, "B n C"], valid: Bool[Array, "B n"] | None
    ) -> tuple[Float[Array, "B k n"], Float[Array, "B n C"]]:
        z = self.norm(z)
        logits = jnp.einsum("bnc,kc->bnk", z, self.queries[...], precision="highest") * self.scale
        return softmax_over_tokens(logits, valid), z


class PatchMerger(Mergers):
    """Learned queries before some blocks.

    Args:
        info: of the model.
        keep_rate: location j leaves int(keep_rate**(j+1) * patches) tokens.
        layers: blocks before which it merges; None: three evenly spread ones, 3, 6, 9 of 12. The paper merges once, in
            the middle, into 8 tokens (`layers=(6,), kept=8`).
        kept: tokens that a location leaves, in place of keep_rate.
        scaled: whether logits are divided by the root of the width.
        seed: of the initial parameters.
    """

    def __init__(
        self,
        info: ModelInfo,
        keep_rate: float = 0.7,
        layers: Sequence[int] | None = None,
        kept: int | Sequence[int] | None = None,
        scaled: bool = False,
        seed: int = 0,
    ):
        rngs = own_rngs(seed)
        super().__init__(info, lambda count: Queries(info.width, count, scaled, rngs=rngs), keep_rate, layers, kept)
