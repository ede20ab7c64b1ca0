"""Hugging Face's `vit`, `deit` and `vit_mae`.

What their files leave unsaid: a norm eps of 1e-12; positions at another size bicubic without anti-aliasing; images of
`vit` are squares (bilinear, mean and std 0.5), of `deit` squares of 256 / 224 of the size and then cropped (bicubic,
ImageNet's mean and std as in the released files), of `vit_mae` the MAE scripts'.

References: transformers `models/vit`, `models/deit`, `models/vit_mae`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np

from tokjax.models.vit import ViTConfig
from tokjax.pretrained.families.base import (
    HF_GELU,
    Config,
    Family,
    Images,
    Json,
    Measured,
    Stated,
    hf_blocks,
    hf_images,
    pair,
    processed,
    stripped,
)
from tokjax.pretrained.names import Made, Readable, Row, View, table
from tokjax.pretrained.preprocess import HALF, Preprocess, script_eval
from tokjax.pretrained.stored import to_float32

ENCODER = (
    ("array", "cls_token", "embeddings.cls_token"),
    ("array", "pos_embed", "embeddings.position_embeddings"),
    ("patch", "patch_embed", "embeddings.patch_embeddings.projection"),
    (
        "linear",
        "blocks.*.attn.qkv",
        "encoder.layer.*.attention.attention.query",
        "encoder.layer.*.attention.attention.key",
        "encoder.layer.*.attention.attention.value",
    ),
    ("linear", "blocks.*.attn.proj", "encoder.layer.*.attention.output.dense"),
    ("norm", "norm", "layernorm"),
)
_ROWS = (
    *ENCODER,
    ("array", "dist_token", "embeddings.distillation_token"),
    ("norm", "blocks.*.norm1", "encoder.layer.*.layernorm_before"),
    ("norm", "blocks.*.norm2", "encoder.layer.*.layernorm_after"),
    ("linear", "blocks.*.mlp.fc1", "encoder.layer.*.intermediate.dense"),
    ("linear", "blocks.*.mlp.fc2", "encoder.layer.*.output.dense"),
)
VIT_ROWS = table(*_ROWS, ("linear", "head", "classifier"))
DEIT_ROWS = table(*_ROWS, ("linear", "head", "cls_classifier"), ("linear", "head_dist", "distillation_classifier"))
_UNREAD = r"pooler\..*|embeddings\.mask_token|decoder\..*"


def _configure(rows: dict[str, Row], kind: str) -> Callable[[Json, Readable], Config]:
    def configure(config: Json, tensors: Readable) -> ViTConfig:
        measured = Measured(rows, tensors)
        stated = Stated(config, measured)
        distilled = kind == "deit"
        patch = stated.size("patch_size", "patch")
        return ViTConfig(
            image_size=pair(config.get("image_size") or measured.image(1 + distilled)),
            patch_size=patch,
            channels=stated.size("num_channels", "channels"),
            num_classes=0 if kind == "vit_mae" else classes_of(config, measured),
            distilled=distilled,
            qkv_bias=stated.get("qkv_bias", True),
            position="sincos" if kind == "vit_mae" else "learned",
            **stated.blocks(12, 1e-12, "gelu"),
        )

    return configure


def classes_of(config: Json, measured: Measured) -> int:
    """Labels of a classifier (a file may leave their number to the tensors), 0 for a backbone alone."""
    architectures = config.get("architectures") or []
    classifies = any("ForImageClassification" in name for name in architectures)
    if architectures and not classifies:
        return 0
    labels = config.get("num_labels") or len(config.get("id2label") or ())
    return (labels or measured.classes) if classifies or measured.classes else 0


def _deit_view(config: Json, tensors: Readable) -> Readable:
    """DeiT's names without their prefix.

    A `DeiTForImageClassification` has a distillation token but one head, on CLS. The mean of two heads is the same when
    the first is doubled and the second is zero, exactly so in floating point.
    """
    if "classifier.weight" not in tensors:
        return stripped("deit.")(config, tensors)

    def doubled(name: str) -> np.ndarray:
        return 2 * to_float32(name, tensors[name])

    heads: dict[str, Made] = {}
    for name in ("classifier.weight", "classifier.bias"):
        shape = tensors.shape(name)
        heads[f"cls_{name}"] = Made(shape, partial(doubled, name))
        heads[f"distillation_{name}"] = Made(shape, partial(np.zeros, shape, np.float32))
    without = frozenset({"classifier.weight", "classifier.bias"})
    return View(tensors, lambda name: name.removeprefix("deit."), heads, without)


def _vit_images(model: ViTConfig) -> Preprocess:
    size = model.image_size
    return Preprocess(size, "square", size, "bilinear", crop=False, crop_rule="hf", mean=HALF, std=HALF)


def _deit_images(model: ViTConfig) -> Preprocess:
    height, width = model.image_size
    return Preprocess(model.image_size, "square", (256 * height // 224, 256 * width // 224), "bicubic", crop_rule="hf")


def _describe(kind: Literal["vit", "deit"]) -> Callable[[ViTConfig, Images | None], Json]:
    heads = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassificationWithTeacher"}
    backbones = {"vit": "ViTModel", "deit": "DeiTModel"}

    def describe(model: ViTConfig, preprocess: Images | None) -> Json:
        return {
            "architectures": [heads[kind] if model.num_classes else backbones[kind]],
            "model_type": kind,
            **hf_blocks(model),
            **hf_images(model),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.02,
            "qkv_bias": model.qkv_bias,
            **({"num_labels": model.num_classes} if model.num_classes else {}),
        }

    return describe


def plain(model: Any) -> bool:
    """Whether a model has nothing beyond what Hugging Face's `vit` and DINO models have, whatever it pools."""
    return (
        isinstance(model, ViTConfig)
        and model.class_token
        and not (model.qk_norm or model.pre_norm or model.fc_norm)
        and model.patch_bias
        and model.head_bias
        and model.position_prefix
        and model.gelu in HF_GELU.values()
    )


def _expresses(distilled: bool) -> Callable[[Any], bool]:
    return lambda model: (
        plain(model)
        and model.pooling == "cls"
        and model.distilled == distilled
        and model.position in ("learned", "sincos")
        and model.mlp == "plain"
        and model.key_bias
        and model.registers == 0
        and model.layer_scale is None
    )


HF_VIT = Family(
    name="vit",
    side="hf",
    rows=VIT_ROWS,
    configure=_configure(VIT_ROWS, "vit"),
    preprocess=processed(_vit_images),
    describe=_describe("vit"),
    expresses=_expresses(distilled=False),
    view=stripped("vit."),
    prefix="vit.",
    ignored=_UNREAD,
)
HF_DEIT = Family(
    name="deit",
    side="hf",
    rows=DEIT_ROWS,
    configure=_configure(DEIT_ROWS, "deit"),
    preprocess=processed(_deit_images),
    describe=_describe("deit"),
    expresses=_expresses(distilled=True),
    view=_deit_view,
    prefix="deit.",
    ignored=_UNREAD,
)
HF_MAE = Family(
    name="vit_mae",
    side="hf",
    rows=VIT_ROWS,
    configure=_configure(VIT_ROWS, "vit_mae"),
    preprocess=processed(lambda model: script_eval(model.image_size)),
    describe=_describe("vit"),
    expresses=lambda model: False,
    view=stripped("vit."),
    prefix="vit.",
    ignored=_UNREAD,
)
