"""Image-text models: a ViT and a text encoder that meet in one space (CLIP, SigLIP, SigLIP2).

Sources: Radford et al., ICML 2021 (openai/CLIP); Zhai et al., ICCV 2023 (google-research/big_vision).
"""

import dataclasses
import math

from flax import struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.models.text import TextConfig
from tokjax.models.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class DualConfig:
    """The two towers and the initial temperature.

    Raises:
        ValueError: towers whose features differ in width.
    """

    vision: ViTConfig
    text: TextConfig
    logit_scale: float = math.log(1 / 0.07)  # initial, logarithmic
    logit_bias: float | None = None  # initial; None: the model has none (CLIP). SigLIP: -10

    def __post_init__(self):
        image, text = self.vision.num_classes or self.vision.width, self.text.embed_dim or self.text.width
        if image != text:
            raise ValueError(f"text.embed_dim={text}: must equal the width of image features, {image}")

    @property
    def embed_dim(self) -> int:
        """Width of the common space."""
        return self.vision.num_classes or self.vision.width


class DualOutput(struct.PyTreeNode):
    """Features of length 1 and what turns their products into logits."""

    image: Float[Array, "B E"]
    text: Float[Array, "T E"]
    scale: Float[Array, ""]
    bias: Float[Array, ""] | None

    @property
    def logits(self) -> Float[Array, "B T"]:
        """Logits per image, float32."""
        out = self.scale * jnp.einsum("be,te->bt", self.image, self.text, precision="highest")
        return out if self.bias is None else out + self.bias


def unit(features: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Features at length 1, float32; a zero vector stays zero."""
    x = features.astype(jnp.float32)
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * jnp.where(square > 0, 1 / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
