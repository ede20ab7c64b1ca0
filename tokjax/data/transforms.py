"""From the bytes of an image file to the float32 batch of a training step, in numpy and PIL.

Everything random takes a `numpy.random.Generator`: the caller decides what the draw depends on. Images stay uint8
until they are in a batch, where normalising and mixing are done for all rows at once.
"""

from collections.abc import Sequence
import dataclasses
import io
import math
from typing import Literal

from jaxtyping import Float32, Int32, UInt8
import numpy as np
from PIL import Image

ResizeMode = Literal["short", "square"]
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """The bytes of one image do not decode; the loader counts these."""


def decode(data: bytes | memoryview | None) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes an image file, upright (EXIF orientation) and in RGB.

    Transparency is dropped, not blended; 16-bit grey is scaled to 8 bits (PIL alone would clip it).

    Raises:
        ImageError: the data is missing, empty, truncated or not an image; says which.
    """
    if not data:
        raise ImageError("no bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            turn = _UPRIGHT.get(_orientation(image))
            upright = image if turn is None else image.transpose(turn)
            return np.asarray(_to_rgb(upright))
    except MemoryError:
        raise
    except Exception as error:  # on damaged data decoders raise OSError, SyntaxError, struct.error, IndexError, ...
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error) or repr(error)
        raise ImageError(reason) from error


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata does not make the pixels useless
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def resize(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Bicubic, antialiased when shrinking; `size` is (height, width)."""
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def fit(
    image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int], *, mode: ResizeMode = "short", crop_pct: float = 1.0
) -> UInt8[np.ndarray, "h w 3"]:
    """The deterministic way to `size` (height, width), as in evaluation.

    `short` keeps the aspect ratio: resize so that the image just covers `size / crop_pct`, then cut the centre (for a
    square size: the short side becomes floor(size / crop_pct), as in torchvision and timm). `square` resizes both
    sides independently and cuts nothing.

    Raises:
        ValueError: unknown `mode`, or `crop_pct` outside (0, 1].
    """
    covering, (top, left) = _covering(image.shape[:2], size, mode, crop_pct)
    return resize(image, covering)[top : top + size[0], left : left + size[1]]


def fit_labels(
    labels: Int32[np.ndarray, "H W"], size: tuple[int, int], *, mode: ResizeMode = "short", crop_pct: float = 1.0
) -> Int32[np.ndarray, "h w"]:
    """`fit` for a map of class ids: the same window, every pixel takes the id that is nearest to its centre.

    Raises:
        ValueError: as `fit`.
    """
    (rows, columns), (top, left) = _covering(labels.shape, size, mode, crop_pct)
    picked = (
        ((np.arange(n) + 0.5) * have / n).astype(int) for n, have in zip((rows, columns), labels.shape, strict=True)
    )
    return labels[np.ix_(*picked)][top : top + size[0], left : left + size[1]]


