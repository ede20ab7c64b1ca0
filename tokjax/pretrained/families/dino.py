"""DINOv2 and DINOv3: Hugging Face's `dinov2`, `dinov2_with_registers`, `dinov3_vit`, and the names of their authors.

Backbones whose pooled feature is CLS. The classifiers of DINOv2 (`Dinov2ForImageClassification`) read CLS beside the
mean of the patches, both behind the final norm, without the registers: as the authors' linear probes
(`dinov2/eval/linear.py`), and as transformers since its pull request 37836, before which registers were in the mean of
`Dinov2WithRegistersForImageClassification`. DINOv2 has a table for 518 pixels, resized bicubic, with anti-aliasing only
in the models with registers, which have no row in it. DINOv3 has rotary positions and no bias on keys. The largest
models of both have SwiGLU, DINOv2's in one matrix (gate, then value), DINOv3's in two. Norm eps 1e-6 and 1e-5.

DINOv2's authors scale a table without registers by (size + 0.1) / 37 where Hugging Face has size / 37, which is done
here too: at other sizes than the table's their features differ a little.

References: Oquab et al., TMLR 2024; Darcet et al., ICLR 2024; Simeoni et al., 2025; facebookresearch/dinov2
`dinov2/models/vision_transformer.py`, facebookresearch/dinov3 `dinov3/models/vision_transformer.py`; transformers
`models/dinov2`, `models/dinov2_with_registers`, `models/dinov3_vit`.
"""

from collections.abc import Callable, Mapping
import dataclasses
from functools import partial
import re
from typing import Any

import numpy as np

from tokjax.errors import UserError
from tokjax.models.vit import ViTConfig
from tokjax.pretrained.families.base import (
    Family,
    Images,
    Json,
    Measured,
    Stated,
    heads_of_64,
    hf_blocks,
    hf_images,
    pair,
    processed,
    ratio,
    stripped,
)
from tokjax.pretrained.families.timm import TIMM_ROWS
from tokjax.pretrained.families.vit import ENCODER, classes_of, plain
from tokjax.pretrained.names import Made, Readable, Row, View, table
from tokjax.pretrained.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

DINOV2_ROWS = table(
    *ENCODER,
    ("array", "reg_token", "embeddings.register_tokens"),
    ("norm", "blocks.*.norm1", "encoder.layer.*.norm1"),
    ("array", "blocks.*.ls1.gamma", "encoder.layer.*.layer_scale1.lambda1"),
    ("norm", "blocks.*.norm2", "encoder.layer.*.norm2"),
    ("linear", "blocks.*.mlp.fc1", "encoder.layer.*.mlp.fc1"),
    ("linear", "blocks.*.mlp.fc2", "encoder.layer.*.mlp.fc2"),
    ("array", "blocks.*.ls2.gamma", "encoder.layer.*.layer_scale2.lambda1"),
    ("linear", "head", "classifier"),
)
DINOV2_SWIGLU = table(
    ("linear", "blocks.*.mlp.fc1", "encoder.layer.*.mlp.weights_in"),
    ("linear", "blocks.*.mlp.fc2", "encoder.layer.*.mlp.weights_out"),
)
DINOV3_ROWS = table(
    ("array", "cls_token", "embeddings.cls_token"),
    ("array", "reg_token", "embeddings.register_tokens"),
    ("patch", "patch_embed", "embeddings.patch_embeddings"),
    ("norm", "blocks.*.norm1", "layer.*.norm1"),
    (
        "linear",
        "blocks.*.attn.qkv",
        "layer.*.attention.q_proj",
        "layer.*.attention.k_proj",
        "layer.*.attention.v_proj",
    ),
    ("array", "blocks.*.attn.qv_bias", "layer.*.attention.q_proj.bias", "layer.*.attention.v_proj.bias"),
    ("linear", "blocks.*.attn.proj", "layer.*.attention.o_proj"),
    ("array", "blocks.*.ls1.gamma", "layer.*.layer_scale1.lambda1"),
    ("norm", "blocks.*.norm2", "layer.*.norm2"),
    ("linear", "blocks.*.mlp.fc1", "layer.*.mlp.up_proj"),
    ("linear", "blocks.*.mlp.fc2", "layer.*.mlp.down_proj"),
    ("array", "blocks.*.ls2.gamma", "layer.*.layer_scale2.lambda1"),
    ("norm", "norm"),
)
DINOV3_SWIGLU = table(("linear", "blocks.*.mlp.fc1", "layer.*.mlp.gate_proj", "layer.*.mlp.up_proj"))

