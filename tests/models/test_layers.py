"""Shared layers: the fused attention against the rows that reducers see, pooling with padding, stacking."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models import layers
from tokjax.signals import AttentionRule, Signals, attention_rows
from tokjax.tokens import MASKED, Tokens

B, N, H, K, D = 2, 9, 4, 2, 8
SCALE = D**-0.5


def made(seed=0, n=N, groups=H, dtype=jnp.float32, **fields):
    rng = np.random.default_rng(seed)
    query, key, value = (jnp.asarray(rng.normal(size=(B, n, h, D)), dtype) for h in (H, groups, groups))
    return Signals(query, key, value, rule=fields.pop("rule", AttentionRule(SCALE)), **fields)


def from_rows(signals):
    value = np.repeat(np.asarray(signals.value, np.float64), H // signals.value.shape[2], 2)
    return np.einsum("bhqn,bnhd->bqhd", np.asarray(attention_rows(signals), np.float64), value)


def pairs(queries):
    return jnp.asarray(np.random.default_rng(9).normal(size=(1, H, N, N)), jnp.float32)[:, :, queries]


BIAS = jnp.asarray(np.random.default_rng(5).normal(size=(B, 1, 1, N)), jnp.float32)
POLICY = jnp.asarray(np.random.default_rng(7).integers(0, 2, (B, N)), jnp.float32)
WEIGHTS = jax.nn.softmax(jnp.asarray(np.random.default_rng(8).normal(size=(B, H, N, N)), jnp.float32))
VARIANTS = {
    "softmax": {},
    "key bias": {"bias": BIAS},
    "pair bias": {"pair_bias": pairs},
    "both biases": {"bias": BIAS, "pair_bias": pairs},
    "soft cap": {"bias": BIAS, "rule": AttentionRule(SCALE, soft_cap=0.8)},
    "causal": {"bias": BIAS, "rule": AttentionRule(SCALE, causal=True)},
    "softmax1": {"rule": AttentionRule(SCALE, "softmax1")},
    "softmax1 with bias": {"bias": BIAS, "pair_bias": pairs, "rule": AttentionRule(SCALE, "softmax1")},
    "causal softmax1": {"rule": AttentionRule(SCALE, "softmax1", causal=True)},
    "causal softmax1 with bias": {"bias": BIAS, "rule": AttentionRule(SCALE, "softmax1", causal=True)},
    "policy": {"policy": POLICY, "rule": AttentionRule(SCALE, "policy")},
    "weights": {"weights": WEIGHTS},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("groups", [H, K])
def test_attention_obeys_the_same_rule_as_its_rows(variant, groups):
    signals = made(groups=groups, **VARIANTS[variant])
    out = jax.jit(layers.attention)(signals)
    assert out.shape == (B, N, H, D)
    np.testing.assert_allclose(out, from_rows(signals), atol=2e-6)


def test_attention_of_bf16_is_near_and_stays_bf16():
    for variant in ("both biases", "soft cap", "causal softmax1", "policy"):
        half = made(dtype=jnp.bfloat16, groups=K, **VARIANTS[variant])
        out = layers.attention(half)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), from_rows(half), atol=0.02)


@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 2e-6), (jnp.bfloat16, 0.02), (jnp.float16, 3e-3)])
def test_a_bias_rides_as_columns(dtype, atol):
    sizes = jnp.asarray(np.random.default_rng(1).integers(1, 200, (B, N)), jnp.float32)
    valid = jnp.ones((B, N), bool).at[1, 5:].set(False)
    bias = Tokens(jnp.zeros((B, N, 1)), size=sizes, valid=valid).attention_bias()
    signals = made(dtype=dtype, groups=K, bias=bias[:, None, None])
    query, key, value = layers.bias_as_columns(signals.query, signals.key, signals.value, bias, SCALE)
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] == D + 8
    assert all(np.isfinite(x.astype(jnp.float32)).all() for x in (query, key, value))
    out = jax.nn.dot_product_attention(query, key, value, scale=SCALE)
    np.testing.assert_array_equal(out[..., D:].astype(jnp.float32), 0)
    np.testing.assert_allclose(out[..., :D].astype(jnp.float32), from_rows(signals), atol=atol)


def test_columns_of_a_fully_masked_row_stay_finite():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        signals = made(dtype=dtype)
        bias = jnp.full((B, N), 2 * MASKED)
        columns = layers.bias_as_columns(signals.query, signals.key, signals.value, bias, SCALE)
        out = jax.nn.dot_product_attention(*columns, scale=SCALE)
        assert np.isfinite(out.astype(jnp.float32)).all()


def test_gradients_agree_with_those_through_the_rows():
    signals = made(bias=BIAS)

    def fused(q, k, v, bias):
        return (layers.attention(signals.replace(query=q, key=k, value=v, bias=bias)) ** 2).sum()

    def by_rows(q, k, v, bias):
        rows = attention_rows(signals.replace(query=q, key=k, value=v, bias=bias))
        return (jnp.einsum("bhqn,bnhd->bqhd", rows, v) ** 2).sum()

    inputs = signals.query, signals.key, signals.value, BIAS
    for ours, theirs in zip(
        jax.grad(fused, (0, 1, 2, 3))(*inputs), jax.grad(by_rows, (0, 1, 2, 3))(*inputs), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


# Pooling.


def pooled(how, **fields):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)), jnp.float32)
    return np.asarray(x), np.asarray(layers.pool(Tokens(x, **fields), how))


SIZE = jnp.array([[1.0, 2, 3, 1, 5, 1], [1, 1, 1, 4, 2, 9]])
VALID = jnp.array([[True] * 6, [True, True, True, True, False, False]])


def test_pooling():
    x, out = pooled("cls", size=SIZE, prefix=1)
    np.testing.assert_array_equal(out, x[:, 0])
    x, out = pooled("mean", size=SIZE, prefix=2)
    np.testing.assert_allclose(out, x[:, 2:].mean(1), atol=1e-6)
    x, out = pooled("size_mean", size=SIZE, prefix=1)
    weights = np.asarray(SIZE)[:, 1:, None]
    np.testing.assert_allclose(out, (x[:, 1:] * weights).sum(1) / weights.sum(1), atol=1e-6)
    x, out = pooled("size_mean", prefix=1)
    np.testing.assert_allclose(out, x[:, 1:].mean(1), atol=1e-6)


def test_cls_and_mean_side_by_side():
    x, out = pooled("cls_mean", size=SIZE, valid=VALID, prefix=3)  # CLS and two registers
    assert out.shape == (2, 6)
    np.testing.assert_array_equal(out[:, :3], x[:, 0])
    np.testing.assert_array_equal(out[:, 3:], pooled("size_mean", size=SIZE, valid=VALID, prefix=3)[1])
    np.testing.assert_allclose(out[1, 3:], x[1, 3], atol=1e-6)  # the only patch that is no padding


@pytest.mark.parametrize("how", ["mean", "size_mean"])
def test_pooling_leaves_padding_out(how):
    x, out = pooled(how, size=SIZE, valid=VALID, prefix=1)
    alone = layers.pool(Tokens(jnp.asarray(x[1:, :4]), size=SIZE[1:, :4], prefix=1), how)
    np.testing.assert_allclose(out[1:], alone, atol=1e-6)
    _, nothing = pooled(how, size=SIZE, valid=VALID.at[1, 1:].set(False), prefix=1)
    np.testing.assert_array_equal(nothing[1], 0)


def test_pooling_of_merged_tokens_is_that_of_their_parts():
    x = np.random.default_rng(0).normal(size=(1, 5, 3)).astype(np.float32)
    merged = np.concatenate([x[:, :1], x[:, 1:3].mean(1, keepdims=True), x[:, 3:]], 1)
    tokens = Tokens(jnp.asarray(merged), size=jnp.array([[1.0, 2, 1, 1]]), prefix=1)
    np.testing.assert_allclose(layers.pool(tokens, "size_mean"), x[:, 1:].mean(1), atol=1e-6)


# The rest.


def test_drop_path_drops_whole_rows_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    out = np.asarray(layers.drop_path(x, 0.25, jax.random.key(0)))
    rows = out.reshape(len(out), -1)
    assert set(np.unique(rows.std(1))) == {0.0}
    kept = rows[:, 0] > 0
    np.testing.assert_allclose(rows[kept], 1 / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 4 * (0.25 * 0.75 / len(kept)) ** 0.5
    np.testing.assert_array_equal(layers.drop_path(x, 0.25, None), x)
    np.testing.assert_array_equal(layers.drop_path(x, 0.0, jax.random.key(0)), x)


def test_drop_path_with_a_key_a_row_does_not_depend_on_the_batch():
    x, keys = jnp.ones((64, 2, 3)), jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(64))
    out = layers.drop_path(x, 0.5, keys)
    np.testing.assert_array_equal(layers.drop_path(x[:8], 0.5, keys[16:24]), out[16:24])
    assert 0.2 < (out[:, 0, 0] == 0).mean() < 0.8


def test_activations():
    x = np.linspace(-4, 4, 9)
    phi = np.array([0.5 * (1 + math.erf(v / 2**0.5)) for v in x])
    np.testing.assert_allclose(layers.ACTIVATIONS["exact"](jnp.asarray(x)), x * phi, atol=1e-6)
    np.testing.assert_allclose(layers.ACTIVATIONS["quick"](jnp.asarray(x)), x / (1 + np.exp(-1.702 * x)), atol=1e-6)
    cube = np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))
    np.testing.assert_allclose(layers.ACTIVATIONS["tanh"](jnp.asarray(x)), 0.5 * x * (1 + cube), atol=1e-6)


def test_layer_norm_is_exact_far_from_zero():
    norm = layers.layer_norm(64, 1e-6, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 1, 64)) + 1000
    expected = (x - x.mean()) / x.std()
    out = norm(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(out, expected, atol=5e-3)  # a one-pass variance is off by whole units here
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32


def test_stack_and_unstack():
    trees = {i: {"kernel": jnp.full((2, 3), i), "bias": jnp.full((3,), -i)} for i in range(4)}
    stacked = layers.stack(trees)
    assert stacked["kernel"].shape == (4, 2, 3)
    back = layers.unstack(stacked)
    assert list(back) == [0, 1, 2, 3]
    jax.tree.map(np.testing.assert_array_equal, back, trees)


@pytest.mark.parametrize("causal", [False, True])
def test_long_attention_on_a_cpu_gives_the_same_numbers(causal):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(1, 512, 2, 4)), jnp.float32) for _ in range(3))
    bias = jnp.asarray(rng.normal(size=(1, 1, 1, 512)), jnp.float32)
    options = {"bias": bias, "scale": 0.7, "is_causal": causal}
    want = jax.nn.dot_product_attention(query, key, value, **options)
    np.testing.assert_allclose(jax.jit(lambda *x: layers.fused(*x, **options))(query, key, value), want, atol=1e-6)
