from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tokjax.hooks import ModelInfo
from tokjax.reducers import create
from tokjax.reducers.llm import byte_baselines as baselines
from tokjax.signals import Context, Signals
from tokjax.token_map import SoftMap, apply
from tokjax.tokens import Tokens

WIDTH, N = 8, 12
INFO = ModelInfo(depth=4, width=WIDTH, heads=2, length=N)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, N, WIDTH)).astype(np.float32)
COUNTS = np.array([12, 9, 0])
VALID = np.arange(N) < COUNTS[:, None]
PLACE = np.tile(np.arange(N, dtype=np.int32), (3, 1))
PADDED = Tokens(X, position=PLACE, valid=VALID)
KEYED = Signals(context=Context(key=jax.random.key(3)))


def text(*rows):
    """Ids of ASCII texts, padded with zeros."""
    width = max(map(len, rows))
    return np.array([[ord(c) + 3 for c in row] + [0] * (width - len(row)) for row in rows], np.int32)


def places(plan, tokens=PADDED):
    out = apply(plan, tokens)
    return [np.asarray(p[v]).tolist() for p, v in zip(out.position, out.valid, strict=True)]


# Random


def test_the_number_that_goes_is_drawn_for_every_row():
    rows, n = 400, 50
    tokens = Tokens(
        np.zeros((rows, n, 1), np.float32), valid=np.arange(n) < np.where(np.arange(rows) % 2, 50, 20)[:, None]
    )
    aux = baselines.ByteRandom(rate=0.4).soften(tokens, KEYED).aux
    share = np.asarray(aux["deleted"]) / np.asarray(aux["tokens"])
    for own in (share[::2], share[1::2]):
        assert 0.36 < own.mean() < 0.41 and 0.03 < own.std() < 0.07  # rounded down
    assert np.unique(np.asarray(aux["gate"])).tolist() == [-30, 0]


def test_without_spread_it_is_int_of_the_rate():
    gone = baselines.ByteRandom(rate=0.3, spread=0.0).soften(PADDED, KEYED).aux["deleted"]
    assert gone.tolist() == [3, 2, 0]


def test_soft_and_hard_draw_the_same():
    plan = baselines.ByteRandom(rate=0.3, capacity=N)
    gate = np.asarray(plan.soften(PADDED, KEYED).key_bias)
    expected = [[i for i in range(n) if gate[row, i] == 0] for row, n in enumerate(COUNTS)]
    assert places(plan.plan(PADDED, KEYED)) == expected


def test_capacity_has_room_for_most_draws():
    assert baselines.ByteRandom(rate=0.5).slots(1000) == 650
    assert baselines.ByteRandom(rate=0.0).slots(10) == 10 and baselines.ByteRandom(rate=0.99, spread=0.0).slots(10) == 1


# Fixed


def test_the_ends_of_words_go():
    words = text("the cat, purring")
    stays = baselines.ByteFixed(amount=0.5).of_ids(jnp.asarray(words), jnp.asarray(words > 0))
    # the|_cat|,|_purring: segments of 3, 4, 1 and 8
    assert "".join(c for c, s in zip("the cat, purring", stays[0], strict=True) if s) == "th c, pur"


def test_a_row_does_not_count_its_neighbours():
    ids = text("ab cdef", "a bc", "")
    kept = baselines.ByteFixed(amount=0.5).of_ids(jnp.asarray(ids), jnp.asarray(ids > 0))
    alone = [
        baselines.ByteFixed(amount=0.5).of_ids(jnp.asarray(r), jnp.ones(r.shape, bool)) for r in (ids[:1], ids[1:2, :4])
    ]
    np.testing.assert_array_equal(kept[0], alone[0][0])
    np.testing.assert_array_equal(kept[1], np.append(alone[1][0], [False] * 3))
    assert not kept[2].any()


def test_ids_are_found_by_position():
    """After other reducers, tokens are fewer and in another order."""
    ids = text("ab cd efgh i", "a b c d e", "")
    moved = Tokens(X[:, :4], position=PLACE[:, 6:10], valid=np.ones((3, 4), bool))
    plan = baselines.ByteFixed(amount=0.5).plan(moved, Signals(context=Context(ids=jnp.asarray(ids))))
    assert places(plan, moved)[0] == [6, 7]  # "efgh"


def test_without_ids_nothing_goes():
    assert baselines.ByteFixed().plan(PADDED, Signals()) is None


# Boundaries


def pooled(**settings):
    reducer = create("boundary_pooling", INFO, **{"hidden": 16, **settings})
    return reducer.plan(PADDED, KEYED)


def test_segments_are_means_at_the_place_of_their_first_token():
    ends = np.zeros((1, 6), np.float32)
    ends[0, [1, 4]] = 1
    valid = np.array([[1, 1, 1, 1, 1, 0]], bool)
    ends = np.asarray(baselines.boundaries(jnp.asarray(ends), jnp.asarray(valid)))
    assert ends[0].tolist() == [0, 1, 0, 0, 1, 0]
    weights = np.asarray(baselines.segment_weights(jnp.asarray(ends), jnp.asarray(valid), 3))
    third = 1 / 3
    np.testing.assert_allclose(weights[0, :2], [[0.5, 0.5, 0, 0, 0, 0], [0, 0, third, third, third, 0]], rtol=1e-6)
    assert (weights[0, 2] == 0).all()


