"""Top-K: which tokens stay, in which order, how many, and in padded rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rows_alone

from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit.topk import TopK
from tokjax.signals import Signals
from tokjax.token_map import apply
from tokjax.tokens import Tokens

INFO = ModelInfo(depth=12, width=8, heads=2, length=17, prefix=1, grid=(4, 4))


def attended(scores, heads=2):
    """Signals of an attention whose CLS row, averaged over heads, is `scores`."""
    scores = jnp.asarray(scores, jnp.float32)
    b, n = scores.shape
    weights = jnp.full((b, heads, n, n), 1 / n).at[:, :, 0].set(scores[:, None])
    return Signals(weights=weights.at[:, 0, 0].multiply(0.5).at[:, 1, 0].multiply(1.5))


def tokens_of(n, prefix=1, batch=1, **fields):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, n, 3)), jnp.float32)
    return Tokens(x, prefix=prefix, **fields)


def test_the_most_attended_stay_from_best_to_worst():
    scores = [[9.0, 0.1, 0.4, 0.0, 0.3, 0.2]]
    tokens = tokens_of(6).traced()
    plan = TopK(kept=3).plan(tokens, attended(scores))
    np.testing.assert_array_equal(plan.map.keep, [[0, 2, 4, 5]])
    out = apply(plan, tokens)
    np.testing.assert_array_equal(out.x, tokens.x[:, jnp.array([0, 2, 4, 5])])
    np.testing.assert_array_equal(out.origin, [[0, 4, 1, 4, 2, 3]])
    assert out.size is None
    assert out.valid is None


def test_ties_go_to_the_lower_index():
    plan = TopK(kept=3).plan(tokens_of(7), attended([[1.0, 0.1, 0.5, 0.1, 0.1, 0.5, 0.1]]))
    np.testing.assert_array_equal(plan.map.keep, [[0, 2, 5, 1]])


def test_every_prefix_token_stays():
    scores = [[0.0, 0.0, 0.0, 0.2, 0.9, 0.5]]
    plan = TopK(kept=2).plan(tokens_of(6, prefix=3), attended(scores))
    np.testing.assert_array_equal(plan.map.keep, [[0, 1, 2, 4, 5]])


def test_without_a_prefix_the_most_attended_of_all_stay():
    weights = jax.nn.softmax(jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 6, 6)), jnp.float32))
    plan = TopK(kept=2).plan(tokens_of(6, prefix=0, batch=2), Signals(weights=weights))
    expected = np.argsort(-np.asarray(weights).mean((1, 2)), -1)[:, :2]
    np.testing.assert_array_equal(plan.map.keep, expected)


def test_sizes_follow_the_tokens_that_stay():
    tokens = tokens_of(4, size=jnp.array([[1.0, 2, 3, 4]]), position=jnp.array([[0, 10, 20, 30]]))
    out = apply(TopK(kept=2).plan(tokens, attended([[0.0, 0.1, 0.2, 0.3]])), tokens)
    np.testing.assert_array_equal(out.size, [[1, 4, 3]])
    np.testing.assert_array_equal(out.position, [[0, 30, 20]])


@pytest.mark.parametrize(
    ("rate", "patches", "kept"),
    [(0.7, 196, 138), (0.7, 139, 98), (0.5, 16, 8), (0.5, 15, 8), (0.01, 16, 1), (1, 16, 16)],
)
def test_counts_are_rounded_up(rate, patches, kept):
    assert TopK(rate).count(patches) == kept


def test_keeping_all_does_nothing():
    for reducer in (TopK(1.0), TopK(kept=5), TopK(kept=50)):
        assert reducer.plan(tokens_of(6), attended([[0.1] * 6])) is None


def test_counts_of_rows_come_from_the_same_rounding():
    valid = jnp.arange(17) < jnp.array([[17], [16], [11], [2], [1]])
    tokens = tokens_of(17, batch=5, valid=valid)
    np.testing.assert_array_equal(TopK(0.7).row_counts(tokens), [12, 11, 7, 1, 0])
    np.testing.assert_array_equal(TopK(kept=9).row_counts(tokens), [9, 9, 9, 1, 0])


@pytest.mark.parametrize(
    ("reducer", "prefix", "holes"),
    [(TopK(0.7), 1, False), (TopK(0.7), 1, True), (TopK(0.5), 0, False), (TopK(kept=3), 2, True)],
)
def test_padded_rows_give_what_rows_alone_give(reducer, prefix, holes):
    rows_alone.check(reducer, prefix, holes=holes)


def test_hooks_spread_the_counts_over_the_locations():
    assert TopK(0.5).hooks(INFO) == [Hook("after_attention", layer, TopK(0.5, layers=None)) for layer in (3, 6, 9)]
    hooks = TopK(kept=(9, 5), layers=(2, 7)).hooks(INFO)
    assert [(hook.layer, hook.reducer.kept) for hook in hooks] == [(2, 9), (7, 5)]
    assert [hook.reducer.kept for hook in TopK(kept=4).hooks(INFO)] == [4, 4, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_rate": 0.0}, r"keep_rate=0.0: must be in \(0, 1\]"),
        ({"keep_rate": 1.2}, r"keep_rate=1.2"),
        ({"keep_rate": float("nan")}, r"keep_rate=nan"),
        ({"kept": 0}, r"kept=0: must be at least 1"),
        ({"kept": (4, 0, 2)}, r"kept=\(4, 0, 2\): must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        TopK(**settings)


def test_layouts_that_cannot_be():
    with pytest.raises(ValueError, match=r"kept=\(9, 5\): must have one number for each of layers=\(3, 6, 9\)"):
        TopK(kept=(9, 5)).hooks(INFO)
    with pytest.raises(ValueError, match=r"layers=\(12,\): must lie in 0 to 11"):
        TopK(layers=(12,)).hooks(INFO)
    with pytest.raises(ValueError, match=r"kept=\(9, 5\): a plan takes one number"):
        TopK(kept=(9, 5)).plan(tokens_of(17), attended([[0.1] * 17]))


def test_the_choice_has_no_gradient_and_the_features_have():
    tokens, scores = tokens_of(6), jnp.array([[0.0, 0.1, 0.4, 0.0, 0.3, 0.2]])

    def loss(x, scores):
        part = tokens.replace(x=x)
        return (apply(TopK(kept=3).plan(part, attended(scores)), part).x ** 2).sum()

    of_x, of_scores = jax.grad(loss, (0, 1))(tokens.x, scores)
    np.testing.assert_array_equal(of_scores, 0)
    np.testing.assert_allclose(of_x[0, jnp.array([0, 2, 4, 5])], 2 * tokens.x[0, jnp.array([0, 2, 4, 5])], rtol=1e-6)
    np.testing.assert_array_equal(of_x[0, jnp.array([1, 3])], 0)


def test_reducers_are_hashable():
    assert hash(TopK(kept=(1, 2))) == hash(dataclasses.replace(TopK(), kept=(1, 2)))
