"""The families of checkpoints that become a ViT: how each is recognised, named, configured and preprocessed.

One `Family` a naming; a new one is a table of names, a few functions and a place in `FAMILIES`. What publishers leave
unsaid:

| family | norm eps | positions at another size | images |
| --- | --- | --- | --- |
| timm `vit_*` (AugReg) | 1e-6 | bicubic, anti-aliased | short side / crop_pct, crop, mean and std 0.5 |
| timm `deit_*`, `deit3_*`, MAE | 1e-6 | bicubic, anti-aliased | the same with ImageNet's mean and std |
| timm's names, no configuration (DeiT's, MAE's files) | 1e-6 | bicubic, anti-aliased | 256 / 224, crop, ImageNet |
| Hugging Face `vit` | 1e-12 | bicubic | square, bilinear, 0.5 |
| Hugging Face `deit` | 1e-12 | bicubic | square 256 / 224, crop, ImageNet as in the released files |
| Hugging Face `vit_mae` | 1e-12 | bicubic | 256 / 224, crop, ImageNet |

References: timm 1.0 `models/vision_transformer.py`, `models/deit.py`, `models/_hub.py`; transformers `models/vit`,
`models/deit`, `models/vit_mae`; facebookresearch/deit and facebookresearch/mae.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import re
from typing import Any, Literal

import numpy as np

from tokjax.errors import UserError
from tokjax.models.vit import ViTConfig
from tokjax.pretrained.names import Readable, Renamed, Row, table
from tokjax.pretrained.positions import Method
from tokjax.pretrained.preprocess import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocess,
    from_processor,
    script_eval,
    timm_eval,
    to_timm,
)

Json = dict[str, Any]
SIDES = ("hf", "timm")


@dataclasses.dataclass(frozen=True)
class Family:
    """One way of naming and describing a ViT.

    Attributes:
        name: "timm", or Hugging Face's `model_type`.
        side: whose convention it is, "hf" or "timm".
        rows: the tree's names in the file, without `prefix`.
        prefix: what precedes the names of the backbone in the file of a whole model ("vit.").
        ignored: pattern of tensors that may be left unread.
        interpolation: method and anti-aliasing of the position table at another image size.
        view: the stored tensors under the names of `rows`.
        configure: the model, from `config.json` and the tensors' names and shapes.
        preprocess: the images' pipeline for a model, from `config.json` and `preprocessor_config.json`.
        describe: the inverse of `configure`: a `config.json`, with the pipeline if this side keeps it there.
        expresses: whether this family's own library can build the model.
    """

    name: str
    side: Literal["hf", "timm"]
    rows: dict[str, Row]
    prefix: str
    ignored: str
    interpolation: tuple[Method, bool]
    view: Callable[[Readable], Readable]
    configure: Callable[[Json, Readable], ViTConfig]
    preprocess: Callable[[Json, Json | None, ViTConfig], Preprocess]
    describe: Callable[[ViTConfig, Preprocess | None], Json]
    expresses: Callable[[ViTConfig], bool]


class Measured:
    """The sizes of a ViT as its tensors show them, for what a configuration leaves unsaid.

    Raises:
        UserError: on asking for a size whose tensor is missing.
    """

    def __init__(self, rows: Mapping[str, Row], tensors: Readable):
        self._rows, self._tensors = rows, tensors

    def _shape(self, tree: str, suffix: str, rank: int) -> tuple[int, ...]:
        name = self._rows[tree].files[0].replace("*", "0") + suffix
        if name not in self._tensors or len(self._tensors.shape(name)) != rank:
            raise UserError(f"The tensors do not fit. Missing: {name} with {rank} axes.")
        return self._tensors.shape(name)

    @property
    def width(self) -> int:
        return self._shape("patch_embed", ".weight", 4)[0]

    @property
    def channels(self) -> int:
        return self._shape("patch_embed", ".weight", 4)[1]

    @property
    def patch(self) -> int:
        return self._shape("patch_embed", ".weight", 4)[2]

    @property
    def hidden(self) -> int:
        return self._shape("blocks.*.mlp.fc1", ".weight", 2)[0]

    @property
    def depth(self) -> int:
        name = re.escape(self._rows["blocks.*.norm1"].files[0] + ".weight").replace(r"\*", r"\d+")
        return sum(re.fullmatch(name, other) is not None for other in self._tensors)

    @property
    def classes(self) -> int:
        """0 without a head."""
        name = self._rows["head"].files[0] + ".weight"
        return self._tensors.shape(name)[0] if name in self._tensors else 0

    @property
    def rows(self) -> int:
        """Rows of the position table."""
        return self._shape("pos_embed", "", 3)[1]

    def image(self, prefix: int) -> int:
        """The side of a square image whose table has `prefix` rows that are not patches."""
        patches = max(self.rows - prefix, 0)
        side = math.isqrt(patches)
        if side * side != patches:
            raise UserError(f"The position table has {patches} rows for patches, no square; state the image size.")
        return side * self.patch


def ratio(width: int, hidden: int) -> float:
    """The `mlp_ratio` for which int(width * mlp_ratio) is `hidden`, rounding errors notwithstanding."""
    value = hidden / width
    return value if int(width * value) == hidden else math.nextafter(value, math.inf)


# ---------------------------------------------------------------------------------------------------------------- timm

TIMM_ROWS = table(
    ("array", "cls_token"),
    ("array", "dist_token"),
    ("array", "reg_token"),
    ("positions", "pos_embed"),
    ("patch", "patch_embed", "patch_embed.proj"),
    ("norm", "norm_pre"),
    ("norm", "blocks.*.norm1"),
    ("linear", "blocks.*.attn.qkv"),
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
    ("linear", "head"),
    ("linear", "head_dist"),
)

_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}

# Architectures of timm by pattern, with what they add to the arguments of a plain ViT.
_TIMM_ARCHITECTURES: tuple[tuple[str, Json], ...] = (
    (r"vit_(?P<size>tiny|small|base|large|huge)_patch(?P<patch>\d+)_(?P<image>\d+)(_in21k)?", {}),
    (r"deit_(?P<size>tiny|small|base)_patch(?P<patch>\d+)_(?P<image>\d+)", {}),
    (r"deit_(?P<size>tiny|small|base)_distilled_patch(?P<patch>\d+)_(?P<image>\d+)", {"distilled": True}),
    (
        r"deit3_(?P<size>small|medium|base|large|huge)_patch(?P<patch>\d+)_(?P<image>\d+)(_in21ft1k)?",
        {"no_embed_class": True, "init_values": 1e-6},
    ),
)

_TIMM_DEFAULTS: Json = {
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
    "init_values": None,
    "qk_norm": False,
    "qkv_bias": True,
    "no_embed_class": False,
    "pre_norm": False,
    "drop_path_rate": 0.0,
}

# Arguments of timm that change nothing at evaluation.
_TIMM_HARMLESS = {"drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "weight_init"}
_TIMM_HARMLESS |= {"fix_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "proj_bias"}

# Over merged tokens, the mean over the patches that they stand for (ToMe's patch of MAE); else the plain mean.
_TIMM_POOLING: Json = {"token": "cls", "avg": "size_mean"}
_TIMM_GELU: Json = {"gelu": "exact", "gelu_tanh": "tanh", "quick_gelu": "quick"}


def _published(config: Json) -> Json:
    """The facts of the published weights; old files have them at the top."""
    return config.get("pretrained_cfg") or config


def _architecture(config: Json) -> Json:
    """The arguments that an architecture's name stands for.

    Raises:
        UserError: a name that is not known.
    """
    name = config["architecture"].split(".")[0]
    for pattern, extra in _TIMM_ARCHITECTURES:
        if found := re.fullmatch(pattern, name):
            width, depth, heads = _SIZES[found["size"]]
            sizes = {"embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": int(found["patch"])}
            return {**sizes, "img_size": int(found["image"]), **extra}
    sizes_known = "|".join(_SIZES)
    raise UserError(
        f"architecture {config['architecture']!r} of timm is not known here; known are "
        f"vit_, deit_, deit_*_distilled_ and deit3_({sizes_known})_patch<p>_<size>."
    )


def _timm_arguments(config: Json, tensors: Readable) -> Json:
    """timm's arguments: the stated ones over the architecture's; without a configuration, what the tensors show."""
    if "architecture" in config:
        stated = {k: v for k, v in (config.get("model_args") or {}).items() if v is not None}
        published = _published(config)
        arguments = {**_TIMM_DEFAULTS, **_architecture(config)}
        if "input_size" in published:
            arguments |= {"in_chans": published["input_size"][0], "img_size": published["input_size"][1:]}
        for source in (published, config):
            arguments |= {k: source[k] for k in ("num_classes", "global_pool") if source.get(k) is not None}
        unknown = {k for k, v in stated.items() if k not in {*arguments, *_TIMM_HARMLESS} and v}
        if unknown:
            raise UserError(f"model_args of timm that are not known here: {', '.join(sorted(unknown))}.")
        return {**arguments, **stated}
    measured = Measured(TIMM_ROWS, tensors)
    registers = tensors.shape("reg_token")[1] if "reg_token" in tensors else 0
    embeds = math.isqrt(measured.rows) ** 2 != measured.rows  # a square number of rows leaves none for CLS
    prefix = embeds * (("cls_token" in tensors) + ("dist_token" in tensors) + registers)
    mean = "fc_norm.weight" in tensors or "cls_token" not in tensors
    return {
        **_TIMM_DEFAULTS,
        "embed_dim": measured.width,
        "depth": measured.depth,
        "num_heads": _heads(measured.width),
        "patch_size": measured.patch,
        "img_size": measured.image(prefix),
        "in_chans": measured.channels,
        "num_classes": measured.classes,
        "mlp_ratio": ratio(measured.width, measured.hidden),
        "class_token": "cls_token" in tensors,
        "distilled": "dist_token" in tensors,
        "reg_tokens": registers,
        "global_pool": "avg" if mean else "token",
        "fc_norm": "fc_norm.weight" in tensors,
        "init_values": 1e-6 if "blocks.0.ls1.gamma" in tensors else None,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "no_embed_class": not embeds,
        "pre_norm": "norm_pre.weight" in tensors,
    }


def _heads(width: int) -> int:
    """Heads of 64 channels, as in every published size, where no configuration tells."""
    if width % 64:
        raise UserError(f"No configuration tells the number of heads, and width {width} is no multiple of 64.")
    return width // 64


def _timm_configure(config: Json, tensors: Readable) -> ViTConfig:
    a = _timm_arguments(config, tensors)
    for name, allowed in (("global_pool", _TIMM_POOLING), ("act_layer", _TIMM_GELU)):
        if a[name] not in allowed:
            raise UserError(f"{name} = {a[name]!r} is not known here; allowed are {', '.join(allowed)}.")
    pooling = _TIMM_POOLING[a["global_pool"]]
    size = a["img_size"]
    return ViTConfig(
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        patch_size=a["patch_size"],
        channels=a["in_chans"],
        width=a["embed_dim"],
        depth=a["depth"],
        heads=a["num_heads"],
        mlp_ratio=a["mlp_ratio"],
        num_classes=a["num_classes"],
        class_token=a["class_token"],
        distilled=a["distilled"],
        registers=a["reg_tokens"],
        pooling=pooling,
        norm_eps=a["norm_eps"],
        gelu=_TIMM_GELU[a["act_layer"]],
        layer_scale=a["init_values"],
        qk_norm=a["qk_norm"],
        qkv_bias=a["qkv_bias"],
        patch_bias=not a["pre_norm"],
        position="sincos" if _is_mae(config, tensors) else "learned",
        position_prefix=not a["no_embed_class"],
        pre_norm=a["pre_norm"],
        fc_norm=pooling == "size_mean" if a["fc_norm"] is None else a["fc_norm"],
        drop_path=a["drop_path_rate"],
    )


def _is_mae(config: Json, tensors: Readable) -> bool:
    """Whether this is MAE's encoder as pre-trained, whose positions are fixed."""
    return "decoder_pos_embed" in tensors or (_published(config).get("tag") == "mae" and config.get("num_classes") == 0)


