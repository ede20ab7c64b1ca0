"""timm's vision transformers: AugReg, DeiT, DeiT-3, MAE, CLIP, SigLIP, DINOv2 and DINOv3 towers under one naming.

Files of the hub name an architecture, which stands for sizes and options (`ARCHITECTURES`), and may state arguments
that go over them. Files without a configuration (DeiT's, MAE's) tell what their tensors show.

Positions at another size: bicubic with anti-aliasing. Images: short side / crop_pct, crop; mean and std 0.5 of AugReg
and SigLIP, CLIP's of CLIP, ImageNet's of the others; DeiT's and MAE's own files the scripts' 256 / 224.

References: timm 1.0 `models/vision_transformer.py`, `models/deit.py`, `models/eva.py`, `models/_hub.py`;
facebookresearch/deit and facebookresearch/mae.
"""

from collections.abc import Mapping
import dataclasses
import math
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
    as_stored,
    heads_of_64,
    key_of,
    pair,
    ratio,
)
from tokjax.pretrained.names import Made, Readable, View, table
from tokjax.pretrained.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocess,
    script_eval,
    timm_eval,
    to_timm,
)
from tokjax.pretrained.stored import to_float32

TIMM_ROWS = table(
    ("array", "cls_token"),
    ("array", "dist_token"),
    ("array", "reg_token"),
    ("positions", "pos_embed"),
    ("patch", "patch_embed", "patch_embed.proj"),
    ("norm", "norm_pre"),
    ("norm", "blocks.*.norm1"),
    ("linear", "blocks.*.attn.qkv"),
    ("array", "blocks.*.attn.qv_bias"),
    ("norm", "blocks.*.attn.q_norm"),
    ("norm", "blocks.*.attn.k_norm"),
    ("linear", "blocks.*.attn.proj"),
    ("array", "blocks.*.ls1.gamma"),
    ("norm", "blocks.*.norm2"),
    ("linear", "blocks.*.mlp.fc1"),
    ("linear", "blocks.*.mlp.fc2"),
    ("array", "blocks.*.ls2.gamma"),
    ("norm", "norm"),
    ("norm", "fc_norm"),
    ("array", "attn_pool.probe", "attn_pool.latent"),
    ("linear", "attn_pool.qkv", "attn_pool.q", "attn_pool.kv:2"),
    ("linear", "attn_pool.proj"),
    ("norm", "attn_pool.norm"),
    ("linear", "attn_pool.mlp.fc1"),
    ("linear", "attn_pool.mlp.fc2"),
    ("linear", "head"),
    ("linear", "head_dist"),
)
# DINOv3 is built from another class of timm, with other names for a few parts.
EVA_ROWS = {
    **TIMM_ROWS,
    **table(
        ("array", "blocks.*.attn.qv_bias", "blocks.*.attn.q_bias", "blocks.*.attn.v_bias"),
        ("array", "blocks.*.ls1.gamma", "blocks.*.gamma_1"),
        ("array", "blocks.*.ls2.gamma", "blocks.*.gamma_2"),
    ),
}
EVA_SWIGLU = table(("linear", "blocks.*.mlp.fc1", "blocks.*.mlp.fc1_g", "blocks.*.mlp.fc1_x"))

# Width, depth, heads, and hidden width over width.
SIZES: dict[str, tuple[int, int, int, float]] = {
    "tiny": (192, 12, 3, 4),
    "xsmall": (256, 10, 4, 4),
    "small": (384, 12, 6, 4),
    "small_plus": (384, 12, 6, 4),
    "medium": (512, 12, 8, 4),
    "mediumd": (512, 20, 8, 4),
    "betwixt": (640, 12, 10, 4),
    "base": (768, 12, 12, 4),
    "base_plus": (896, 12, 14, 4),
    "large": (1024, 24, 16, 4),
    "huge": (1280, 32, 16, 4),
    "huge_plus": (1280, 32, 20, 4),
    "giant": (1408, 40, 16, 48 / 11),
    "giant2": (1536, 40, 24, 5.33334),
    "giantopt": (1536, 40, 16, 4),
    "gigantic": (1664, 48, 16, 64 / 13),
    "so150m": (896, 18, 14, 2.572),
    "so150m2": (832, 21, 13, 34 / 13),
    "so400m": (1152, 27, 16, 3.7362),
    "wee": (256, 14, 4, 5),
    "little": (320, 14, 5, 5.6),
    "7b": (4096, 40, 32, 2),
}