def _covering(
    shape: tuple[int, ...], size: tuple[int, int], mode: ResizeMode, crop_pct: float
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size (height, width) to resize to, and where (top, left) the window of `size` is cut from that."""
    _check_fit(mode, crop_pct)
    if mode == "square":
        return size, (0, 0)
    rows, columns = shape
    need_rows, need_columns = (math.floor(side / crop_pct) for side in size)
    if need_rows * columns >= need_columns * rows:  # the height decides
        covering = need_rows, max(need_columns, need_rows * columns // rows)
    else:
        covering = max(need_rows, need_columns * rows // columns), need_columns
    top, left = (round((have - want) / 2) for have, want in zip(covering, size, strict=True))
    return covering, (top, left)


def pad_crop(image: UInt8[np.ndarray, "H W 3"], pad: int, rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    """The CIFAR crop: `pad` black pixels on each side, then a random window of the old size."""
    height, width = image.shape[:2]
    down, right = int(rng.integers(-pad, pad + 1)), int(rng.integers(-pad, pad + 1))
    window = np.zeros_like(image)
    window[max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)] = image[
        max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)
    ]
    return window


def resized_crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """The random box (top, left, height, width) of the Inception / ImageNet crop.

    Area share uniform in `scale`, aspect ratio (width / height) log-uniform in `ratio`; ten attempts, then the largest
    centred box with an allowed ratio.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(0, height - box_height, endpoint=True))
            left = int(rng.integers(0, width - box_width, endpoint=True))
            return top, left, box_height, box_width
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The transform of evaluation: `fit`, nothing random. Called with (image, rng) like `Training`; rng is not used."""

    size: tuple[int, int]
    mode: ResizeMode = "short"
    crop_pct: float = 1.0

    def __post_init__(self):
        check_size(self.size)
        _check_fit(self.mode, self.crop_pct)

    def __call__(
        self, image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator | None = None
    ) -> UInt8[np.ndarray, "h w 3"]:
        return fit(image, self.size, mode=self.mode, crop_pct=self.crop_pct)


@dataclasses.dataclass(frozen=True)
class Training:
    """The transform of training: a random crop, then perhaps a mirror image.

    Attributes:
        size: (height, width) of the result.
        flip: mirror left and right with probability 1/2.
        crop: `pad` (CIFAR: `fit`, then `pad_crop`), `resized` (ImageNet: a random box, resized) or None (`fit`).
        pad: pixels of `pad`.
        scale: area share of `resized`.
        ratio: aspect ratio, width / height, of `resized`.
        mode: resize mode of `fit`.
        crop_pct: crop share of `fit`.
    """

    size: tuple[int, int]
    flip: bool = True
    crop: Literal["pad", "resized"] | None = None
    pad: int = 4
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    mode: ResizeMode = "short"
    crop_pct: float = 1.0

    def __post_init__(self):
        check_size(self.size)
        _check_fit(self.mode, self.crop_pct)
        if self.crop not in ("pad", "resized", None):
            raise ValueError(f"crop must be 'pad', 'resized' or None, got {self.crop!r}")
        if self.crop == "pad" and not 0 <= self.pad <= min(self.size):
            raise ValueError(f"pad must be between 0 and the image size {self.size}, got {self.pad}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio must be 0 < low <= high, got {self.ratio}")

    def __call__(self, image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
        if self.crop == "resized":
            rows, columns = image.shape[:2]
            top, left, height, width = resized_crop_box(rows, columns, rng, self.scale, self.ratio)
            image = resize(image[top : top + height, left : left + width], self.size)
        else:
            image = fit(image, self.size, mode=self.mode, crop_pct=self.crop_pct)
            if self.crop == "pad" and self.pad:
                image = pad_crop(image, self.pad, rng)
        return image[:, ::-1] if self.flip and rng.random() < 0.5 else image


@dataclasses.dataclass(frozen=True)
class Normalise:
    """uint8 -> float32, `(x * rescale - mean) / std` for each channel, in two steps of a factor and a summand.

    Raises:
        ValueError: numbers that are not finite or not three, or, when called, images of another number of channels.
    """

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale: float = 1 / 255

    def __post_init__(self):
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} must be three finite numbers, got {values}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if not math.isfinite(self.rescale):
            raise ValueError(f"rescale must be finite, got {self.rescale}")

    def __call__(
        self, images: UInt8[np.ndarray, "B H W 3"], out: Float32[np.ndarray, "B H W 3"] | None = None
    ) -> Float32[np.ndarray, "B H W 3"]:
        out = np.empty(images.shape, np.float32) if out is None else out
        batch, height, width, channels = images.shape
        if channels != 3:
            raise ValueError(f"images must have 3 channels, got {channels}")
        scale, shift = self._row(width)
        rows = out.reshape(batch, height, width * channels)  # a view: `out` is contiguous
        np.multiply(images.reshape(rows.shape), scale, out=rows)
        rows += shift
        return out

    def _row(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        # Constants for a whole image row: broadcasting over an axis of length three is five times slower.
        std = np.asarray(self.std, np.float64)
        scale, shift = self.rescale / std, -np.asarray(self.mean, np.float64) / std
        return np.tile(scale.astype(np.float32), width), np.tile(shift.astype(np.float32), width)


@dataclasses.dataclass(frozen=True)
class Mix:
    """Mixup, CutMix and label smoothing of a batch, with timm's conventions.

    One decision and one lambda for the whole batch; row i meets row B-1-i (the batch reversed). Mixup (Zhang et al.
    2018, arXiv 1710.09412) blends the pair, CutMix (Yun et al. 2019, arXiv 1905.04899) pastes a box of the partner;
    since a box is clipped at the border, lambda becomes the share of the image that really stayed. Targets are the
    same blend of two smoothed one-hot rows: 1 - s + s/K for the class, s/K for the others.

    Attributes:
        num_classes: K.
        mixup: alpha of Beta(alpha, alpha); 0: off.
        cutmix: the same for CutMix.
        prob: probability that a batch is mixed at all.
        switch_prob: probability of CutMix where both are on.
        label_smoothing: s.
    """

    num_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self):
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is the alpha of a Beta distribution, at least 0, got {getattr(self, name)}")
        for name in ("prob", "switch_prob", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    def __call__(
        self, images: Float32[np.ndarray, "B H W 3"], labels: Int32[np.ndarray, " B"], rng: np.random.Generator
    ) -> tuple[Float32[np.ndarray, "B H W 3"], Float32[np.ndarray, "B K"]]:
        share = 1.0
        alpha, boxed = self._draw(rng)
        if alpha:
            share = float(rng.beta(alpha, alpha))
            if boxed:
                height, width = images.shape[1:3]
                top, bottom, left, right = cutmix_box(height, width, share, rng)
                share = 1 - (bottom - top) * (right - left) / (height * width)
                pasted = images.copy()
                pasted[:, top:bottom, left:right] = images[::-1, top:bottom, left:right]
                images = pasted
            else:
                images = images * np.float32(share) + images[::-1] * np.float32(1 - share)
        targets = smooth_one_hot(labels, self.num_classes, self.label_smoothing)
        if share < 1:
            targets = targets * np.float32(share) + targets[::-1] * np.float32(1 - share)
        return images, targets

    def _draw(self, rng: np.random.Generator) -> tuple[float, bool]:
        """The alpha to use (0: leave the batch alone) and whether it is CutMix."""
        mixed, switched = rng.random(2)
        if mixed >= self.prob:
            return 0.0, False
        boxed = switched < self.switch_prob if self.mixup and self.cutmix else bool(self.cutmix)
        return (self.cutmix if boxed else self.mixup), boxed


def cutmix_box(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a box of about `1 - share` of the area around a uniform centre, clipped."""
    cut = math.sqrt(1 - share)
    half_height, half_width = int(height * cut) // 2, int(width * cut) // 2
    row, column = int(rng.integers(height)), int(rng.integers(width))
    return (
        max(row - half_height, 0),
        min(row + half_height, height),
        max(column - half_width, 0),
        min(column + half_width, width),
    )


def smooth_one_hot(labels: Int32[np.ndarray, " B"], num_classes: int, smoothing: float) -> Float32[np.ndarray, "B K"]:
    off = smoothing / num_classes
    targets = np.full((len(labels), num_classes), off, np.float32)
    targets[np.arange(len(labels)), labels] = 1 - smoothing + off
    return targets


def check_size(size: Sequence[int]) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (height, width), both at least 1, got {size}")


def _check_fit(mode: str, crop_pct: float) -> None:
    if mode not in ("short", "square"):
        raise ValueError(f"resize mode must be 'short' or 'square', got {mode!r}")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must be in (0, 1], got {crop_pct}")
