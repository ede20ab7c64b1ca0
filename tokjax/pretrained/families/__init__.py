"""The families of checkpoints: how each is recognised, named, configured and preprocessed.

One `Family` a naming; a new one is a table of names, a few functions and a place in `FAMILIES`.

| module | families | from |
| --- | --- | --- |
| `timm` | `vit_*`, `deit*` of timm: AugReg, DeiT, DeiT-3, MAE, CLIP, SigLIP, DINOv2, DINOv3 | timm's hub, DeiT, MAE |
| `augreg` | the same as JAX's `.npz` | google-research/vision_transformer |
| `vit` | `vit`, `deit`, `vit_mae` | Hugging Face |
| `clip` | `clip`, `clip_vision_model`; OpenAI's names | Hugging Face, OpenAI, OpenCLIP |
| `open_clip` | a tower of timm and a text encoder | OpenCLIP's SigLIP |
| `siglip` | `siglip`, `siglip2` and their vision towers | Hugging Face |
| `bert` | `bert` | Hugging Face |
| `t5` | `t5` (1.0, 1.1, ByT5), `mt5` | Hugging Face |
| `llama` | `llama`, `mistral`, `qwen2`, `gemma`, `gemma2` | Hugging Face |
| `opt` | `opt` | Hugging Face |
| `dino` | `dinov2`, `dinov2_with_registers`, `dinov3_vit`; their authors' names | Hugging Face, facebookresearch |
"""

from tokjax.errors import UserError
from tokjax.models.bert import BertConfig
from tokjax.models.decoder import DecoderConfig
from tokjax.models.dual import DualConfig
from tokjax.models.t5 import T5Config
from tokjax.pretrained.families.augreg import AUGREG
from tokjax.pretrained.families.base import SIDES, Family, Json
from tokjax.pretrained.families.bert import HF_BERT
from tokjax.pretrained.families.clip import HF_CLIP, HF_CLIP_VISION, OPENAI_CLIP
from tokjax.pretrained.families.dino import (
    DINOV2_UPSTREAM,
    DINOV2_UPSTREAM_REGISTERS,
    DINOV3_UPSTREAM,
    HF_DINOV2,
    HF_DINOV2_REGISTERS,
    HF_DINOV3,
)
from tokjax.pretrained.families.llama import HF_GEMMA, HF_GEMMA2, HF_LLAMA, HF_MISTRAL, HF_QWEN2
from tokjax.pretrained.families.open_clip import OPEN_CLIP
from tokjax.pretrained.families.opt import HF_OPT
from tokjax.pretrained.families.siglip import HF_SIGLIP, HF_SIGLIP2, HF_SIGLIP2_VISION, HF_SIGLIP_VISION
from tokjax.pretrained.families.t5 import HF_MT5, HF_T5
from tokjax.pretrained.families.timm import TIMM, TIMM_EVA
from tokjax.pretrained.families.vit import HF_DEIT, HF_MAE, HF_VIT
from tokjax.pretrained.names import Config, Readable

_HUGGING_FACE = (
    *(HF_VIT, HF_DEIT, HF_MAE),
    *(HF_CLIP, HF_CLIP_VISION),
    *(HF_SIGLIP, HF_SIGLIP_VISION, HF_SIGLIP2, HF_SIGLIP2_VISION),
    *(HF_DINOV2, HF_DINOV2_REGISTERS, HF_DINOV3),
    *(HF_BERT, HF_T5, HF_MT5),
    *(HF_LLAMA, HF_MISTRAL, HF_QWEN2, HF_GEMMA, HF_GEMMA2, HF_OPT),
)
_OTHERS = (AUGREG, OPENAI_CLIP, OPEN_CLIP, DINOV2_UPSTREAM, DINOV2_UPSTREAM_REGISTERS, DINOV3_UPSTREAM)
FAMILIES: dict[str, Family] = {family.name: family for family in (TIMM, TIMM_EVA, *_HUGGING_FACE, *_OTHERS)}

# Tensors by which files without a configuration are told apart: all of these, in the order of the rows.
_MARKS: tuple[tuple[tuple[str, ...], Family], ...] = (
    (("embedding/kernel",), AUGREG),
    (("embeddings.token_type_embeddings.weight", "encoder.layer.0.attention.self.query.weight"), HF_BERT),
    (("encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.final_layer_norm.weight"), HF_T5),
    (("visual.class_embedding",), OPENAI_CLIP),
    (("visual.trunk.patch_embed.proj.weight",), OPEN_CLIP),
    (("patch_embed.proj.weight", "storage_tokens"), DINOV3_UPSTREAM),
    (("patch_embed.proj.weight", "register_tokens"), DINOV2_UPSTREAM_REGISTERS),
    (("patch_embed.proj.weight", "ls1.gamma", "mask_token"), DINOV2_UPSTREAM),
    (("patch_embed.proj.weight", "reg_token", "gamma_1"), TIMM_EVA),
    (("patch_embed.proj.weight",), TIMM),
    (("embeddings.patch_embeddings.projection.weight", "layer_scale1.lambda1", "register_tokens"), HF_DINOV2_REGISTERS),
    (("embeddings.patch_embeddings.projection.weight", "layer_scale1.lambda1"), HF_DINOV2),
    (("embeddings.patch_embeddings.projection.weight", "embeddings.distillation_token"), HF_DEIT),
    (("embeddings.patch_embeddings.projection.weight", "decoder.mask_token"), HF_MAE),
    (("embeddings.patch_embeddings.projection.weight",), HF_VIT),
)


def recognise(config: Json, tensors: Readable) -> Family:
    """The family of a checkpoint, by its configuration, else by the names of its tensors.

    A configuration of two towers with the tensors of the image's alone is that tower.

    Raises:
        UserError: none of the known ones.
    """
    if "architecture" in config:
        return TIMM_EVA if "_dinov3" in config["architecture"] else TIMM
    kind = config.get("model_type")
    if kind is not None:
        known = [family.name for family in _HUGGING_FACE]
        if kind not in known:
            raise UserError(f"model_type {kind!r} is not known here; known are {', '.join(known)}.")
        tower = FAMILIES.get(f"{kind}_vision_model")
        return tower if tower and not any(name.startswith("text_model.") for name in tensors) else FAMILIES[kind]
    names = list(tensors)
    for marks, family in _MARKS:
        if all(any(name.endswith(mark) for name in names) for mark in marks):
            return family
    raise UserError(
        "Neither the configuration (model_type, architecture) nor the tensors' names are of a known family; "
        f"known are {', '.join(FAMILIES)}. Tensors: {', '.join(sorted(names)[:5])}, ..."
    )


def to_save(model: Config, side: str) -> Family:
    """The family to save a model as: one that can express it, on this side if possible; else one that can name it."""
    able = [family for family in FAMILIES.values() if family.expresses(model)]
    other = {DualConfig: OPEN_CLIP, BertConfig: HF_BERT, T5Config: HF_T5, DecoderConfig: HF_LLAMA}.get(
        type(model), TIMM
    )
    return next((family for family in able if family.side == side), able[0] if able else other)


__all__ = ["FAMILIES", "SIDES", "Family", "recognise", "to_save"]
