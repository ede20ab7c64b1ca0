"""CLCA: what is cached and when it comes back, carriers, the head, what it wraps, saving."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokjax
from tokjax import budget
from tokjax.hooks import ModelInfo
from tokjax.models.vit import ViTConfig
from tokjax.reducers.vit.clca import CLCA, BatchNorm, Cache, removed
from tokjax.reducers.vit.evit import EViT
from tokjax.reducers.vit.tome import ToMe
from tokjax.signals import Signals
from tokjax.token_map import apply
from tokjax.tokens import Tokens

CONFIG = ViTConfig((16, 16), 4, width=16, depth=6, heads=2, num_classes=3)


@pytest.fixture(scope="module")
def model() -> tokjax.Model:
    return tokjax.build(CONFIG)


def lengths(model) -> list[int]:
    """Tokens behind every block, what came back included."""
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    out = jax.eval_shape(lambda params, x: model.forward(params, x, states=True), model.params, images)
    return [state.length for state in out.states]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 18 go in; EViT leaves CLS, ceil(17 / 2) and a fused token; then two cached pairs of mean and carrier return.
        ({"num_clr": 1}, [18, 11 + 2, 13, 8 + 4, 12 + 2, 14]),
        ({"num_clr": 1, "recover_at_last": False}, [18, 11 + 2, 13, 8 + 4, 12, 12]),
        ({}, [17, 10 + 1, 11, 7 + 2, 9 + 1, 10]),
        ({"gap": False, "num_clr": 2}, [19, 11 + 2, 13, 8 + 4, 12 + 2, 14]),
        ({"cache": False}, [17, 10, 10, 7, 7, 7]),
        ({"reducer": "topk", "num_clr": 1}, [18, 10 + 2, 12, 7 + 4, 11 + 2, 13]),
        ({"reducer": "tome"}, [17, 9 + 1, 10, 6 + 2, 8 + 1, 9]),
        ({"reducer": None}, [17, 18, 18, 20, 21, 21]),
    ],
)
def test_sequences_grow_again(model, settings, expected):
    reduced = tokjax.reduce(model, "clca", keep_rate=0.5, layers=(1, 3), **settings)
    assert lengths(reduced) == expected


def test_what_is_cached_and_what_comes_back():
    x = jnp.arange(12.0).reshape(1, 6, 2)
    tokens, store = Tokens(x, prefix=1).traced(), Cache(False, True, 1, True, 1)
    one = apply(store.plan(tokens, Signals()), tokens)
    np.testing.assert_array_equal(one.carry["clca"], [[x[0, 1:5].mean(0), x[0, 5]]])
    assert one.length == 6
    two = apply(store.plan(one, Signals()), one)
    assert two.carry["clca"].shape == (1, 4, 2)
    # The mean leaves out what came back; the last token that came back is a carrier from now on.
    back = apply(Cache(True, True, 1, True, 1).plan(two, Signals()), two)
    np.testing.assert_array_equal(back.x, jnp.concatenate([x, two.carry["clca"]], 1))
    np.testing.assert_array_equal(back.carry["clca"], [[x[0, 1:].mean(0), x[0, 5]]])
    np.testing.assert_array_equal(back.origin, [np.arange(6)])
    end = apply(Cache(True, False, 0, True, 1).plan(back, Signals()), back)
    assert end.length == 12 and end.carry["clca"] is None


def test_an_empty_cache_brings_nothing_back():
    tokens = Tokens(jnp.ones((1, 4, 2)), prefix=1)
    out = apply(Cache(True, True, 0, True, 0).plan(tokens, Signals()), tokens)
    assert out.length == 4 and out.carry["clca"].shape == (1, 1, 2)


def test_sizes_and_positions_of_what_comes_back():
    carry = {"clca": jnp.ones((1, 2, 2))}
    tokens = Tokens(jnp.ones((1, 3, 2)), size=jnp.array([[1.0, 2, 3]]), position=jnp.array([[0, 5, 7]]), carry=carry)
    out = apply(Cache(True, False, 0, True, 0).plan(tokens, Signals()), tokens)
    np.testing.assert_array_equal(out.size, [[1, 2, 3, 1, 1]])
    np.testing.assert_array_equal(out.position, [[0, 5, 7, -1, -1]])


def test_padding_is_not_cached():
    rng = np.random.default_rng(0)
    valid = np.array([[True, True, False, True, False, True]])
    x = jnp.asarray(rng.normal(size=(1, 6, 2)), jnp.float32)
    plan = Cache(False, True, 1, True, 1).plan(Tokens(x, valid=jnp.asarray(valid), prefix=1), Signals())
    alone = Cache(False, True, 1, True, 1).plan(Tokens(x[:, valid[0]], prefix=1), Signals())
    np.testing.assert_allclose(plan.carry["clca"], alone.carry["clca"], rtol=1e-6)


def test_the_reducer_inside():
    info = CONFIG.info
    assert CLCA(info, keep_rate=0.4, layers=(2,)).inner == EViT(keep_rate=0.4, layers=(2,))
    assert CLCA(info, reducer="tome", keep_rate=0.7, layers=(1, 3)).inner == ToMe(r=(0, 5, 0, 4, 0, 0))
    every = CLCA(info, reducer="tome", settings={"r": 2})
    assert every.inner == ToMe(r=2) and every.layers == tuple(range(6))
    assert CLCA(info, settings={"kept": 3}).inner == EViT(keep_rate=0.7, kept=3)
    assert CLCA(info).layers == (1, 3, 4) and CLCA(info).depths == (1, 3, 4, 5)
    assert removed(ModelInfo(12, 8, 2, 197, 1), 0.5, (3, 6, 9)) == (0, 0, 0, 98, 0, 0, 49, 0, 0, 25, 0, 0)


def test_the_head_replaces_the_models_logits(model):
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    reduced = tokjax.reduce(model, "clca")
    out = reduced.forward(reduced.params, images, states=True)
    assert out.logits.shape == (4, 3) and np.ptp(out.logits, 0).min() > 0  # the model's own head starts at zero
    assert len(out.head_logits) == 1 and out.pooled.shape == (4, 16)
    headless = tokjax.reduce(model, "clca", head=False)
    np.testing.assert_array_equal(headless(images), 0)


def test_gradients_reach_carriers_and_head_but_not_the_statistics(model):
    reduced = tokjax.reduce(model, "clca", num_clr=1)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    gradient = jax.grad(lambda params: (reduced.forward(params, images).logits ** 2).sum())(reduced.params)
    learned = gradient["reducers"][0]
    assert np.abs(learned["clr"]).max() > 0 and np.abs(learned["head"]["over_depth"]).max() > 0
    for norm in ("norm1", "norm2"):
        np.testing.assert_array_equal(learned["head"][norm]["mean"], 0)
        np.testing.assert_array_equal(learned["head"][norm]["var"], 0)


def test_batch_norm_by_hand():
    x = jax.random.normal(jax.random.key(0), (3, 4, 5)) * 3 + 1
    norm = BatchNorm(4)
    np.testing.assert_allclose(norm(x), x / np.sqrt(1 + 1e-5), rtol=1e-5)
    of_batch = np.asarray(norm(x, batch=True))
    np.testing.assert_allclose(of_batch.mean((0, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(of_batch.std((0, 2)), 1, atol=1e-4)


def test_it_is_saved_with_its_parameters(model, tmp_path):
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    settings = {"reducer": "tome", "keep_rate": 0.6, "num_clr": 2, "settings": {"proportional": False}, "seed": 5}
    reduced = tokjax.reduce(model, "clca", **settings)
    tokjax.save(reduced, tmp_path)
    again = tokjax.load(tmp_path)
    assert again.methods[0].name == "clca" and dict(again.methods[0].settings) == settings
    np.testing.assert_array_equal(again(images), reduced(images))


def test_budgets_are_reached(model):
    found = budget.solve("clca", model, macs=0.75, num_clr=1)
    assert found.reached and abs(found.relative - 0.75) < 0.05 and found.reachable[1] > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clr": -1}, r"num_clr=-1: must be at least 0"),
        ({"num_clr": 1, "cache": False}, r"num_clr=1: must be at least 0, and 0 with cache=False"),
        ({"gap": False}, r"gap=False, num_clr=0: leave nothing to cache"),
        ({"expand": 0}, r"expand=0: must be at least 1"),
        ({"reducer": "evits"}, r"reducer='evits': must be one of "),
        ({"reducer": "diffrate"}, r"reducer='diffrate': has no keep_rate; give its settings"),
        ({"reducer": "tome", "keep_rate": 0.0}, r"keep_rate=0.0: must be in \(0, 1\]"),
        ({"layers": (6,)}, r"layers=\(6,\): must lie in 0 to 5"),
        ({"settings": {"rate": 1}}, r"rate=1: evit has the settings"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        CLCA(CONFIG.info, **settings).hooks(CONFIG.info)


def test_a_head_needs_classes():
    with pytest.raises(ValueError, match=r"head=True: needs a model with classes"):
        CLCA(ModelInfo(4, 8, 2, 17, 1), head=True)
    assert CLCA(ModelInfo(4, 8, 2, 17, 1)).head is None
