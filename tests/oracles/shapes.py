"""Writes tests/pretrained/large.json: names and shapes of published large models, as their libraries build them.

By hand, with torch, transformers, timm and open_clip; no weights are made (torch's meta device):

    python tests/oracles/shapes.py > tests/pretrained/large.json

Blocks are equal, so the file has one of each encoder and their number.
"""

from collections.abc import Mapping
import json
import re
from typing import Any

import open_clip
import timm
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
HUGE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
OPT = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 40, "num_attention_heads": 16}
CLIP_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
DINOV2_GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}
DINOV2_GIANT |= {"image_size": 518, "patch_size": 14}
GATED = {"patch_size": 16, "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"}
SIGLIP2_TEXT = {**SO400M, "vocab_size": 256000}

HUGGING_FACE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit-large-patch16-224": ("ViTForImageClassification", "ViTConfig", {**LARGE, "num_labels": 1000}),
    "vit-huge-patch14-224": ("ViTForImageClassification", "ViTConfig", {**HUGE, "patch_size": 14, "num_labels": 1000}),
    "clip-vit-large-patch14-336": (
        "CLIPModel",
        "CLIPConfig",
        {
            "projection_dim": 768,
            "text_config": {**CLIP_TEXT, "projection_dim": 768, "eos_token_id": 2},
            "vision_config": {**LARGE, "image_size": 336, "patch_size": 14, "projection_dim": 768},
        },
    ),
    "siglip-so400m-patch14-384": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": SO400M, "vision_config": {**SO400M, "image_size": 384, "patch_size": 14}},
    ),
    "siglip2-giant-opt-patch16-384": (
        "SiglipModel",
        "SiglipConfig",
        {
            "text_config": {**SIGLIP2_TEXT, "projection_size": 1536},
            "vision_config": {**OPT, "image_size": 384, "patch_size": 16},
        },
    ),
    "siglip2-so400m-patch16-naflex": (
        "Siglip2Model",
        "Siglip2Config",
        {"text_config": SIGLIP2_TEXT, "vision_config": {**SO400M, "patch_size": 16}},
    ),
    "dinov2-giant": ("Dinov2Model", "Dinov2Config", DINOV2_GIANT),
    "dinov2-with-registers-giant": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINOV2_GIANT),
    "dinov3-vith16plus": ("DINOv3ViTModel", "DINOv3ViTConfig", {**HUGE, **GATED, "num_attention_heads": 20}),
    "dinov3-vit7b16": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {"hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 40, "num_attention_heads": 32}
        | {**GATED, "query_bias": False, "value_bias": False},
    ),
}
TIMM = (
    "deit3_huge_patch14_224",
    "vit_7b_patch16_dinov3",
    "vit_giant_patch14_reg4_dinov2",
    "vit_gigantic_patch14_clip_224",
    "vit_huge_plus_patch16_dinov3_qkvb",
    "vit_large_patch14_clip_quickgelu_336",
    "vit_so400m_patch14_siglip_384",
)
OPEN_CLIP = ("ViT-H-14", "ViT-L-14-336-quickgelu", "ViT-B-16-SigLIP2")


def shapes(state: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """Names to shapes; "layer.{24}.norm" stands for that of 24 equal blocks."""
    numbered: dict[str, list[int]] = {}
    counts: dict[str, int] = {}
    for name, value in state.items():
        pattern = re.sub(r"[.]\d+[.]", ".#.", name, count=1)
        assert numbered.setdefault(pattern, list(value.shape)) == list(value.shape)
        counts[pattern] = counts.get(pattern, 0) + 1
    return {pattern.replace("#", f"{{{counts[pattern]}}}"): shape for pattern, shape in numbered.items()}


def main() -> None:
    entries: dict[str, dict[str, Any]] = {}
    with torch.device("meta"):
        for name, (kind, config, settings) in HUGGING_FACE.items():
            built = getattr(transformers, config)(**settings)
            model = getattr(transformers, kind)(built)
            stated = {"architectures": [kind], "model_type": built.model_type, **settings}
            state = revert_weight_conversion(model, model.state_dict())
            entries[name] = {"config": stated, "parameters": count(model), "tensors": shapes(state)}
        for name in TIMM:
            model = timm.create_model(name)
            stated = {"architecture": name, "pretrained_cfg": model.pretrained_cfg, "num_classes": model.num_classes}
            entries[name] = {
                "config": json.loads(json.dumps(stated)),
                "parameters": count(model),
                "tensors": shapes(model.state_dict()),
            }
        for name in OPEN_CLIP:
            settings = open_clip.get_model_config(name)
            custom = settings.pop("custom_text", False)
            kind = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
            model = kind(**settings)
            stated = {"model_cfg": settings}
            entries[name] = {"config": stated, "parameters": count(model), "tensors": shapes(model.state_dict())}
    print(json.dumps(entries, indent=None, separators=(",", ":")).replace('},"', '},\n"'))


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
