"""The radial pattern: distances, radii, which patches leave, and the same class token as the published masking."""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.hooks import ModelInfo
from tokjax.models.vit import ViT, ViTConfig
from tokjax.reducers.vit.heuristic import Heuristic, contiguous_radii, radial_distance, subset_radii
from tokjax.signals import Context, Signals
from tokjax.tokens import MASKED, Tokens

INFO = ModelInfo(depth=12, width=8, heads=2, length=197, prefix=1, grid=(14, 14))


def test_distances_from_the_middle():
    d = radial_distance((4, 4), "l1")
    np.testing.assert_allclose(d[0], [4, 8 / 3, 8 / 3, 4], rtol=1e-6)
    np.testing.assert_array_equal(d, d[::-1, ::-1])
    np.testing.assert_allclose(radial_distance((4, 4), "linf")[0], 2)
    assert radial_distance((3, 3))[0, 0] == np.float32(np.sqrt(8)) > radial_distance((3, 3))[2, 2]  # off the middle


def test_radii_fall_or_fit_the_counts():
    d = radial_distance((14, 14))
    falling = contiguous_radii(d, 3, 9, 12)
    assert falling[2] == d[0, 0] > falling[3] > falling[9] > falling[10] == 1.0 == falling[11]
    inside = [(d <= radius).sum() for radius in subset_radii(d, [98, 49, 24])]
    assert inside == [96, 52, 24]


def test_what_leaves_is_outside_and_the_rest_stays_in_place():
    hooks = Heuristic(0.5).hooks(INFO)
    assert [(h.where, h.layer) for h in hooks] == [("before_block", layer) for layer in (3, 6, 9)]
    context, place, left = Signals(context=Context(grid=(14, 14))), np.arange(197), []
    for hook in hooks:
        plan = hook.reducer.plan(Tokens(jnp.zeros((2, len(place), 1)), prefix=1), context)
        place = place[np.asarray(plan.map.keep)[1]]
        left.append(len(place) - 1)
    assert left == [96, 52, 24]
    d = radial_distance((14, 14)).reshape(-1)
    np.testing.assert_array_equal(place[1:] - 1, np.flatnonzero(d <= np.sort(d)[23]))


def test_the_class_token_is_that_of_masked_attention():
    cfg = ViTConfig((16, 16), 4, width=16, depth=2, heads=2, num_classes=3)
    graphdef, state = nnx.split(ViT(cfg, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = nnx.to_pure_dict(state)
    params["head"]["kernel"] = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
    model, images = nnx.merge(graphdef, params), jnp.asarray(rng.normal(size=(2, 16, 16, 3)), jnp.float32)
    hooks = Heuristic(kept=(4,), layers=(1,)).hooks(cfg.info)
    tokens = model.blocks[0](model.embed(images))[0]
    outside = radial_distance((4, 4)).reshape(-1) > hooks[0].reducer.radius
    gate = jnp.broadcast_to(jnp.pad(jnp.where(outside, MASKED, 0), (1, 0)), (2, 17))
    masked = model.blocks[1](tokens.replace(key_bias=gate))[0]
    expected = model.head(model.norm(masked.x)[:, 0])
    np.testing.assert_allclose(model(images, hooks).logits, expected, atol=1e-5)


def test_contiguous_pruning_and_none_at_all():
    hooks = Heuristic(mode="contiguous").hooks(INFO)
    assert [h.layer for h in hooks] == list(range(3, 11))
    assert Heuristic(1.0).hooks(INFO) == [] == Heuristic(mode="contiguous", layers=()).hooks(INFO)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="metric='l3': must be one of l1, l2, linf"):
        Heuristic(metric="l3")
    with pytest.raises(ValueError, match=r"min_radius=0\.0"):
        Heuristic(min_radius=0.0)
    with pytest.raises(ValueError, match="grid=None: a radial pattern needs"):
        Heuristic().hooks(ModelInfo(depth=12, width=8, heads=2, length=197, prefix=1))
    with pytest.raises(ValueError, match="here are 190"):
        Heuristic(0.5).hooks(INFO)[0].reducer.plan(
            Tokens(jnp.zeros((1, 191, 1)), prefix=1), Signals(context=Context(grid=(14, 14)))
        )
