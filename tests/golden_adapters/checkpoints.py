"""Vectors of `checkpoints`: whole models from published file formats, position tables and images resized."""

from pathlib import Path
import re
import shutil
import tempfile

from flax import nnx
import jax
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from tokjax.models.vit import ViT
from tokjax.pretrained import load_checkpoint, resize_grid
from tokjax.pretrained.preprocess import centre_crop, resize_short, resize_square

INPUTS = ("param.*", "images*", "pixel_values*", "grid", "image_uint8")
TOLERANCE = {
    "bicubic_[sc]*": (0, 1),  # bytes
    "bilinear_[sc]*": (0, 1),
    "num_heads": (0, 0),
    "*": (0, 2e-5),
}

# What a model gives, by the names of the vectors without their suffix ("_other_size").
OUTPUTS = {
    "logits": lambda out: out.logits,
    "output": lambda out: out.logits,
    "cls_logits": lambda out: out.head_logits[0],
    "distillation_logits": lambda out: out.head_logits[1],
    "last_hidden_state_before_layernorm": lambda out: out.tokens.x,
    "last_hidden_state": lambda out: out.features,
    "features_after_final_norm": lambda out: out.features,
}


def run(case: Path, arrays: dict) -> dict:
    if "grid" in arrays:
        return run_positions(arrays)
    if "image_uint8" in arrays:
        return run_images(arrays)
    return run_model(case, arrays)


def run_positions(arrays: dict) -> dict:
    results = {}
    for name in arrays.keys() - {"grid"}:
        method, kind, size = name.split("_")
        height, width = map(int, size.split("x"))
        results[name] = resize_grid(arrays["grid"], (height, width), method, antialias=kind == "antialias")
    return results


def run_images(arrays: dict) -> dict:
    results = {}
    for name in arrays.keys() - {"image_uint8"}:
        image, (method, *steps) = Image.fromarray(arrays["image_uint8"]), name.split("_")
        for step in steps:
            kind, *sides = re.fullmatch(r"(short|square|center)(\d+)(?:x(\d+))?", step).groups()
            height, width = int(sides[0]), int(sides[1] or sides[0])
            if kind == "short":
                image = resize_short(image, height, method)
            elif kind == "square":
                image = resize_square(image, (height, width), method)
            else:
                image = centre_crop(image, (height, width))
        results[name] = np.asarray(image)
    return results


def run_model(case: Path, arrays: dict) -> dict:
    params = {name.removeprefix("param."): value for name, value in arrays.items() if name.startswith("param.")}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: np.ascontiguousarray(value) for name, value in params.items()}, f"{folder}/model.safetensors")
        shutil.copyfile(case.with_suffix(".json"), f"{folder}/config.json")
        images = {
            re.sub("^(images|pixel_values)", "", n): v for n, v in arrays.items() if re.match("images|pixel_v", n)
        }
        for suffix, image in images.items():
            checkpoint = load_checkpoint(folder, image_size=image.shape[2:])
            graph, _ = nnx.split(nnx.eval_shape(lambda config=checkpoint.config: ViT(config, rngs=nnx.Rngs(0))))
            forward = jax.jit(lambda params, image, graph=graph: nnx.merge(graph, params)(image))
            out = forward(checkpoint.params, image.transpose(0, 2, 3, 1))
            results |= {name + suffix: make(out) for name, make in OUTPUTS.items() if name + suffix in arrays}
    if "num_heads" in arrays:
        results["num_heads"] = checkpoint.config.heads
    return results
