"""Images of any aspect as a bounded number of patches: the input of SigLIP2's NaFlex models.

Every image is resized, with next to its own aspect, to the largest size whose patches still fit; the batch is padded to
one number of patches. Tschannen et al., "SigLIP 2", 2025, section 3.2; numbers as transformers' `siglip2` processor.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from PIL import Image

from tokjax.models.vit import Patches
from tokjax.pretrained.images import (
    FILTERS,
    Filter,
    Images,
    Picture,
    check_batch,
    check_normalisation,
    for_each,
    normalise_images,
    resize_square,
    to_mode,
)

HALF = (0.5, 0.5, 0.5)


def fit(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """Height and width, multiples of the patch, of the largest image of this aspect that has at most so many patches.

    The scale is found by bisection of (1e-6, 100) down to 1e-5, which decides between neighbouring sizes and keeps
    images of a few pixels small.
    """

    def grid(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / patch_size)), max(1, math.ceil(width * scale / patch_size))

    low, high = 1e-5 / 10, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        down, across = grid(middle)
        low, high = (middle, high) if down * across <= max_patches else (low, middle)
    down, across = grid(low)
    return down * patch_size, across * patch_size


@dataclasses.dataclass(frozen=True)
class Naflex:
    """Resize, scale, normalise, cut into patches. Callable on images; hashable; goes to and from plain values.

    Attributes:
        patch_size: pixels down and across a patch.
        max_patches: patches of every image after padding.
        resize: whether images are resized; without it their sides must be multiples of the patch, and fit.
        filter: "bilinear" or "bicubic".
        mean: subtracted from the scaled pixels, one value a channel: three for RGB, one for grey.
        std: what the rest is divided by, likewise.
        rescale: what bytes are multiplied by first.

    Raises:
        ValueError: a value out of range.
    """

    patch_size: int = 16
    max_patches: int = 256
    resize: bool = True
    filter: Filter = "bilinear"
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    rescale: float = 1 / 255

    def __post_init__(self):
        for field in ("mean", "std"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        if self.filter not in FILTERS:
            raise ValueError(f"filter = {self.filter!r}; allowed are {', '.join(map(repr, FILTERS))}.")
        for field in ("patch_size", "max_patches"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} = {value!r}; it must be a whole number, at least 1.")
        check_normalisation(self.mean, self.std, self.rescale)

    def __call__(self, images: Images) -> Patches:
        """Preprocesses a batch, several images at a time in threads.

        Args:
            images: a sequence of Pillow images, uint8 `[H, W(, channels)]` arrays, paths and encoded bytes, of any
                sizes, or one uint8 array `[B, H, W, channels]`. See `images.to_mode` for what becomes of them.

        Returns:
            `Patches` of NumPy arrays: float32 `[B, max_patches, patch_size ** 2 * channels]`, zero where `valid` is
            False, and the patches down and across of every image.

        Raises:
            UserError: a file that cannot be decoded.
            ValueError: not a batch, an image that is not 8 or 16 bit, or, without resizing, one of another size.
        """
        check_batch(images)
        p, channels = self.patch_size, len(self.mean)
        values = p**2 * channels
        patches: Any = np.zeros((len(images), self.max_patches, values), np.float32)
        valid: Any = np.zeros((len(images), self.max_patches), bool)
        shape: Any = np.zeros((len(images), 2), np.int32)

        def fill(i: int, image: Picture) -> None:
            cut = self.cut(self.pixels(image))
            down, across = shape[i] = cut.shape[:2]
            valid[i, : down * across] = True
            # As patches of one row of pixels, for speed.
            self.normalise(
                cut.reshape(down * across, p * p, channels),
                patches[i, : down * across].reshape(down * across, p * p, channels),
            )

        for_each(images, fill)
        return Patches(patches=patches, valid=valid, shape=shape)

    def pixels(self, image: Picture) -> np.ndarray:
        """One image converted and resized: bytes `[down * patch_size, across * patch_size, channels]`."""
        image = self.transform(image)
        return np.asarray(image).reshape(image.height, image.width, -1)

    def normalise(self, pixels: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Bytes `[..., width, channels]`, of whole images or of patches, normalised to float32; `out`: contiguous."""
        return normalise_images(pixels, self.mean, self.std, self.rescale, out)

    def transform(self, image: Picture) -> Image.Image:
        """One image converted and resized, still in bytes."""
        image = to_mode(image, "RGB" if len(self.mean) == 3 else "L")
        if self.resize:
            size = fit(image.height, image.width, self.patch_size, self.max_patches)
            return resize_square(image, size, self.filter)
        (down, rest), (across, other) = (divmod(side, self.patch_size) for side in (image.height, image.width))
        if rest or other or down * across > self.max_patches:
            raise ValueError(
                f"An image of {image.height}x{image.width} pixels is not resized (resize = False); its sides must be "
                f"multiples of {self.patch_size} that give at most {self.max_patches} patches."
            )
        return image

    def cut(self, pixels: np.ndarray) -> np.ndarray:
        """`[height, width(, channels)]` as `[down, across, patch_size, patch_size, channels]`."""
        p = self.patch_size
        parts = pixels.reshape(pixels.shape[0] // p, p, pixels.shape[1] // p, p, len(self.mean))
        return parts.transpose(0, 2, 1, 3, 4)

    def at(self, size: tuple[int, int]) -> "Naflex":
        """The same: how many patches there are does not depend on the size of a model's position table."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Naflex":
        """The inverse of `to_dict`; raises ValueError for unknown names and values out of range."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"A naflex preprocess has no {', '.join(sorted(unknown))}.")
        return cls(**values)
