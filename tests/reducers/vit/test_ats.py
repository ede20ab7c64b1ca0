"""ATS: which tokens the points take, in which order, how many, what finds no slot, and the official variant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.hooks import ModelInfo
from tokjax.reducers.vit import ats
from tokjax.reducers.vit.ats import ATS
from tokjax.reducers.vit.staged import NOTING
from tokjax.signals import Signals
from tokjax.token_map import apply
from tokjax.tokens import Tokens

INFO = ModelInfo(depth=12, width=8, heads=2, length=17, prefix=1, grid=(4, 4))


def seen(scores, heads=2):
    """Signals in which CLS pays `scores` to the tokens, with values of length one in every head."""
    scores = jnp.asarray(scores, jnp.float32)
    b, n = scores.shape
    weights = jnp.full((b, heads, n, n), 1 / n).at[:, :, 0].set(scores[:, None] / heads)
    return Signals(weights=weights, value=jnp.zeros((b, n, heads, 3)).at[..., 0].set(1))


def tokens_of(n, batch=1, **fields):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, n, 3)), jnp.float32)
    return Tokens(x, prefix=1, **fields)


def test_significant_tokens_are_taken_many_times_and_others_never():
    plan = ATS(kept=4).plan(tokens_of(7), seen([[9, 0.01, 0.6, 0.01, 0.01, 0.36, 0.01]]))
    # Cumulative sums .01 .61 .62 .63 .99 1; points .1 .3 .5 .7 are nearest to .01, .01, .61 and .63.
    np.testing.assert_array_equal(plan.map.keep, [[0, 1, 2, 4, 7]])
    np.testing.assert_array_equal(plan.valid, [[True] * 4 + [False]])
    np.testing.assert_array_equal(plan.aux["sampled"], [3])
    np.testing.assert_array_equal(plan.aux["overflow"], [0])


def test_rows_differ_in_length_and_evenly_significant_tokens_stay_spread():
    scores = np.stack([[9, *[0.1] * 10], [9, *[0.001] * 9, 0.9]])
    plan = ATS(kept=5).plan(tokens_of(11, batch=2), seen(scores))
    # Points 1/12, 3/12 ... 9/12 and cumulative sums .1, .2 ..., which the guard of the division makes a hair smaller.
    np.testing.assert_array_equal(plan.map.keep[0], [0, 1, 3, 4, 6, 8])
    np.testing.assert_array_equal(plan.aux["sampled"], [5, 2])
    np.testing.assert_array_equal(plan.valid.sum(1), [6, 3])


def test_ties_go_to_the_first_token():
    plan = ATS(kept=1).plan(tokens_of(5), seen([[9, 0.25, 0.5, 0.0, 0.25]]))
    assert plan.map.keep[0, 1] == 1  # .5 is as far from .25 as from .75, which two tokens share


def test_a_longer_value_makes_a_token_more_significant():
    signals = seen([[9, 0.5, 0.5]])
    longer = signals.replace(value=signals.value.at[:, 2].multiply(3))
    np.testing.assert_allclose(ats.normalised(ats.significance(tokens_of(3), longer)), [[0.25, 0.75]], rtol=1e-5)
    both = ats.significance(tokens_of(3), longer, "official")
    np.testing.assert_allclose(both / both.sum(), [[0.25, 0.75]], rtol=1e-5)


def test_surplus_is_dropped_from_the_least_significant_on_and_counted():
    scores = [[9, 0.3, 0.1, 0.25, 0.15, 0.2]]
    free = ATS(kept=4).plan(tokens_of(6), seen(scores))
    np.testing.assert_array_equal(free.map.keep, [[0, 1, 2, 3, 6]])  # .3 .4 .65 and points .1 .3 .5 .7
    tight = ATS(kept=4, capacity=2).plan(tokens_of(6), seen(scores))
    np.testing.assert_array_equal(tight.map.keep, [[0, 1, 3]])
    np.testing.assert_array_equal([tight.aux["sampled"], tight.aux["overflow"]], [[2], [1]])


def test_padding_is_never_taken():
    valid = jnp.array([[True, False, True, True, False, True, True]])
    scores = [[9, 5.0, 0.2, 0.2, 7.0, 0.3, 0.3]]
    plan = ATS(kept=3, patches=6).plan(tokens_of(7, valid=valid), seen(scores))
    alone = ATS(kept=3).plan(tokens_of(5), seen([[9, 0.2, 0.2, 0.3, 0.3]]))
    place = np.array([0, 2, 3, 5, 6])
    np.testing.assert_array_equal(plan.map.keep[plan.valid], place[alone.map.keep[alone.valid]])


def test_behind_another_reducer_samples_are_a_share_of_the_patches_at_the_input():
    _, one, *_ = ATS(0.5, layers=(3,)).hooks(INFO)
    for carry, samples in (({"patches": jnp.array([16])}, 8), ({}, 6)):  # of the twelve that it meets, without the note
        tokens, scores = tokens_of(13, carry=carry), seen(np.full((1, 13), 0.1))
        assert one.reducer.plan(tokens, scores).aux["sampled"] == samples


def test_official_variant_orders_by_significance_and_drops_the_least():
    scores = [[9, 0.4, 0.1, 0.3, 0.2]]
    plan = ATS(variant="official", keep_rate=1.0).plan(tokens_of(5), seen(scores))
    # Ascending .1 .2 .3 .4: cumulative sums 0, 2/9, 5/9, 1; points 2/9, .48, .74, 1: .1 is never nearest.
    np.testing.assert_array_equal(plan.map.keep, [[0, 4, 3, 1, 5]])
    out = apply(plan, tokens_of(5))
    np.testing.assert_array_equal(out.valid, [[True] * 4 + [False]])
    np.testing.assert_array_equal(out.x[:, 4], 0)


def test_rows_without_significance_stay_finite():
    for variant in ("benchmark", "official"):
        tokens = tokens_of(6, batch=2)
        plan = ATS(variant=variant, kept=3).plan(tokens, seen(np.zeros((2, 6))))
        assert np.isfinite(apply(plan, tokens).x).all() and (plan.aux["sampled"] >= 1).all()


def test_hooks_of_both_variants():
    assert [(h.layer, h.reducer.count(16)) for h in ATS(0.5).hooks(INFO)[1:]] == [(3, 8), (6, 4), (9, 2)]
    note, *official = ATS(1.0, variant="official").hooks(INFO)
    assert note == NOTING
    assert [h.layer for h in official] == list(range(3, 12))
    assert {h.reducer.count(16) for h in official} == {16} and {h.where for h in official} == {"after_attention"}
    assert ATS(1.0).hooks(INFO) == []


def test_the_choice_has_no_gradient():
    tokens, weights = tokens_of(6), seen([[9, 0.3, 0.1, 0.25, 0.15, 0.2]])

    def loss(signals):
        return (apply(ATS(kept=2).plan(tokens, signals), tokens).x ** 2).sum()

    gradient = jax.grad(lambda w, v: loss(weights.replace(weights=w, value=v)), (0, 1))(weights.weights, weights.value)
    assert all(not np.any(g) for g in gradient)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "new"}, "variant='new': must be one of benchmark, official"),
        ({"capacity": 0}, "capacity=0: must be at least 1"),
        ({"keep_rate": 0.0}, "keep_rate=0.0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ATS(**settings)
    with pytest.raises(ValueError, match=r"capacity=\(4, 2\): must have one number for each of layers=\(3, 6, 9\)"):
        ATS(capacity=(4, 2)).hooks(INFO)
