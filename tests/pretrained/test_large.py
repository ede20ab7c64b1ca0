"""Published large models by names and shapes, as their own libraries build them (`oracles/shapes.py`)."""

import json
import math
from pathlib import Path
import re
import tracemalloc

import jax
import numpy as np
import pytest

from tokjax.models.dual import DualConfig
from tokjax.models.text import TextConfig
from tokjax.models.vit import ViTConfig
from tokjax.pretrained import families, names
from tokjax.pretrained.checkpoint import shapes

MODELS = json.loads((Path(__file__).parent / "large.json").read_text())


class Zeros(dict):
    """Tensors of given shapes that take no memory."""

    def shape(self, name):
        return tuple(super().__getitem__(name))

    def __getitem__(self, name):
        return np.broadcast_to(np.float32(0), self.shape(name))

    view = __getitem__


def tensors_of(name):
    out = Zeros()
    for pattern, shape in MODELS[name]["tensors"].items():
        count = re.search(r"\{(\d+)\}", pattern)
        for i in range(int(count[1]) if count else 1):
            out[re.sub(r"\{\d+\}", str(i), pattern)] = shape
    return out


def understood(name):
    config, tensors = MODELS[name]["config"], tensors_of(name)
    family = families.recognise(config, tensors)
    tensors = family.view(config, tensors)
    return family, family.configure(config, tensors), tensors


