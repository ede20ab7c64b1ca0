"""What travels with the features: masks that stay finite, and tokens put behind each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models import layers
from tokjax.signals import AttentionRule, Signals
from tokjax.tokens import MASKED, Tokens, concat


def some(length, seed=0, **fields):
    return Tokens(jnp.asarray(np.random.default_rng(seed).normal(size=(2, length, 3)), jnp.float32), **fields)


def test_untracked_fields_have_neutral_values():
    tokens = some(4)
    assert tokens.batch == 2
    assert tokens.length == 4
    np.testing.assert_array_equal(tokens.count(), [4, 4])
    np.testing.assert_array_equal(tokens.sizes(), np.ones((2, 4)))
    assert tokens.attention_bias() is None


def test_count_is_that_of_valid_tokens():
    valid = jnp.array([[True, False, True, True], [False] * 4])
    count = some(4, valid=valid).count()
    assert count.dtype == jnp.int32
    np.testing.assert_array_equal(count, [3, 0])


def test_bias_is_log_size_plus_gates_plus_mask():
    tokens = some(
        3,
        size=jnp.array([[1.0, 2.0, 4.0], [3.0, 1.0, 1.0]]),
        key_bias=jnp.array([[0.0, -1.0, 0.5], [0.0, 0.0, 0.0]]),
        valid=jnp.array([[True, True, True], [True, False, True]]),
    )
    bias = np.asarray(tokens.attention_bias())
    np.testing.assert_allclose(bias[0], [0, np.log(2) - 1, np.log(4) + 0.5], rtol=1e-6)
    np.testing.assert_allclose(bias[1, [0, 2]], np.log([3, 1]), rtol=1e-6)
    assert bias[1, 1] == MASKED
    gates_only = tokens.replace(proportional=False, valid=None).attention_bias()
    np.testing.assert_array_equal(gates_only, tokens.key_bias)


def test_empty_slots_are_masked_with_a_finite_value_and_gradient():
    size = jnp.array([[2.0, 0.0], [0.0, 0.0]])
    bias = some(2, size=size).attention_bias()
    np.testing.assert_allclose(bias, [[np.log(2), MASKED], [MASKED, MASKED]], rtol=1e-6)
    gradient = jax.grad(lambda size: jnp.exp(some(2, size=size).attention_bias()).sum())(size)
    np.testing.assert_allclose(gradient, [[1, 0], [0, 0]], atol=1e-6)


@pytest.mark.parametrize("normaliser", ["softmax", "softmax1"])
def test_a_row_without_valid_keys_gives_no_nan(normaliser):
    tokens = some(5, valid=jnp.array([[True] * 5, [False] * 5]), size=jnp.ones((2, 5)).at[:, 1].set(0))

    def out(tokens):
        heads, bias = tokens.x[:, :, None], tokens.attention_bias()[:, None, None]
        return layers.attention(Signals(heads, heads, heads, bias, rule=AttentionRule(normaliser=normaliser)))

    y, pull = jax.vjp(lambda x, size: out(tokens.replace(x=x, size=size)), tokens.x, tokens.size)
    assert np.isfinite(y).all()
    for gradient in pull(jnp.ones_like(y)):
        assert np.isfinite(gradient).all()
    np.testing.assert_allclose(y[:1], out(jax.tree.map(lambda field: field[:1], tokens)), atol=1e-6)


def test_concat_fills_what_one_side_lacks():
    a = some(3, size=jnp.full((2, 3), 2.0), kind=jnp.ones((2, 3), jnp.int32), prefix=1, carry={"kept": 7})
    b = some(2, 1, valid=jnp.zeros((2, 2), bool), position=jnp.ones((2, 2, 2), jnp.int32))
    both = concat(a, b)
    np.testing.assert_array_equal(both.x, np.concatenate([a.x, b.x], 1))
    np.testing.assert_array_equal(both.size, [[2, 2, 2, 1, 1]] * 2)
    np.testing.assert_array_equal(both.kind, [[1, 1, 1, 0, 0]] * 2)
    np.testing.assert_array_equal(both.valid, [[True, True, True, False, False]] * 2)
    np.testing.assert_array_equal(both.position[0, :, 0], [-1, -1, -1, 1, 1])
    assert both.key_bias is None
    assert both.origin is None
    assert both.prefix == 1
    assert both.carry == {"kept": 7}


def test_concat_keeps_track_of_where_tokens_went():
    dropped = 3
    a = some(3, origin=jnp.array([[0, dropped, 2, dropped, 1]] * 2))
    without = concat(a, some(2, 1)).origin
    np.testing.assert_array_equal(without, [[0, 5, 2, 5, 1]] * 2)  # dropped tokens have the new N
    restored = concat(a, some(2, 1, origin=jnp.array([[2, 0, 2, 2, 2]] * 2))).origin  # token 1 lives on in b
    np.testing.assert_array_equal(restored, [[0, 3, 2, 5, 1]] * 2)


def test_traced_tokens_start_where_they_are():
    np.testing.assert_array_equal(some(4).traced().origin, [[0, 1, 2, 3]] * 2)
