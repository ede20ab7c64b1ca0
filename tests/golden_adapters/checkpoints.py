"""Vectors of `checkpoints`: whole models from published file formats, position tables and images resized."""

import json
from pathlib import Path
import re
import shutil
import tempfile
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from tokjax.models.dual import DualOutput, unit
from tokjax.models.text import Text, TextConfig
from tokjax.models.transformer import Output, skeleton
from tokjax.models.vit import Patches, ViT, ViTConfig
from tokjax.pretrained import Checkpoint, load_checkpoint, resize_grid
from tokjax.pretrained.preprocess import centre_crop, resize_short, resize_square

INPUTS = ("param.*", "images*", "pixel_*", "spatial_shapes", "text", "input_ids", "*_num_heads", "grid", "image_uint8")
TOLERANCE = {
    "bicubic_[sc]*": (0, 1),  # bytes
    "bilinear_[sc]*": (0, 1),
    "num_heads": (0, 0),
    "*": (0, 2e-5),
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
    """A whole checkpoint: written to files, loaded, and run on every input of the case."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), case, arrays)
        for name in arrays:
            if not (found := re.fullmatch("(?:images|pixel_values(?:_patches)?)(.*)", name)):
                continue
            images, suffix = images_of(name, arrays), found[1]
            checkpoint = load_checkpoint(folder, image_size=None if "patches" in name else images.shape[1:3])
            outputs = run_towers(checkpoint, images, arrays)
            results |= {n + suffix: value for n, value in outputs.items() if n + suffix in arrays}
    return results


def write_files(folder: Path, case: Path, arrays: dict) -> None:
    params = {name.removeprefix("param."): value for name, value in arrays.items() if name.startswith("param.")}
    if any("/" in name for name in params):  # JAX's own names
        np.savez(folder / "model.npz", **params)
    else:
        save_file({n: np.asarray(value, order="C") for n, value in params.items()}, folder / "model.safetensors")
    if case.with_suffix(".json").exists():
        shutil.copyfile(case.with_suffix(".json"), folder / "config.json")
    elif "vision_num_heads" in arrays:
        heads = {f"{tower}_heads": int(arrays[f"{tower}_num_heads"]) for tower in ("vision", "text")}
        (folder / "config.json").write_text(json.dumps({**heads, "quick_gelu": True}))


def images_of(name: str, arrays: dict) -> np.ndarray | Patches:
    if "patches" in name:
        shape = jnp.asarray(arrays["spatial_shapes"], jnp.int32)
        return Patches(jnp.asarray(arrays[name]), jnp.asarray(arrays["pixel_attention_mask"], bool), shape)
    return arrays[name].transpose(0, 2, 3, 1)


def run_towers(checkpoint: Checkpoint, images: np.ndarray | Patches, arrays: dict) -> dict:
    """All that the vectors of any family may ask for, by name."""
    config, params = checkpoint.config, checkpoint.params
    ids = next((arrays[name].astype(np.int32) for name in ("input_ids", "text") if name in arrays), None)
    if isinstance(config, ViTConfig):
        return vision_outputs(encode(ViT, config, params, images), config, checkpoint.source["format"])
    vision = encode(ViT, config.vision, params["vision"], images)
    text = encode(Text, config.text, params["text"], ids)
    bias = params.get("logit_bias")
    both = DualOutput(unit(vision.logits), unit(text.logits), jnp.exp(params["logit_scale"]), bias)
    return vision_outputs(vision, config.vision, checkpoint.source["format"]) | {
        "image_embeds_normalized": both.image,
        "text_embeds_normalized": both.text,
        "text_features": text.logits,
        "logits_per_image": both.logits,
    }


def vision_outputs(out: Output, config: ViTConfig, form: str) -> dict:
    heads = dict(zip(("cls_logits", "distillation_logits"), out.head_logits, strict=False))
    states = [tokens.x for tokens in out.states]
    return heads | {
        "logits": out.logits,
        "output": out.logits,
        "image_features": out.logits,
        "pooler_output": out.pooled,
        "vision_pooler": out.pooled,
        "vision_pooled_after_post_layernorm": out.pooled,
        "last_hidden_state_before_layernorm": out.tokens.x,
        "last_hidden_state": out.features,
        "features_after_final_norm": out.features,
        # Hugging Face's CLIP gives its last state without the final norm, SigLIP with it.
        "vision_last_hidden_state": out.tokens.x if form.startswith("clip") else out.features,
        "vision_penultimate_hidden_state": states[-2] if len(states) > 1 else None,
        "states": np.stack(states),
        "num_heads": config.heads,
    }


def encode(kind: type[ViT] | type[Text], config: ViTConfig | TextConfig, params: dict, inputs: Any) -> Output:
    graph, _ = nnx.split(skeleton(kind, config))
    return jax.jit(lambda params, inputs: nnx.merge(graph, params)(inputs, states=True))(params, inputs)
