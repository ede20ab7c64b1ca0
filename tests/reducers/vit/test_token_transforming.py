"""Token transforming against its rule in loops; its limits, both modes, padding, settings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rows_alone

from tokjax.hooks import ModelInfo
from tokjax.reducers.vit.token_transforming import TokenTransforming
from tokjax.signals import Signals
from tokjax.token_map import SoftMap, SpreadMap, apply
from tokjax.tokens import Tokens

INFO = ModelInfo(depth=4, width=8, heads=2, length=13, prefix=1, grid=(3, 4))


def drawn(n=13, width=6, batch=2, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, n, width)).astype(np.float32)


def seen(x, seed=1):
    """Signals whose keys are the features, with a drawn attention."""
    b, n, _ = x.shape
    weights = jax.nn.softmax(jnp.asarray(np.random.default_rng(seed).normal(size=(b, 2, n, n)), jnp.float32))
    return Signals(key=jnp.asarray(x)[:, :, None], weights=weights)


@functools.partial(jax.jit, static_argnums=0, compiler_options=rows_alone.QUICK)
def transformed(reducer, tokens, signals):
    plan = reducer.plan(tokens, signals)
    return plan, apply(plan, tokens)


def by_hand(x, size, score, prefix, r, tau=0.1, theta=None, hard=True):
    """Anchors, and how every token spreads [N,M], of one row."""
    n, unit = len(x), x / np.linalg.norm(x, axis=1, keepdims=True)
    order = sorted(range(prefix, n), key=lambda i: -score[i])
    anchors = [*range(prefix), *sorted(order[: n - prefix - r])]
    share = np.zeros((n, len(anchors)))
    for i in range(n):
        if i < prefix or (hard and i in anchors):
            share[i, anchors.index(i)] = 1
            continue
        near = [unit[i] @ unit[j] for j in anchors[prefix:]]
        if theta is None or max(near) >= theta:
            e = np.exp(np.array(near) / tau)
            share[i, prefix:] = e / e.sum()
    new = share.T @ size
    return anchors, share, new, share.T @ (x * size[:, None]) / new[:, None]


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(
    "settings", [{}, {"theta": 0.4, "tau": 0.3}, {"anchor_hard": False}], ids=["", "theta", "soft"]
)
def test_mass_by_hand(prefix, settings):
    x, size = drawn(), np.random.default_rng(2).integers(1, 4, (2, 13)).astype(np.float32)
    size[:, :prefix] = 1
    tokens, signals = Tokens(jnp.asarray(x), size=jnp.asarray(size), prefix=prefix), seen(x)
    plan, out = transformed(TokenTransforming(5, **settings), tokens, signals)
    weights = np.asarray(signals.weights).mean(1)
    score = weights[:, 0] if prefix else weights.mean(1)
    settings = {"hard" if name == "anchor_hard" else name: value for name, value in settings.items()}
    for b in range(2):
        anchors, share, new, y = by_hand(x[b].astype(np.float64), size[b], score[b], prefix, 5, **settings)
        np.testing.assert_array_equal(plan.map.anchor[b], anchors)
        np.testing.assert_allclose(plan.map.membership()[b], share.T, atol=1e-5)
        np.testing.assert_allclose(out.size[b], new, atol=1e-4)
        np.testing.assert_allclose(out.x[b], y, atol=1e-5)
    if "theta" not in settings:
        np.testing.assert_allclose(out.size.sum(1), size.sum(1), rtol=1e-5)


def test_a_low_temperature_merges_into_the_nearest_anchor():
    x = drawn()
    plan, _ = transformed(TokenTransforming(6, tau=1e-4), Tokens(jnp.asarray(x), prefix=1), seen(x))
    member = np.asarray(plan.map.membership())
    np.testing.assert_array_equal(member, member.round())
    np.testing.assert_array_equal(member.sum(1), 1)


def test_a_threshold_above_one_prunes():
    x = drawn()
    plan, out = transformed(TokenTransforming(6, theta=1.1), Tokens(jnp.asarray(x), prefix=1), seen(x))
    np.testing.assert_array_equal(out.x, np.take_along_axis(x, np.asarray(plan.map.anchor)[..., None], 1))
    np.testing.assert_array_equal(out.size, 1)


def test_pooling_by_rows():
    x, size = drawn(), np.random.default_rng(2).integers(1, 4, (2, 13)).astype(np.float32)
    tokens = Tokens(jnp.asarray(x), size=jnp.asarray(size), prefix=1)
    plan, out = transformed(TokenTransforming(5, mode="row", tau=0.2), tokens, seen(x))
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    for b in range(2):
        anchors = np.asarray(plan.map.anchor)[b]
        logits = np.exp(unit[b, anchors] @ unit[b].T / 0.2) * size[b]
        pool = logits / logits.sum(1, keepdims=True)
        pool[0] = np.arange(13) == 0
        np.testing.assert_allclose(out.x[b], pool @ x[b], atol=1e-5)
        np.testing.assert_allclose(out.size[b], pool / pool.sum(0) @ size[b], atol=1e-4)
    np.testing.assert_allclose(out.size.sum(1), size.sum(1), rtol=1e-5)


def test_hard_anchors_multiply_the_others_alone():
    x = drawn()
    tokens = Tokens(jnp.asarray(x), prefix=1)
    plan, _ = transformed(TokenTransforming(5), tokens, seen(x))
    assert isinstance(plan.map, SpreadMap)
    assert plan.map.share.shape == (2, 8, 5)
    assert isinstance(transformed(TokenTransforming(5, anchor_hard=False), tokens, seen(x))[0].map, SoftMap)


@pytest.mark.parametrize(
    ("settings", "prefix"), [({"theta": 0.2}, 0), ({"anchor_hard": False}, 1), ({"mode": "row"}, 2)], ids=str
)
def test_padded_rows_give_what_rows_alone_give(settings, prefix):
    rows_alone.check(TokenTransforming(4, **settings), prefix, patches=(16, 6, 1), steps=2, holes=True)


def test_rows_without_patches_and_zero_vectors_give_no_nan():
    x = drawn()
    x[1] = 0
    valid = jnp.ones((2, 13), bool).at[0, 1:].set(False)
    for settings in ({}, {"anchor_hard": False}, {"mode": "row"}, {"theta": 0.5}):
        _, out = transformed(TokenTransforming(5, **settings), Tokens(jnp.asarray(x), valid=valid, prefix=1), seen(x))
        assert np.isfinite(out.x).all()
        np.testing.assert_array_equal(out.valid[0], [True] + [False] * 7)
        np.testing.assert_array_equal(out.x[0, 0], x[0, 0])


def test_at_least_one_patch_stays():
    x = drawn()
    assert transformed(TokenTransforming(50), Tokens(jnp.asarray(x), prefix=1), seen(x))[1].length == 2
    assert TokenTransforming(5).plan(Tokens(jnp.asarray(drawn(2)), prefix=1), Signals()) is None


def test_the_plan_has_no_gradient_and_the_tokens_have():
    x = jnp.asarray(drawn())

    def loss(x, metric):
        tokens = Tokens(x, prefix=1)
        return (apply(TokenTransforming(4).plan(tokens, seen(metric)), tokens).x ** 2).sum()

    of_x, of_metric = jax.jit(jax.grad(loss, (0, 1)), compiler_options=rows_alone.QUICK)(x, x)
    assert (np.abs(of_x).max(-1) > 0).all()
    np.testing.assert_array_equal(of_metric, 0)


def test_hooks_spread_the_schedule():
    def laid_out(info=INFO, **settings):
        return [(hook.layer, hook.reducer.r) for hook in TokenTransforming(**settings).hooks(info)]

    assert laid_out(r=3) == [(i, 3) for i in range(4)]
    assert laid_out(r=(5, 0, 2)) == [(0, 5), (2, 2)]
    assert laid_out(r=4, inflect=-1.0, layers=(0, 1, 3)) == [(0, 8), (1, 5)]
    assert laid_out(r=0) == []
    of_patches = dataclasses.replace(INFO, pooling="size_mean")
    assert TokenTransforming().hooks(INFO)[0].reducer.proportional
    assert not TokenTransforming().hooks(of_patches)[0].reducer.proportional


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": -1}, r"r=-1: must be at least 0"),
        ({"r": (3, -2)}, r"r=\(3, -2\): must be at least 0"),
        ({"inflect": 1.5}, r"inflect=1.5: must be in \[-1, 1\]"),
        ({"tau": 0.0}, r"tau=0.0: must be at least 0.0001"),
        ({"tau": float("nan")}, r"tau=nan"),
        ({"theta": float("nan")}, r"theta=nan: must be a number or None"),
        ({"mode": "column"}, r"mode='column': must be one of mass, row"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenTransforming(**settings)


def test_plans_that_cannot_be_made():
    tokens = Tokens(jnp.asarray(drawn()), prefix=1)
    with pytest.raises(ValueError, match=r"r=\(3, 2\): a plan takes one number"):
        TokenTransforming(r=(3, 2)).plan(tokens, Signals())
    with pytest.raises(ValueError, match=r"layers=\(4,\): must lie in 0 to 3"):
        TokenTransforming(layers=(4,)).hooks(INFO)
