"""Decoder checkpoints: what their files say, and back."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tokjax
from tokjax.errors import UserError
from tokjax.models.decoder import DecoderConfig

SIZES = {"vocab_size": 11, "width": 8, "hidden": 12, "depth": 2, "heads": 4, "kv_heads": 2, "head_width": 4}
TINY = DecoderConfig(**SIZES, length=8, max_length=32)
GEMMA = {"feed": "geglu", "norm": "rms_offset", "embed_scaled": True, "tied": True}
GEMMA2 = {**GEMMA, "norm_order": "both", "window": 3, "window_layers": (0,), "soft_cap": 5.0, "logit_cap": 3.0}
BIASES = {"qkv_bias": True, "proj_bias": True, "mlp_bias": True}
OPT = {"norm": "layer", "feed": "relu", "position": "learned", "head_width": 2, "kv_heads": 4, "tied": True, **BIASES}
SCALING = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_length": 16}
KINDS = {
    "llama": {},
    "llama_biases": {**BIASES, **SCALING, "eos_ids": (2, 3)},
    "mistral": {"window": 3, "rope_base": 1e6},
    "qwen2": {"qkv_bias": True, "tied": True, "rope_scaling": "linear", "rope_factor": 2.0},
    "qwen2_windows": {"qkv_bias": True, "window": 4, "window_layers": (1,)},
    "gemma": {**GEMMA, "pad_id": 0},
    "gemma2": {**GEMMA2, "query_scale": 4.0**-0.5, "pad_id": 0},
    "opt": {**OPT, "pad_id": 1},
    "opt_post": {**OPT, "norm_order": "post", "embed_width": 6},
}
IDS = np.array([[1, 4, 5, 6, 7, 8], [3, 9, 10, 2, 4, 4]], np.int32)


def build(**changes):
    return tokjax.build(dataclasses.replace(TINY, **changes))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_says_what_it_is(tmp_path, kind):
    """Both from our own part of the configuration and from what transformers would read."""
    model = build(**KINDS[kind])
    tokjax.save(model, tmp_path)
    assert tokjax.load(tmp_path).config == model.config
    path = tmp_path / "config.json"
    said = json.loads(path.read_text())
    assert said["model_type"] == kind.split("_")[0]
    said.pop("tokjax")
    path.write_text(json.dumps(said))
    again = tokjax.load(tmp_path)
    scale = again.config.query_scale
    same = {"length": 8, "query_scale": None if scale is None else round(scale, 6)}
    assert dataclasses.replace(again.config, **same) == model.config
    tokjax.save(again, tmp_path / "again")
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def foreign(folder: Path, config: dict, drop=(), rename=lambda name: name, extra=None) -> Path:
    """A checkpoint as others write it: without our own part of the configuration."""
    tokjax.save(build(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {rename(name): value for name, value in tensors.items() if name not in drop}
    save_file({**tensors, **(extra or {})}, folder / "model.safetensors")
    said = json.loads((folder / "config.json").read_text())
    said.pop("tokjax")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**said, **config}.items() if v is not ...}))
    return folder


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"rope_parameters": ..., "rope_theta": 5e5}, {"rope_base": 5e5}),
        (
            {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_scaling": "linear", "rope_factor": 4.0},
        ),
        ({"eos_token_id": [2, 5]}, {"eos_ids": (2, 5)}),
        ({"model_type": "mistral", "sliding_window": 4}, {"window": 4}),
        ({"model_type": "mistral", "sliding_window": None}, {"window": None}),
        ({"pad_token_id": -1}, {"pad_id": None}),
        ({"tie_word_embeddings": True}, {"tied": True}),
    ],
)
def test_both_layouts_of_configurations(tmp_path, config, wanted):
    got = tokjax.load(foreign(tmp_path, config)).config
    assert {name: getattr(got, name) for name in wanted} == wanted


def test_names_of_a_backbone_and_what_old_files_have(tmp_path):
    extra = {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    folder = foreign(tmp_path, {}, drop=("lm_head.weight",), rename=lambda n: n.removeprefix("model."), extra=extra)
    model = tokjax.load(folder)
    assert model.config.tied
    assert np.isfinite(model(IDS)).all()


@pytest.mark.parametrize(
    ("config", "drop", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, (), "rope_type = 'yarn' is not known here"),
        ({"model_type": "gpt2"}, (), "model_type 'gpt2' is not known here"),
        ({"hidden_act": "gelu"}, (), "hidden_act = 'gelu' is not known here"),
        ({"head_dim": ...}, (), r"k_proj.weight is 8x8 instead of 4x8"),
        (
            {"rope_parameters": ..., "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            (),
            "'dynamic' is not known",
        ),
        ({"num_key_value_heads": 3}, (), "kv_heads=3: must divide heads=4"),
        ({}, ("model.layers.1.mlp.up_proj.weight",), r"Missing: model\.layers\.1\.mlp\.up_proj\.weight"),
        ({}, ("model.embed_tokens.weight",), "Missing: model.embed_tokens.weight"),
    ],
)
def test_what_does_not_fit(tmp_path, config, drop, message):
    with pytest.raises(UserError, match=message):
        tokjax.load(foreign(tmp_path, config, drop))


def test_shards(tmp_path):
    """Tensors over several files, placed one by one; a file that is missing is named."""
    folder = foreign(tmp_path, {})
    tensors = load_file(folder / "model.safetensors")
    whole = np.asarray(tokjax.load(folder)(IDS))
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    placed = []

    def place(path, shape):
        placed.append(path)
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])

    np.testing.assert_array_equal(tokjax.load(folder, sharding=place)(IDS), whole)
    assert ("embedding",) in placed
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors does not exist"):
        tokjax.load(folder)


def test_more_ends_beside_the_configuration(tmp_path):
    folder = foreign(tmp_path, {})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert tokjax.load(folder).config.eos_ids == (2, 7)


def test_reduced_and_stacked_models_come_back(tmp_path):
    """With their reducers; stacked blocks give the same texts, and are saved as others are."""
    model = tokjax.reduce(build(depth=5), "fastv", layer=1, kept=2)
    tokjax.save(model, tmp_path / "plain")
    again = tokjax.load(tmp_path / "plain", scan=True)
    assert again.config == dataclasses.replace(model.config, scan=True)
    assert [method.settings for method in again.methods] == [{"layer": 1, "kept": 2}]
    one, other = (each.generate(IDS, max_tokens=4, eos_id=None) for each in (model, again))
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_allclose(one.score, other.score, atol=1e-5)
    tokjax.save(again, tmp_path / "stacked", dtype="bfloat16")
    names = [set(load_file(tmp_path / name / "model.safetensors")) for name in ("plain", "stacked")]
    assert names[0] == names[1]
    assert tokjax.load(tmp_path / "stacked").methods == again.methods
