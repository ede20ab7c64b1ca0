import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np
import pytest

from tokjax.train.losses import (
    accuracy,
    byol_loss,
    clip_loss,
    cross_entropy,
    distillation,
    siglip_loss,
    simclr_loss,
    token_distillation,
)

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


def unit(*shape):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


IMAGE, TEXT = unit(2, 6, 8)
SAME = np.zeros((6, 6), bool)
SAME[0, 3] = SAME[3, 0] = SAME[2, 5] = SAME[5, 2] = True
VALID = np.array([True, True, False, True, True, False])


def contrast(image, text, scale, keep):
    """CLIP's loss, pair by pair."""
    logits = np.float64(scale) * image.astype(np.float64) @ text.T
    rows = [
        np.log(sum(np.exp(m[i, j]) for j in range(len(m)) if i == j or keep[i, j])) - m[i, i]
        for m in (logits, logits.T)
        for i in range(len(m))
    ]
    return np.mean(rows)


def sigmoid_sum(image, text, scale, bias, keep):
    """SigLIP's loss, pair by pair."""
    logits = np.float64(scale) * image.astype(np.float64) @ text.T + bias
    n = len(logits)
    signs = 2 * np.eye(n) - 1
    return (
        sum(np.log1p(np.exp(-signs[i, j] * logits[i, j])) for i in range(n) for j in range(n) if i == j or keep[i, j])
        / n
    )


LOSSES = {
    "clip": (lambda *a, **k: clip_loss(a[0], a[1], 20.0, *a[2:], **k), lambda i, t, k: contrast(i, t, 20, k)),
    "siglip": (
        lambda *a, **k: siglip_loss(a[0], a[1], 9.0, -3.0, *a[2:], **k),
        lambda i, t, k: sigmoid_sum(i, t, 9, -3, k),
    ),
}
both = pytest.mark.parametrize("name", LOSSES)


@both
class TestPairs:
    def test_is_the_formula(self, name):
        loss, formula = LOSSES[name]
        got = loss(jnp.array(IMAGE), jnp.array(TEXT))
        assert got.dtype == jnp.float32 and got.shape == ()
        np.testing.assert_allclose(got, formula(IMAGE, TEXT, ~np.eye(6, dtype=bool)), rtol=1e-5)
        half = loss(jnp.array(IMAGE, jnp.bfloat16), jnp.array(TEXT, jnp.bfloat16))
        assert half.dtype == jnp.float32
        np.testing.assert_allclose(half, got, rtol=0.1)

    def test_pairs_that_tell_the_same_are_no_negatives(self, name):
        loss, formula = LOSSES[name]
        got = loss(jnp.array(IMAGE), jnp.array(TEXT), same=jnp.array(SAME))
        np.testing.assert_allclose(got, formula(IMAGE, TEXT, ~SAME), rtol=1e-5)
        # A row is the same as itself: marking it must not lose the positive.
        marked = loss(jnp.array(IMAGE), jnp.array(TEXT), same=jnp.array(SAME | np.eye(6, dtype=bool)))
        np.testing.assert_array_equal(marked, got)
        everything = loss(jnp.array(IMAGE), jnp.array(TEXT), same=jnp.ones((6, 6), bool))
        np.testing.assert_allclose(everything, formula(IMAGE, TEXT, np.zeros((6, 6), bool)), rtol=1e-5, atol=1e-7)

    def test_invalid_rows_are_not_there(self, name):
        loss, formula = LOSSES[name]
        image, text = (np.where(VALID[:, None], x, np.nan) for x in (IMAGE, TEXT))
        value, grads = jax.value_and_grad(loss, (0, 1))(jnp.array(image), jnp.array(text), jnp.array(VALID))
        kept = IMAGE[VALID], TEXT[VALID]
        np.testing.assert_allclose(value, formula(*kept, np.ones((4, 4), bool)), rtol=1e-5)
        alone = jax.grad(loss, (0, 1))(*map(jnp.array, kept))
        for got, want in zip(grads, alone, strict=True):
            np.testing.assert_allclose(got[VALID], want, rtol=1e-4, atol=1e-6)
            assert not np.asarray(got)[~VALID].any()
        assert loss(jnp.array(image), jnp.array(text), jnp.zeros(6, bool)) == 0

    def test_order_does_not_matter(self, name):
        loss, _ = LOSSES[name]
        order = np.array([4, 2, 0, 5, 1, 3])
        same = jnp.array(SAME)
        args = jnp.array(IMAGE), jnp.array(TEXT), jnp.array(VALID)
        mixed = loss(*(x[order] for x in args), same=same[order][:, order])
        np.testing.assert_allclose(mixed, loss(*args, same=same), rtol=1e-5)
        swapped = loss(args[1], args[0], args[2], same=same)
        np.testing.assert_allclose(swapped, loss(*args, same=same), rtol=1e-5)

    def test_matching_pairs_are_the_minimum(self, name):
        loss, _ = LOSSES[name]
        eye = jnp.eye(6)
        assert loss(eye, eye) < loss(jnp.array(IMAGE), jnp.array(TEXT)) < loss(eye, jnp.roll(eye, 1, 0))
        grad = jax.grad(loss)(1000.0 * eye, eye[::-1])
        assert jnp.isfinite(grad).all()

    @pytest.mark.parametrize("devices", [2, 3])
    def test_a_split_batch_is_the_whole(self, name, devices):
        """Value and gradients, differentiated outside and inside of the mapped function."""
        loss, _ = LOSSES[name]
        args = jnp.array(IMAGE), jnp.array(TEXT), jnp.array(VALID), jnp.array(SAME)
        whole, grads = jax.value_and_grad(lambda i, t, v, s: loss(i, t, v, same=s), (0, 1))(*args)
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:devices])
        rows, all_ = PartitionSpec("data"), PartitionSpec()

        def split(i, t, v, s):
            return loss(i, t, v, same=s, axis_name="data")

        shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=rows)
        outside = jax.jit(jax.value_and_grad(shard(split, out_specs=all_), (0, 1)))(*args)
        inside = jax.jit(shard(jax.value_and_grad(split, (0, 1)), out_specs=(all_, rows)))(*args)
        for value, gradient in (outside, inside):
            np.testing.assert_allclose(value, whole, rtol=1e-5)
            for got, want in zip(gradient, grads, strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)

    def test_under_vmap(self, name):
        loss, _ = LOSSES[name]
        parts = [jnp.array(x).reshape(3, 2, 8) for x in (IMAGE, TEXT)]
        mapped = jax.vmap(functools.partial(loss, axis_name="data"), axis_name="data")(*parts)
        np.testing.assert_allclose(mapped, [loss(jnp.array(IMAGE), jnp.array(TEXT))] * 3, rtol=1e-5)
        batched = jax.vmap(loss)(*parts)
        np.testing.assert_allclose(batched, [loss(i, t) for i, t in zip(*parts, strict=True)], rtol=1e-5)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image": (6, 7)}, r"image is \(6, 7\) and text \(6, 8\)"),
            ({"text": (5, 8)}, r"text \(5, 8\)"),
            ({"valid": (5,)}, r"valid is \(5,\); for 6 pairs"),
            ({"same": (6, 5)}, r"same is \(6, 5\); .* must be \(6, 6\)"),
        ],
    )
    def test_shapes_that_do_not_fit(self, name, change, message):
        shapes = {"image": (6, 8), "text": (6, 8), "valid": (6,), "same": (6, 6), **change}
        image, text, valid, same = (jnp.zeros(shapes[k], bool if k in ("valid", "same") else float) for k in shapes)
        with pytest.raises(ValueError, match=message):
            LOSSES[name][0](image, text, valid, same=same)