# The authors' names are timm's but for these.
_UPSTREAM_ROWS = {**TIMM_ROWS, **table(("array", "pos_embed"))}
DINOV2_UPSTREAM_ROWS = {**_UPSTREAM_ROWS, **table(("array", "reg_token", "register_tokens"))}
DINOV2_UPSTREAM_SWIGLU = table(
    ("linear", "blocks.*.mlp.fc1", "blocks.*.mlp.w12"), ("linear", "blocks.*.mlp.fc2", "blocks.*.mlp.w3")
)
DINOV3_UPSTREAM_ROWS = {**_UPSTREAM_ROWS, **table(("array", "reg_token", "storage_tokens"))}
DINOV3_UPSTREAM_SWIGLU = table(
    ("linear", "blocks.*.mlp.fc1", "blocks.*.mlp.w1", "blocks.*.mlp.w2"),
    ("linear", "blocks.*.mlp.fc2", "blocks.*.mlp.w3"),
)


def swiglu_width(width: int, mlp_ratio: float) -> int:
    """DINOv2's hidden width of SwiGLU: two thirds of a plain MLP's, rounded up to a multiple of 8."""
    return (int(int(width * mlp_ratio) * 2 / 3) + 7) // 8 * 8


# --------------------------------------------------------------------------------------------------------- Hugging Face


def _dinov2_configure(config: Json, tensors: Readable) -> ViTConfig:
    gated = bool(config.get("use_swiglu_ffn", False))
    measured = Measured({**DINOV2_ROWS, **DINOV2_SWIGLU} if gated else DINOV2_ROWS, tensors)
    stated = Stated(config, measured)
    width, times = stated.size("hidden_size", "width"), stated.get("mlp_ratio", 4)
    hidden = swiglu_width(width, times) if gated else int(width * times)
    with_registers = config.get("model_type") == "dinov2_with_registers"
    patch, classes = stated.size("patch_size", "patch"), classes_of(config, measured)
    return ViTConfig(
        image_size=pair(config.get("image_size") or measured.image(1)),
        patch_size=patch,
        channels=stated.size("num_channels", "channels"),
        num_classes=classes,
        pooling="cls_mean" if classes else "cls",
        registers=stated.get("num_register_tokens", 4) if with_registers else 0,
        layer_scale=stated.get("layerscale_value", 1.0),
        qkv_bias=stated.get("qkv_bias", True),
        drop_path=stated.get("drop_path_rate", 0.0),
        mlp="swiglu" if gated else "plain",
        **{**stated.blocks(12, 1e-6, "gelu"), "mlp_ratio": ratio(width, hidden)},
    )


def _dinov3_configure(config: Json, tensors: Readable) -> ViTConfig:
    gated = bool(config.get("use_gated_mlp", False))
    measured = Measured({**DINOV3_ROWS, **DINOV3_SWIGLU} if gated else DINOV3_ROWS, tensors)
    stated = Stated(config, measured)
    query, key, value = (stated.get(f"{name}_bias", name != "key") for name in ("query", "key", "value"))
    if query != value or (key and not query):
        raise UserError(f"query_bias = {query}, key_bias = {key}, value_bias = {value} is not known here.")
    for name in ("proj_bias", "mlp_bias"):
        if not stated.get(name, True):
            raise UserError(f"{name} = false is not known here; allowed is true.")
    activation = stated.get("hidden_act", "gelu")
    if gated != (activation == "silu"):
        raise UserError(f"hidden_act = {activation!r} with use_gated_mlp = {gated} is not known here.")
    blocks = Stated({**config, "hidden_act": "gelu"}, measured) if gated else stated
    patch = stated.size("patch_size", "patch")
    return ViTConfig(
        image_size=pair(stated.get("image_size", 224)),
        patch_size=patch,
        channels=stated.size("num_channels", "channels"),
        num_classes=0,
        registers=stated.get("num_register_tokens", 0),
        layer_scale=stated.get("layerscale_value", 1.0),
        qkv_bias=query,
        key_bias=key or not query,
        drop_path=stated.get("drop_path_rate", 0.0),
        position="rope",
        rope_base=float(stated.get("rope_theta", 100.0)),
        mlp="swiglu" if gated else "plain",
        **blocks.blocks(6, 1e-5, "gelu"),
    )