def _timm_preprocess(config: Json, processor: Json | None, model: ViTConfig) -> Preprocess:
    if "architecture" not in config:
        return script_eval(model.image_size)
    published = _published(config)
    half = config["architecture"].startswith("vit_") and not model.fc_norm and model.position == "learned"
    return timm_eval(
        model.image_size,
        crop_pct=published.get("crop_pct") or (0.9 if max(model.image_size) < 384 else 1.0),
        interpolation=published.get("interpolation") or "bicubic",
        mean=published.get("mean") or (HALF if half else IMAGENET_MEAN),
        std=published.get("std") or (HALF if half else IMAGENET_STD),
        crop_mode=published.get("crop_mode") or "center",
    )


def _timm_describe(model: ViTConfig, preprocess: Preprocess | None) -> Json:
    distilled = {"distilled": True} if model.distilled else {}
    pooling = "token" if model.pooling == "cls" else "avg"
    arguments = {
        "img_size": list(model.image_size),
        "patch_size": model.patch_size,
        "in_chans": model.channels,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.heads,
        "mlp_ratio": model.mlp_ratio,
        "class_token": model.class_token,
        "reg_tokens": model.registers,
        "global_pool": pooling,
        "fc_norm": model.fc_norm,
        "norm_eps": model.norm_eps,
        "act_layer": next(name for name, gelu in _TIMM_GELU.items() if gelu == model.gelu),
        "init_values": model.layer_scale,
        "qk_norm": model.qk_norm,
        "qkv_bias": model.qkv_bias,
        "no_embed_class": not model.position_prefix,
        "pre_norm": model.pre_norm,
        "drop_path_rate": model.drop_path,
    }
    kept = {k: v for k, v in arguments.items() if k not in _TIMM_DEFAULTS or v != _TIMM_DEFAULTS[k]}
    if model.fc_norm == (pooling == "avg"):
        kept.pop("fc_norm", None)
    published = {
        "input_size": [model.channels, *model.image_size],
        "fixed_input_size": True,
        "num_classes": model.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if distilled else "head",
        **(to_timm(preprocess) if preprocess else {}),
    }
    return {
        "architecture": "deit_base_distilled_patch16_224" if distilled else "vit_base_patch16_224",
        "num_classes": model.num_classes,
        "num_features": model.width,
        "global_pool": pooling,
        "model_args": kept,
        "pretrained_cfg": published,
    }


