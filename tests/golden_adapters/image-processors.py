"""Vectors of `image-processors`: Hugging Face's, timm's and OpenAI's, read from their JSON; an oracle wrote them."""

import json
from pathlib import Path

import numpy as np

from tokjax.pretrained.naflex import Naflex
from tokjax.pretrained.preprocess import Preprocess, clip_eval, from_processor, timm_eval

INPUTS = ("image_*",)
TOLERANCE = {
    "bytes_torchvision": (0, 1),  # it resizes with weights of fewer bits
    "floats_torchvision": (0, 5e-6),  # sums in float32, Pillow's in float64
    "pixel_values": (0, 1e-6),
}


def run(case: Path, arrays: dict) -> dict:
    images = [arrays[f"image_{i}"] for i in range(2)]
    preprocess = build(json.loads(case.with_suffix(".json").read_text()))
    out = preprocess(images)
    if isinstance(preprocess, Naflex):
        results = {
            "pixel_values": out.patches,
            "pixel_attention_mask": out.valid.astype(np.int32),
            "spatial_shapes": out.shape,
        }
        repeat, valid = out.patches.shape[-1] // 3, out.valid[..., None]
        mean, std = (np.tile(v, repeat) for v in (preprocess.mean, preprocess.std))
    else:
        results = {"pixel_values": out.transpose(0, 3, 1, 2)}
        valid, (mean, std) = True, (np.array(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
    if "bytes_torchvision" in arrays:
        scaled = (results["pixel_values"] * std + mean) * 255
        results["bytes_torchvision"] = (scaled.round() * valid).astype(np.uint8)
    if "floats_torchvision" in arrays:
        results["floats_torchvision"] = results.pop("pixel_values")
    return results


def build(config: dict) -> Preprocess | Naflex:
    if "image_processor_type" in config:
        unlike = Preprocess((99, 99), "square", 99, crop=False)
        naflex = config["image_processor_type"] == "Siglip2ImageProcessor"
        return from_processor(config, Naflex() if naflex else unlike)
    if "crop_pct" in config:
        return timm_eval(tuple(config.pop("input_size"))[1:], **config)
    return clip_eval((config["input_resolution"], config["input_resolution"]))
