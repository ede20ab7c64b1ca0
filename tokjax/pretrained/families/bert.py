"""BERT (Hugging Face's `bert`): the encoder alone, or with a classifier of whole texts.

Source: transformers `models/bert`. Pre-training's heads (`cls.*`) are left unread, and the oldest files call the norms'
parameters gamma and beta. Dropout of branches and of attention weights is one number here, that of branches.
"""

import re
from typing import Any

from tokjax.errors import UserError
from tokjax.models.bert import BertConfig
from tokjax.pretrained.families.base import HF_GELU, Config, Family, Json, Measured, Stated, heads_of_64, hf_blocks
from tokjax.pretrained.names import Readable, View, table

_LAYER = "encoder.layer.*"
_QKV = (f"{_LAYER}.attention.self.{part}" for part in ("query", "key", "value"))
_ROWS = table(
    ("array", "token_embed", "embeddings.word_embeddings.weight"),
    ("rows", "pos_embed", "embeddings.position_embeddings.weight"),
    ("array", "type_embed", "embeddings.token_type_embeddings.weight"),
    ("norm", "norm_embed", "embeddings.LayerNorm"),
    ("linear", "blocks.*.attn.qkv", *_QKV),
    ("linear", "blocks.*.attn.proj", f"{_LAYER}.attention.output.dense"),
    ("norm", "blocks.*.norm1", f"{_LAYER}.attention.output.LayerNorm"),
    ("linear", "blocks.*.mlp.fc1", f"{_LAYER}.intermediate.dense"),
    ("linear", "blocks.*.mlp.fc2", f"{_LAYER}.output.dense"),
    ("norm", "blocks.*.norm2", f"{_LAYER}.output.LayerNorm"),
    ("linear", "pooler", "pooler.dense"),
    ("linear", "head", "classifier"),
)
_NORM = {"gamma": "weight", "beta": "bias"}


def _view(config: Json, tensors: Readable) -> Readable:
    """Names without their prefix, and the norms' new ones."""

    def rename(name: str) -> str:
        return re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda found: _NORM[found[1]], name.removeprefix("bert."))

    return View(tensors, rename)


def _configure(config: Json, tensors: Readable) -> BertConfig:
    measured = Measured(_ROWS, tensors)
    vocab_size, width = measured.shape("token_embed", 2)
    stated = Stated({**config, "hidden_size": width}, measured)
    stated.choice("position_embedding_type", "absolute", {"absolute": None})
    if config.get("is_decoder"):
        raise UserError("is_decoder = True: a BERT that writes is not known here.")
    names = stated.get("id2label", {})
    return BertConfig(
        vocab_size=vocab_size,
        length=measured.positions,
        max_length=measured.positions,
        types=measured.shape("type_embed", 2)[0],
        num_classes=(classes := measured.classes),
        labels=tuple(names[key] for key in sorted(names, key=int)) if len(names) == classes else (),
        pooler=measured.has("pooler.kernel"),
        pad_id=stated.get("pad_token_id", 0),
        dropout=stated.get("hidden_dropout_prob", 0.1),
        **stated.blocks(config.get("num_attention_heads") or heads_of_64(width), 1e-12, "gelu"),
    )


def _expresses(model: Config) -> bool:
    return isinstance(model, BertConfig) and model.gelu in HF_GELU.values()


def _describe(model: BertConfig, preprocess: Any) -> Json:
    labels = model.labels or tuple(f"LABEL_{i}" for i in range(model.num_classes))
    return {
        "architectures": ["BertForSequenceClassification" if model.num_classes else "BertModel"],
        "model_type": "bert",
        **hf_blocks(model),
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_length,
        "type_vocab_size": model.types,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout,
        "pad_token_id": model.pad_id,
        **({"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}} if labels else {}),
    }


HF_BERT = Family(
    name="bert",
    side="hf",
    rows=_ROWS,
    configure=_configure,
    preprocess=lambda config, processor, model: None,
    describe=_describe,
    expresses=_expresses,
    view=_view,
    prefix="bert.",
    ignored=r"cls\..*|embeddings\.position_ids",
)
