"""T5 checkpoints: what their files say, and back."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tokjax
from tokjax import budget
from tokjax.data.bytes import ByteTokenizer
from tokjax.errors import UserError
from tokjax.models.t5 import Seq2Seq, T5Config

TINY = T5Config(vocab_size=11, width=8, hidden=12, heads=2, head_width=3, depth=2, decoder_depth=1)


def inputs(vocabulary=11):
    rng = np.random.default_rng(0)
    ids = rng.integers(1, vocabulary, (2, 6)).astype(np.int32)
    ids[1, 4:] = 0
    return Seq2Seq(ids, rng.integers(0, vocabulary, (2, 3)).astype(np.int32))


@pytest.mark.parametrize(
    "changes",
    [{}, {"feed": "relu", "tied": True, "scaled": True}, {"normaliser": "softmax1"}, {"tied": True}],
    ids=["byt5", "t5", "softmax1", "tied_unscaled"],
)
def test_saved_and_loaded(tmp_path, changes):
    model = tokjax.build(T5Config(**{**vars(TINY), **changes}))
    tokjax.save(tokjax.reduce(model, "tome", r=1), tmp_path)
    again = tokjax.load(tmp_path)
    assert again.config == model.config
    np.testing.assert_array_equal(again.unreduced(inputs()), model(inputs()))
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in tensors) != model.config.tied
    assert config["model_type"] == "t5"
    assert config["feed_forward_proj"] == ("relu" if model.config.feed == "relu" else "gated-gelu")


def foreign(folder: Path, config: dict, rename=lambda name: name, drop=(), extra=None) -> Path:
    """A checkpoint as others write it: without our own part of the configuration."""
    tokjax.save(tokjax.build(TINY), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {rename(name): value for name, value in tensors.items() if name not in drop}
    save_file({**tensors, **(extra or {})}, folder / "model.safetensors")
    said = json.loads((folder / "config.json").read_text())
    said.pop("tokjax")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**said, **config}.items() if v is not ...}))
    return folder


@pytest.mark.parametrize(
    ("config", "drop", "tied", "scaled"),
    [
        ({}, (), False, False),
        ({"model_type": "mt5"}, (), False, False),
        ({"tie_word_embeddings": ...}, ("lm_head.weight",), True, True),
        ({"tie_word_embeddings": True}, ("lm_head.weight",), True, True),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, (), False, False),
        ({"model_type": ...}, (), False, False),
    ],
)
def test_what_files_say_of_the_head(tmp_path, config, drop, tied, scaled):
    model = tokjax.load(foreign(tmp_path, config, drop=drop))
    assert (model.config.tied, model.config.scaled) == (tied, scaled)
    assert np.isfinite(model(inputs())).all()


def test_other_names_of_the_embedding(tmp_path):
    old = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    rename = {"shared.weight": "encoder.embed_tokens.weight"}
    folder = foreign(tmp_path, {}, lambda n: rename.get(n, n), extra={old: np.zeros((32, 2), np.float32)})
    np.testing.assert_array_equal(tokjax.load(folder)(inputs()), tokjax.build(TINY)(inputs()))


@pytest.mark.parametrize(
    ("config", "drop", "message"),
    [
        ({"model_type": "umt5"}, (), "model_type 'umt5' is not known here"),
        ({"feed_forward_proj": "gated-silu"}, (), "feed_forward_proj = 'gated-silu' is not known here"),
        ({"d_kv": 4}, (), "Of another shape: .*EncDecAttention.k.weight is 6x8 instead of 8x8"),
        ({}, ("decoder.final_layer_norm.weight",), "Missing: decoder.final_layer_norm.weight"),
        ({"num_heads": 0}, (), "heads=0: must be at least 1"),
    ],
)
def test_what_does_not_fit(tmp_path, config, drop, message):
    with pytest.raises(UserError, match=message):
        tokjax.load(foreign(tmp_path, config, drop=drop))


def test_images_have_no_size_here(tmp_path):
    tokjax.save(tokjax.build(TINY), tmp_path)
    with pytest.raises(ValueError, match=r"image_size=.*must be None"):
        tokjax.load(tmp_path, image_size=(8, 8))


def test_stacked_blocks_and_bytes(tmp_path):
    cfg = T5Config(**{**vars(TINY), "vocab_size": 384, "depth": 5, "decoder_depth": 4, "length": 20})
    model = tokjax.build(cfg, preprocess=ByteTokenizer(20))
    tokjax.save(model, tmp_path / "plain")
    scanned = tokjax.load(tmp_path / "plain", scan=True)
    ids = scanned.preprocess(["aé", "b"])
    assert ids.shape == (2, 20)
    batch = Seq2Seq(ids, inputs().decoder_ids)
    np.testing.assert_allclose(scanned(batch), model(batch), atol=1e-5)
    tokjax.save(scanned, tmp_path / "scanned")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "scanned"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_reduced_model_costs_less():
    model = tokjax.build(T5Config(**{**vars(TINY), "length": 32, "decoder_length": 4}))
    n, t, c, inner, mlp = 32, 4, 8, 6, 3 * 8 * 12
    encoder = 2 * (n * (4 * c * inner + mlp) + 2 * n * n * inner)
    cross = 2 * t * c * inner + 2 * n * c * inner + 2 * t * n * inner
    decoder = t * (4 * c * inner + mlp) + 2 * t * t * inner + cross
    assert model.cost().total == encoder + decoder + t * c * 11
    fast = budget.solve("tome", model, macs=0.75).model
    assert 0.7 < fast.cost().total / model.cost().total < 0.8
    fast = tokjax.reduce(model, "tome", r=8)
    assert fast.token_counts() == (24, 16)
    assert fast.cost().model < model.cost().model
    logits, trace = fast(inputs(), trace=True)
    assert logits.shape == (2, 3, 11)
    np.testing.assert_array_equal(trace.tokens[0], [3, 2])  # of 6 and 4 tokens at most half merge
