"""Reading images of every kind, resizing and cropping them, and doing so for many at a time.

Resizing is Pillow's own (kernels widened when shrinking), which timm, OpenAI's CLIP and Hugging Face's image processors
use. Its two passes, with bytes between them, do not commute: up to Pillow 12 rows come first, while Pillow 13 begins
with columns where the height shrinks much more than the width. Here each pass is a call of its own, rows first, so the
bytes are those of the published pipelines whatever the version.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import io
import math
import os
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from tokjax.errors import UserError

Filter = Literal["bicubic", "bilinear"]
CropRule = Literal["torchvision", "hf"]
Picture = Image.Image | np.ndarray | str | Path | bytes
Images = Sequence[Picture] | np.ndarray

FILTERS: dict[str, Image.Resampling] = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# Pillow's modes that convert to RGB and grey only by way of another one.
_BY_WAY_OF = {"RGBa": "RGBA", "La": "LA", "PA": "RGBA"}
# Pixels (of 4 bytes) that an image may have between resizing and cropping.
_MOST_PIXELS = 2**25


def read(image: Image.Image | str | Path | bytes) -> Image.Image:
    """A decoded image; of several frames the first. Transparency, colours and orientation are left as they are.

    Args:
        image: a path, the encoded bytes, or a Pillow image, which may be one that is not decoded yet.

    Raises:
        UserError: what Pillow cannot decode completely; the path is named.
    """
    if isinstance(image, Image.Image):
        name = str(getattr(image, "filename", "")) or f"the {image.mode} image"
    elif isinstance(image, bytes):
        name = f"the encoded image of {len(image)} bytes"
    else:
        name = str(image)
    try:
        if isinstance(image, Image.Image):
            image.load()
            return image
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            opened.load()
            return opened
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: empty, or not an image of a format that Pillow knows") from error
    except Exception as error:  # decoders raise all sorts at damaged files: OSError, SyntaxError, struct.error, ...
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: cannot be read as an image: {reason}") from error


def to_mode(image: Picture, mode: Literal["RGB", "L"] = "RGB") -> Image.Image:
    """Any 8 or 16 bit image as RGB (or grey), upright.

    The orientation that a camera wrote into EXIF is applied. Grey and black-and-white are repeated, palettes are looked
    up, CMYK, YCbCr and HSV are converted, alpha is dropped (not blended), 16 bit greys keep their upper 8 bits, as 16
    bit colours do, of films the first frame is taken.

    Args:
        image: a Pillow image; uint8 `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or `[H, W, 4]`; or what `read` takes.
        mode: "RGB" or "L".

    Raises:
        UserError: a file or bytes that cannot be decoded.
        ValueError: an array of another type or shape or without pixels, or a Pillow image of 32 bit pixels (modes "I"
            and "F") or of a mode that Pillow does not convert (LAB to grey).
    """
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    elif isinstance(image, Image.Image | str | Path | bytes):
        image = read(image)
    else:
        raise ValueError(
            f"An image is a {type(image).__name__}; allowed are Pillow images, uint8 arrays, paths and encoded bytes."
        )
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == mode:
        return image
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"An image has mode {image.mode!r} (32 bit pixels), whose range is unknown; make it uint8 first."
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in _BY_WAY_OF:
        image = image.convert(_BY_WAY_OF[image.mode])
    try:
        return image.convert(mode)
    except ValueError as error:
        raise ValueError(f"An image has mode {image.mode!r}, which Pillow does not convert to {mode}.") from error


def _from_array(image: np.ndarray) -> Image.Image:
    pixels = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    channels = (*pixels.shape, 1)[2] if pixels.ndim in (2, 3) else 0
    if pixels.dtype != np.uint8 or channels not in (1, 3, 4) or pixels.size == 0:
        raise ValueError(
            f"An image array has shape {image.shape} and type {image.dtype}; allowed is uint8 "
            "[height, width] or [height, width, 1, 3 or 4 channels], not empty."
        )
    return Image.fromarray(pixels)


def short_size(height: int, width: int, size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width after `resize_short`."""
    if isinstance(size, int):
        short, long = min(width, height), max(width, height)
        other = int(size * long / short)
        return (size, other) if height <= width else (other, size)
    ratio = min(height / size[0], width / size[1])
    return round(height / ratio), round(width / ratio)


def resize_square(image: Image.Image, size: tuple[int, int], filter: Filter = "bicubic") -> Image.Image:
    """Resizes to exactly `size` (height, width), whatever the aspect."""
    rows = image.resize((size[1], image.height), FILTERS[filter]) if image.width != size[1] else image
    return rows.resize((size[1], size[0]), FILTERS[filter])


def resize_short(image: Image.Image, size: int | tuple[int, int], filter: Filter = "bicubic") -> Image.Image:
    """Resizes and keeps the aspect.

    Args:
        image: a Pillow image.
        size: the new length of the short side (the long one becomes int(size * long / short), as in torchvision), or a
            (height, width) that the result just covers (timm's rule for targets that are not square).
        filter: "bicubic" or "bilinear".
    """
    return resize_square(image, short_size(image.height, image.width, size), filter)


def crop_offsets(spare: tuple[int, int], rule: CropRule) -> tuple[int, int]:
    """Top and left of a centre crop that leaves out `spare` rows and columns, see `centre_crop`."""
    top, left = (round(s / 2) if rule == "torchvision" else s // 2 for s in spare)
    return top, left


def centre_crop(image: Image.Image, size: tuple[int, int], rule: CropRule = "torchvision") -> Image.Image:
    """The middle `size` (height, width) of an image that is at least as large.

    Args:
        image: a Pillow image.
        size: height and width.
        rule: where the odd pixel goes: "torchvision" rounds half to even, "hf" rounds down.

    Raises:
        ValueError: the image is smaller than the crop.
    """
    width, height = image.size
    spare = (height - size[0], width - size[1])
    if min(spare) < 0:
        raise ValueError(f"An image of {height}x{width} pixels is smaller than the crop of {size[0]}x{size[1]}.")
    top, left = crop_offsets(spare, rule)
    return image.crop((left, top, left + size[1], top + size[0]))


def resize_and_crop(
    image: Image.Image, resized: tuple[int, int], size: tuple[int, int], filter: Filter, rule: CropRule
) -> Image.Image:
    """`resize_square` to `resized`, then `centre_crop` of `size`: the same bytes for less work.

    Columns that the crop drops are dropped after the first pass. An image so elongated that it would fill the memory
    before the crop is resampled where the crop lies alone; its bytes may then differ from the rest's in the last bit.
    """
    (height, width), (new_height, new_width) = (image.height, image.width), resized
    if resized == size:
        return resize_square(image, size, filter)
    top, left = crop_offsets((new_height - size[0], new_width - size[1]), rule)
    bottom, right = top + size[0], left + size[1]
    if max(height * new_width, new_height * size[1]) > _MOST_PIXELS:
        across, down = width / new_width, height / new_height
        box = (left * across, 0, min(right * across, width), height)
        rows = image.resize((size[1], height), FILTERS[filter], box=box)
        return rows.resize(
            (size[1], size[0]), FILTERS[filter], box=(0, top * down, size[1], min(bottom * down, height))
        )
    if new_width > size[1]:
        image = resize_square(image, (height, new_width), filter).crop((left, 0, right, height))
    return resize_square(image, (new_height, size[1]), filter).crop((0, top, size[1], bottom))


def check_normalisation(mean: tuple[float, ...], std: tuple[float, ...], rescale: float) -> None:
    """Raises ValueError unless there are as many of each as channels and every byte becomes a finite number."""
    if len(mean) not in (1, 3) or len(std) != len(mean) or not min(std) > 0:
        raise ValueError(f"mean = {mean}, std = {std}; needed are 3 (RGB) or 1 (grey) each, std above 0.")
    with np.errstate(all="ignore"):
        extremes = normalise(np.array([[0] * len(mean), [255] * len(mean)], np.uint8), mean, std, rescale)
    if not math.isfinite(rescale) or not np.isfinite(extremes).all():
        raise ValueError(f"mean = {mean}, std = {std}, rescale = {rescale}; pixels must stay finite in float32.")


def normalise(
    pixels: np.ndarray,
    mean: Sequence[float] | np.ndarray,
    std: Sequence[float] | np.ndarray,
    rescale: float | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """(pixels * rescale - mean) / std in float32, each step rounded.

    Args:
        pixels: `[..., K]`, uint8 or float32.
        mean: K values. Long rows (of several pixels, `mean` repeated) are much faster than rows of 3 values.
        std: likewise.
        rescale: None: the pixels are scaled already.
        out: float32 `[..., K]`, where the result goes.
    """
    if rescale is None:
        out = np.subtract(pixels, np.asarray(mean, np.float32), out=out)
    else:
        out = np.multiply(pixels, np.float32(rescale), out=out, dtype=np.float32)
        out -= np.asarray(mean, np.float32)
    out /= np.asarray(std, np.float32)
    return out


def normalise_images(
    pixels: np.ndarray,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    rescale: float,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """`normalise` of images `[..., width, channels]`: bytes are scaled by `rescale`, float32 pixels are scaled already.

    Raises:
        ValueError: images of another number of channels than `mean` has.
    """
    *rows, width, channels = pixels.shape
    if channels != len(mean):
        raise ValueError(f"images have {channels} channels, mean and std {len(mean)}.")
    out = np.empty(pixels.shape, np.float32) if out is None else out
    flat = (*rows, width * channels)
    scale = None if pixels.dtype == np.float32 else rescale
    normalise(pixels.reshape(flat), np.tile(mean, width), np.tile(std, width), scale, out=out.reshape(flat))
    return out


def check_batch(images: Images) -> None:
    """Raises ValueError unless `images` is a sequence of images, which a path, bytes or a single image are not."""
    if isinstance(images, np.ndarray) and images.ndim != 4:
        raise ValueError(f"images has shape {images.shape}; allowed are a list of images and [B, H, W, channels].")
    if isinstance(images, Image.Image | str | Path | bytes):
        kind = "Pillow image" if isinstance(images, Image.Image) else type(images).__name__
        raise ValueError(f"images is one {kind}; allowed are a list of images and [B, H, W, channels].")


def for_each(images: Images, do: Callable[[int, Picture], None]) -> None:
    """Calls `do(i, image)` for every image of a batch, several at a time in threads.

    Raises:
        ValueError: what `do` raises (the class stays), with the image's place in the batch.
    """

    def task(i: int) -> None:
        try:
            do(i, images[i])
        except ValueError as error:
            raise type(error)(f"images[{i}]: {error}") from error

    if len(images) < 2:
        for i in range(len(images)):
            task(i)
        return
    if isinstance(images, list | tuple):
        _load_repeated(images)
    with ThreadPoolExecutor(min(len(images), os.cpu_count() or 1, 16)) as pool:
        list(pool.map(task, range(len(images))))


def _load_repeated(images: Sequence[Picture]) -> None:
    """Decodes images that are in the batch more than once: Pillow's decoding is not safe in two threads."""
    seen = set()
    for i, image in enumerate(images):
        if isinstance(image, Image.Image):
            if id(image) in seen:
                try:
                    read(image).getexif()
                except UserError as error:
                    raise UserError(f"images[{i}]: {error}") from error
            seen.add(id(image))
