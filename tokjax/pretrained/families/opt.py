"""OPT (Hugging Face's `opt`).

Source: transformers `models/opt`. Learned positions, plain layer norms, biases everywhere; the 350M model has its norms
behind each sum, none at the end, and embeddings of another width than its blocks.
"""

from typing import Any

from tokjax.models.decoder import DecoderConfig
from tokjax.pretrained.families.base import Config, Family, Json, Measured, Stated
from tokjax.pretrained.families.llama import first_id, prefixed, token_ids
from tokjax.pretrained.names import Readable, table

_LAYER = "model.decoder.layers.*"
_ROWS = table(
    ("array", "embedding", "model.decoder.embed_tokens.weight"),
    ("array", "positions", "model.decoder.embed_positions.weight"),
    ("linear", "project_in", "model.decoder.project_in"),
    ("linear", "project_out", "model.decoder.project_out"),
    ("norm", "blocks.*.norm1", f"{_LAYER}.self_attn_layer_norm"),
    ("linear", "blocks.*.attn.q", f"{_LAYER}.self_attn.q_proj"),
    ("linear", "blocks.*.attn.kv", f"{_LAYER}.self_attn.k_proj", f"{_LAYER}.self_attn.v_proj"),
    ("linear", "blocks.*.attn.proj", f"{_LAYER}.self_attn.out_proj"),
    ("norm", "blocks.*.norm2", f"{_LAYER}.final_layer_norm"),
    ("linear", "blocks.*.mlp.fc1", f"{_LAYER}.fc1"),
    ("linear", "blocks.*.mlp.fc2", f"{_LAYER}.fc2"),
    ("norm", "norm", "model.decoder.final_layer_norm"),
    ("linear", "head", "lm_head"),
)
_FEEDS: Json = {"relu": "relu", "gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def _configure(config: Json, tensors: Readable) -> DecoderConfig:
    measured = Measured(_ROWS, tensors)
    stated = Stated(config, measured)
    vocab_size, wide = measured.shape("embedding", 2)
    table_rows, width = measured.shape("positions", 2)
    heads, bias = stated.get("num_attention_heads", 12), stated.get("enable_bias", True)
    return DecoderConfig(
        vocab_size=vocab_size,
        length=min(table_rows - 2, 1024),
        max_length=table_rows - 2,
        width=width,
        hidden=stated.size("ffn_dim", "hidden"),
        depth=stated.size("num_hidden_layers", "depth"),
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        feed=stated.choice("activation_function", "relu", _FEEDS),
        norm="layer",
        norm_order="pre" if stated.get("do_layer_norm_before", True) else "post",
        norm_eps=1e-5,
        qkv_bias=bias,
        proj_bias=bias,
        mlp_bias=bias,
        position="learned",
        embed_width=wide if measured.has("project_in.kernel") else None,
        tied=stated.get("tie_word_embeddings", True) or "lm_head.weight" not in tensors,
        bos_id=first_id(config.get("bos_token_id", 2)),
        eos_ids=token_ids(config.get("eos_token_id", 2)),
        pad_id=first_id(config.get("pad_token_id", 1)),
    )


def _expresses(model: Config) -> bool:
    if not isinstance(model, DecoderConfig):
        return False
    wanted = {"norm": "layer", "norm_eps": 1e-5, "position": "learned", "window": None, "query_scale": None}
    wanted |= {"soft_cap": None, "logit_cap": None, "embed_scaled": False, "kv_layers": None}
    same = model.qkv_bias == model.proj_bias == model.mlp_bias and model.kv_heads == model.heads
    same &= model.heads * model.head_width == model.width
    known = model.norm_order != "both" and model.feed in _FEEDS.values()
    return known and same and all(getattr(model, field) == value for field, value in wanted.items())


def _describe(model: DecoderConfig, preprocess: Any) -> Json:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "word_embed_proj_dim": model.embed_width or model.width,
        "ffn_dim": model.hidden,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "max_position_embeddings": model.max_length,
        "activation_function": next(name for name, feed in _FEEDS.items() if feed == model.feed),
        "do_layer_norm_before": model.norm_order == "pre",
        "enable_bias": model.qkv_bias,
        "tie_word_embeddings": model.tied,
        "bos_token_id": model.bos_id,
        "eos_token_id": model.eos_ids[0] if len(model.eos_ids) == 1 else list(model.eos_ids) or None,
        "pad_token_id": model.pad_id,
    }


HF_OPT = Family(
    name="opt",
    side="hf",
    rows=_ROWS,
    configure=_configure,
    preprocess=lambda config, processor, model: None,
    describe=_describe,
    expresses=_expresses,
    view=prefixed("model.", ("decoder.",)),
    ignored=r"lm_head\.weight",
    generates=True,
)
