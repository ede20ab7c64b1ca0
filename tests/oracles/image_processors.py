"""Writes tests/golden/image-processors: what published image processors make of two small images.

By hand, where torch, torchvision, timm, transformers 5 and Pillow 12 are installed; nothing is downloaded:

    python tests/oracles/image_processors.py

Every case has the images, the processor's configuration beside it as JSON, and

- `pixel_values`: the Pillow processor's output, of timm's evaluation, of OpenAI's CLIP transform;
- `floats_torchvision`: the output of DINOv3's processor, which resizes floats;
- `bytes_torchvision`: the torchvision processor's output, turned back into bytes: it resizes bytes with weights of
  fewer bits than Pillow, so the last bit may differ;
- of NaFlex also the mask and the shapes.

Pillow 13 passes over columns first where the height shrinks much more than the width, which changes bytes; the
published pipelines ran with earlier versions, all of which pass over rows first.
"""

import json
from pathlib import Path

import numpy as np
import PIL
from PIL import Image
from timm.data import create_transform
import torch
from torchvision import transforms
import transformers

FOLDER = Path(__file__).parents[1] / "golden" / "image-processors"

SQUARE, HALF = {"height": 20, "width": 20}, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CASES = {  # class without its ending, settings
    "clip": ("CLIPImageProcessor", {"size": {"shortest_edge": 24}, "crop_size": {"height": 21, "width": 21}}),
    "siglip": ("SiglipImageProcessor", {"size": SQUARE}),
    "siglip2": ("SiglipImageProcessor", {"size": SQUARE, "resample": 2}),
    "siglip2_naflex": ("Siglip2ImageProcessor", {"patch_size": 4, "max_num_patches": 24}),
    "dinov2": (
        "BitImageProcessor",
        {"size": {"shortest_edge": 23}, "crop_size": {"height": 20, "width": 20}, **IMAGENET},
    ),
    "dinov3": ("DINOv3ViTImageProcessor", {"size": SQUARE}),
    "vit": ("ViTImageProcessor", {"size": SQUARE}),
    "deit": (
        "DeiTImageProcessor",
        {"size": {"height": 23, "width": 23}, "crop_size": {"height": 20, "width": 20}, **IMAGENET},
    ),
}
TIMM = {
    "timm_center": {"input_size": [3, 21, 21], "crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "center"},
    "timm_squash": {"input_size": [3, 20, 20], "crop_pct": 0.875, "interpolation": "bicubic", "crop_mode": "squash"},
    "timm_rectangle": {"input_size": [3, 16, 24], "crop_pct": 0.9, "interpolation": "bilinear", "crop_mode": "center"},
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def main() -> None:
    if int(PIL.__version__.split(".")[0]) > 12:
        raise SystemExit(f"Pillow {PIL.__version__} passes over columns first at times; version 12 is needed.")
    rng = np.random.default_rng(0)
    images = {f"image_{i}": rng.integers(0, 256, (*size, 3), np.uint8) for i, size in enumerate(((37, 53), (64, 20)))}
    FOLDER.mkdir(exist_ok=True)
    for name, (kind, settings) in CASES.items():
        torchvision = getattr(transformers, kind)(**settings)
        pillow = getattr(transformers, f"{kind}Pil")(**settings) if name != "dinov3" else torchvision
        pictures = [Image.fromarray(image) for image in images.values()]
        outputs = {key: np.asarray(value) for key, value in pillow(pictures, return_tensors="np").items()}
        if pillow is torchvision:
            outputs["floats_torchvision"] = outputs.pop("pixel_values")
        else:
            pixels = np.asarray(torchvision(pictures, return_tensors="np")["pixel_values"])
            outputs["bytes_torchvision"] = to_bytes(pixels, torchvision, outputs.get("pixel_attention_mask"))
        write(name, images, outputs, pillow.to_dict())
    for name, config in TIMM.items():
        config = {**config, "mean": IMAGENET["image_mean"], "std": IMAGENET["image_std"]}
        steps = create_transform(**{**config, "input_size": tuple(config["input_size"])})
        write(name, images, {"pixel_values": apply(steps, images)}, config)
    # What clip.load returns beside the model, with 21 for 224.
    steps = [
        transforms.Resize(21, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(21),
        lambda image: image.convert("RGB"),
        transforms.ToTensor(),
        transforms.Normalize(CLIP_MEAN, CLIP_STD),
    ]
    write("openai_clip", images, {"pixel_values": apply(transforms.Compose(steps), images)}, {"input_resolution": 21})


def apply(steps, images: dict[str, np.ndarray]) -> np.ndarray:
    return torch.stack([steps(Image.fromarray(image)) for image in images.values()]).numpy()


def write(name: str, images: dict[str, np.ndarray], outputs: dict[str, np.ndarray], config: dict) -> None:
    np.savez_compressed(FOLDER / f"{name}.npz", **images, **outputs)
    (FOLDER / f"{name}.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    size = (FOLDER / f"{name}.npz").stat().st_size
    print(name, {key: value.shape for key, value in outputs.items()}, f"{size / 1000:.1f} kB")


def to_bytes(pixels: np.ndarray, processor, mask: np.ndarray | None) -> np.ndarray:
    """Undoes mean, deviation and scale; padding becomes 0."""
    mean, std = (np.array(v, np.float64) for v in (processor.image_mean, processor.image_std))
    if mask is None:  # [B, 3, h, w]
        mean, std = mean[:, None, None], std[:, None, None]
    else:  # [B, N, p * p * 3]
        mean, std = (np.tile(v, pixels.shape[-1] // 3) for v in (mean, std))
    scaled = (pixels * std + mean) * 255
    assert np.abs(scaled - scaled.round()).max() < 1e-3
    return (scaled.round() if mask is None else scaled.round() * mask[..., None]).astype(np.uint8)


if __name__ == "__main__":
    main()