_CLIP: Json = {"pre_norm": True, "norm_eps": 1e-5}
_QUICK: Json = {**_CLIP, "act_layer": "quick_gelu"}
# timm itself has the exact GELU in some of these; they were trained with the tanh form.
_SIGLIP: Json = {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"}
_SIGLIP_GAP: Json = {**_SIGLIP, "global_pool": "avg", "fc_norm": False}
_GAP: Json = {"class_token": False, "global_pool": "avg", "fc_norm": False}
_REG_GAP: Json = {"class_token": False, "no_embed_class": True, "global_pool": "avg", "init_values": 1e-5}
_REG_GAP2: Json = {"class_token": False, "global_pool": "avg", "init_values": 1e-5, "qkv_bias": False}
_DEIT3: Json = {"no_embed_class": True, "init_values": 1e-6}
_DINOV2: Json = {"init_values": 1e-5, "img_size": 518}
_DINOV2_REG: Json = {**_DINOV2, "no_embed_class": True}
_PACKED: Json = {"packed_swiglu": True}  # gate and value in one matrix
_DINOV3: Json = {
    "init_values": 1e-5,
    "img_size": 256,
    "norm_eps": 1e-5,
    "num_reg_tokens": 4,
    "qkv_bias": False,
    "rope_type": "dinov3",
    "rope_temperature": 100.0,
    "use_abs_pos_emb": False,
    "swiglu_mlp": False,
    "swiglu_align_to": 0,
    "global_pool": "avg",
    "fc_norm": False,
}
_DINOV3_BIAS: Json = {**_DINOV3, "qkv_bias": True}
_GATED: Json = {"swiglu_mlp": True, "swiglu_align_to": 8}

# Architectures by pattern (patch P, image S, registers R) and size, with what they add to the arguments of a plain ViT.
ARCHITECTURES: tuple[tuple[str, str, Json], ...] = (
    ("vit_{size}_patch{P}_{S}(_in21k)?", "tiny small base large huge giant gigantic", {}),
    ("vit_{size}_patch{P}_{S}_miil", "base", {"qkv_bias": False}),
    ("vit_small_patch{P}_36x1_{S}", "small", {"depth": 36, "init_values": 1e-5}),
    ("vit_base_patch{P}_plus_{S}", "base_plus", {"init_values": 1e-5}),
    ("vit_base_patch{P}_plus_clip_{S}", "base_plus", _CLIP),
    ("vit_{size}_patch{P}_clip_{S}", "xsmall medium betwixt base large huge giant gigantic", _CLIP),
    ("vit_{size}_patch{P}_clip_quickgelu_{S}", "base large huge gigantic", _QUICK),
    ("vit_{size}_patch{P}_siglip_{S}", "base large so400m giantopt", _SIGLIP),
    ("vit_{size}_patch{P}_siglip_gap_{S}", "base large so400m giantopt", _SIGLIP_GAP),
    ("vit_{size}_patch{P}_gap_{S}", "medium betwixt", {**_GAP, "qkv_bias": False, "init_values": 1e-6}),
    ("vit_{size}_patch{P}_gap_{S}", "huge giant", _GAP),
    ("vit_{size}_patch{P}_gap_{S}", "base", {**_GAP, "num_heads": 16}),
    ("vit_{size}_patch{P}_reg{R}_gap_{S}", "wee little medium mediumd betwixt", _REG_GAP),
    ("vit_{size}_patch{P}_reg{R}_gap_{S}", "base", {**_REG_GAP, "init_values": None}),
    ("vit_{size}_patch{P}_reg{R}_gap_{S}", "so150m", _GAP),
    ("vit_{size}_patch{P}_reg{R}_gap_{S}", "so150m2", _REG_GAP2),
    ("vit_{size}_patch{P}_dinov2", "small base large", _DINOV2),
    ("vit_{size}_patch{P}_reg{R}_dinov2", "small base large", _DINOV2_REG),
    ("vit_giant_patch{P}_dinov2", "giant2", {**_DINOV2, **_PACKED}),
    ("vit_giant_patch{P}_reg{R}_dinov2", "giant2", {**_DINOV2_REG, **_PACKED}),
    ("vit_{size}_patch{P}_dinov3", "small base large", _DINOV3),
    ("vit_{size}_patch{P}_dinov3_qkvb", "tiny small base large", _DINOV3_BIAS),
    ("vit_{size}_patch{P}_dinov3", "small_plus huge_plus 7b", {**_DINOV3, **_GATED}),
    ("vit_{size}_patch{P}_dinov3_qkvb", "small_plus huge_plus", {**_DINOV3_BIAS, **_GATED}),
    ("deit_{size}_patch{P}_{S}", "tiny small base", {}),
    ("deit_{size}_distilled_patch{P}_{S}", "tiny small base", {"distilled": True}),
    ("deit3_{size}_patch{P}_{S}(_in21ft1k)?", "small medium base large huge", _DEIT3),
)

_DEFAULTS: Json = {
    "img_size": 224,
    "in_chans": 3,
    "num_classes": 1000,
    "mlp_ratio": 4.0,
    "class_token": True,
    "distilled": False,
    "reg_tokens": 0,
    "global_pool": "token",
    "fc_norm": None,  # a norm after pooling exactly when the pooling is "avg"
    "norm_eps": 1e-6,
    "act_layer": "gelu",
    "packed_swiglu": False,  # a name of ours: timm states a class
    "init_values": None,
    "qk_norm": False,
    "qkv_bias": True,
    "no_embed_class": False,
    "pre_norm": False,
    "drop_path_rate": 0.0,
}

# Arguments that change nothing at evaluation.
_HARMLESS = {"drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "weight_init"}
_HARMLESS |= {"fix_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "proj_bias"}
_HARMLESS |= {"use_rot_pos_emb", "rope_rotate_half"}  # as DINOv3's architectures have them

# Over merged tokens, the mean over the patches that they stand for (ToMe's patch of MAE); else the plain mean.
_POOLING: Json = {"token": "cls", "avg": "size_mean", "map": "map"}
_GELU: Json = {"gelu": "exact", "gelu_tanh": "tanh", "quick_gelu": "quick"}


def _published(config: Json) -> Json:
    """The facts of the published weights; old files have them at the top."""
    return config.get("pretrained_cfg") or config


_FIELDS = {"P": r"(?P<patch>\d+)", "S": r"(?P<image>\d+)", "R": r"(?P<registers>\d)"}


def architecture(name: str) -> Json:
    """The arguments that an architecture's name stands for; a tag behind a dot tells only which weights they are.

    Raises:
        UserError: a name that is not known.
    """
    for pattern, sizes, extra in ARCHITECTURES:
        for size in sizes.split():
            found = re.fullmatch(pattern.format(size=size, **_FIELDS), name.split(".")[0])
            if found is None:
                continue
            width, depth, heads, times = SIZES[size]
            arguments = {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": times, **extra}
            parts = {"patch": "patch_size", "image": "img_size", "registers": "reg_tokens"}
            return arguments | {parts[part]: int(value) for part, value in found.groupdict().items()}
    known = sorted({re.sub(r"\(.*\)\?", "", pattern) for pattern, *_ in ARCHITECTURES})
    raise UserError(
        f"architecture {name!r} of timm is not known here; known are {', '.join(known)} "
        "(patch side P, image size S, R registers)."
    )


def _arguments(config: Json, tensors: Readable) -> Json:
    """timm's arguments: the stated ones over the architecture's; without a configuration, what the tensors show."""
    if "architecture" not in config:
        return _measured(config, tensors)
    stated = {k: v for k, v in (config.get("model_args") or {}).items() if v is not None}
    published = _published(config)
    arguments = {**_DEFAULTS, **architecture(config["architecture"])}
    if "input_size" in published:
        arguments |= {"in_chans": published["input_size"][0], "img_size": published["input_size"][1:]}
    for source in (published, config):
        arguments |= {k: source[k] for k in ("num_classes", "global_pool") if source.get(k) is not None}
    unknown = {k for k, v in stated.items() if k not in {*arguments, *_HARMLESS} and v}
    if unknown:
        raise UserError(f"model_args of timm that are not known here: {', '.join(sorted(unknown))}.")
    return {**arguments, **stated}


def _measured(config: Json, tensors: Readable) -> Json:
    eva = "blocks.0.gamma_1" in tensors
    gated = "blocks.0.mlp.fc1_g.weight" in tensors
    measured = Measured(EVA_ROWS if eva else TIMM_ROWS, tensors)
    width, hidden = measured.width, measured.hidden
    registers = tensors.shape("reg_token")[1] if "reg_token" in tensors else 0
    sizes = {
        "embed_dim": width,
        "depth": measured.depth,
        "num_heads": config.get("num_heads") or heads_of_64(width),
        "patch_size": measured.patch,
        "in_chans": measured.channels,
        "num_classes": measured.classes,
        "mlp_ratio": ratio(width, hidden),
    }
    if eva:
        bias = "blocks.0.attn.q_bias" in tensors
        return {**_DEFAULTS, **_DINOV3, **sizes, "swiglu_mlp": gated, "num_reg_tokens": registers, "qkv_bias": bias}
    # A first layer twice as wide as the second one's input holds a gate.
    packed = tensors.shape("blocks.0.mlp.fc1.weight")[0] == 2 * hidden
    embeds = math.isqrt(measured.positions) ** 2 != measured.positions  # a square of rows leaves none for CLS
    prefix = embeds * (("cls_token" in tensors) + ("dist_token" in tensors) + registers)
    pooling = "token" if "cls_token" in tensors and "fc_norm.weight" not in tensors else "avg"
    return {
        **_DEFAULTS,
        **sizes,
        "img_size": measured.image(prefix),
        "mlp_ratio": ratio(width, hidden * (1 + packed)),
        "packed_swiglu": packed,
        "class_token": "cls_token" in tensors,
        "distilled": "dist_token" in tensors,
        "reg_tokens": registers,
        "global_pool": "map" if "attn_pool.latent" in tensors else pooling,
        "fc_norm": "fc_norm.weight" in tensors,
        "act_layer": "gelu_tanh" if "attn_pool.latent" in tensors else "gelu",
        "init_values": 1e-6 if "blocks.0.ls1.gamma" in tensors else None,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "no_embed_class": not embeds,
        "pre_norm": "norm_pre.weight" in tensors,
    }


def _choice(arguments: Json, name: str, allowed: Mapping[Any, Any]) -> Any:
    if arguments[name] not in allowed:
        raise UserError(f"{name} = {arguments[name]!r} is not known here; allowed are {', '.join(map(str, allowed))}.")
    return allowed[arguments[name]]


def _configure(config: Json, tensors: Readable) -> ViTConfig:
    a = _arguments(config, tensors)
    pooling = _choice(a, "global_pool", _POOLING)
    rotary = "rope_type" in a
    gated = a.get("swiglu_mlp", False) or a["packed_swiglu"]
    registers = a["num_reg_tokens"] if rotary else a["reg_tokens"]
    if pooling == "map" and (a["class_token"] or registers):
        raise UserError("global_pool = 'map' with class or register tokens, which timm leaves out, is not known here.")
    if rotary:
        _choice(a, "rope_type", {"dinov3": True})
        _choice(a, "use_abs_pos_emb", {False: False})
    # A matrix that holds gate and value counts twice; two of them are rounded up.
    hidden = int(a["embed_dim"] * a["mlp_ratio"]) // (1 + a["packed_swiglu"])
    align = a.get("swiglu_align_to", 1) or 1
    hidden += -hidden % align
    return ViTConfig(
        image_size=pair(a["img_size"]),
        patch_size=a["patch_size"],
        channels=a["in_chans"],
        width=a["embed_dim"],
        depth=a["depth"],
        heads=a["num_heads"],
        mlp_ratio=ratio(a["embed_dim"], hidden) if gated else a["mlp_ratio"],
        mlp="swiglu" if gated else "plain",
        num_classes=a["num_classes"],
        class_token=a["class_token"],
        distilled=a["distilled"],
        registers=registers,
        pooling=pooling,
        norm_eps=a["norm_eps"],
        gelu="exact" if gated else _choice(a, "act_layer", _GELU),
        layer_scale=a["init_values"],
        qk_norm=a["qk_norm"],
        qkv_bias=a["qkv_bias"],
        key_bias=not (rotary and a["qkv_bias"]),
        patch_bias=not a["pre_norm"],
        position="rope" if rotary else "sincos" if _is_mae(config, tensors) else "learned",
        rope_base=float(a.get("rope_temperature", 100.0)),
        position_prefix=not a["no_embed_class"],
        pre_norm=a["pre_norm"],
        fc_norm=pooling == "size_mean" if a["fc_norm"] is None else a["fc_norm"],
        drop_path=a["drop_path_rate"],
    )


def _is_mae(config: Json, tensors: Readable) -> bool:
    """Whether this is MAE's encoder as pre-trained, whose positions are fixed."""
    return "decoder_pos_embed" in tensors or (_published(config).get("tag") == "mae" and config.get("num_classes") == 0)


def _preprocess(config: Json, processor: Json | None, model: ViTConfig) -> Preprocess:
    if "architecture" not in config:
        return script_eval(model.image_size)
    name, published = config["architecture"], _published(config)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if "_clip_" in name:
        mean, std = CLIP_MEAN, CLIP_STD
    elif name.startswith("vit_") and "dino" not in name and not model.fc_norm and model.position == "learned":
        mean, std = HALF, HALF
    whole = max(model.image_size) >= 384 or re.match(r".*_dinov\d|vit_(large|huge|giant|gigantic)_.*_clip_", name)
    return timm_eval(
        model.image_size,
        crop_pct=published.get("crop_pct") or (1.0 if whole else 0.9),
        interpolation=published.get("interpolation") or "bicubic",
        mean=published.get("mean") or mean,
        std=published.get("std") or std,
        crop_mode=published.get("crop_mode") or "center",
    )


def _base(model: ViTConfig) -> str:
    """An architecture whose class and options come nearest, which the arguments then make the model's."""
    if model.position == "rope":
        return "vit_base_patch16_dinov3_qkvb" if model.qkv_bias else "vit_base_patch16_dinov3"
    if model.distilled:
        return "deit_base_distilled_patch16_224"
    if model.mlp == "swiglu":
        return "vit_giant_patch14_dinov2"
    if model.norm_eps == 1e-5:
        return "vit_base_patch16_clip_224"
    return "vit_base_patch16_siglip_224" if model.pooling == "map" else "vit_base_patch16_224"


def _describe(model: ViTConfig, preprocess: Images | None) -> Json:
    name, rotary = _base(model), model.position == "rope"
    gated = model.mlp == "swiglu"
    packed = gated and not rotary
    hidden = int(model.width * model.mlp_ratio)
    arguments: Json = {
        "img_size": list(model.image_size),
        "patch_size": model.patch_size,
        "in_chans": model.channels,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.heads,
        "mlp_ratio": ratio(model.width, 2 * hidden) if packed else model.mlp_ratio,
        "class_token": model.class_token,
        "global_pool": key_of(_POOLING, {"mean": "size_mean", "cls_mean": "cls"}.get(model.pooling, model.pooling)),
        "norm_eps": model.norm_eps,
        "init_values": model.layer_scale,
        "qk_norm": model.qk_norm,
        "qkv_bias": model.qkv_bias,
        "drop_path_rate": model.drop_path,
    }
    if rotary:
        arguments |= {"num_reg_tokens": model.registers, "rope_temperature": model.rope_base}
        arguments |= {"swiglu_mlp": True, "swiglu_align_to": 1} if gated else {}
    else:
        arguments |= {
            "reg_tokens": model.registers,
            "fc_norm": model.fc_norm,
            "no_embed_class": not model.position_prefix,
            "pre_norm": model.pre_norm,
        }
    if not gated:
        arguments["act_layer"] = key_of(_GELU, model.gelu)
    # What timm takes anyway is not said, least of all what it does not let anyone say (a norm's eps).
    usual = {**_DEFAULTS, **architecture(name)}
    kept = {k: v for k, v in arguments.items() if v != usual.get(k) or (k in _DEFAULTS and v != _DEFAULTS[k])}
    if model.norm_eps == usual["norm_eps"]:
        kept.pop("norm_eps", None)
    if model.fc_norm == (arguments["global_pool"] == "avg"):
        kept.pop("fc_norm", None)
    kept |= {k: arguments[k] for k in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    published = {
        "input_size": [model.channels, *model.image_size],
        "fixed_input_size": True,
        "num_classes": model.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if model.distilled else "head",
        **(to_timm(preprocess) if isinstance(preprocess, Preprocess) else {}),
    }
    return {
        "architecture": name,
        "num_classes": model.num_classes,
        "num_features": model.width,
        "global_pool": arguments["global_pool"],
        "model_args": kept,
        "pretrained_cfg": published,
    }


def _view(config: Json, tensors: Readable) -> Readable:
    """timm's present names and one meaning of registers: they have no position of their own.

    DeiT-3's own files call LayerScale's factors gamma_1 and gamma_2. Where registers have rows in the position table,
    these are added to the tokens, as the model does at once.
    """
    renamed = View(tensors, lambda name: re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name))
    if not {"reg_token", "pos_embed"} <= set(renamed):
        return renamed
    a = _arguments(config, renamed)
    if a["no_embed_class"]:
        return renamed
    start, shape = a["class_token"] + a["distilled"], renamed.shape("reg_token")

    def registers() -> np.ndarray:
        tokens, table = (to_float32(name, renamed[name]) for name in ("reg_token", "pos_embed"))
        return tokens + table[:, start : start + shape[1]]

    return View(renamed, made={"reg_token": Made(shape, registers)})


def _blank(model: ViTConfig) -> dict[str, tuple[int, ...]]:
    """timm's heads always have a bias."""
    return {} if model.head_bias or not model.num_classes else {"head.bias": (model.num_classes,)}


TIMM = Family(
    name="timm",
    side="timm",
    rows=TIMM_ROWS,
    configure=_configure,
    preprocess=_preprocess,
    describe=_describe,
    expresses=lambda model: (
        isinstance(model, ViTConfig) and model.position in ("learned", "sincos") and model.pooling != "cls_mean"
    ),
    view=_view,
    ignored=r"decoder_.*|mask_token",
    interpolation=("bicubic", True),
    blank=_blank,
)
TIMM_EVA = dataclasses.replace(
    TIMM,
    name="timm_eva",
    rows=EVA_ROWS,
    gated=EVA_SWIGLU,
    expresses=lambda model: (
        isinstance(model, ViTConfig)
        and model.position == "rope"
        and not model.distilled
        and model.pooling != "cls_mean"
    ),
    view=as_stored,
)
