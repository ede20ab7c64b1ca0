"""Scores that reducers read, against maps written out with numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.signals import (
    AttentionRule,
    Context,
    Signals,
    attention_rows,
    cls_attention,
    column_mean,
    column_sum,
    importance,
    last_row,
    last_slots,
    logits,
    mean_key,
    select,
)
from tokjax.tokens import MASKED, Tokens

B, N, H, K, D = 2, 7, 4, 2, 3
SCALE = D**-0.5


def made(seed=0, n=N, groups=H, **fields):
    rng = np.random.default_rng(seed)
    query, key, value = (jnp.asarray(rng.normal(size=(B, n, h, D)), jnp.float32) for h in (H, groups, groups))
    rule = fields.pop("rule", AttentionRule(SCALE))
    return Signals(query, key, value, rule=rule, **fields)


def written_out(signals, policy=None):
    """The attention map in float64, one step of the definition at a time."""
    rule = signals.rule
    query, key = np.asarray(signals.query, np.float64), np.asarray(signals.key, np.float64)
    key = np.repeat(key, query.shape[2] // key.shape[2], 2)
    n = key.shape[1]
    l = np.einsum("bqhd,bnhd->bhqn", query, key) * rule.scale
    if rule.soft_cap is not None:
        l = rule.soft_cap * np.tanh(l / rule.soft_cap)
    if signals.bias is not None:
        l = l + np.asarray(signals.bias, np.float64)
    if signals.pair_bias is not None:
        l = l + np.asarray(signals.pair_bias(slice(None)), np.float64)
    if rule.causal:
        l = np.where(np.tri(n, dtype=bool), l, -np.inf)
    e = np.exp(l)
    if rule.normaliser == "softmax1":
        return e / (1 + e.sum(-1, keepdims=True))
    if rule.normaliser == "policy":
        e = np.exp(l - l.max(-1, keepdims=True))
        policy = np.asarray(signals.policy)[:, None, None]
        e = e * (policy + (1 - policy) * np.eye(n))
        return (e + 1e-6 / n) / (e.sum(-1, keepdims=True) + 1e-6)
    return e / e.sum(-1, keepdims=True)


def table(queries):
    """A pair bias for the chosen rows only."""
    return select(jnp.asarray(np.random.default_rng(9).normal(size=(1, H, N, N)), jnp.float32), queries, 2)


KEYS = jnp.asarray(np.random.default_rng(5).normal(size=(B, 1, 1, N)), jnp.float32)
FULL = jnp.asarray(np.random.default_rng(6).normal(size=(B, H, N, N)), jnp.float32)
POLICY = jnp.asarray(np.random.default_rng(7).integers(0, 2, (B, N)), jnp.float32)
VARIANTS = {
    "softmax": {},
    "key bias": {"bias": KEYS},
    "full bias": {"bias": FULL},
    "pair bias": {"bias": KEYS, "pair_bias": table},
    "soft cap": {"bias": KEYS, "rule": AttentionRule(SCALE, soft_cap=0.8)},
    "causal": {"bias": KEYS, "rule": AttentionRule(SCALE, causal=True)},
    "softmax1": {"bias": KEYS, "rule": AttentionRule(SCALE, "softmax1")},
    "causal softmax1": {"rule": AttentionRule(SCALE, "softmax1", causal=True)},
    "policy": {"policy": POLICY, "rule": AttentionRule(SCALE, "policy")},
    "grouped heads": {"groups": K, "bias": FULL, "rule": AttentionRule(SCALE, soft_cap=0.8, causal=True)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_those_of_the_map(variant):
    signals = made(**VARIANTS[variant])
    full = written_out(signals)
    for queries in (slice(None), slice(0, 1), slice(2, 6), jnp.array([5, 0, 3])):
        rows = jax.jit(lambda s, queries=queries: attention_rows(s, queries))(signals)
        assert rows.dtype == jnp.float32
        np.testing.assert_allclose(rows, full[:, :, queries], atol=1e-6)
    own = jnp.array([[5, 0, 3], [1, 6, 6]])  # of every row its own
    rows = jax.jit(attention_rows)(signals, own)
    np.testing.assert_allclose(rows, [f[:, q] for f, q in zip(full, np.asarray(own), strict=True)], atol=1e-6)


@pytest.mark.parametrize("variant", ["key bias", "soft cap", "causal", "softmax1"])
def test_rows_from_the_log_sum_exp(variant):
    signals = made(**VARIANTS[variant])
    lse = jax.nn.logsumexp(logits(signals), -1)
    if signals.rule.normaliser == "softmax1":
        lse = jnp.logaddexp(lse, 0)
    signals = signals.replace(lse=jnp.moveaxis(lse, 1, 2))
    for queries in (slice(None), slice(0, 1), jnp.array([6, 2])):
        np.testing.assert_allclose(attention_rows(signals, queries), written_out(signals)[:, :, queries], atol=1e-6)


def test_given_weights_win():
    weights = jnp.asarray(np.random.default_rng(1).uniform(size=(B, H, N, N)), jnp.bfloat16)
    signals = made().replace(weights=weights)
    rows = attention_rows(signals, slice(1, 3))
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows, weights[:, :, 1:3].astype(jnp.float32))


def test_large_logits_do_not_overflow():
    for normaliser in ("softmax", "softmax1", "policy"):
        signals = made(policy=POLICY, rule=AttentionRule(1e4, normaliser))
        rows, pull = jax.vjp(lambda q, signals=signals: attention_rows(signals.replace(query=q)), signals.query)
        assert np.isfinite(rows).all()
        assert np.isfinite(pull(jnp.ones_like(rows))[0]).all()


def test_cls_attention_is_the_mean_over_heads_of_row_0():
    signals = made(bias=KEYS)
    np.testing.assert_allclose(cls_attention(signals), written_out(signals).mean(1)[:, 0], atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("block", [2, 3, 7, 128])
def test_column_mean_in_blocks_is_that_of_the_map(variant, block):
    signals = made(**VARIANTS[variant])
    full = written_out(signals).mean(1)
    valid = jnp.array([[True] * 5 + [False] * 2, [False, True, True, False, True, True, True]])
    every, some = jax.jit(lambda s: (column_mean(s, block=block), column_mean(s, valid, block)))(signals)
    np.testing.assert_allclose(every, full.mean(1), atol=1e-6)
    expected = [row[np.asarray(v)].mean(0) for row, v in zip(full, valid, strict=True)]
    np.testing.assert_allclose(some, expected, atol=1e-6)


def test_column_sum_is_by_head():
    signals = made(**VARIANTS["grouped heads"])
    np.testing.assert_allclose(column_sum(signals, block=3), written_out(signals).sum(2), atol=3e-6)


def test_column_mean_of_given_weights_needs_nothing_else():
    weights = jnp.asarray(written_out(made()), jnp.float32)
    np.testing.assert_allclose(column_mean(Signals(weights=weights)), weights.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(column_mean(Signals(weights=weights), block=2), weights.mean((1, 2)), atol=1e-6)


def test_column_mean_of_a_row_without_valid_tokens_is_zero():
    np.testing.assert_array_equal(column_mean(made(), jnp.zeros((B, N), bool)), np.zeros((B, N)))


def test_the_last_tokens_of_rows_whose_order_is_their_own():
    valid = jnp.array([[True] * 5 + [False] * 2, [False] * 5 + [True] * 2])
    order = jnp.array([[4, 0, 2, 3, 1, 9, 9], [0, 1, 2, 3, 4, 6, 5]])
    tokens = Tokens(jnp.zeros((B, N, 1)), valid=valid, order=order)
    slots = np.asarray(last_slots(tokens, 3))
    assert slots[0].tolist() == [2, 3, 0] and slots[1, 1:].tolist() == [6, 5] and not valid[1, slots[1, 0]]
    signals = made(bias=tokens.attention_bias()[:, None, None])
    full = written_out(signals)
    np.testing.assert_allclose(last_row(tokens, signals), [full[0, :, 0], full[1, :, 5]], atol=1e-6)
    np.testing.assert_array_equal(last_slots(Tokens(jnp.zeros((1, 4, 1))), 9), [[0, 1, 2, 3]])


def test_importance_is_the_cls_row_or_what_is_received_without_gradient():
    signals = made(bias=KEYS)
    x = jnp.zeros((B, N, 1))
    np.testing.assert_array_equal(importance(Tokens(x, prefix=1), signals), cls_attention(signals))
    np.testing.assert_array_equal(importance(Tokens(x), signals), column_mean(signals))
    for prefix in (0, 1):
        gradient = jax.grad(
            lambda q, prefix=prefix: (importance(Tokens(x, prefix=prefix), signals.replace(query=q)) ** 2).sum()
        )(signals.query)
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_padding_gets_no_attention():
    valid = jnp.arange(N)[None] < jnp.array([[N], [4]])
    bias = Tokens(jnp.zeros((B, N, 1)), valid=valid).attention_bias()[:, None, None]
    assert (bias.dtype, bias.weak_type, bias.min()) == (jnp.float32, False, jnp.float32(MASKED))
    signals = made(bias=bias)
    alone = made().replace(**{name: getattr(made(), name)[1:, :4] for name in ("query", "key", "value")})
    np.testing.assert_allclose(cls_attention(signals)[1, :4], cls_attention(alone)[0], atol=1e-6)
    received = column_mean(signals, valid, 3)
    np.testing.assert_allclose(received[1, :4], column_mean(alone)[0], atol=1e-6)
    np.testing.assert_array_equal(received[1, 4:], 0)


def test_mean_key_is_in_float32_and_without_gradient():
    signals = made(groups=K)
    half = signals.replace(key=signals.key.astype(jnp.bfloat16))
    assert mean_key(half).dtype == jnp.float32
    np.testing.assert_allclose(mean_key(signals), np.asarray(signals.key).mean(2), atol=1e-6)
    gradient = jax.grad(lambda k: (mean_key(signals.replace(key=k)) ** 2).sum())(signals.key)
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_what_a_site_lacks_is_named():
    with pytest.raises(ValueError, match=r"signals.key=None: this reducer needs it"):
        mean_key(Signals())
    with pytest.raises(ValueError, match=r"signals.policy=None"):
        attention_rows(made(rule=AttentionRule(SCALE, "policy")))


def test_keys_of_a_row_do_not_depend_on_the_batch():
    context = Context(key=jax.random.key(3))
    data = jax.random.key_data(context.row_keys(5, 2))
    np.testing.assert_array_equal(jax.random.key_data(context.row_keys(3, 2)), data[:3])
    assert len(np.unique(data, axis=0)) == 5
    assert not np.array_equal(jax.random.key_data(context.row_keys(5, 1)), data)  # another layer draws anew
    keys = jax.random.split(jax.random.key(4), 5)
    own = jax.random.key_data(Context(key=keys).row_keys(5, 0))
    np.testing.assert_array_equal(jax.random.key_data(Context(key=keys[3:]).row_keys(2, 0)), own[3:])


def test_without_a_key_the_seed_serves():
    first, again, other = (jax.random.key_data(Context().row_keys(2, 0, seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
