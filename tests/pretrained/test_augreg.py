import collections
from pathlib import Path

import jax
import numpy as np
import pytest

from tokjax.errors import UserError
from tokjax.pretrained import files, load_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints" / "augreg_npz.npz"


@pytest.fixture
def state():
    """A ViT of two blocks, width 8, as google-research/vision_transformer writes one."""
    with np.load(GOLDEN) as file:
        return {name.removeprefix("param."): file[name] for name in file if name.startswith("param.")}


def load(folder, arrays, **settings):
    np.savez(folder / "model.npz", **arrays)
    return load_checkpoint(folder / "model.npz", **settings)


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_sizes_come_from_the_arrays(tmp_path, state):
    checkpoint = load(tmp_path, state)
    config = checkpoint.config
    assert (config.width, config.depth, config.heads, config.num_classes) == (8, 2, 2, 5)
    assert (config.image_size, config.pooling, config.norm_eps) == ((32, 32), "cls", 1e-6)
    assert (checkpoint.family, checkpoint.source["format"]) == ("timm", "augreg")
    assert checkpoint.preprocess.mean == (0.5, 0.5, 0.5)


def test_layouts_against_plain_arithmetic(tmp_path, state):
    params = load(tmp_path, state).params
    rng = np.random.default_rng(0)
    x, patch = rng.standard_normal((3, 8)), rng.standard_normal((8, 8, 3))
    attention = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
    key = np.einsum("nc,chd->nhd", x, state[f"{attention}/key/kernel"]) + state[f"{attention}/key/bias"]
    ours = params["blocks"][1]["attn"]
    qkv = x @ ours["qkv"]["kernel"] + ours["qkv"]["bias"]
    np.testing.assert_allclose(qkv[:, 8:16], key.reshape(3, 8), rtol=1e-5, atol=1e-6)
    out = np.einsum("nhd,hdc->nc", x.reshape(3, 2, 4), state[f"{attention}/out/kernel"])
    np.testing.assert_allclose(x @ ours["proj"]["kernel"], out, rtol=1e-5, atol=1e-6)
    embedded = np.einsum("hwi,hwic->c", patch, state["embedding/kernel"])
    np.testing.assert_allclose(patch.reshape(-1) @ params["patch_embed"]["kernel"], embedded, rtol=1e-5, atol=1e-5)


def test_every_array_is_read_once(tmp_path, state, monkeypatch):
    counts = collections.Counter()
    for way in ("__getitem__", "view"):
        read = getattr(files.Tensors, way)
        monkeypatch.setattr(files.Tensors, way, lambda self, name, read=read: counts.update([name]) or read(self, name))
    load(tmp_path, state)
    assert counts == dict.fromkeys(state, 1)


@pytest.mark.parametrize("root", ["opt/target/", "params/", "params/img/"])
def test_states_of_training_have_a_prefix(tmp_path, state, root):
    plain = load(tmp_path, state)
    prefixed = load(tmp_path, {root + name: value for name, value in state.items()})
    assert prefixed.config == plain.config
    assert_same(prefixed.params, plain.params)


def test_a_layer_before_the_classifier_makes_it_a_backbone(tmp_path, state):
    whole = load(tmp_path, state).params
    hidden = {"pre_logits/kernel": np.zeros((8, 8), np.float32), "pre_logits/bias": np.zeros(8, np.float32)}
    checkpoint = load(tmp_path, {**state, **hidden})
    assert checkpoint.config.num_classes == 0
    del whole["head"]
    assert_same(checkpoint.params, whole)


def test_big_visions_names(tmp_path, state):
    """Modules are numbered otherwise, the table lies at the top, and features are averaged."""
    plain = load(tmp_path, state).params
    table = state.pop("Transformer/posembed_input/pos_embedding")
    del state["cls"]
    renamed = {"pos_embedding": table[:, 1:]}
    for name, value in state.items():
        for old, new in (("Attention_1", "Attention_0"), ("MlpBlock_3", "MlpBlock_0"), ("LayerNorm_2", "LayerNorm_1")):
            name = name.replace(old, new)
        renamed[name] = value
    checkpoint = load(tmp_path, renamed)
    assert (checkpoint.config.class_token, checkpoint.config.pooling) == (False, "size_mean")
    del plain["cls_token"]
    assert_same(checkpoint.params, {**plain, "pos_embed": plain["pos_embed"][:, 1:]})


def test_an_attention_pool(tmp_path, state):
    del state["cls"], state["head/kernel"], state["head/bias"]
    state["Transformer/posembed_input/pos_embedding"] = state["Transformer/posembed_input/pos_embedding"][:, 1:]
    block = "Transformer/encoderblock_0/"
    pool = {"MAPHead_0/probe": np.ones((1, 1, 8), np.float32)}
    for name, value in state.items():
        if name.startswith(block):
            name = name.removeprefix(block).replace("Attention_1", "Attention_0").replace("MlpBlock_3", "MlpBlock_0")
            pool[f"MAPHead_0/{name}"] = value
    pool = {name: value for name, value in pool.items() if "LayerNorm_2" not in name}
    checkpoint = load(tmp_path, {**state, **pool})
    assert (checkpoint.config.pooling, checkpoint.config.gelu) == ("map", "tanh")
    ours, first = checkpoint.params["attn_pool"], checkpoint.params["blocks"][0]
    assert_same(ours["qkv"], first["attn"]["qkv"])
    assert_same(ours["proj"], first["attn"]["proj"])
    assert_same(ours["mlp"], first["mlp"])
    assert_same(ours["norm"], first["norm1"])


def test_what_does_not_fit(tmp_path, state):
    stacked = {name.replace("encoderblock_0", "encoderblock"): value for name, value in state.items()}
    with pytest.raises(UserError, match="stored stacked"):
        load(tmp_path, stacked)
    del state["Transformer/encoder_norm/bias"], state["Transformer/encoderblock_1/LayerNorm_2/scale"]
    with pytest.raises(UserError, match=r"Missing: blocks\.1\.norm2\.weight, norm\.bias\."):
        load(tmp_path, state)