def _dino(model: Any) -> bool:
    return plain(model) and not model.distilled and model.layer_scale is not None


def _dinov2_ratio(model: ViTConfig) -> int | None:
    """The `mlp_ratio`, a whole number, by which transformers arrives at the model's hidden width."""
    width, hidden = model.width, int(model.width * model.mlp_ratio)
    if model.mlp == "plain":
        return hidden // width if hidden % width == 0 else None
    return next((times for times in range(1, 2 * hidden // width + 2) if swiglu_width(width, times) == hidden), None)


def _dinov2_expresses(registers: bool) -> Callable[[Any], bool]:
    return lambda model: (
        _dino(model)
        and model.pooling == ("cls_mean" if model.num_classes else "cls")
        and (model.registers > 0) == registers
        and model.position == "learned"
        and model.key_bias
        and _dinov2_ratio(model) is not None
    )


def _dinov3_expresses(model: Any) -> bool:
    return _dino(model) and model.num_classes == 0 and model.pooling == "cls" and model.position == "rope"


def _describe_common(model: ViTConfig) -> Json:
    return {
        **hf_blocks(model),
        **hf_images(model),
        "initializer_range": 0.02,
        "layerscale_value": model.layer_scale,
        "drop_path_rate": model.drop_path,
    }


def _dinov2_describe(model: ViTConfig, preprocess: Images | None) -> Json:
    common = _describe_common(model)
    del common["intermediate_size"]
    registers: Json = {"num_register_tokens": model.registers} if model.registers else {"use_mask_token": False}
    kind = "Dinov2WithRegisters" if model.registers else "Dinov2"
    return {
        "architectures": [kind + ("ForImageClassification" if model.num_classes else "Model")],
        "model_type": "dinov2_with_registers" if model.registers else "dinov2",
        **common,
        "mlp_ratio": _dinov2_ratio(model),
        "qkv_bias": model.qkv_bias,
        "use_swiglu_ffn": model.mlp == "swiglu",
        **registers,
        **({"num_labels": model.num_classes} if model.num_classes else {}),
    }


def _dinov3_describe(model: ViTConfig, preprocess: Images | None) -> Json:
    gated = model.mlp == "swiglu"
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        **_describe_common(model),
        "query_bias": model.qkv_bias,
        "key_bias": model.qkv_bias and model.key_bias,
        "value_bias": model.qkv_bias,
        "rope_theta": model.rope_base,
        "num_register_tokens": model.registers,
        "use_gated_mlp": gated,
        **({"hidden_act": "silu"} if gated else {}),
    }


def _dinov2_images(model: ViTConfig) -> Preprocess:
    height, width = model.image_size
    return Preprocess(model.image_size, "short", (256 * height // 224, 256 * width // 224), "bicubic", crop_rule="hf")


def _dinov3_images(model: ViTConfig) -> Preprocess:
    size = model.image_size
    return Preprocess(
        size,
        "square",
        size,
        "bilinear",
        crop=False,
        crop_rule="hf",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        float_resize=True,
    )


HF_DINOV2 = Family(
    name="dinov2",
    side="hf",
    rows=DINOV2_ROWS,
    gated=DINOV2_SWIGLU,
    configure=_dinov2_configure,
    preprocess=processed(_dinov2_images),
    describe=_dinov2_describe,
    expresses=_dinov2_expresses(registers=False),
    view=stripped("dinov2."),
    prefix="dinov2.",
    ignored=r"embeddings\.mask_token",
)
HF_DINOV2_REGISTERS = dataclasses.replace(
    HF_DINOV2,
    name="dinov2_with_registers",
    expresses=_dinov2_expresses(registers=True),
    view=stripped("dinov2_with_registers."),
    prefix="dinov2_with_registers.",
    interpolation=("bicubic", True),
    blank=lambda model: {"embeddings.mask_token": (1, model.width)},
)
HF_DINOV3 = Family(
    name="dinov3_vit",
    side="hf",
    rows=DINOV3_ROWS,
    gated=DINOV3_SWIGLU,
    configure=_dinov3_configure,
    preprocess=processed(_dinov3_images),
    describe=_dinov3_describe,
    expresses=_dinov3_expresses,
    view=stripped("model."),
    ignored=r"embeddings\.mask_token|rope_embeddings\.inv_freq",
    blank=lambda model: {"embeddings.mask_token": (1, 1, model.width)},
)


# ------------------------------------------------------------------------------------------------------- their authors'


def _upstream(rows: Mapping[str, Row], swiglu: Mapping[str, Row], tensors: Readable) -> tuple[Measured, Json]:
    """The sizes that tensors of the authors' names show."""
    first = next(iter(swiglu["blocks.*.mlp.fc1"].files)).replace("*", "0") + ".weight"
    gated = first in tensors
    measured = Measured({**rows, **swiglu} if gated else rows, tensors)
    return measured, {
        "patch_size": measured.patch,
        "channels": measured.channels,
        "width": measured.width,
        "depth": measured.depth,
        "mlp_ratio": ratio(measured.width, measured.hidden),
        "mlp": "swiglu" if gated else "plain",
        "num_classes": 0,
        "registers": measured.shape("reg_token", 3)[1] if measured.has("reg_token") else 0,
        "layer_scale": 1e-5,
    }


def _dinov2_upstream(config: Json, tensors: Readable) -> ViTConfig:
    measured, sizes = _upstream(DINOV2_UPSTREAM_ROWS, DINOV2_UPSTREAM_SWIGLU, tensors)
    side = measured.image(1)
    heads = config.get("num_heads") or heads_of_64(measured.width)
    return ViTConfig(image_size=(side, side), heads=heads, **sizes)


def _dinov3_upstream(config: Json, tensors: Readable) -> ViTConfig:
    """The rotary frequencies are a fourth of a head's channels, which tells the heads of all sizes."""
    measured, sizes = _upstream(DINOV3_UPSTREAM_ROWS, DINOV3_UPSTREAM_SWIGLU, tensors)
    width, periods = measured.width, "rope_embed.periods"
    heads = width // (4 * tensors.shape(periods)[0]) if periods in tensors else heads_of_64(width)
    bias = "blocks.0.attn.qv_bias" in tensors
    return ViTConfig(heads=heads, position="rope", norm_eps=1e-5, qkv_bias=bias, key_bias=not bias, **sizes)


def _dinov2_view(config: Json, tensors: Readable) -> Readable:
    """Blocks are numbered through, also where a file has them in chunks ("blocks.1.13" is block 13)."""
    return View(tensors, lambda name: re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name))


def _dinov3_view(config: Json, tensors: Readable) -> Readable:
    """The third of a bias that belongs to keys is masked in the authors' code, and left out here."""
    bias = re.compile(r"(blocks\.\d+\.attn)\.qkv\.bias(_mask)?")

    def cut(name: str) -> np.ndarray:
        query, _, value = np.split(tensors[name], 3)
        return np.concatenate([query, value])

    found = [(name, match) for name in tensors if (match := bias.fullmatch(name))]
    made = {
        f"{match[1]}.qv_bias": Made((tensors.shape(name)[0] // 3 * 2,), partial(cut, name))
        for name, match in found
        if not match[2]
    }
    return View(tensors, made=made, without=frozenset(name for name, _ in found))


def _upstream_images(model: ViTConfig) -> Preprocess:
    """The authors' evaluation: short side of 256 / 224 of the size, bicubic, cropped."""
    height, width = model.image_size
    return Preprocess(model.image_size, "short", (256 * height // 224, 256 * width // 224), "bicubic")


DINOV2_UPSTREAM = Family(
    name="dinov2_upstream",
    side="hf",
    rows=DINOV2_UPSTREAM_ROWS,
    gated=DINOV2_UPSTREAM_SWIGLU,
    configure=_dinov2_upstream,
    preprocess=lambda config, processor, model: _upstream_images(model),
    describe=lambda model, preprocess: {},
    expresses=lambda model: False,
    view=_dinov2_view,
    ignored=r"mask_token",
)
DINOV2_UPSTREAM_REGISTERS = dataclasses.replace(
    DINOV2_UPSTREAM, name="dinov2_upstream_registers", interpolation=("bicubic", True)
)
DINOV3_UPSTREAM = Family(
    name="dinov3_upstream",
    side="hf",
    rows=DINOV3_UPSTREAM_ROWS,
    gated=DINOV3_UPSTREAM_SWIGLU,
    configure=_dinov3_upstream,
    preprocess=lambda config, processor, model: _upstream_images(model),
    describe=lambda model, preprocess: {},
    expresses=lambda model: False,
    view=_dinov3_view,
    ignored=r"mask_token|rope_embed\.periods|local_cls_norm\..*",
)