def test_both_forms_have_the_same_values():
    """Pooling by a matrix, through which the predictor learns, and by adding up."""
    hard, soft = pooled(), pooled(soft=True)
    assert isinstance(soft.map, SoftMap)
    a, b = apply(hard, PADDED), apply(soft, PADDED)
    np.testing.assert_array_equal(a.valid, b.valid)
    np.testing.assert_array_equal(a.position, b.position)
    np.testing.assert_allclose(a.x, b.x, atol=1e-6)
    assert hard.aux["segments"].tolist() == a.count().tolist() and "loss/boundary" not in hard.aux
    assert 1 < a.count()[0] < N and a.count()[2] == 0


def test_surplus_segments_are_counted():
    whole, capped = pooled(), pooled(capacity=1)
    assert (whole.aux["overflow"] == 0).all()
    np.testing.assert_array_equal(capped.aux["overflow"] + capped.aux["segments"], whole.aux["segments"])
    assert apply(capped, PADDED).length == 1


def test_the_predictor_learns_through_the_means():
    """From what the segments become, and from the prior."""
    reducer = create("boundary_pooling", INFO, hidden=16, soft=True)
    graph, params = nnx.split(reducer)

    def loss(params, prior):
        plan = nnx.merge(graph, params).plan(PADDED, KEYED)
        return plan.aux["loss/boundary"].sum() if prior else (apply(plan, PADDED).x ** 2).sum()

    for prior in (True, False):
        g = jax.grad(loss)(params, prior)["predictor"]["out"]["bias"][...]
        assert np.isfinite(g).all() and np.abs(g).max() > 0


def test_the_prior_is_binomial_in_a_rows_own_tokens():
    ends = np.zeros((2, N), np.float32)
    ends[0, [1, 4, 8]] = 1
    got = baselines.prior_loss(jnp.asarray(ends), jnp.array([9, 0]), 0.2)
    np.testing.assert_allclose(got, [-stats.binom.logpmf(3, 9, 0.2) / 9, 0], rtol=1e-5)


def test_a_draw_has_the_gradient_of_its_soft_form():
    def value(logit, which):
        return baselines.relaxed_bernoulli(logit, jnp.float32(0.4), 0.5)[which]

    assert value(2.0, 1) == 1 and value(-2.0, 1) == 0
    np.testing.assert_allclose(jax.grad(value)(2.0, 1), jax.grad(value)(2.0, 0), rtol=1e-6)


# Convolutions


def test_windows_are_of_a_rows_own_tokens():
    reducer = create("conv_pooling", INFO, stride=4)
    out = apply(reducer.plan(PADDED, KEYED), PADDED)
    assert out.length == 3 and out.count().tolist() == [3, 2, 0]
    assert np.asarray(out.position)[0].tolist() == [0, 4, 8] and np.asarray(out.position)[1, :2].tolist() == [0, 4]
    u = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6)
    y = u[0, 4:8].reshape(-1) @ np.asarray(reducer.conv.kernel[...]) + np.asarray(reducer.conv.bias[...])
    np.testing.assert_allclose(out.x[0, 1], jax.nn.gelu(y, approximate=False), rtol=1e-4, atol=1e-5)


def test_a_row_shorter_than_a_window_keeps_one_token():
    short = Tokens(X[:, :3], position=PLACE[:, :3])
    out = apply(create("conv_pooling", INFO, stride=4).plan(short, KEYED), short)
    assert out.length == 1 and out.valid is None and np.isfinite(out.x).all()


# Settings


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("byte_random", {"rate": 1.0}, r"rate=1.0: must be in \[0, 1\)"),
        ("byte_random", {"spread": -0.1}, "spread=-0.1: must be at least 0"),
        ("byte_random", {"capacity": 0}, "capacity=0: must be a whole number"),
        ("byte_fixed", {"amount": 1.0}, r"amount=1.0: must be in \[0, 1\)"),
        ("boundary_pooling", {"prior": 0.0}, r"prior=0.0: must be in \(0, 1\]"),
        ("boundary_pooling", {"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ("boundary_pooling", {"weight": -1.0}, "weight=-1.0: must be at least 0"),
        ("boundary_pooling", {"layer": 4}, "layer=4: must be in 0 to 3"),
        ("conv_pooling", {"stride": 0}, "stride=0: must be a whole number of at least 1"),
    ],
)
def test_settings_out_of_range(name, settings, message):
    with pytest.raises(ValueError, match=message):
        create(name, INFO, **settings)


@pytest.mark.parametrize("name", ["byte_random", "byte_fixed"])
def test_a_layer_that_the_model_does_not_have(name):
    with pytest.raises(ValueError, match="layer=4: must be in 0 to 3"):
        create(name, layer=4).hooks(INFO)


def test_the_learning_form_is_the_same_reducer():
    assert [hook.call for hook in create("byte_random", hard=False).hooks(INFO)] == ["soften"]
    assert [hook.layer for hook in create("byte_fixed").hooks(INFO)] == [1]