def test_the_scale_learns():
    grads = jax.grad(lambda s, b: siglip_loss(jnp.array(IMAGE), jnp.array(TEXT), s, b), (0, 1))(10.0, -10.0)
    assert all(jnp.isfinite(g) and g != 0 for g in grads)
    assert jax.grad(lambda s: clip_loss(jnp.array(IMAGE), jnp.array(TEXT), s))(10.0) != 0


def test_distillation_is_a_divergence_over_the_valid_rows():
    rng = np.random.default_rng(0)
    ours, theirs = (jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for _ in range(2))
    p, q = (np.exp(np.asarray(x) / 2) / np.exp(np.asarray(x) / 2).sum(1, keepdims=True) for x in (theirs, ours))
    rows = 4 * (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(distillation(ours, theirs, temperature=2.0), rows.mean(), rtol=1e-5)
    valid, broken = jnp.array([True, True, False]), ours.at[2].set(jnp.nan)
    value, gradient = jax.value_and_grad(distillation)(broken, theirs, valid, 2.0)
    np.testing.assert_allclose(value, rows[:2].mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient[:2], (q - p)[:2] * 2 / 2, atol=1e-6)
    np.testing.assert_array_equal(gradient[2], 0)
    assert distillation(ours, theirs, jnp.zeros(3, bool)) == 0
    assert not np.any(jax.grad(distillation, 1)(ours, theirs))
    np.testing.assert_allclose(distillation(ours, ours), 0, atol=1e-7)
    with pytest.raises(ValueError, match=r"temperature is 0; it must be above 0"):
        distillation(ours, theirs, temperature=0)


def test_token_distillation_counts_the_kept_tokens_of_the_valid_rows():
    rng = np.random.default_rng(1)
    ours, theirs = (jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32) for _ in range(2))
    kept = jnp.array([[1.0, 0, 1], [0, 1, 1]])
    apart = np.square(np.asarray(ours - theirs)).mean(-1)
    expected = (apart * kept).sum() / 4
    np.testing.assert_allclose(token_distillation(ours.at[0, 1].set(jnp.nan), theirs, kept), expected, rtol=1e-5)
    only = token_distillation(ours, theirs, kept, jnp.array([False, True]))
    np.testing.assert_allclose(only, apart[1, 1:].mean(), rtol=1e-5)
    assert token_distillation(ours, theirs, jnp.zeros((2, 3))) == 0
    with pytest.raises(ValueError, match=r"kept is \(2, 4\); for these features it must be \(2, 3\)"):
        token_distillation(ours, theirs, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"features are \(2, 3, 4\) and teacher \(2, 2, 4\)"):
        token_distillation(ours, theirs[:, :2], kept)


