"""SigLIP and SigLIP2: Hugging Face's `siglip`, `siglip2` and the vision towers alone.

SigLIP2's models of fixed resolution say `siglip` in their files; `siglip2` are the NaFlex ones, whose patches enter
flattened and whose square table is resized for every image. Tanh GELU, a norm eps of 1e-6, texts of 64 tokens read at
the last place, positions at another size bicubic without anti-aliasing, images resized to squares, mean and std 0.5.

References: Zhai et al., ICCV 2023; Tschannen et al., 2025; transformers `models/siglip`, `models/siglip2`.
"""

from collections.abc import Callable
import math
from typing import Any

from tokjax.models.dual import DualConfig
from tokjax.models.text import TextConfig
from tokjax.models.vit import ViTConfig
from tokjax.pretrained.families.base import (
    HF_GELU,
    Config,
    Family,
    Images,
    Json,
    Measured,
    Stated,
    as_stored,
    pair,
    processed,
)
from tokjax.pretrained.families.clip import HF_BLOCKS, HF_TEXT_ROWS, describe_text, describe_vision, tower, tower_view
from tokjax.pretrained.names import Readable, Row, table, under
from tokjax.pretrained.preprocess import HALF, Naflex, Preprocess

_TOWER = (
    ("rows", "pos_embed", "embeddings.position_embedding.weight"),
    *HF_BLOCKS,
    ("norm", "norm", "post_layernorm"),
    ("array", "attn_pool.probe", "head.probe"),
    ("in_proj", "attn_pool.qkv", "head.attention.in_proj"),
    ("linear", "attn_pool.proj", "head.attention.out_proj"),
    ("norm", "attn_pool.norm", "head.layernorm"),
    ("linear", "attn_pool.mlp.fc1", "head.mlp.fc1"),
    ("linear", "attn_pool.mlp.fc2", "head.mlp.fc2"),
)
_PATCHES = {"siglip": "patch", "siglip2": "linear"}  # a convolution, or a matrix for flattened patches
_LOGIT_SCALE, _LOGIT_BIAS = math.log(10), -10.0  # initial values


def _vision_rows(kind: str) -> dict[str, Row]:
    return under("", "vision_model.", table((_PATCHES[kind], "patch_embed", "embeddings.patch_embedding"), *_TOWER))


def _rows(kind: str) -> dict[str, Row]:
    return {
        **under("vision.", "", _vision_rows(kind)),
        **under("text.", "text_model.", HF_TEXT_ROWS),
        **table(("linear", "text.head", "text_model.head"), ("one", "logit_scale"), ("one", "logit_bias")),
    }


def _vision_configure(kind: str, path: str = "") -> Callable[[Json, Readable], ViTConfig]:
    rows = _rows(kind) if path else _vision_rows(kind)

    def configure(config: Json, tensors: Readable) -> ViTConfig:
        measured = Measured(rows, tensors, path)
        stated = Stated(tower(config, "vision") or config, measured)
        patch = stated.get("patch_size", 16) if kind == "siglip2" else stated.size("patch_size", "patch")
        flexible = kind == "siglip2"
        side = math.isqrt(stated.get("num_patches", measured.positions)) * patch
        return ViTConfig(
            image_size=(side, side) if flexible else pair(stated.get("image_size", 224)),
            patch_size=patch,
            channels=stated.get("num_channels", 3),
            num_classes=0,
            class_token=False,
            position="naflex" if flexible else "learned",
            # Without its own head the features are left to their user; their mean is what others take.
            pooling="map" if stated.get("vision_use_head", True) else "size_mean",
            **stated.blocks(12, 1e-6, "gelu_pytorch_tanh"),
        )

    return configure


def _configure(kind: str) -> Callable[[Json, Readable], DualConfig]:
    rows, vision_configure = _rows(kind), _vision_configure(kind, "vision.")

    def configure(config: Json, tensors: Readable) -> DualConfig:
        measured = Measured(rows, tensors, "text.")
        text = TextConfig(
            vocab_size=measured.shape("token_embed", 2)[0],
            length=measured.positions,
            causal=False,
            pooling="last",
            embed_dim=measured.classes,
            head_bias=True,
            **Stated(tower(config, "text"), measured).blocks(12, 1e-6, "gelu_pytorch_tanh"),
        )
        return DualConfig(vision_configure(config, tensors), text, _LOGIT_SCALE, _LOGIT_BIAS)

    return configure


def _vision_expresses(kind: str) -> Callable[[Config], bool]:
    position = "naflex" if kind == "siglip2" else "learned"
    fixed = ("registers", "distilled", "layer_scale", "mlp", "fc_norm", "qk_norm", "pre_norm", "qkv_bias", "key_bias")
    usual = ViTConfig()
    return lambda model: (
        isinstance(model, ViTConfig)
        and all(getattr(model, name) == getattr(usual, name) for name in (*fixed, "patch_bias", "head_bias"))
        and not model.class_token
        and model.position == position
        and model.gelu in HF_GELU.values()
        and model.num_classes == 0
        and model.pooling in ("map", "size_mean")
    )


def _expresses(kind: str) -> Callable[[Config], bool]:
    vision = _vision_expresses(kind)
    return lambda model: (
        isinstance(model, DualConfig)
        and vision(model.vision)
        and model.vision.pooling == "map"
        and model.text.embed_dim > 0
        and model.text.head_bias
        and not model.text.causal
        and model.text.pooling == "last"
        and model.logit_bias is not None
    )


def _describe_vision(kind: str) -> Callable[[ViTConfig, Images | None], Json]:
    name = kind.capitalize()

    def describe(model: ViTConfig, preprocess: Images | None) -> Json:
        common = describe_vision(model, f"{kind}_vision_model")
        if kind == "siglip2":
            del common["image_size"]
            common["num_patches"] = model.num_patches
        return {"architectures": [f"{name}VisionModel"], **common, "vision_use_head": model.pooling == "map"}

    return describe


def _describe(kind: str) -> Callable[[DualConfig, Images | None], Json]:
    name, vision = kind.capitalize(), _describe_vision(kind)

    def describe(model: DualConfig, preprocess: Images | None) -> Json:
        image = vision(model.vision, None)
        del image["architectures"]
        text = {**describe_text(model.text, f"{kind}_text_model"), "projection_size": model.embed_dim}
        return {
            "architectures": [f"{name}Model"],
            "model_type": kind,
            "text_config": text,
            "vision_config": image,
        }

    return describe


def _square(model: ViTConfig) -> Any:
    size = model.image_size
    return Preprocess(size, "square", size, "bicubic", crop=False, crop_rule="hf", mean=HALF, std=HALF)


def _flexible(model: ViTConfig) -> Any:
    return Naflex(model.patch_size)


def _family(kind: str, vision: bool) -> Family:
    return Family(
        name=f"{kind}_vision_model" if vision else kind,
        side="hf",
        rows=_vision_rows(kind) if vision else _rows(kind),
        configure=_vision_configure(kind) if vision else _configure(kind),
        preprocess=processed(_square if kind == "siglip" else _flexible),
        describe=_describe_vision(kind) if vision else _describe(kind),
        expresses=_vision_expresses(kind) if vision else _expresses(kind),
        view=tower_view if vision else as_stored,
        ignored=r".*embeddings\.position_ids" + (r"|logit_scale|logit_bias" if vision else ""),
    )


HF_SIGLIP, HF_SIGLIP_VISION = _family("siglip", vision=False), _family("siglip", vision=True)
HF_SIGLIP2, HF_SIGLIP2_VISION = _family("siglip2", vision=False), _family("siglip2", vision=True)
