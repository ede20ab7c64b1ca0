"""A pretrained model's own preprocessing within the data's loader: the same pixels, bit for bit."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from jaxtyping import Float, Float32, Int, UInt8
import numpy as np

from tokjax import viz
from tokjax.data.sources import Fields
from tokjax.errors import UserError
from tokjax.pretrained.preprocess import Naflex, Preprocess


@dataclasses.dataclass(frozen=True)
class AsPretrained:
    """Resizing and cropping as a transform of single images, and normalising as a function of a batch of them.

    A `Naflex` makes no image of one size: its transform gives the patches one below the other, `max_patches` of them,
    those that an image does not have black, and beside them `shape`, the patches down and across.
    """

    preprocess: Preprocess | Naflex

    @property
    def size(self) -> tuple[int, int]:
        if isinstance(self.preprocess, Naflex):
            return self.preprocess.max_patches * self.preprocess.patch_size, self.preprocess.patch_size
        return self.preprocess.size

    @property
    def channels(self) -> int:
        """3, or 1 for a model of grey images."""
        return len(self.preprocess.mean)

    @property
    def dtype(self) -> str:
        """Of the transform's pixels: bytes, or numbers that are scaled already."""
        return "float32" if isinstance(self.preprocess, Preprocess) and self.preprocess.float_resize else "uint8"

    @property
    def fields(self) -> Fields:
        return {"shape": ((2,), "int32")} if isinstance(self.preprocess, Naflex) else {}

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator | None = None) -> Mapping[str, Any]:
        """One image of the data; nothing is random.

        Raises:
            UserError: an image that the preprocessing does not take.
        """
        try:
            pixels = self.preprocess.pixels(image)
        except ValueError as error:
            raise UserError(str(error)) from error
        if isinstance(self.preprocess, Preprocess):
            return {"image": pixels}
        cut = self.preprocess.cut(pixels)
        column = np.zeros((*self.size, self.channels), np.uint8)
        column[: cut.shape[0] * cut.shape[1] * self.preprocess.patch_size] = cut.reshape(-1, *column.shape[1:])
        return {"image": column, "shape": np.array(cut.shape[:2], np.int32)}

    def normalise(
        self, pixels: np.ndarray, out: Float32[np.ndarray, "B H W C"] | None = None
    ) -> Float32[np.ndarray, "B H W C"]:
        """The pixels of a batch of transformed images as the model takes them, float32."""
        return self.preprocess.normalise(pixels, out)

    def picture(
        self, image: Float[np.ndarray, "H W C"], shape: Int[np.ndarray, "2"] | None = None
    ) -> UInt8[np.ndarray, "h w 3"]:
        """A normalised image of a batch as it can be looked at; `shape` of one that is in patches."""
        made = self.preprocess
        if isinstance(made, Naflex) and shape is not None:
            (down, across), p = map(int, shape), made.patch_size
            cut = image[: down * across * p].reshape(down, across, p, p, -1)
            image = cut.transpose(0, 2, 1, 3, 4).reshape(down * p, across * p, -1)
        brightest = 255 * made.rescale
        mean, std = ([value / brightest for value in values] for values in (made.mean, made.std))
        return np.asarray(viz.to_uint8(image, mean, std))