FIRST, SECOND = RNG.normal(size=(2, 6, 8)).astype(np.float32) * 3


def length_one(*views):
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.float64(view) for view in views)]


def test_simclr_is_the_formula():
    got = simclr_loss(jnp.array(FIRST), jnp.array(SECOND), 0.2)
    both_views, n = np.concatenate(length_one(FIRST, SECOND)), len(FIRST)
    logits = both_views @ both_views.T / 0.2
    np.fill_diagonal(logits, -np.inf)
    positive = np.roll(np.arange(2 * n), n)
    want = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(2 * n), positive])
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(simclr_loss(jnp.array(SECOND), jnp.array(FIRST) * 2, 0.2), want, rtol=1e-5)


def test_byol_is_the_formula_and_leaves_its_target_alone():
    value, grads = jax.value_and_grad(byol_loss, (0, 1))(jnp.array(FIRST), jnp.array(SECOND))
    one, two = length_one(FIRST, SECOND)
    np.testing.assert_allclose(value, np.mean(2 - 2 * (one * two).sum(1)), rtol=1e-5)
    assert np.abs(grads[0]).max() > 0 and not np.asarray(grads[1]).any()


SELF_SUPERVISED = {"simclr": lambda a, b, v=None, **k: simclr_loss(a, b, 0.3, v, **k), "byol": byol_loss}


@pytest.mark.parametrize("name", SELF_SUPERVISED)
class TestSelfSupervised:
    def test_gradients_are_those_of_finite_differences(self, name):
        loss, way = SELF_SUPERVISED[name], RNG.normal(size=FIRST.shape).astype(np.float32)
        slope = (jax.grad(loss)(jnp.array(FIRST), jnp.array(SECOND)) * way).sum()
        ahead, back = (loss(jnp.array(FIRST + step * way), jnp.array(SECOND)) for step in (1e-2, -1e-2))
        np.testing.assert_allclose(slope, (ahead - back) / 2e-2, rtol=1e-2, atol=1e-4)

    def test_invalid_rows_are_not_there(self, name):
        loss, holed = SELF_SUPERVISED[name], [np.where(VALID[:, None], x, np.nan) for x in (FIRST, SECOND)]
        value, grad = jax.value_and_grad(loss)(*map(jnp.array, holed), jnp.array(VALID))
        want, alone = jax.value_and_grad(loss)(jnp.array(FIRST[VALID]), jnp.array(SECOND[VALID]))
        np.testing.assert_allclose(value, want, rtol=1e-5)
        np.testing.assert_allclose(grad[VALID], alone, rtol=1e-4, atol=1e-6)
        assert not np.asarray(grad)[~VALID].any()
        assert loss(*map(jnp.array, holed), jnp.zeros(6, bool)) == 0

    def test_a_split_batch_is_the_whole(self, name):
        loss, args = SELF_SUPERVISED[name], (jnp.array(FIRST), jnp.array(SECOND), jnp.array(VALID))
        whole, grad = jax.value_and_grad(loss)(*args)
        mesh = jax.make_mesh((3,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:3])
        rows = PartitionSpec("data")
        split = jax.shard_map(
            lambda *parts: loss(*parts, axis_name="data"), mesh=mesh, in_specs=rows, out_specs=PartitionSpec()
        )
        value, got = jax.jit(jax.value_and_grad(split))(*args)
        np.testing.assert_allclose(value, whole, rtol=1e-5)
        np.testing.assert_allclose(got, grad, rtol=1e-4, atol=1e-6)

    def test_zero_and_equal_rows_stay_finite(self, name):
        loss = SELF_SUPERVISED[name]
        for row in (jnp.zeros((3, 4)), jnp.ones((3, 4)) * 1e15):
            value, grad = jax.value_and_grad(loss)(row, row)
            assert jnp.isfinite(value) and jnp.isfinite(grad).all()


def test_a_temperature_is_positive():
    with pytest.raises(ValueError, match="temperature is 0; it must be above 0"):
        simclr_loss(jnp.array(FIRST), jnp.array(SECOND), 0)
