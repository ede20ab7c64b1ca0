"""Stand-ins for hard choices: values by their definition, gradients against finite differences, limits and masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import relax

RNG = np.random.default_rng(0)
SCORE = jnp.asarray(RNG.normal(size=(3, 9)), jnp.float32)
VALID = jnp.asarray(np.arange(9) < np.array([[9], [5], [2]]))
COTANGENT = jnp.asarray(RNG.normal(size=(3, 9)), jnp.float32)


def differences(f, x, step=1e-2):
    """Central differences of a scalar function."""
    x, out = np.asarray(x, np.float32), np.zeros(x.shape)
    flat = out.reshape(-1)
    f = jax.jit(f)
    for i in range(x.size):
        move = np.zeros(x.size, np.float32)
        move[i] = step
        move = move.reshape(x.shape)
        flat[i] = (float(f(x + move)) - float(f(x - move))) / (2 * step)
    return out


LOGITS, CANDIDATES = jnp.asarray(RNG.normal(size=(2, 4)), jnp.float32), np.arange(8, 0, -2)
KEY = jax.random.key(0)
SOFT = {
    "soft_topk": (lambda s: relax.soft_topk(s, 3, 0.7), SCORE),
    "soft_topk, padded": (lambda s: relax.soft_topk(s, 2.5, 0.7, VALID), SCORE),
    "soft_rank": (lambda s: relax.soft_rank(s, 0.7, VALID), SCORE),
    "gumbel_softmax": (lambda s: relax.gumbel_softmax(KEY, s, 0.7, valid=VALID), SCORE),
    "expected_count": (lambda l: relax.expected_count(l, CANDIDATES), LOGITS),
    "kept_probability": (lambda l: relax.kept_probability(l, CANDIDATES, 9), LOGITS),
    "policy_softmax, logits": (lambda l: relax.policy_softmax(l, VALID[1] * 0.8, jnp.array([0, 4, 8])), SCORE),
    "policy_softmax, policy": (lambda p: relax.policy_softmax(SCORE, p, slice(0, 3)), jnp.linspace(0.1, 0.9, 9)),
}


@pytest.mark.parametrize("name", SOFT)
def test_gradients_are_those_of_finite_differences(name):
    f, x = SOFT[name]
    weight = np.random.default_rng(1).normal(size=f(x).shape).astype(np.float32)

    def total(x):
        return (f(x) * weight).sum()

    gradient = jax.grad(total)(x)
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(gradient, differences(total, x), atol=2e-3 * float(np.abs(gradient).max()) + 2e-4)


def test_the_number_of_a_soft_topk_has_a_gradient():
    def total(k):
        return (relax.soft_topk(SCORE, k, 0.5) * COTANGENT).sum()

    k = jnp.array([2.0, 3.5, 7.0])
    np.testing.assert_allclose(jax.grad(total)(k), differences(total, k), atol=3e-3)


HARD = {
    "straight_through": (lambda s: relax.straight_through(jnp.round(s), jnp.sin(s)), jnp.sin),
    "ste_ceil": (relax.ste_ceil, lambda s: s),
    "topk_mask": (lambda s: relax.topk_mask(s, 4, 0.3, VALID), lambda s: relax.soft_topk(s, 4, 0.3, VALID)),
    "gumbel_softmax": (
        lambda s: relax.gumbel_softmax(KEY, s, 0.5, hard=True, valid=VALID),
        lambda s: relax.gumbel_softmax(KEY, s, 0.5, valid=VALID),
    ),
    "gumbel_topk": (
        lambda s: relax.gumbel_topk(KEY, s, 3, 0.5),
        lambda s: relax.soft_topk(s + jax.random.gumbel(KEY, s.shape), 3, 0.5),
    ),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_values_are_whole_and_have_the_gradient_of_the_soft_ones(name):
    hard, soft = HARD[name]
    value = np.asarray(hard(SCORE))
    np.testing.assert_array_equal(value, np.round(value))  # exactly: nothing is left of the soft value
    actual, expected = (jax.grad(lambda s, f=f: (f(s) * COTANGENT).sum())(SCORE) for f in (hard, soft))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("k", [0, 1, 4, 2.25, 9, 20])
def test_soft_masks_add_up_to_the_number(k):
    for scale in (1e-3, 1.0, 1e3):
        mask = np.asarray(relax.soft_topk(SCORE * scale, k, 0.5, VALID))
        np.testing.assert_allclose(mask.sum(-1), np.minimum(k, [9, 5, 2]), atol=2e-3)
        assert ((mask >= 0) & (mask <= 1)).all() and not mask[~np.asarray(VALID)].any()
        gradient = jax.grad(lambda s, c=scale: (relax.soft_topk(s * c, k, 0.5, VALID) * COTANGENT).sum())(SCORE)
        assert np.isfinite(gradient).all() and not np.asarray(gradient)[~np.asarray(VALID)].any()


def test_as_the_temperature_falls_soft_becomes_hard():
    np.testing.assert_allclose(relax.soft_topk(SCORE, 4, 1e-3), relax.topk_mask(SCORE, 4), atol=1e-4)
    np.testing.assert_allclose(relax.soft_rank(SCORE, 1e-4, VALID), np.where(VALID, relax.ranks(SCORE, VALID), 0))
    hard = relax.gumbel_softmax(KEY, SCORE, 1e-4, hard=True)
    np.testing.assert_allclose(relax.gumbel_softmax(KEY, SCORE, 1e-4), hard, atol=1e-4)


def test_ties_go_to_the_lower_index_and_share_where_it_is_soft():
    score = jnp.array([1.0, 2, 1, 1, 0])
    np.testing.assert_array_equal(relax.topk_mask(score, 3), [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(relax.ranks(score), [1, 0, 2, 3, 4])
    np.testing.assert_allclose(relax.soft_topk(score, 3, 0.01), [2 / 3, 1, 2 / 3, 2 / 3, 0], atol=1e-5)
    np.testing.assert_allclose(relax.soft_rank(score, 0.01), [2, 0, 2, 2, 4], atol=1e-5)
    np.testing.assert_allclose(relax.soft_topk(jnp.ones(4), 1), 0.25, atol=1e-6)


def test_rows_may_have_numbers_of_their_own_under_jit_and_vmap():
    k = jnp.array([1, 4, 2])
    mask = jax.jit(functools.partial(relax.topk_mask, temperature=0.1))(SCORE, k)
    np.testing.assert_array_equal(mask.sum(-1), k)
    rows = jax.vmap(lambda s, k, v: relax.topk_mask(s, k, 0.1, v))(SCORE, k, VALID)
    np.testing.assert_array_equal(rows, relax.topk_mask(SCORE, k, 0.1, VALID))
    np.testing.assert_array_equal(relax.topk_mask(SCORE.astype(jnp.bfloat16), 2).dtype, jnp.float32)


def test_gumbel_draws_have_their_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    draws = jax.vmap(lambda key: relax.gumbel_softmax(key, logits, hard=True))(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(draws.mean(0), [0.5, 0.3, 0.2], atol=0.03)
    pairs = jax.vmap(lambda key: relax.gumbel_topk(key, logits, 2))(jax.random.split(KEY, 4000))
    left_out = 1 - pairs  # without replacement: i last is a product of the two before it, in either order
    p = np.array([0.5, 0.3, 0.2])
    expected = [p[j] * p[k] / (1 - p[j]) + p[k] * p[j] / (1 - p[k]) for j, k in ((1, 2), (0, 2), (0, 1))]
    np.testing.assert_allclose(left_out.mean(0), expected, atol=0.03)


def test_counts_and_what_they_keep():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    np.testing.assert_allclose(
        relax.expected_count(logits, CANDIDATES), 8 * 0.1 + 6 * 0.2 + 4 * 0.3 + 2 * 0.4, rtol=1e-6
    )
    kept = relax.kept_probability(logits, CANDIDATES, 9)
    np.testing.assert_allclose(kept, [1, 1, 0.6, 0.6, 0.3, 0.3, 0.1, 0.1, 0], atol=1e-6)
    np.testing.assert_allclose(kept.sum(), relax.expected_count(logits, CANDIDATES), rtol=1e-6)
    whole = jnp.float32(100.00001)
    assert relax.ste_ceil(whole) == 101 and relax.ste_ceil(whole, 1e-4) == 100


def test_policy_softmax_without_dropped_tokens_is_softmax_and_a_dropped_one_sees_itself():
    logits = jnp.asarray(RNG.normal(size=(2, 5, 5)), jnp.float32)
    np.testing.assert_allclose(relax.policy_softmax(logits, jnp.ones((2, 5))), jax.nn.softmax(logits), atol=2e-6)
    policy = jnp.array([[1.0, 1, 0, 1, 0], [1, 0, 0, 0, 0]])
    rows = np.asarray(relax.policy_softmax(logits, policy))
    np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-5)
    alive = jax.nn.softmax(jnp.where(policy[:, None] > 0, logits, -jnp.inf))
    np.testing.assert_allclose(rows[0, [0, 1, 3]], alive[0, np.array([0, 1, 3])], atol=1e-4)
    assert rows[0, 2, 2] > 0.1 and rows[0, 2, 4] < 1e-5
    np.testing.assert_allclose(relax.policy_softmax(logits[:, :1], policy, slice(0, 1)), rows[:, :1], atol=1e-6)
    assert np.isfinite(relax.policy_softmax(logits * 1e4, jnp.zeros((2, 5)))).all()


@pytest.mark.parametrize("f", [relax.soft_topk, relax.topk_mask])
def test_temperatures_that_cannot_be(f):
    with pytest.raises(ValueError, match="temperature=0: must be above 0"):
        f(SCORE, 2, 0)
    with pytest.raises(ValueError, match=r"temperature=-1\.0"):
        relax.soft_rank(SCORE, -1.0)
    with pytest.raises(ValueError, match="temperature=nan"):
        relax.gumbel_softmax(KEY, SCORE, float("nan"))


def test_the_chord_of_a_dropped_key_is_what_keeping_it_would_change():
    logits, policy = jnp.array([[2.0, 1.0, 40.0]]), jnp.array([1.0, 1.0, 0.0])  # one key outweighs all that are kept
    rows = jnp.array([0])
    value = relax.policy_softmax(logits, policy, rows)
    np.testing.assert_array_equal(relax.policy_softmax(logits, policy, rows, chord=True), value)

    def of(chord, policy, at):
        return relax.policy_softmax(logits, policy, rows, 1e-30, chord=chord)[0, at]

    change = of(False, jnp.ones(3), 2) - of(False, policy, 2)
    slope = jax.grad(of, argnums=1)(True, policy, 2)[2]
    np.testing.assert_allclose(slope, change, rtol=1e-5)
    assert jax.grad(of, argnums=1)(False, policy, 2)[2] > 1e15
    kept = [jax.grad(of, argnums=1)(chord, policy, 0)[:2] for chord in (False, True)]
    np.testing.assert_allclose(*kept, rtol=1e-5)  # that of kept keys is the same
