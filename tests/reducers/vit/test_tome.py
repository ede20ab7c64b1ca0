"""ToMe against its definition in loops; schedules, ties, padding, and its three matchings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rows_alone

from tokjax.hooks import ModelInfo
from tokjax.reducers.vit import tome
from tokjax.reducers.vit.tome import ToMe
from tokjax.signals import Context, Signals
from tokjax.token_map import Plan, apply
from tokjax.tokens import Tokens

INFO = ModelInfo(depth=4, width=8, heads=2, length=17, prefix=1, grid=(4, 4))


def drawn(n=12, width=6, batch=2, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, n, width)).astype(np.float32)


def groups_by_hand(metric, r, prefix):
    """The input tokens in every output slot of one row, its own token first, by the paper's five steps."""
    n = len(metric)
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    proposals = []
    for a in range(0, n, 2):
        if a >= prefix:
            receivers = [b for b in range(1, n, 2) if b >= prefix]
            similarity = [unit[a] @ unit[b] for b in receivers]
            best = int(np.argmax(similarity))
            proposals.append((-similarity[best], a, receivers[best]))
    proposals.sort()
    r = min(r, (n - prefix) // 2)
    taken, left = proposals[:r], [a for _, a, _ in proposals[r:]]
    into = {}
    for _, a, b in taken:
        into.setdefault(b, []).append(a)
    left = sorted(left) if prefix else left
    behind = [b for b in range(1, n, 2) if b >= prefix]
    return [[t] for t in (*range(prefix), *left)] + [[b, *into.get(b, [])] for b in behind]


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 5])
@pytest.mark.parametrize(("n", "r"), [(12, 3), (13, 4), (13, 100)])
def test_bipartite_matching_by_hand(n, r, prefix):
    metric = drawn(n)
    merge = jax.jit(lambda m: tome.bipartite(m, r, prefix=prefix))(metric)
    assert merge.num_out == n - min(r, (n - prefix) // 2)
    for b in range(2):
        groups = groups_by_hand(metric[b].astype(np.float64), r, prefix)
        expected = np.zeros((merge.num_out, n))
        for slot, group in enumerate(groups):
            expected[slot, group] = 1
        np.testing.assert_array_equal(merge.membership()[b], expected)
        np.testing.assert_array_equal(merge.keep[b], [group[0] for group in groups])


@pytest.mark.parametrize(("n", "r", "prefix"), [(12, 0, 1), (2, 5, 1), (3, 5, 2), (1, 5, 0), (1, 5, 1)])
def test_nothing_to_merge(n, r, prefix):
    assert tome.bipartite(jnp.asarray(drawn(n)), r, prefix=prefix) is None


@pytest.mark.parametrize("n", [8, 17, 18, 33])
@pytest.mark.parametrize("width", [6, 7, 8, 24])
def test_equal_tokens_tie_exactly(n, width):
    metric = jnp.broadcast_to(jnp.asarray(drawn(1, width)), (2, n, width))
    scores, merge = jax.jit(lambda m: (tome.pair_scores(m), tome.bipartite(m, 3)))(metric)
    assert len(np.unique(scores[0])) == 1
    np.testing.assert_array_equal(merge.moved, [[0, 2, 4]] * 2)  # the first senders, into the first receiver
    np.testing.assert_array_equal(merge.keep[:, np.asarray(merge.into[0])], 1)


def test_zero_vectors_are_no_nan():
    metric = drawn()
    metric[0, [2, 5]] = 0
    metric[1] = 0
    scores = tome.pair_scores(jnp.asarray(metric))
    assert np.isfinite(scores).all()
    merge = tome.bipartite(jnp.asarray(metric), 3)
    np.testing.assert_array_equal(np.sort(np.concatenate([merge.keep, merge.moved], 1)), [range(12)] * 2)


def test_kth_matching_by_hand():
    metric = drawn(14)
    merge = tome.kth(jnp.asarray(metric), 3)
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    receivers, senders = [2, 5, 8, 11], [0, 1, 3, 4, 6, 7, 9, 10]
    np.testing.assert_array_equal(merge.keep, [receivers] * 2)
    np.testing.assert_array_equal(merge.moved, [senders] * 2)
    np.testing.assert_array_equal(merge.into, (unit[:, senders] @ unit[:, receivers].swapaxes(1, 2)).argmax(-1))
    np.testing.assert_array_equal(merge.dest()[:, 12:], 4)  # the tail is dropped
    assert tome.kth(jnp.asarray(metric), 1) is None
    assert tome.kth(jnp.asarray(metric), 15) is None


def test_random_matching_by_hand():
    metric, uniform = drawn(9), np.random.default_rng(1).uniform(size=(2, 9)).astype(np.float32)
    merge = tome.random(jnp.asarray(metric), 4, jnp.asarray(uniform))
    order = uniform.argsort(-1)
    np.testing.assert_array_equal(merge.moved, order[:, :4])
    np.testing.assert_array_equal(merge.keep, order[:, 4:])
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    for b in range(2):
        similarity = unit[b, order[b, :4]] @ unit[b, order[b, 4:]].T
        np.testing.assert_array_equal(merge.into[b], similarity.argmax(-1))
    assert tome.random(jnp.asarray(metric), 100, jnp.asarray(uniform)).num_out == 1
    assert tome.random(jnp.asarray(metric), 0, jnp.asarray(uniform)) is None


# The reducer.


def keyed(x, heads=2, **context):
    """Signals whose keys, averaged over heads, are the features."""
    key = jnp.stack([jnp.asarray(x) + 1, jnp.asarray(x) - 1], 2)[:, :, :heads]
    return Signals(key=key, context=Context(**context))


def test_a_plan_averages_by_size():
    x, size = jnp.asarray(drawn()), jnp.asarray(np.random.default_rng(2).integers(1, 5, (2, 12)), jnp.float32)
    tokens = Tokens(x, size=size, prefix=1)
    by_size = apply(ToMe(r=4).plan(tokens, keyed(x)), tokens)
    equally = apply(ToMe(r=4, how="mean").plan(tokens, keyed(x)), tokens)
    for b in range(2):
        for slot, group in enumerate(groups_by_hand(np.asarray(x[b], np.float64), 4, 1)):
            mean = np.average(x[b, group], axis=0, weights=size[b, group])
            np.testing.assert_allclose(by_size.x[b, slot], mean, atol=1e-5)
            np.testing.assert_allclose(equally.x[b, slot], np.mean(x[b, group], 0), atol=1e-5)
            assert by_size.size[b, slot] == equally.size[b, slot] == size[b, group].sum()


@pytest.mark.parametrize("settings", [{}, {"how": "mean"}, {"matching": "random"}])
def test_sizes_and_their_mass_are_conserved(settings):
    x, size = jnp.asarray(drawn(17)), jnp.asarray(np.random.default_rng(2).integers(1, 5, (2, 17)), jnp.float32)
    tokens = Tokens(x, size=size, prefix=1)
    for _ in range(3):
        tokens = apply(ToMe(r=4, **settings).plan(tokens, keyed(tokens.x)), tokens)
    np.testing.assert_array_equal(tokens.size.sum(1), size.sum(1))
    np.testing.assert_array_equal(tokens.size[:, 0], size[:, 0])  # CLS takes nobody in
    if settings.get("how", "size") == "size":
        mass = jnp.einsum("bnc,bn->bc", tokens.x, tokens.size)
        np.testing.assert_allclose(mass, jnp.einsum("bnc,bn->bc", x, size), atol=1e-4)


def test_random_merging_draws_for_every_row_and_layer():
    x = jnp.broadcast_to(jnp.asarray(drawn(17, batch=1)), (3, 17, 6))
    reducer = ToMe(r=8, matching="random")
    tokens = Tokens(x, prefix=1)
    first = reducer.plan(tokens, keyed(x)).map
    assert len(np.unique(first.moved, axis=0)) == 3
    np.testing.assert_array_equal(first.keep[:, 0], 0)
    fewer = reducer.plan(Tokens(x[:2], prefix=1), keyed(x[:2])).map
    np.testing.assert_array_equal(fewer.moved, first.moved[:2])
    for other in (dataclasses.replace(reducer, layer=1), dataclasses.replace(reducer, seed=1)):
        assert not np.array_equal(other.plan(tokens, keyed(x)).map.moved, first.moved)
    with_key = reducer.plan(tokens, keyed(x, key=jax.random.key(5))).map
    assert not np.array_equal(with_key.moved, first.moved)


def test_the_plan_has_no_gradient_and_the_merge_has():
    x = jnp.asarray(drawn())

    def loss(x, metric):
        tokens = Tokens(x, prefix=1)
        return (apply(ToMe(r=4).plan(tokens, keyed(metric)), tokens).x ** 2).sum()

    of_x, of_metric = jax.grad(loss, (0, 1))(x, x)
    assert np.isfinite(of_x).all()
    assert (np.abs(of_x).max(-1) > 0).all()
    np.testing.assert_array_equal(of_metric, 0)


@pytest.mark.parametrize(("prefix", "holes"), [(0, False), (1, False), (1, True), (2, False)])
def test_padded_rows_give_what_rows_alone_give(prefix, holes):
    after = rows_alone.check(ToMe(r=4), prefix, holes=holes)
    assert [tokens.length for tokens in after] == [13, 9, 9 - min(4, (9 - prefix) // 2)]


def test_rows_without_patches_stay_as_they_are():
    x = jnp.asarray(drawn(9))
    valid = jnp.ones((2, 9), bool).at[1, 1:].set(False)
    tokens = Tokens(x, valid=valid, prefix=1)
    out = apply(ToMe(r=4).plan(tokens, keyed(x)), tokens)
    np.testing.assert_array_equal(out.valid, [[True] * 5, [True] + [False] * 4])
    np.testing.assert_array_equal(out.x[1, 0], x[1, 0])
    assert np.isfinite(out.x).all()


# Settings.


def test_hooks_spread_the_schedule():
    def laid_out(**settings):
        return [(hook.where, hook.layer, hook.reducer.r) for hook in ToMe(**settings).hooks(INFO)]

    site = "after_attention"
    assert laid_out(r=3) == [(site, i, 3) for i in range(4)]
    assert laid_out(r=(5, 0, 2)) == [(site, 0, 5), (site, 2, 2)]
    assert laid_out(r=4, inflect=-1.0) == [(site, 0, 8), (site, 1, 5), (site, 2, 2)]
    assert laid_out(r=4, layers=(1, 3)) == [(site, 1, 4), (site, 3, 4)]
    assert laid_out(r=0) == []
    assert [hook.reducer.layer for hook in ToMe(r=3).hooks(INFO)] == [0, 1, 2, 3]
    assert len(ToMe(r=0, matching="kth", k=2).hooks(INFO)) == 4
    assert all(hook.reducer.inflect == 0 for hook in ToMe(r=4, inflect=-1.0).hooks(INFO))


def test_attention_is_proportional_unless_the_head_weighs_by_size():
    of_patches = dataclasses.replace(INFO, pooling="size_mean")
    for info, said, expected in (
        (INFO, None, True),
        (of_patches, None, False),
        (of_patches, True, True),
        (INFO, False, False),
    ):
        hook = ToMe(r=3, proportional=said).hooks(info)[0]
        tokens = Tokens(jnp.asarray(drawn(17)), prefix=1)
        assert apply(hook.reducer.plan(tokens, keyed(tokens.x)), tokens).proportional is expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": -1}, r"r=-1: must be at least 0"),
        ({"r": (3, -2)}, r"r=\(3, -2\): must be at least 0"),
        ({"inflect": 1.5}, r"inflect=1.5: must be in \[-1, 1\]"),
        ({"matching": "optimal"}, r"matching='optimal': must be one of bipartite, kth, random"),
        ({"k": 0}, r"k=0: must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ToMe(**settings)


def test_more_than_there_is_cannot_be_merged():
    ToMe(r=16).hooks(INFO)
    with pytest.raises(ValueError, match=r"r=17: must be at most 16"):
        ToMe(r=17).hooks(INFO)
    with pytest.raises(ValueError, match=r"layers=\(1, 4\): must lie in 0 to 3"):
        ToMe(r=3, layers=(1, 4)).hooks(INFO)


def test_plans_that_cannot_be_made():
    tokens = Tokens(jnp.asarray(drawn()), prefix=1)
    with pytest.raises(ValueError, match=r"r=\(3, 2\): a plan takes one number"):
        ToMe(r=(3, 2)).plan(tokens, keyed(tokens.x))
    with pytest.raises(ValueError, match=r"signals.key=None"):
        ToMe(r=3).plan(tokens, Signals())
    padded = tokens.replace(valid=jnp.ones((2, 12), bool))
    for matching in ("kth", "random"):
        with pytest.raises(ValueError, match=f"matching='{matching}': takes no padded rows"):
            ToMe(r=3, matching=matching).plan(padded, keyed(tokens.x))


def test_matchings_other_than_bipartite_spare_the_prefix():
    tokens = Tokens(jnp.asarray(drawn(13)), prefix=1)
    plan = ToMe(matching="kth", k=3).plan(tokens, keyed(tokens.x))
    assert isinstance(plan, Plan)
    out = apply(plan, tokens)
    assert out.length == 1 + 12 // 3
    np.testing.assert_array_equal(out.x[:, 0], tokens.x[:, 0])
    np.testing.assert_array_equal(out.size.sum(1), 13)
