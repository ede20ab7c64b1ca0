import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.train.losses import accuracy, cross_entropy

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(5, 7)).astype(np.float32) * 3
LABELS = np.array([0, 6, 3, 3, 1], np.int32)


def reference(logits, targets):
    logits = logits.astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -(targets * logp).sum(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_numbers(smoothing):
    targets = (1 - smoothing) * np.eye(7)[LABELS] + smoothing / 7
    got = cross_entropy(jnp.array(LOGITS), jnp.array(LABELS), label_smoothing=smoothing)
    assert got.dtype == jnp.float32 and got.shape == ()
    np.testing.assert_allclose(got, reference(LOGITS, targets).mean(), rtol=1e-5)
    np.testing.assert_allclose(cross_entropy(jnp.array(LOGITS), jnp.array(targets, jnp.float32)), got, rtol=1e-5)


def test_mixed_labels():
    targets = RNG.dirichlet(np.ones(7), 5).astype(np.float32)
    got = cross_entropy(jnp.array(LOGITS), jnp.array(targets))
    np.testing.assert_allclose(got, reference(LOGITS, targets).mean(), rtol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_padding_rows_change_nothing(soft):
    labels = np.eye(7, dtype=np.float32)[LABELS] if soft else LABELS
    padded = np.concatenate([LOGITS, np.full((2, 7), np.nan, np.float32)])
    filler = np.full((2, *labels.shape[1:]), -1, labels.dtype)
    padded_labels, valid = jnp.array(np.concatenate([labels, filler])), jnp.arange(7) < 5
    value, grad = jax.value_and_grad(cross_entropy)(jnp.array(padded), padded_labels, valid)
    alone, alone_grad = jax.value_and_grad(cross_entropy)(jnp.array(LOGITS), jnp.array(labels))
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    np.testing.assert_allclose(grad[:5], alone_grad, rtol=1e-6)
    assert not grad[5:].any()
    assert [float(x) for x in accuracy(jnp.array(padded), padded_labels, valid)] == [
        float(x) for x in accuracy(jnp.array(LOGITS), jnp.array(labels))
    ]


def test_no_valid_row_is_zero():
    none = jnp.zeros(5, bool)
    assert cross_entropy(jnp.array(LOGITS), jnp.array(LABELS), none) == 0
    assert [float(x) for x in accuracy(jnp.array(LOGITS), jnp.array(LABELS), none)] == [0, 0]


def test_low_precision_and_large_logits_stay_finite():
    logits = jnp.array(LOGITS, jnp.bfloat16) * 1e4
    value, grad = jax.value_and_grad(cross_entropy)(logits, jnp.array(LABELS))
    assert value.dtype == jnp.float32 and jnp.isfinite(value) and jnp.isfinite(grad).all()


def test_an_impossible_class_of_share_zero_adds_nothing():
    logits = jnp.array([[1.0, 2.0, -jnp.inf]])
    value, grad = jax.value_and_grad(cross_entropy)(logits, jnp.array([[0.5, 0.5, 0.0]]))
    np.testing.assert_allclose(value, cross_entropy(logits[:, :2], jnp.array([[0.5, 0.5]])), rtol=1e-6)
    assert jnp.isfinite(grad).all()


def test_accuracy_counts():
    logits = jnp.array([[1.0, 2.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 5.0], [9.0, 0.0, 0.0]])
    labels = jnp.array([1, 0, 0, 0], jnp.int32)
    assert [float(x) for x in accuracy(logits, labels)] == [3, 4]
    assert [float(x) for x in accuracy(logits, labels, jnp.array([True, True, True, False]))] == [2, 3]
    mixed = jnp.array([[0.3, 0.7, 0.0], [0.6, 0.4, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    assert [float(x) for x in accuracy(logits, mixed)] == [3, 4]


def test_bad_arguments_are_named():
    logits, labels = jnp.array(LOGITS), jnp.array(LABELS)
    with pytest.raises(ValueError, match=r"labels are int32 \(4,\)"):
        cross_entropy(logits, labels[:4])
    with pytest.raises(ValueError, match=r"labels are float32 \(5,\)"):
        accuracy(logits, labels.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"valid is \(4,\)"):
        cross_entropy(logits, labels, jnp.ones(4, bool))
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.0"):
        cross_entropy(logits, labels, label_smoothing=1.0)
    with pytest.raises(ValueError, match="must bring their own"):
        cross_entropy(logits, jax.nn.one_hot(labels, 7), label_smoothing=0.1)