SO400M = ViTConfig((384, 384), 14, width=1152, depth=27, heads=16, mlp_ratio=4304 / 1152, num_classes=0, gelu="tanh")
OPT = {"width": 1536, "depth": 40, "heads": 16, "num_classes": 0, "gelu": "tanh"}
MAP = {"class_token": False, "pooling": "map"}
GIANT = {"patch_size": 14, "width": 1536, "depth": 40, "heads": 24, "mlp_ratio": 4096 / 1536, "mlp": "swiglu"}
GIANT |= {"image_size": (518, 518), "num_classes": 0}
H_PLUS = {"width": 1280, "depth": 32, "heads": 20, "num_classes": 0, "position": "rope", "registers": 4}
H_PLUS |= {"key_bias": False, "mlp": "swiglu", "norm_eps": 1e-5}
SEVEN = {**H_PLUS, "width": 4096, "depth": 40, "heads": 32, "mlp_ratio": 2.0, "qkv_bias": False, "key_bias": True}
CLIP = {"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5, "patch_size": 14}
CLIP_L = {**CLIP, "image_size": (336, 336), "width": 1024, "depth": 24, "heads": 16, "gelu": "quick"}
CLIP_L |= {"num_classes": 768, "head_bias": False}
CLIP_L_TEXT = TextConfig(width=768, heads=12, embed_dim=768)
SIGLIP_TEXT = {"length": 64, "causal": False, "pooling": "last", "head_bias": True, "gelu": "tanh", "norm_eps": 1e-6}
SO400M_TEXT = {**SIGLIP_TEXT, "width": 1152, "depth": 27, "heads": 16, "mlp_ratio": 4304 / 1152, "embed_dim": 1152}


def so400m(**fields):
    return ViTConfig(**{**vars(SO400M), **MAP, **fields})


WANT = {
    "vit-large-patch16-224": ViTConfig(width=1024, depth=24, heads=16, norm_eps=1e-12),
    "vit-huge-patch14-224": ViTConfig(patch_size=14, width=1280, depth=32, heads=16, norm_eps=1e-12),
    "clip-vit-large-patch14-336": DualConfig(ViTConfig(**CLIP_L), CLIP_L_TEXT, 2.6592),
    "siglip-so400m-patch14-384": DualConfig(so400m(), TextConfig(vocab_size=32000, **SO400M_TEXT), math.log(10), -10.0),
    "siglip2-giant-opt-patch16-384": DualConfig(
        ViTConfig((384, 384), **OPT, **MAP),
        TextConfig(vocab_size=256000, **{**SO400M_TEXT, "embed_dim": 1536}),
        math.log(10),
        -10.0,
    ),
    "siglip2-so400m-patch16-naflex": DualConfig(
        so400m(image_size=(256, 256), patch_size=16, position="naflex"),
        TextConfig(vocab_size=256000, **SO400M_TEXT),
        math.log(10),
        -10.0,
    ),
    "dinov2-giant": ViTConfig(**GIANT, layer_scale=1.0),
    "dinov2-with-registers-giant": ViTConfig(**GIANT, layer_scale=1.0, registers=4),
    "dinov3-vith16plus": ViTConfig(**H_PLUS, layer_scale=1.0),
    "dinov3-vit7b16": ViTConfig(**SEVEN, layer_scale=1.0),
    "deit3_huge_patch14_224": ViTConfig(
        patch_size=14, width=1280, depth=32, heads=16, layer_scale=1e-6, position_prefix=False
    ),
    "vit_7b_patch16_dinov3": ViTConfig((256, 256), **SEVEN, layer_scale=1e-5, pooling="size_mean"),
    "vit_giant_patch14_reg4_dinov2": ViTConfig(**GIANT, layer_scale=1e-5, registers=4, position_prefix=False),
    "vit_gigantic_patch14_clip_224": ViTConfig(
        **CLIP, width=1664, depth=48, heads=16, mlp_ratio=64 / 13, num_classes=1280
    ),
    "vit_huge_plus_patch16_dinov3_qkvb": ViTConfig((256, 256), **H_PLUS, layer_scale=1e-5, pooling="size_mean"),
    "vit_large_patch14_clip_quickgelu_336": ViTConfig(**{**CLIP_L, "head_bias": True}),
    "vit_so400m_patch14_siglip_384": so400m(),
    "ViT-H-14": DualConfig(
        ViTConfig(**CLIP, width=1280, depth=32, heads=16, num_classes=1024, head_bias=False),
        TextConfig(width=1024, depth=24, heads=16, embed_dim=1024, gelu="exact"),
    ),
    "ViT-L-14-336-quickgelu": DualConfig(ViTConfig(**CLIP_L), CLIP_L_TEXT),
    "ViT-B-16-SigLIP2": DualConfig(
        ViTConfig(width=768, heads=12, num_classes=0, gelu="tanh", **MAP),
        TextConfig(vocab_size=256000, width=768, heads=12, embed_dim=768, **SIGLIP_TEXT),
        logit_bias=-10.0,
    ),
}


def hidden(config):
    """The configuration with hidden widths in place of ratios, of which there are several for each."""
    if isinstance(config, DualConfig):
        return [hidden(config.vision), hidden(config.text), config.logit_scale, config.logit_bias]
    return {**vars(config), "mlp_ratio": int(config.width * config.mlp_ratio)}


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_numbers_of_parameters(name):
    family, config, tensors = understood(name)
    assert hidden(config) == hidden(WANT[name])
    unread = [t for t in tensors if t in family.blank(config) or re.fullmatch(family.ignored, t)]
    assert all("mask_token" in t for t in unread)
    tree = shapes(config)
    names.check(family.naming(config), tree, tensors, config, unread.__contains__)
    ours = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    assert ours + sum(math.prod(tensors.shape(t)) for t in unread) == MODELS[name]["parameters"]


def test_only_what_is_not_placed_yet_is_in_memory():
    family, config, tensors = understood("vit-large-patch16-224")
    largest = 4 * 4 * 1024**2  # bytes of a matrix of the MLP
    tree = shapes(config)
    tracemalloc.start()
    try:
        leaves = names.check(family.naming(config), tree, tensors, config)
        placed = names.read_tree(leaves, tree, tensors, config, place=lambda path, array: array.shape)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert placed["blocks"][23]["mlp"]["fc1"]["kernel"] == (1024, 4096)
    assert peak < 2.2 * largest
