"""CLIP: Hugging Face's `clip` and `clip_vision_model`, and OpenAI's own names, which OpenCLIP has too.

Sources: Radford et al., ICML 2021 (openai/CLIP `clip/model.py`); mlfoundations/open_clip `src/open_clip/model.py`;
transformers `models/clip`. In all of them: QuickGELU unless a configuration says otherwise, a norm eps of 1e-5,
positions at another size bicubic without anti-aliasing, images with a short side of the size, bicubic, cropped.

OpenAI's archives hold no configuration: heads have 64 channels, and the activation is QuickGELU. OpenCLIP's
`open_clip_config.json` says all of that (its own default is the exact GELU). Other files with these names could be
either's, so a `config.json` must state `quick_gelu`; it may state `vision_heads` and `text_heads`.
"""

import dataclasses
import re
from typing import Any

from tokjax.errors import UserError
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
    heads_of_64,
    hf_blocks,
    hf_images,
    pair,
    processed,
    ratio,
)
from tokjax.pretrained.names import Readable, View, table, under
from tokjax.pretrained.preprocess import clip_eval, from_openclip

# The blocks of Hugging Face's CLIP and SigLIP towers.
HF_BLOCKS = (
    ("norm", "blocks.*.norm1", "encoder.layers.*.layer_norm1"),
    (
        "linear",
        "blocks.*.attn.qkv",
        "encoder.layers.*.self_attn.q_proj",
        "encoder.layers.*.self_attn.k_proj",
        "encoder.layers.*.self_attn.v_proj",
    ),
    ("linear", "blocks.*.attn.proj", "encoder.layers.*.self_attn.out_proj"),
    ("norm", "blocks.*.norm2", "encoder.layers.*.layer_norm2"),
    ("linear", "blocks.*.mlp.fc1", "encoder.layers.*.mlp.fc1"),
    ("linear", "blocks.*.mlp.fc2", "encoder.layers.*.mlp.fc2"),
)
HF_TEXT_ROWS = table(
    ("array", "token_embed", "embeddings.token_embedding.weight"),
    ("rows", "pos_embed", "embeddings.position_embedding.weight"),
    *HF_BLOCKS,
    ("norm", "norm", "final_layer_norm"),
)
_HF_VISION_ROWS = table(
    ("vector", "cls_token", "embeddings.class_embedding"),
    ("rows", "pos_embed", "embeddings.position_embedding.weight"),
    ("patch", "patch_embed", "embeddings.patch_embedding"),
    ("norm", "norm_pre", "pre_layrnorm"),  # spelled so
    *HF_BLOCKS,
    ("norm", "norm", "post_layernorm"),
)
VISION_ROWS = {**under("", "vision_model.", _HF_VISION_ROWS), **table(("linear", "head", "visual_projection"))}
CLIP_ROWS = {
    **under("vision.", "", VISION_ROWS),
    **under("text.", "text_model.", HF_TEXT_ROWS),
    **table(("linear", "text.head", "text_projection"), ("array", "logit_scale")),
}

# OpenAI's blocks; both towers have them.
_BLOCKS = (
    ("norm", "blocks.*.norm1", "transformer.resblocks.*.ln_1"),
    ("in_proj", "blocks.*.attn.qkv", "transformer.resblocks.*.attn.in_proj"),
    ("linear", "blocks.*.attn.proj", "transformer.resblocks.*.attn.out_proj"),
    ("norm", "blocks.*.norm2", "transformer.resblocks.*.ln_2"),
    ("linear", "blocks.*.mlp.fc1", "transformer.resblocks.*.mlp.c_fc"),
    ("linear", "blocks.*.mlp.fc2", "transformer.resblocks.*.mlp.c_proj"),
)
OPENAI_TEXT_ROWS = table(
    ("array", "token_embed", "token_embedding.weight"),
    ("rows", "pos_embed", "positional_embedding"),
    *_BLOCKS,
    ("norm", "norm", "ln_final"),
    ("matrix", "head", "text_projection"),
)
_OPENAI_VISION_ROWS = table(
    ("vector", "cls_token", "class_embedding"),
    ("rows", "pos_embed", "positional_embedding"),
    ("patch", "patch_embed", "conv1"),
    ("norm", "norm_pre", "ln_pre"),
    *_BLOCKS,
    ("norm", "norm", "ln_post"),
    ("matrix", "head", "proj"),
)
OPENAI_ROWS = {
    **under("vision.", "visual.", _OPENAI_VISION_ROWS),
    **under("text.", "", OPENAI_TEXT_ROWS),
    **table(("array", "logit_scale"), ("array", "logit_bias")),
}

