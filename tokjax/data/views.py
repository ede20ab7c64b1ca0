"""Two augmented crops of an image and a third that encloses both, with their boxes: what A-CLIP trains on.

Sources: microsoft/A-CLIP, `datasets.py` (Yang et al., ICCV 2023); the colours are those of SimCLR and BYOL (Chen et al.
2020, appendix A; Grill et al. 2020, appendix B), with PIL's operations.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

from jaxtyping import UInt8
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from tokjax.data.transforms import check_size, resize, resized_crop_box

VIEWS = 3  # two crops, and the one around them


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


def enclosing_box(first: Box, second: Box, height: int, width: int, rng: np.random.Generator) -> Box:
    """A random box of an image that holds two others: each of its sides is uniform between theirs and the border.

    The published code takes the second crop's height for its left side, and measures the far sides from near ones that
    it has moved since, so that its boxes need not hold the crops. Here they do.
    """
    top, left = (int(rng.integers(0, min(a, b), endpoint=True)) for a, b in zip(first[:2], second[:2], strict=True))
    near = max(first.top + first.height, second.top + second.height)
    bottom = int(rng.integers(near, height, endpoint=True))
    near = max(first.left + first.width, second.left + second.width)
    right = int(rng.integers(near, width, endpoint=True))
    return Box(top, left, bottom - top, right - left)


@dataclasses.dataclass(frozen=True)
class Colours:
    """Random colours of an image, in this order: jitter, grey, blur, solarise. Probabilities are in [0, 1].

    Attributes:
        jitter: probability of changing brightness, contrast, saturation and hue, in random order.
        brightness: factors are uniform in 1 - brightness to 1 + brightness; contrast and saturation alike.
        contrast: towards the image's mean grey.
        saturation: towards its own grey.
        hue: shifts are uniform in -hue to hue turns, at most 0.5.
        grey: probability of dropping all colour.
        blur: probability of a Gaussian blur.
        sigma: its standard deviation is uniform between these, in pixels.
        solarise: probability of inverting all values from 128 on.

    Raises:
        ValueError: a value out of range.
    """

    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey: float = 0.2
    blur: float = 0.1
    sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.2

    def __post_init__(self):
        for name in ("jitter", "grey", "blur", "solarise", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must be between 0 and 0.5, got {self.hue}")
        if len(self.sigma) != 2 or not 0 <= self.sigma[0] <= self.sigma[1]:
            raise ValueError(f"sigma must be two rising numbers of at least 0, got {self.sigma}")

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
        jitter, grey, blur, solarise = rng.random(4)
        picture = Image.fromarray(np.ascontiguousarray(image))
        if jitter < self.jitter:
            picture = self._jittered(picture, rng)
        if grey < self.grey:
            picture = ImageOps.grayscale(picture).convert("RGB")
        if blur < self.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(*self.sigma)))
        if solarise < self.solarise:
            picture = ImageOps.solarize(picture, 128)
        return np.asarray(picture)

    def _jittered(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        factors = [
            (kind, rng.uniform(1 - spread, 1 + spread))
            for kind, spread in (
                (ImageEnhance.Brightness, self.brightness),
                (ImageEnhance.Contrast, self.contrast),
                (ImageEnhance.Color, self.saturation),
            )
        ]
        turn = round(256 * rng.uniform(-self.hue, self.hue))
        for which in rng.permutation(4):
            if which < 3:
                kind, factor = factors[which]
                picture = kind(picture).enhance(factor)
            elif turn:
                channels = np.array(picture.convert("HSV"))
                channels[..., 0] += np.uint8(turn % 256)  # a circle: it wraps
                picture = Image.fromarray(channels, "HSV").convert("RGB")
        return picture


@dataclasses.dataclass(frozen=True)
class Views:
    """The transform: both crops with colours of their own, then the box around them as it is, one below the other.

    In a batch `image` is [B, 3 * height, width, 3], to be reshaped to [B, 3, height, width, 3], and `boxes` [B, 3, 4]
    tells (top, left, height, width) of each in pixels of the image that came in.

    Attributes:
        view_size: (height, width) of every view.
        scale: area share of the two crops.
        ratio: their aspect ratio, width / height.
        colours: of the two crops.
    """

    view_size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    colours: Colours = Colours()

    def __post_init__(self):
        check_size(self.view_size)
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two rising numbers above 0, got {getattr(self, name)}")

    @property
    def size(self) -> tuple[int, int]:
        return VIEWS * self.view_size[0], self.view_size[1]

    @property
    def fields(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return {"boxes": ((VIEWS, 4), "int32")}

    def __call__(self, image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator) -> Mapping[str, Any]:
        height, width = image.shape[:2]
        first, second = (Box(*resized_crop_box(height, width, rng, self.scale, self.ratio)) for _ in range(2))
        around = enclosing_box(first, second, height, width, rng)
        crops = [self.colours(resize(box.of(image), self.view_size), rng) for box in (first, second)]
        views = [*crops, resize(around.of(image), self.view_size)]
        return {"image": np.concatenate(views), "boxes": np.array([first, second, around], np.int32)}
