"""Models of two towers: features, logits, reduction of either tower, gradients, budgets."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokjax
from tokjax import budget
from tokjax.models.dual import DualConfig, unit
from tokjax.models.text import TextConfig
from tokjax.models.vit import ViTConfig

VISION = ViTConfig(
    image_size=(16, 16), patch_size=4, width=16, depth=3, heads=2, num_classes=6, head_bias=False, pre_norm=True
)
TEXT = TextConfig(vocab_size=20, length=8, width=16, depth=2, heads=2, embed_dim=6, eos_id=19)
SIGLIP = DualConfig(
    dataclasses.replace(VISION, class_token=False, pooling="map", num_classes=0, pre_norm=False),
    dataclasses.replace(TEXT, causal=False, pooling="last", eos_id=None, embed_dim=16, head_bias=True),
    logit_scale=1.0,
    logit_bias=-3.0,
)


@functools.cache
def clip():
    return tokjax.build(DualConfig(VISION, TEXT))


def inputs():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 18, (4, 8)).astype(np.int32)
    ids[:, 6] = 19
    return rng.normal(size=(3, 16, 16, 3)).astype(np.float32), ids


def test_logits_are_scaled_products_of_unit_features():
    images, ids = inputs()
    image, text = clip().encode_image(images), clip().encode_text(ids)
    np.testing.assert_allclose(np.linalg.norm(image, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(text, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(clip()(images, ids), image @ text.T / 0.07, rtol=1e-5, atol=1e-5)
    out = jax.jit(clip().forward)(clip().params, images, ids)
    np.testing.assert_allclose(out.logits, clip()(images, ids), rtol=1e-5, atol=1e-5)
    assert out.bias is None


def test_a_bias_is_added():
    model, (images, ids) = tokjax.build(SIGLIP), inputs()
    image, text = model.encode_image(images), model.encode_text(ids)
    np.testing.assert_allclose(model(images, ids), math.e * image @ text.T - 3, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_either_tower_is_reduced(tower):
    small, (images, ids) = tokjax.reduce(clip(), "tome", r=2, tower=tower), inputs()
    other = {"vision": "text", "text": "vision"}[tower]
    assert len(small.towers[tower].methods) == 1
    assert not small.towers[other].methods
    assert small.towers[tower].token_counts()[-1] < clip().towers[tower].token_counts()[-1]
    assert np.abs(np.asarray(small(images, ids) - clip()(images, ids))).max() > 1e-5
    np.testing.assert_array_equal(small.unreduced(images, ids), clip()(images, ids))
    assert [method.name for method in small.methods] == ["tome"]


def test_vision_is_the_tower_by_default():
    assert tokjax.reduce(clip(), "topk", keep_rate=0.5).vision.methods
    with pytest.raises(ValueError, match="tower='audio': must be 'vision' or 'text'"):
        tokjax.reduce(clip(), "topk", tower="audio")
    with pytest.raises(ValueError, match="of a model that has both"):
        tokjax.reduce(clip().vision, "topk", tower="vision")


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_budgets_are_of_the_tower(tower):
    found = budget.solve("topk", clip(), macs=0.7, tower=tower, layers=(0,))
    assert isinstance(found.model, tokjax.DualModel)
    part, whole = found.model.towers[tower].cost().total, clip().towers[tower].cost().total
    assert found.relative == part / whole
    assert abs(found.relative - 0.7) < 0.1


def test_other_parameters_use_the_same_programs():
    images, ids = inputs()
    doubled = {**clip().params, "logit_scale": clip().params["logit_scale"] + math.log(2)}
    np.testing.assert_allclose(clip().with_params(doubled)(images, ids), 2 * clip()(images, ids), rtol=1e-5)
    assert clip().with_params(doubled).vision._logits is clip().vision._logits


def test_gradients_reach_both_towers_and_the_temperature():
    images, ids = inputs()
    grads = jax.grad(lambda p: clip().forward(p, images, ids[:3]).logits[0, 0])(clip().params)
    for part in (grads["vision"], grads["text"], grads["logit_scale"]):
        leaves = jax.tree.leaves(part)
        assert all(np.isfinite(leaf).all() for leaf in leaves)
        assert any(np.abs(leaf).max() > 0 for leaf in leaves)


def test_unit_of_zero_is_zero_with_a_finite_gradient():
    np.testing.assert_array_equal(unit(jnp.zeros((2, 3))), 0)
    assert np.isfinite(jax.grad(lambda x: unit(x).sum())(jnp.zeros((2, 3)))).all()


def test_towers_must_meet():
    with pytest.raises(ValueError, match=r"text.embed_dim=5: must equal the width of image features, 6"):
        DualConfig(VISION, dataclasses.replace(TEXT, embed_dim=5))


def test_a_text_encoder_alone_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="text encoder alone"):
        tokjax.save(clip().text, tmp_path / "x")
