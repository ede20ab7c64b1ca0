"""OpenCLIP's models whose image tower is timm's: SigLIP and SigLIP2 as timm's organisation publishes them.

`open_clip_config.json` tells both towers. This naming has a name for every part of any two towers, so it is also the
one in which models are saved that no library can build.

References: mlfoundations/open_clip `src/open_clip/{model,timm_model,transformer}.py`.
"""

from tokjax.errors import UserError
from tokjax.models.dual import DualConfig
from tokjax.models.text import TextConfig
from tokjax.models.vit import ViTConfig
from tokjax.pretrained.families.base import Family, Json, Measured, ratio
from tokjax.pretrained.families.clip import OPENAI_TEXT_ROWS, openclip_images
from tokjax.pretrained.families.timm import TIMM, TIMM_ROWS
from tokjax.pretrained.names import Config, Readable, table, under

ROWS = {
    **under("vision.", "visual.trunk.", TIMM_ROWS),
    **under("text.", "text.", {**OPENAI_TEXT_ROWS, **table(("linear", "head", "text_projection"))}),
    **table(("array", "logit_scale"), ("array", "logit_bias")),
}
_KNOWN_VISION = {"image_size", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj"}
_KNOWN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs", "act_kwargs"}
_KNOWN_TEXT |= {"hf_tokenizer_name", "tokenizer_kwargs", "pool_type", "no_causal_mask", "proj_bias", "proj_type"}


def _configure(config: Json, tensors: Readable) -> Config:
    cfg = config.get("model_cfg")
    if not cfg:
        raise UserError(
            "OpenCLIP's models with a tower of timm need open_clip_config.json, or its content, beside them."
        )
    image, text = cfg.get("vision_cfg") or {}, cfg.get("text_cfg") or {}
    unknown = sorted(
        {k for k, v in image.items() if v} - _KNOWN_VISION | {k for k, v in text.items() if v} - _KNOWN_TEXT
    )
    if unknown or image.get("timm_proj") not in (None, "none", "") or "timm_model_name" not in image:
        raise UserError(f"open_clip_config.json has what is not known here: {', '.join(unknown) or 'timm_proj'}.")
    trunk = {
        "architecture": image["timm_model_name"],
        "num_classes": 0,
        "global_pool": image.get("timm_pool"),
        "model_args": {"img_size": image.get("image_size")},
    }
    measured = Measured(ROWS, tensors, "text.")
    last = text.get("pool_type") == "last"
    # Texts read at their last place are SigLIP's, which was trained with the tanh form whatever the file says.
    tanh = last or (text.get("act_kwargs") or {}).get("approximate") == "tanh"
    words = TextConfig(
        vocab_size=measured.shape("token_embed", 2)[0],
        length=measured.positions,
        width=measured.width,
        depth=measured.depth,
        heads=text.get("heads", 8),
        mlp_ratio=ratio(measured.width, measured.hidden),
        causal=not text.get("no_causal_mask", False),
        pooling="last" if last else "eos",
        norm_eps=(text.get("norm_kwargs") or {}).get("eps", 1e-5),
        gelu="tanh" if tanh else "quick" if cfg.get("quick_gelu") else "exact",
        embed_dim=measured.classes,
        head_bias="text.text_projection.bias" in tensors,
    )
    vision = TIMM.configure(trunk, tensors)
    assert isinstance(vision, ViTConfig)
    bias = {"logit_bias": float(cfg.get("init_logit_bias", -10))} if "logit_bias" in tensors else {}
    return DualConfig(vision, words, float(cfg.get("init_logit_scale", DualConfig.logit_scale)), **bias)


OPEN_CLIP = Family(
    name="open_clip",
    side="hf",
    rows=ROWS,
    configure=_configure,
    preprocess=openclip_images,
    describe=lambda model, preprocess: {},
    expresses=lambda model: False,
    interpolation=("bicubic", True),
)