_VISION: Json = {"pre_norm": True, "patch_bias": False, "head_bias": False}


def tower(config: Json, name: str) -> Json:
    """A tower's part of a configuration, from either key that Hugging Face's old files have."""
    return {**(config.get(f"{name}_config") or {}), **(config.get(f"{name}_config_dict") or {})}


def tower_view(config: Json, tensors: Readable) -> Readable:
    """A vision tower alone, which transformers 5 saves without the prefix that all others have."""
    own = r"(?=(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)"
    return View(tensors, lambda name: re.sub("^" + own, "vision_model.", name))


def _vision_configure(config: Json, tensors: Readable, path: str = "") -> ViTConfig:
    measured = Measured(CLIP_ROWS if path else VISION_ROWS, tensors, path)
    stated = Stated(tower(config, "vision") or config, measured)
    patch = stated.size("patch_size", "patch")
    return ViTConfig(
        image_size=pair(stated.get("image_size", 224)),
        patch_size=patch,
        channels=stated.size("num_channels", "channels"),
        num_classes=measured.classes,
        **_VISION,
        **stated.blocks(12, 1e-5, "quick_gelu"),
    )


def _configure(config: Json, tensors: Readable) -> DualConfig:
    vision = _vision_configure(config, tensors, "vision.")
    measured = Measured(CLIP_ROWS, tensors, "text.")
    stated = Stated(tower(config, "text"), measured)
    eos = stated.get("eos_token_id", 49407)
    text = TextConfig(
        vocab_size=measured.shape("token_embed", 2)[0],
        length=measured.positions,
        embed_dim=measured.classes,
        eos_id=None if eos == 2 else eos,  # files from before the end was known by its id
        **stated.blocks(8, 1e-5, "quick_gelu"),
    )
    return DualConfig(vision, text, logit_scale=float(config.get("logit_scale_init_value", 2.6592)))


def _vision_expresses(model: Config) -> bool:
    fixed = ("class_token", "registers", "distilled", "pooling", "position", "layer_scale", "mlp", "fc_norm")
    usual = ViTConfig()
    return (
        isinstance(model, ViTConfig)
        and all(getattr(model, name) == value for name, value in _VISION.items())
        and all(getattr(model, name) == getattr(usual, name) for name in (*fixed, "qk_norm", "position_prefix"))
        and model.qkv_bias
        and model.key_bias
        and model.gelu in HF_GELU.values()
    )


def _expresses(model: Config) -> bool:
    return (
        isinstance(model, DualConfig)
        and _vision_expresses(model.vision)
        and model.vision.num_classes > 0
        and model.text.embed_dim > 0
        and not model.text.head_bias
        and model.text.causal
        and model.text.pooling == "eos"
        and model.text.eos_id != 2
        and model.logit_bias is None
    )


def describe_text(text: TextConfig, kind: str) -> Json:
    """Hugging Face's `text_config`."""
    return {
        "model_type": kind,
        **hf_blocks(text),
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.length,
        "attention_dropout": 0.0,
    }


def describe_vision(vision: ViTConfig, kind: str) -> Json:
    """Hugging Face's `vision_config`."""
    return {"model_type": kind, **hf_blocks(vision), **hf_images(vision), "attention_dropout": 0.0}


def _describe(model: DualConfig, preprocess: Images | None) -> Json:
    eos = 2 if model.text.eos_id is None else model.text.eos_id
    text = {**describe_text(model.text, "clip_text_model"), "eos_token_id": eos}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.embed_dim,
        "logit_scale_init_value": model.logit_scale,
        "text_config": {**text, "projection_dim": model.embed_dim},
        "vision_config": {
            **describe_vision(model.vision, "clip_vision_model"),
            "projection_dim": model.embed_dim,
        },
    }


def _describe_vision(model: ViTConfig, preprocess: Images | None) -> Json:
    architecture = "CLIPVisionModelWithProjection" if model.num_classes else "CLIPVisionModel"
    projection = {"projection_dim": model.num_classes} if model.num_classes else {}
    return {"architectures": [architecture], **describe_vision(model, "clip_vision_model"), **projection}


def _clip_images(model: ViTConfig) -> Any:
    return dataclasses.replace(clip_eval(model.image_size), crop_rule="hf")


_POSITION_IDS = r".*embeddings\.position_ids"