def _timm_view(tensors: Readable) -> Readable:
    """DeiT-3's own files call LayerScale's factors gamma_1 and gamma_2."""
    return Renamed(tensors, lambda name: re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name))


TIMM = Family(
    name="timm",
    side="timm",
    rows=TIMM_ROWS,
    prefix="",
    ignored=r"decoder_.*|mask_token",
    interpolation=("bicubic", True),
    view=_timm_view,
    configure=_timm_configure,
    preprocess=_timm_preprocess,
    describe=_timm_describe,
    expresses=lambda model: True,
)

# -------------------------------------------------------------------------------------------------------- Hugging Face

_HF_ROWS = (
    ("array", "cls_token", "embeddings.cls_token"),
    ("array", "dist_token", "embeddings.distillation_token"),
    ("array", "pos_embed", "embeddings.position_embeddings"),
    ("patch", "patch_embed", "embeddings.patch_embeddings.projection"),
    ("norm", "blocks.*.norm1", "encoder.layer.*.layernorm_before"),
    (
        "linear",
        "blocks.*.attn.qkv",
        "encoder.layer.*.attention.attention.query",
        "encoder.layer.*.attention.attention.key",
        "encoder.layer.*.attention.attention.value",
    ),
    ("linear", "blocks.*.attn.proj", "encoder.layer.*.attention.output.dense"),
    ("norm", "blocks.*.norm2", "encoder.layer.*.layernorm_after"),
    ("linear", "blocks.*.mlp.fc1", "encoder.layer.*.intermediate.dense"),
    ("linear", "blocks.*.mlp.fc2", "encoder.layer.*.output.dense"),
    ("norm", "norm", "layernorm"),
)
_HF_VIT_ROWS = table(*_HF_ROWS, ("linear", "head", "classifier"))
_HF_DEIT_ROWS = table(
    *_HF_ROWS, ("linear", "head", "cls_classifier"), ("linear", "head_dist", "distillation_classifier")
)
_HF_GELU: Json = {"gelu": "exact", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "quick_gelu": "quick"}


