"""T5 and its descendants of one architecture: T5 1.0 and 1.1, mT5, ByT5 (Hugging Face's `t5` and `mt5`).

Source: transformers `models/t5`. 1.0 has a plain MLP with ReLU, and a head that is the embedding, before which features
are scaled by width**-0.5; the others have a gated MLP and a head of their own, without the scale. Files tell the first
by `feed_forward_proj`, the second by whether there is an `lm_head`; the scale goes with `tie_word_embeddings`, except
that transformers 5 always writes that as true and says `scale_decoder_outputs` instead. umT5, whose blocks have a table
of relative biases each, is another architecture.
"""

from typing import Any

from tokjax.models.t5 import T5Config
from tokjax.pretrained.families.base import Config, Family, Json, Measured, Stated, key_of
from tokjax.pretrained.names import Readable, View, table, under

_FEEDS: Json = {"gated-gelu": "geglu", "relu": "relu"}
_BLOCK = "block.*.layer"


def _attention(path: str, file: str, parts: str, target: str) -> tuple[str, ...]:
    return ("linear", f"{path}.{target}", *(f"{file}.{part}" for part in parts))


def _stack(feed: int) -> tuple[tuple[str, ...], ...]:
    """Rows of a stack whose MLP is the part of this number of its blocks."""
    own = f"{_BLOCK}.0.SelfAttention"
    return (
        ("array", "relative_bias", "block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("norm", "blocks.*.norm1", f"{_BLOCK}.0.layer_norm"),
        _attention("blocks.*.attn", own, "qkv", "qkv"),
        _attention("blocks.*.attn", own, "o", "proj"),
        ("norm", "blocks.*.norm2", f"{_BLOCK}.{feed}.layer_norm"),
        ("linear", "blocks.*.mlp.fc1", f"{_BLOCK}.{feed}.DenseReluDense.wi"),
        ("linear", "blocks.*.mlp.fc2", f"{_BLOCK}.{feed}.DenseReluDense.wo"),
        ("norm", "norm", "final_layer_norm"),
    )


def _gated(stack: str, feed: int) -> tuple[str, ...]:
    file = f"{stack}.{_BLOCK}.{feed}.DenseReluDense"
    return ("linear", f"{stack}.blocks.*.mlp.fc1", f"{file}.wi_0", f"{file}.wi_1")


_CROSS = f"{_BLOCK}.1.EncDecAttention"
_DECODER = (
    *_stack(2),
    ("norm", "blocks.*.norm_cross", f"{_BLOCK}.1.layer_norm"),
    _attention("blocks.*.cross", _CROSS, "q", "q"),
    _attention("blocks.*.cross", _CROSS, "kv", "kv"),
    _attention("blocks.*.cross", _CROSS, "o", "proj"),
)
_ROWS = {
    **under("encoder.", "encoder.", table(*_stack(1))),
    **under("decoder.", "decoder.", table(*_DECODER)),
    **table(("array", "embedding", "shared.weight"), ("linear", "head", "lm_head")),
}


def _view(config: Json, tensors: Readable) -> Readable:
    """Files of shared tensors may have kept another of the embedding's names."""
    if "shared.weight" in tensors:
        return tensors
    return View(tensors, lambda name: "shared.weight" if name == "encoder.embed_tokens.weight" else name)


def _configure(config: Json, tensors: Readable) -> T5Config:
    measured, stated = Measured(_ROWS, tensors), Stated(config, Measured(_ROWS, tensors, "encoder."))
    vocab_size, width = measured.shape("embedding", 2)
    depth = stated.size("num_layers", "depth")
    pad = stated.get("pad_token_id", 0)
    return T5Config(
        vocab_size=vocab_size,
        length=stated.get("n_positions", 1024 if vocab_size == 384 else 512),
        width=width,
        hidden=stated.get("d_ff", 2048),
        heads=stated.get("num_heads", 8),
        head_width=stated.get("d_kv", 64),
        depth=depth,
        decoder_depth=stated.get("num_decoder_layers", depth),
        feed=stated.choice("feed_forward_proj", "relu", _FEEDS),
        buckets=stated.get("relative_attention_num_buckets", 32),
        max_distance=stated.get("relative_attention_max_distance", 128),
        tied="lm_head.weight" not in tensors,
        scaled=stated.get("scale_decoder_outputs", stated.get("tie_word_embeddings", True)),
        norm_eps=stated.get("layer_norm_epsilon", 1e-6),
        dropout=stated.get("dropout_rate", 0.1),
        pad_id=pad,
        eos_id=stated.get("eos_token_id", 1),
        start_id=stated.get("decoder_start_token_id", pad),
    )


def _expresses(model: Config) -> bool:
    return isinstance(model, T5Config) and model.normaliser == "softmax" and model.tied == model.scaled


def _describe(model: T5Config, preprocess: Any) -> Json:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": model.vocab_size,
        "n_positions": model.length,
        "d_model": model.width,
        "d_kv": model.head_width,
        "d_ff": model.hidden,
        "num_layers": model.depth,
        "num_decoder_layers": model.decoder_depth,
        "num_heads": model.heads,
        "relative_attention_num_buckets": model.buckets,
        "relative_attention_max_distance": model.max_distance,
        "dropout_rate": model.dropout,
        "layer_norm_epsilon": model.norm_eps,
        "feed_forward_proj": key_of(_FEEDS, model.feed),
        "tie_word_embeddings": model.scaled,
        "pad_token_id": model.pad_id,
        "eos_token_id": model.eos_id,
        "decoder_start_token_id": model.start_id,
    }


def _family(name: str) -> Family:
    return Family(
        name=name,
        side="hf",
        rows=_ROWS,
        configure=_configure,
        preprocess=lambda config, processor, model: None,
        describe=_describe,
        expresses=_expresses,
        view=_view,
        # Other names of the embedding, and a table that 1.0 was stored with and never read.
        ignored=r"(en|de)coder\.embed_tokens\.weight|.*EncDecAttention\.relative_attention_bias\.weight",
        gated=table(_gated("encoder", 1), _gated("decoder", 2)),
    )


HF_T5, HF_MT5 = _family("t5"), _family("mt5")