HF_CLIP = Family(
    name="clip",
    side="hf",
    rows=CLIP_ROWS,
    configure=_configure,
    preprocess=processed(_clip_images),
    describe=_describe,
    expresses=_expresses,
    ignored=_POSITION_IDS,
)
HF_CLIP_VISION = Family(
    name="clip_vision_model",
    side="hf",
    rows=VISION_ROWS,
    configure=_vision_configure,
    preprocess=processed(_clip_images),
    describe=_describe_vision,
    expresses=_vision_expresses,
    view=tower_view,
    ignored=_POSITION_IDS + r"|text_projection\..*|logit_scale",
)


# ------------------------------------------------------------------------------------------------- OpenAI and OpenCLIP


def _openai_configure(config: Json, tensors: Readable) -> DualConfig:
    """The towers as OpenCLIP's `model_cfg` states them, else as the tensors show them."""
    cfg = config.get("model_cfg") or {}
    vision_cfg, text_cfg = cfg.get("vision_cfg") or {}, cfg.get("text_cfg") or {}
    _refuse(vision_cfg, "vision_cfg", _KNOWN_VISION)
    _refuse(text_cfg, "text_cfg", _KNOWN_TEXT)
    # These are only in OpenAI's archives.
    quick = cfg.get("quick_gelu", False) if cfg else config.get("quick_gelu", "input_resolution" in tensors or None)
    if quick is None:
        raise UserError(
            "These names are OpenAI's and OpenCLIP's, whose activations differ: put open_clip_config.json beside the "
            'weights, or {"quick_gelu": true} (OpenAI) or false in config.json.'
        )
    image, words = (Measured(OPENAI_ROWS, tensors, path) for path in ("vision.", "text."))

    def blocks(measured: Measured, heads: int | None, norm: Json) -> Json:
        width = measured.width
        return {
            "width": width,
            "depth": measured.depth,
            "heads": heads or heads_of_64(width),
            "mlp_ratio": ratio(width, measured.hidden),
            "norm_eps": norm.get("eps", 1e-5),
            "gelu": "quick" if quick else "exact",
        }

    heads = config.get("vision_heads")
    if "head_width" in vision_cfg:
        heads = image.width // vision_cfg["head_width"]
    vision = ViTConfig(
        image_size=pair(vision_cfg.get("image_size") or image.image(1)),
        patch_size=image.patch,
        channels=image.channels,
        num_classes=image.classes,
        **_VISION,
        **blocks(image, heads, vision_cfg.get("norm_kwargs") or {}),
    )
    text = TextConfig(
        vocab_size=words.shape("token_embed", 2)[0],
        length=words.positions,
        embed_dim=words.classes,
        **blocks(words, text_cfg.get("heads") or config.get("text_heads"), text_cfg.get("norm_kwargs") or {}),
    )
    bias = {"logit_bias": float(cfg.get("init_logit_bias", -10))} if "logit_bias" in tensors else {}
    return DualConfig(vision, text, **bias)


# Keys of OpenCLIP that are read, that only repeat the tensors' shapes, or that change nothing at evaluation.
_KNOWN_VISION = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "norm_kwargs"}
_KNOWN_VISION |= {"patch_dropout", "ls_init_value", "output_tokens", "input_patchnorm"}
_KNOWN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs"}
_KNOWN_TEXT |= {"hf_tokenizer_name", "tokenizer_kwargs", "ls_init_value", "output_tokens", "embed_cls", "pad_id"}
_MUST_BE_OFF = {"ls_init_value", "input_patchnorm", "embed_cls"}


def _refuse(config: Json, where: str, known: set[str]) -> None:
    unknown = [key for key, value in config.items() if value and (key not in known or key in _MUST_BE_OFF)]
    if unknown:
        raise UserError(f"{where} of open_clip_config.json has what is not known here: {', '.join(sorted(unknown))}.")


def _openai_view(config: Json, tensors: Readable) -> Readable:
    """Without the wrapper of distributed training, and the `text.` that OpenCLIP's newer models put before a text."""
    return View(tensors, lambda name: re.sub(r"^(module\.)?(text\.)?", "", name))


def openclip_images(config: Json, processor: Json | None, model: ViTConfig) -> Images:
    return from_openclip(config.get("preprocess_cfg") or {}, model.image_size).at(model.image_size)


OPENAI_CLIP = Family(
    name="openai_clip",
    side="hf",
    rows=OPENAI_ROWS,
    configure=_openai_configure,
    preprocess=openclip_images,
    describe=lambda model, preprocess: {},
    expresses=lambda model: False,
    view=_openai_view,
    ignored=r"input_resolution|context_length|vocab_size|attn_mask",
)
