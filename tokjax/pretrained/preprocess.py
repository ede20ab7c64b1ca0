"""From images to the normalised pixels that a checkpoint was evaluated with.

A published accuracy belongs to one way of resizing and cropping. The ways that exist among vision transformers:

* timm's evaluation: short side to floor(S / crop_pct), centre crop of S, or both sides ("squash") (`timm_eval`);
* the DeiT and MAE scripts: short side to int(256 / 224 * S), bicubic, centre crop (`script_eval`);
* OpenAI's CLIP and OpenCLIP: short side to S, bicubic, centre crop of S, or both sides (`clip_eval`, `from_openclip`);
* Hugging Face's image processors: S x S whatever the aspect, or a short side; a crop or none; DINOv3's resize numbers
  between 0 and 1 instead of bytes (`from_processor`);
* SigLIP2's NaFlex: the aspect stays, the number of patches is bounded (`naflex.Naflex`).
"""

from collections.abc import Sequence
import dataclasses
import math
import re
from typing import Any, Literal, overload

from jaxtyping import Float
import numpy as np
from PIL import Image

from tokjax.errors import UserError
from tokjax.pretrained.images import (
    FILTERS,
    CropRule,
    Filter,
    Images,
    Picture,
    centre_crop,
    check_batch,
    check_normalisation,
    for_each,
    normalise_images,
    resize_and_crop,
    resize_short,
    resize_square,
    short_size,
    to_mode,
)
from tokjax.pretrained.naflex import HALF, Naflex

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "HALF",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Images",
    "Naflex",
    "Preprocess",
    "centre_crop",
    "clip_eval",
    "from_dict",
    "from_openclip",
    "from_processor",
    "resize_short",
    "resize_square",
    "script_eval",
    "timm_eval",
    "to_mode",
    "to_processor",
    "to_timm",
]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


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
        float_resize: whether pixels are scaled before resizing and never rounded to bytes, as DINOv3 does.

    Raises:
        ValueError: a value out of range, or values that do not fit together.
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
    float_resize: bool = False

    def __post_init__(self):
        for field in ("size", "resize_to", "mean", "std"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        if isinstance(self.resize_to, tuple) and len(set(self.resize_to)) == 1:
            object.__setattr__(self, "resize_to", self.resize_to[0])  # one way to say it
        allowed = {"resize": ("short", "square"), "filter": tuple(FILTERS), "crop_rule": ("torchvision", "hf")}
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise ValueError(f"{field} = {getattr(self, field)!r}; allowed are {', '.join(map(repr, values))}.")
        if len(self.size) != 2 or min(*self.size, *self._resize_to) < 1:
            raise ValueError(f"size = {self.size}, resize_to = {self.resize_to}; lengths must be (height, width) >= 1.")
        check_normalisation(self.mean, self.std, self.rescale)
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
            images: a sequence of Pillow images, uint8 `[H, W(, channels)]` arrays, paths and encoded bytes, of any
                sizes, or one uint8 array `[B, H, W, channels]`. Files are read and decoded in the threads. See
                `to_mode` for what becomes of grey, alpha, palettes and orientation.

        Returns:
            float32 `[B, *size, channels]`, with as many channels as `mean` has values.

        Raises:
            UserError: a file that cannot be decoded.
            ValueError: not a batch, or an image that is not 8 or 16 bit.
        """
        check_batch(images)
        out = np.empty((len(images), *self.size, len(self.mean)), np.float32)

        def fill(i: int, image: Picture) -> None:
            self.normalise(self.pixels(image), out[i])

        for_each(images, fill)
        return out

    def pixels(self, image: Picture) -> np.ndarray:
        """One image converted, resized and cropped: `[*size, channels]`, bytes or (`float_resize`) scaled float32."""
        if self.float_resize:
            return self._floats(image)
        return np.asarray(self.transform(image)).reshape(*self.size, -1)

    def normalise(
        self, pixels: np.ndarray, out: Float[np.ndarray, "*B h w channels"] | None = None
    ) -> Float[np.ndarray, "*B h w channels"]:
        """What `pixels` gives (or bytes of that size), normalised: float32 `[..., h, w, channels]`.

        Args:
            pixels: uint8, or float32 that is scaled already.
            out: contiguous float32, where the result goes.
        """
        return normalise_images(pixels, self.mean, self.std, self.rescale, out)

    def transform(self, image: Picture) -> Image.Image:
        """One image converted, resized and cropped, in bytes (with `float_resize`: what the call itself rounds not)."""
        return self._resize(self._converted(image))

    def _converted(self, image: Picture) -> Image.Image:
        return to_mode(image, "RGB" if len(self.mean) == 3 else "L")

    def _resize(self, image: Image.Image) -> Image.Image:
        resized = self._resize_to
        if self.resize == "short":
            resized = short_size(image.height, image.width, self.resize_to)
        return resize_and_crop(image, resized, self.size, self.filter, self.crop_rule)

    def _floats(self, image: Picture) -> np.ndarray:
        """Scaled, then resized and cropped: float32 `[*size, channels]`."""
        bands = self._converted(image).split()
        scaled = (np.asarray(band) * np.float32(self.rescale) for band in bands)
        return np.stack([np.asarray(self._resize(Image.fromarray(band))) for band in scaled], -1)

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
        ValueError: `crop_pct` outside of (0, 1].
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct = {crop_pct}; allowed is above 0 and at most 1.")
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


def clip_eval(size: tuple[int, int]) -> Preprocess:
    """OpenAI's CLIP: short side to the size, bicubic, centre crop, CLIP's mean and deviation."""
    return Preprocess(size=size, resize_to=size, mean=CLIP_MEAN, std=CLIP_STD)


def from_openclip(preprocess_cfg: dict[str, Any], size: tuple[int, int]) -> Preprocess:
    """OpenCLIP's evaluation transform, from `preprocess_cfg` of an `open_clip_config.json`.

    Args:
        preprocess_cfg: `size`, `mean`, `std`, `interpolation` and `resize_mode`; where it is silent, `clip_eval` holds.
        size: height and width of the model's images.

    Raises:
        UserError: a filter or mode that is not known ("longest" pads), or values out of range.
    """
    given = {key: value for key, value in preprocess_cfg.items() if value is not None}
    mode, filter = given.get("resize_mode", "shortest"), given.get("interpolation", "bicubic")
    modes: dict[str, Literal["short", "square"]] = {"shortest": "short", "squash": "square"}
    if mode not in modes or filter not in (*FILTERS, "random"):
        raise UserError(
            f"interpolation = {filter!r}, resize_mode = {mode!r} in preprocess_cfg of open_clip_config.json; "
            f"allowed are {', '.join(FILTERS)} and {', '.join(modes)}."
        )
    try:
        size = _sides(given.get("size", size))
        return Preprocess(
            size=size,
            resize=modes[mode],
            resize_to=size,
            filter="bilinear" if filter == "bilinear" else "bicubic",  # "random" is for training
            crop=mode == "shortest",
            mean=_channels(given.get("mean", CLIP_MEAN), 3),
            std=_channels(given.get("std", CLIP_STD), 3),
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"preprocess_cfg of open_clip_config.json: {error}") from error


def from_dict(values: dict[str, Any]) -> Preprocess | Naflex:
    """The inverse of either class's `to_dict`; raises ValueError for unknown names and values out of range."""
    return Naflex.from_dict(values) if "max_patches" in values else Preprocess.from_dict(values)


_FILE = "preprocessor_config.json"
_RESAMPLE: dict[int, Filter] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers

# What transformers' processors do where a file is silent. A size that is one number is both sides' for processors that
# resize to squares, else the short side's.
_SQUARE = Preprocess((224, 224), "square", 224, crop=False, crop_rule="hf", mean=HALF, std=HALF)
_SHORT = Preprocess((224, 224), "short", 224, crop_rule="hf", mean=CLIP_MEAN, std=CLIP_STD)
_PROCESSORS: dict[str, Preprocess] = {
    "ViT": dataclasses.replace(_SQUARE, filter="bilinear"),
    "Siglip": _SQUARE,
    "DeiT": dataclasses.replace(_SQUARE, resize_to=256, crop=True),
    "CLIP": _SHORT,
    "Bit": _SHORT,
    "DINOv3ViT": dataclasses.replace(
        _SQUARE, filter="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD, float_resize=True
    ),
}
# Steps that other processors have, and that would change the pixels.
_OTHER_STEPS = ("crop_pct", "do_pad", "do_flip_channel_order", "do_grayscale", "do_thumbnail", "do_image_splitting")


@overload
def from_processor(processor: dict[str, Any], default: Preprocess) -> Preprocess: ...
@overload
def from_processor(processor: dict[str, Any], default: Naflex) -> Naflex: ...
def from_processor(processor: dict[str, Any], default: Preprocess | Naflex) -> Preprocess | Naflex:
    """Reads a `preprocessor_config.json` of Hugging Face (or the `image_processor` of a `processor_config.json`).

    Processors of the classes CLIP, Bit (DINOv2), DINOv3ViT, ViT, DeiT and Siglip, slow or fast, mean what transformers
    takes them for, also where the file is silent. Of others, and where no class is named, the keys are understood:
    `size` as a number, as `{"height", "width"}` and as `{"shortest_edge"}`; `crop_size` likewise; `resample` (2
    bilinear, 3 bicubic); `rescale_factor`, `image_mean`, `image_std` and the `do_` switches of cropping, scaling and
    normalising. Resizing is always done: `do_resize` false promises images of the right size, for which it changes
    nothing. A `Naflex` is read from the class Siglip2.

    Args:
        processor: the file's content.
        default: what holds where file and class are silent; its type is the type of what is returned.

    Raises:
        UserError: a class, step, size or filter that is not understood, or that makes other inputs than the default.
    """
    nested = processor.get("image_processor", processor)
    processor = {key: value for key, value in nested.items() if value is not None}
    name = processor.get("image_processor_type", processor.get("feature_extractor_type", ""))
    kind = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", name)
    if kind and (kind == "Siglip2") != isinstance(default, Naflex):
        made = "patches of images of any size" if kind == "Siglip2" else "images of one size"
        raise UserError(f"{_FILE}: {name} makes {made}, which is not what the model takes.")
    steps = [step for step in _OTHER_STEPS if processor.get(step)]
    if kind not in _PROCESSORS and steps:
        raise UserError(f"{_FILE}: {name or 'the processor'} has the step {steps[0]}, which is not known here.")
    try:
        if isinstance(default, Naflex):
            return _naflex_of(processor, default)
        return _preprocess_of(processor, kind, _PROCESSORS.get(kind, default))
    except (ValueError, TypeError) as error:
        raise UserError(f"{_FILE}: {error}") from error


def _preprocess_of(processor: dict[str, Any], kind: str, base: Preprocess) -> Preprocess:
    size, resize, resize_to = processor.get("size"), base.resize, base._resize_to
    silent = base.crop if kind in _PROCESSORS or size is None else "crop_size" in processor
    crop = processor.get("do_center_crop", silent)
    if size is not None:
        resize_to = _sides(size)
        if not isinstance(size, int):
            resize = "short" if "shortest_edge" in size else "square"
        elif kind not in _PROCESSORS and not crop:
            resize = "square"
    return Preprocess(
        size=_sides(processor.get("crop_size", base.size)) if crop else resize_to,
        resize=resize,
        resize_to=resize_to,
        crop=crop,
        crop_rule="hf",
        float_resize=base.float_resize,
        **_pixels_of(processor, base),
    )


def _naflex_of(processor: dict[str, Any], base: Naflex) -> Naflex:
    return Naflex(
        patch_size=processor.get("patch_size", base.patch_size),
        max_patches=processor.get("max_num_patches", base.max_patches),
        resize=processor.get("do_resize", base.resize),
        **_pixels_of(processor, base),
    )


def _pixels_of(processor: dict[str, Any], base: Preprocess | Naflex) -> dict[str, Any]:
    """Filter, mean, deviation and factor."""
    resample, channels = processor.get("resample"), len(base.mean)
    if resample is not None and resample not in _RESAMPLE:
        raise ValueError(f"resample = {resample}; allowed are 2 (bilinear) and 3 (bicubic).")
    normalised = processor.get("do_normalize", True)
    return {
        "filter": base.filter if resample is None else _RESAMPLE[resample],
        "mean": _channels(processor.get("image_mean", base.mean) if normalised else 0.0, channels),
        "std": _channels(processor.get("image_std", base.std) if normalised else 1.0, channels),
        "rescale": processor.get("rescale_factor", base.rescale) if processor.get("do_rescale", True) else 1.0,
    }


def _channels(value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    return (value,) * channels if isinstance(value, int | float) else tuple(value)


def _sides(size: Any) -> tuple[int, int]:
    """Height and width from the ways of writing them; a short side is returned twice."""
    if isinstance(size, dict):
        size = {key: value for key, value in size.items() if value is not None}
        if size.keys() == {"shortest_edge"}:
            return size["shortest_edge"], size["shortest_edge"]
        if size.keys() == {"height", "width"}:
            return size["height"], size["width"]
    elif isinstance(size, int):
        return size, size
    elif isinstance(size, list | tuple) and len(size) == 2:
        return size[0], size[1]
    raise ValueError(f"size = {size!r}; needed is a number, height and width, or shortest_edge.")


def to_processor(preprocess: Preprocess | Naflex, name: str | None = None) -> dict[str, Any] | None:
    """The `preprocessor_config.json` by which transformers does the same, None where it has no such processor.

    Centre crops differ by a pixel where torchvision rounds an odd half up and transformers down.

    Args:
        preprocess: what to write.
        name: the class to write, such as "SiglipImageProcessor"; None: one that does it.

    Raises:
        ValueError: a class that is not known here or does something else.
    """
    if isinstance(preprocess, Naflex):
        suits = {"Siglip2"}
        steps: dict[str, Any] = {
            "do_resize": preprocess.resize,
            "patch_size": preprocess.patch_size,
            "max_num_patches": preprocess.max_patches,
        }
    else:
        short = preprocess.resize == "short"
        if (short and not isinstance(preprocess.resize_to, int)) or (preprocess.float_resize and short):
            return None
        suits = {
            kind
            for kind, base in _PROCESSORS.items()
            if (base.resize, base.crop, base.float_resize)
            == (preprocess.resize, preprocess.crop, preprocess.float_resize)
        }
        if not suits:
            return None
        height, width = preprocess._resize_to
        steps = {
            "do_resize": True,
            "size": {"shortest_edge": height} if short else {"height": height, "width": width},
            "do_center_crop": preprocess.crop,
        }
        if preprocess.crop:
            steps["crop_size"] = {"height": preprocess.size[0], "width": preprocess.size[1]}
    suffix = "ImageProcessorFast" if suits == {"DINOv3ViT"} else "ImageProcessor"  # there is no slow one of DINOv3
    names = [kind + suffix for kind in (*_PROCESSORS, "Siglip2") if kind in suits]
    if name is not None and name not in names:
        raise ValueError(f"name = {name!r}; what does the same is {' or '.join(names)}.")
    return {
        "image_processor_type": name or names[0],
        **steps,
        "resample": 3 if preprocess.filter == "bicubic" else 2,
        "do_rescale": True,
        "rescale_factor": preprocess.rescale,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "do_convert_rgb": len(preprocess.mean) == 3,
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