def _hf_configure(rows: dict[str, Row], kind: str) -> Callable[[Json, Readable], ViTConfig]:
    def configure(config: Json, tensors: Readable) -> ViTConfig:
        measured = Measured(rows, tensors)

        def stated(key: str, size: str) -> Any:
            return config[key] if config.get(key) is not None else getattr(measured, size)

        activation = config.get("hidden_act", "gelu")
        if activation not in _HF_GELU:
            raise UserError(f"hidden_act = {activation!r} is not known here; allowed are {', '.join(_HF_GELU)}.")
        distilled = kind == "deit"
        size = config.get("image_size") or measured.image(1 + distilled)
        width = stated("hidden_size", "width")
        return ViTConfig(
            image_size=(size, size) if isinstance(size, int) else tuple(size),
            patch_size=stated("patch_size", "patch"),
            channels=stated("num_channels", "channels"),
            width=width,
            depth=stated("num_hidden_layers", "depth"),
            heads=config.get("num_attention_heads") or _heads(width),
            mlp_ratio=ratio(width, stated("intermediate_size", "hidden")),
            num_classes=0 if kind == "vit_mae" else _hf_classes(config, measured),
            distilled=distilled,
            norm_eps=config.get("layer_norm_eps", 1e-12),
            gelu=_HF_GELU[activation],
            qkv_bias=config.get("qkv_bias", True),
            position="sincos" if kind == "vit_mae" else "learned",
        )

    return configure


