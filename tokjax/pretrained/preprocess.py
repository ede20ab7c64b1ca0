"""From images to the normalised pixels that a checkpoint was evaluated with.

A published accuracy belongs to one way of resizing and cropping. The ways that exist among vision transformers:

* timm's evaluation: short side to floor(S / crop_pct), centre crop of S (`timm_eval`);
* the DeiT and MAE scripts: short side to int(256 / 224 * S), bicubic, centre crop (`script_eval`);
* Hugging Face's image processors: S x S whatever the aspect, or a short side; a crop or none (`from_processor`).

Resizing is Pillow's own (uint8 between its two passes, kernels widened when shrinking), so the bytes are those of the
published pipelines.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import math
import os
from typing import Any, Literal

from jaxtyping import Float
import numpy as np
from PIL import ExifTags, Image, ImageOps

from tokjax.errors import UserError

Filter = Literal["bicubic", "bilinear"]
CropRule = Literal["torchvision", "hf"]
Images = Sequence[Image.Image | np.ndarray] | np.ndarray

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

_FILTERS: dict[str, Image.Resampling] = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def to_mode(image: Image.Image | np.ndarray, mode: Literal["RGB", "L"] = "RGB") -> Image.Image:
    """Any 8 or 16 bit image as RGB (or grey), upright.

    The orientation that a camera wrote into EXIF is applied. Grey is repeated, palettes are looked up, CMYK is
    converted, alpha is dropped (not blended), 16 bit greys keep their upper 8 bits.

    Args:
        image: a Pillow image, or uint8 `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or `[H, W, 4]`.
        mode: "RGB" or "L".

    Raises:
        ValueError: an array of another type or shape, or a Pillow image of 32 bit pixels (modes "I" and "F").
    """
    if isinstance(image, np.ndarray):
        pixels = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
        if (
            pixels.dtype != np.uint8
            or pixels.ndim not in (2, 3)
            or (pixels.ndim == 3 and pixels.shape[-1] not in (3, 4))
        ):
            raise ValueError(
                f"An image array has shape {image.shape} and type {image.dtype}; allowed is uint8 "
                "[height, width] or [height, width, 1, 3 or 4 channels]."
            )
        image = Image.fromarray(pixels)
    elif not isinstance(image, Image.Image):
        raise ValueError(f"An image is a {type(image).__name__}; allowed are Pillow images and uint8 arrays.")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"An image has mode {image.mode!r} (32 bit pixels), whose range is unknown; make it uint8 first."
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def resize_square(image: Image.Image, size: tuple[int, int], filter: Filter = "bicubic") -> Image.Image:
    """Resizes to exactly `size` (height, width), whatever the aspect."""
    return image.resize((size[1], size[0]), _FILTERS[filter])


def resize_short(image: Image.Image, size: int | tuple[int, int], filter: Filter = "bicubic") -> Image.Image:
    """Resizes and keeps the aspect.

    Args:
        image: a Pillow image.
        size: the new length of the short side (the long one becomes int(size * long / short), as in torchvision), or a
            (height, width) that the result just covers (timm's rule for targets that are not square).
        filter: "bicubic" or "bilinear".
    """
    width, height = image.size
    if isinstance(size, int):
        short, long = min(width, height), max(width, height)
        other = int(size * long / short)
        new = (size, other) if height <= width else (other, size)
    else:
        ratio = min(height / size[0], width / size[1])
        new = (round(height / ratio), round(width / ratio))
    return resize_square(image, new, filter)


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
    top, left = (round(s / 2) if rule == "torchvision" else s // 2 for s in spare)
    return image.crop((left, top, left + size[1], top + size[0]))


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Resize, crop, scale, normalise. Callable on images; hashable; goes to and from a dict of plain values.

    Attributes:
        size: height and width of the result, in pixels.
        resize: "short" keeps the aspect, "square" does not.
        resize_to: what is resized to before the crop: an int (the short side, or both sides) or (height, width).
        filter: "bicubic" or "bilinear".
        crop: whether a centre crop of `size` follows; without it `resize_to` must be `size`.
        crop_rule: where a centre crop's odd pixel goes, see `centre_crop`.
        mean: subtracted from the scaled pixels, one value a channel: three for RGB, one for grey.
        std: what the rest is divided by, likewise.
        rescale: what bytes are multiplied by first.
    """

    size: tuple[int, int]
    resize: Literal["short", "square"] = "short"
    resize_to: int | tuple[int, int] = 256
    filter: Filter = "bicubic"
    crop: bool = True
    crop_rule: CropRule = "torchvision"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    rescale: float = 1 / 255

    def __post_init__(self):
        for field in ("size", "resize_to", "mean", "std"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        if isinstance(self.resize_to, tuple) and len(set(self.resize_to)) == 1:
            object.__setattr__(self, "resize_to", self.resize_to[0])  # one way to say it
        allowed = {"resize": ("short", "square"), "filter": tuple(_FILTERS), "crop_rule": ("torchvision", "hf")}
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise ValueError(f"{field} = {getattr(self, field)!r}; allowed are {', '.join(map(repr, values))}.")
        if len(self.size) != 2 or min(*self.size, *self._resize_to) < 1:
            raise ValueError(f"size = {self.size}, resize_to = {self.resize_to}; lengths must be (height, width) >= 1.")
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean) or min(self.std) <= 0:
            raise ValueError(f"mean = {self.mean}, std = {self.std}; needed are 3 (RGB) or 1 (grey) each, std above 0.")
        if self.crop and any(r < s for r, s in zip(self._resize_to, self.size, strict=True)):
            raise ValueError(f"resize_to = {self.resize_to} is smaller than the crop, size = {self.size}.")
        if not self.crop and (self.resize != "square" or self._resize_to != tuple(self.size)):
            raise ValueError(
                f"Without a crop, resize must be 'square' and resize_to the size; got resize = {self.resize!r}, "
                f"resize_to = {self.resize_to}, size = {self.size}."
            )

    @property
    def _resize_to(self) -> tuple[int, int]:
        return (self.resize_to, self.resize_to) if isinstance(self.resize_to, int) else self.resize_to

    def __call__(self, images: Images) -> Float[np.ndarray, "B h w channels"]:
        """Preprocesses a batch, several images at a time in threads.

        Args:
            images: a sequence of Pillow images and uint8 `[H, W(, channels)]` arrays of any sizes, or one uint8 array
                `[B, H, W, channels]`. See `to_mode` for what becomes of grey, alpha, palettes and orientation.

        Returns:
            float32 `[B, *size, channels]`, with as many channels as `mean` has values.

        Raises:
            ValueError: not a batch, or an image that is not 8 or 16 bit.
        """
        if isinstance(images, np.ndarray) and images.ndim != 4:
            raise ValueError(f"images has shape {images.shape}; allowed are a list of images and [B, H, W, channels].")
        if isinstance(images, Image.Image):
            raise ValueError("images is one Pillow image; allowed are a list of images and [B, H, W, channels].")
        out = np.empty((len(images), *self.size, len(self.mean)), np.float32)

        def fill(i: int) -> None:
            pixels = np.asarray(self.transform(images[i]))
            out[i] = pixels.reshape(out.shape[1:])
            out[i] *= np.float32(self.rescale)
            out[i] -= np.array(self.mean, np.float32)
            out[i] /= np.array(self.std, np.float32)

        if len(images) < 2:
            for i in range(len(images)):
                fill(i)
            return out
        with ThreadPoolExecutor(min(len(images), os.cpu_count() or 1, 16)) as pool:
            list(pool.map(fill, range(len(images))))
        return out

    def transform(self, image: Image.Image | np.ndarray) -> Image.Image:
        """One image converted, resized and cropped, still in bytes."""
        image = to_mode(image, "RGB" if len(self.mean) == 3 else "L")
        if self.resize == "short":
            image = resize_short(image, self.resize_to, self.filter)
        else:
            image = resize_square(image, self._resize_to, self.filter)
        return centre_crop(image, self.size, self.crop_rule) if self.crop else image

    def at(self, size: tuple[int, int]) -> "Preprocess":
        """The same for another image size: what is resized to grows in proportion, rounded down."""
        if tuple(size) == tuple(self.size):
            return self
        height, width = (int(r * new / old) for r, new, old in zip(self._resize_to, size, self.size, strict=True))
        return dataclasses.replace(self, size=size, resize_to=(height, width))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocess":
        """The inverse of `to_dict`; raises ValueError for unknown names and values out of range."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"A preprocess has no {', '.join(sorted(unknown))}.")
        return cls(**values)


def timm_eval(
    size: tuple[int, int],
    crop_pct: float = 0.9,
    interpolation: str = "bicubic",
    mean: Sequence[float] = HALF,
    std: Sequence[float] = HALF,
    crop_mode: str = "center",
) -> Preprocess:
    """timm's evaluation transform (`transforms_imagenet_eval`) from the fields of a `pretrained_cfg`.

    Raises:
        UserError: a filter or crop mode that vision transformers do not use ("border" pads, "random" is random).
    """
    modes: dict[str, Literal["short", "square"]] = {"center": "short", "squash": "square"}
    filters: dict[str, Filter] = {"bicubic": "bicubic", "bilinear": "bilinear"}
    if crop_mode not in modes or interpolation not in filters:
        raise UserError(
            f"interpolation = {interpolation!r}, crop_mode = {crop_mode!r} in pretrained_cfg; "
            f"allowed are {', '.join(filters)} and {', '.join(modes)}."
        )
    return Preprocess(
        size=size,
        resize=modes[crop_mode],
        resize_to=(math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct)),
        filter=filters[interpolation],
        mean=tuple(mean),
        std=tuple(std),
    )


def script_eval(size: tuple[int, int]) -> Preprocess:
    """The DeiT and MAE scripts: 256 / 224 of the size, bicubic; MAE's rule above 224 px: the size itself."""
    height, width = (s if s > 224 else int(256 / 224 * s) for s in size)
    return Preprocess(size=size, resize_to=(height, width))


def from_processor(processor: dict[str, Any], default: Preprocess) -> Preprocess:
    """Reads a `preprocessor_config.json` of Hugging Face.

    Understood are `size` as a number (both sides, as in the `vit` and `deit` processors), as `{"height", "width"}` and
    as `{"shortest_edge"}`; `crop_size` likewise; `resample` (2 bilinear, 3 bicubic); `rescale_factor`, `image_mean`,
    `image_std` and the `do_` switches of cropping, scaling and normalising. Resizing is always done: `do_resize` false
    promises images of the right size, for which it changes nothing.

    Args:
        processor: the file's content.
        default: what holds where the file is silent.

    Raises:
        UserError: a size or filter in a form that is not understood.
    """
    processor = {key: value for key, value in processor.items() if value is not None}
    size = processor.get("size", default.resize_to)
    resize, crop = default.resize, processor.get("do_center_crop", "crop_size" in processor or "size" not in processor)
    if "size" in processor:
        resize = "short" if isinstance(size, dict) and "shortest_edge" in size else "square"
    resize_to = _processor_size(size)
    target = _processor_size(processor.get("crop_size", default.size)) if crop else resize_to
    filters: dict[int, Filter] = {2: "bilinear", 3: "bicubic"}
    resample = processor.get("resample")
    if resample is not None and resample not in filters:
        raise UserError(f"resample = {resample} in preprocessor_config.json; allowed are 2 (bilinear) and 3 (bicubic).")
    normalise = processor.get("do_normalize", True)
    mean = processor.get("image_mean", default.mean) if normalise else [0.0] * len(default.mean)
    std = processor.get("image_std", default.std) if normalise else [1.0] * len(default.std)
    rescale = processor.get("rescale_factor", default.rescale) if processor.get("do_rescale", True) else 1.0
    try:
        return Preprocess(
            size=target,
            resize=resize,
            resize_to=resize_to,
            filter=filters[resample] if resample is not None else default.filter,
            crop=crop,
            crop_rule="hf",
            mean=tuple(mean),
            std=tuple(std),
            rescale=rescale,
        )
    except ValueError as error:
        raise UserError(f"preprocessor_config.json: {error}") from error


def _processor_size(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    if isinstance(size, dict) and {"height", "width"} <= set(size):
        return size["height"], size["width"]
    if isinstance(size, list | tuple) and len(size) == 2:
        return size[0], size[1]
    raise UserError(
        f"size = {size!r} in preprocessor_config.json; needed is a number, height and width, or shortest_edge."
    )


def to_processor(preprocess: Preprocess) -> dict[str, Any] | None:
    """The `preprocessor_config.json` by which transformers does the same, None where it has no such processor."""
    short = preprocess.resize == "short"
    if short and not isinstance(preprocess.resize_to, int):
        return None
    height, width = preprocess._resize_to
    kinds = {
        (False, False): "ViTImageProcessor",
        (False, True): "DeiTImageProcessor",
        (True, True): "CLIPImageProcessor",
    }
    return {
        "image_processor_type": kinds[short, preprocess.crop],
        "do_resize": True,
        "size": {"shortest_edge": preprocess.resize_to} if short else {"height": height, "width": width},
        "resample": 3 if preprocess.filter == "bicubic" else 2,
        "do_center_crop": preprocess.crop,
        "crop_size": {"height": preprocess.size[0], "width": preprocess.size[1]},
        "do_rescale": True,
        "rescale_factor": preprocess.rescale,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def to_timm(preprocess: Preprocess) -> dict[str, Any]:
    """The fields of a `pretrained_cfg` by which timm does the same (square sizes; others as near as timm comes)."""
    target, resized = preprocess.size[0], preprocess._resize_to[0]
    # The shortest decimal that floor(target / crop_pct) turns back into `resized`.
    shares = (round(target / r, digits) for digits in range(1, 8) for r in (resized, resized + 0.5))
    crop_pct = next((c for c in shares if c > 0 and math.floor(target / c) == resized), target / resized)
    return {
        "input_size": [len(preprocess.mean), *preprocess.size],
        "crop_pct": crop_pct if preprocess.crop else 1.0,
        "interpolation": preprocess.filter,
        "crop_mode": "center" if preprocess.resize == "short" else "squash",
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
    }