def _hf_classes(config: Json, measured: Measured) -> int:
    """Labels of a classifier (a file may leave their number to the tensors), 0 for a backbone alone."""
    architectures = config.get("architectures") or []
    classifies = any("ForImageClassification" in name for name in architectures)
    if architectures and not classifies:
        return 0
    labels = config.get("num_labels") or len(config.get("id2label") or ())
    return (labels or measured.classes) if classifies or measured.classes else 0


def _strip(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


def _deit_view(tensors: Readable) -> Readable:
    """DeiT's names without their prefix.

    A `DeiTForImageClassification` has a distillation token but one head, on CLS. The mean of two heads is the same when
    the first is doubled and the second is zero, exactly so in floating point.
    """
    if "classifier.weight" not in tensors:
        return Renamed(tensors, _strip("deit."))
    heads: dict[str, np.ndarray] = {}
    for part in ("weight", "bias"):
        value = tensors[f"classifier.{part}"].astype(np.float32)
        heads |= {f"cls_classifier.{part}": 2 * value, f"distillation_classifier.{part}": np.zeros_like(value)}
    return Renamed(tensors, _strip("deit."), heads, frozenset({"classifier.weight", "classifier.bias"}))


def _hf_preprocess(default: Callable[[tuple[int, int]], Preprocess]) -> Callable[..., Preprocess]:
    def preprocess(config: Json, processor: Json | None, model: ViTConfig) -> Preprocess:
        usual = default(model.image_size)
        return usual if processor is None else from_processor(processor, usual).at(model.image_size)

    return preprocess


def _vit_images(size: tuple[int, int]) -> Preprocess:
    return Preprocess(size, "square", size, "bilinear", crop=False, crop_rule="hf", mean=HALF, std=HALF)


def _deit_images(size: tuple[int, int]) -> Preprocess:
    return Preprocess(size, "square", (256 * size[0] // 224, 256 * size[1] // 224), "bicubic", crop_rule="hf")


def _hf_describe(kind: Literal["vit", "deit"]) -> Callable[[ViTConfig, Preprocess | None], Json]:
    heads = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassificationWithTeacher"}
    backbones = {"vit": "ViTModel", "deit": "DeiTModel"}

    def describe(model: ViTConfig, preprocess: Preprocess | None) -> Json:
        height, width = model.image_size
        return {
            "architectures": [heads[kind] if model.num_classes else backbones[kind]],
            "model_type": kind,
            "hidden_size": model.width,
            "num_hidden_layers": model.depth,
            "num_attention_heads": model.heads,
            "intermediate_size": int(model.width * model.mlp_ratio),
            "hidden_act": next(name for name, gelu in _HF_GELU.items() if gelu == model.gelu),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.02,
            "layer_norm_eps": model.norm_eps,
            "image_size": height if height == width else [height, width],
            "patch_size": model.patch_size,
            "num_channels": model.channels,
            "qkv_bias": model.qkv_bias,
            **({"num_labels": model.num_classes} if model.num_classes else {}),
        }

    return describe


def _plain(model: ViTConfig) -> bool:
    """Whether a model has nothing that Hugging Face's `vit` and `deit` lack."""
    return (
        model.class_token
        and model.registers == 0
        and model.pooling == "cls"
        and model.layer_scale is None
        and not (model.qk_norm or model.pre_norm or model.fc_norm)
        and model.patch_bias
        and model.position_prefix
    )


def _hf(
    name: Literal["vit", "deit", "vit_mae"],
    rows: dict[str, Row],
    ignored: str,
    images: Callable[[tuple[int, int]], Preprocess],
    view: Callable[[Readable], Readable] | None = None,
    expresses: Callable[[ViTConfig], bool] = lambda model: False,
) -> Family:
    prefix = "deit." if name == "deit" else "vit."
    return Family(
        name=name,
        side="hf",
        rows=rows,
        prefix=prefix,
        ignored=ignored,
        interpolation=("bicubic", False),
        view=view or (lambda tensors: Renamed(tensors, _strip(prefix))),
        configure=_hf_configure(rows, name),
        preprocess=_hf_preprocess(images),
        describe=_hf_describe("deit" if name == "deit" else "vit"),
        expresses=expresses,
    )


_UNREAD = r"pooler\..*|embeddings\.mask_token|decoder\..*"

HF_VIT = _hf("vit", _HF_VIT_ROWS, _UNREAD, _vit_images, expresses=lambda model: _plain(model) and not model.distilled)
HF_DEIT = _hf("deit", _HF_DEIT_ROWS, _UNREAD, _deit_images, _deit_view, lambda model: _plain(model) and model.distilled)
HF_MAE = _hf("vit_mae", _HF_VIT_ROWS, _UNREAD, script_eval)

FAMILIES: dict[str, Family] = {family.name: family for family in (TIMM, HF_VIT, HF_DEIT, HF_MAE)}


def recognise(config: Json, tensors: Readable) -> Family:
    """The family of a checkpoint, by its configuration, else by the names of its tensors.

    Raises:
        UserError: none of the known ones.
    """
    if "architecture" in config:
        return TIMM
    if "model_type" in config:
        if config["model_type"] not in FAMILIES:
            known = ", ".join(name for name, family in FAMILIES.items() if family.side == "hf")
            raise UserError(f"model_type {config['model_type']!r} is not known here; known are {known}.")
        return FAMILIES[config["model_type"]]
    names = {name.removeprefix("vit.").removeprefix("deit.") for name in tensors}
    if "patch_embed.proj.weight" in names:
        return TIMM
    if "embeddings.patch_embeddings.projection.weight" in names:
        if "embeddings.distillation_token" in names:
            return HF_DEIT
        return HF_MAE if "decoder.mask_token" in names else HF_VIT
    raise UserError(
        "Neither the configuration (model_type, architecture) nor the tensors' names are of a known family; "
        f"known are {', '.join(FAMILIES)}. Tensors: {', '.join(sorted(names)[:5])}, ..."
    )


def to_save(model: ViTConfig, side: str) -> Family:
    """The family to save a model as: on the given side if it can express the model, else timm."""
    return next((f for f in FAMILIES.values() if f.side == side and f.expresses(model)), TIMM)
