"""GTP against its definition in loops: graphs, sparse maps, scores, propagation over several blocks, padding."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rows_alone

from tokjax.hooks import ModelInfo
from tokjax.reducers.vit import gtp
from tokjax.reducers.vit.gtp import GTP
from tokjax.signals import AttentionRule, Context, Signals
from tokjax.token_map import apply
from tokjax.tokens import Tokens

INFO = ModelInfo(depth=4, width=8, heads=2, length=13, prefix=1, grid=(3, 4))
GRID = Context(grid=(3, 4))


def drawn(n=13, width=6, batch=2, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, n, width)).astype(np.float32)


def attention(n=13, heads=2, batch=2, seed=1):
    logits = np.random.default_rng(seed).normal(size=(batch, heads, n, n)) * 2
    return np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))


@functools.partial(jax.jit, static_argnums=0, compiler_options=rows_alone.QUICK)
def propagated(reducer, tokens, signals):
    plan = reducer.plan(tokens, signals)
    return plan, apply(plan, tokens)


def with_graph(reducer, tokens, context=GRID):
    return apply(reducer.graph(tokens, Signals(context=context)), tokens)


# Parts.


@pytest.mark.parametrize("n", [7, 5000])
def test_kth_smallest_is_the_one_of_a_sort(n):
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(size=n), rng.integers(-2, 3, n), np.full(n, 0.5), rng.random(n) * 1e-30])
    x[0, :2] = np.inf, -np.inf
    x = x.astype(np.float32)
    find = jax.jit(gtp.kth_smallest)
    for k in (1, 2, n // 2, n):
        np.testing.assert_array_equal(find(x, k), np.sort(x, -1)[:, k - 1])
    of_rows = np.array([1, 3, n, n // 3])
    np.testing.assert_array_equal(find(x, of_rows), np.sort(x, -1)[np.arange(4), of_rows - 1])


def test_spatial_edges_by_hand():
    tokens = Tokens(jnp.asarray(drawn()), prefix=1)
    graph = GTP(graph_type="spatial").graph(tokens, Signals(context=GRID)).carry["gtp"]["graph"]
    edges = np.zeros((12, 12))
    for i in range(12):
        for j in range(12):
            (a, b), (c, d) = divmod(i, 4), divmod(j, 4)
            edges[i, j] = i != j and abs(a - c) <= 1 and abs(b - d) <= 1
    degree = edges.sum(1)
    np.testing.assert_allclose(graph, [edges / np.sqrt(np.outer(degree, degree))] * 2, atol=1e-6)


@pytest.mark.parametrize("flat", [True, False])
def test_edges_follow_positions(flat):
    order = np.random.default_rng(0).permutation(12)
    x, reducer = drawn(), GTP(graph_type="mixed", neighbours=2)
    place = order + 1 if flat else np.stack(np.divmod(order, 4), -1)
    place = np.concatenate([0 * place[:1] - (not flat), place])
    moved = Tokens(jnp.asarray(x[:, np.append(0, order + 1)]), position=jnp.asarray([place] * 2), prefix=1)
    plain = reducer.graph(Tokens(jnp.asarray(x), prefix=1), Signals(context=GRID)).carry["gtp"]["graph"]
    ours = reducer.graph(moved, Signals(context=GRID)).carry["gtp"]["graph"]
    np.testing.assert_allclose(ours, np.asarray(plain)[:, order][:, :, order], atol=1e-6)


@pytest.mark.parametrize(("prefix", "exact", "number"), [(1, False, 3), (0, False, 4), (0, True, 3), (2, True, 3)])
def test_patches_have_so_many_semantic_neighbours(prefix, exact, number):
    x = drawn(12 + prefix)
    reducer = GTP(graph_type="semantic", neighbours=3, exact_neighbours=exact)
    graph = np.asarray(reducer.graph(Tokens(jnp.asarray(x), prefix=prefix), Signals()).carry["gtp"]["graph"])
    unit = x[:, prefix:] / np.linalg.norm(x[:, prefix:], axis=-1, keepdims=True)
    for b in range(2):
        for i in range(12):
            near = unit[b] @ unit[b, i]
            near[i] = -2
            assert set(np.flatnonzero(graph[b, i])) == set(np.argsort(-near)[:number])


def test_tokens_without_edges_have_weights_of_zero():
    tokens = Tokens(jnp.asarray(drawn()), prefix=1)
    graph = GTP(graph_type="semantic", neighbours=0).graph(tokens, Signals()).carry["gtp"]["graph"]
    np.testing.assert_array_equal(graph, 0)


@pytest.mark.parametrize("sparsity", [0.6, 0.31, 1.0])
def test_the_smallest_entries_of_a_map_become_zero(sparsity):
    weights, n = attention(9), 9
    ours = gtp.sparse(jnp.asarray(weights), sparsity)
    rank = int(n * n * (1 - sparsity))
    for b in range(2):
        for h in range(2):
            least = np.sort(weights[b, h].ravel())[rank - 1] if rank else 0
            np.testing.assert_array_equal(ours[b, h], np.where(weights[b, h] < least, 0, weights[b, h]))
            assert (ours[b, h] > 0).sum() == min(n * n - rank + 1, n * n)


def test_maps_of_padded_rows_count_their_own_entries():
    small = attention(6, batch=1)
    inside = np.array([0, 2, 3, 5, 7, 8])
    wide = np.random.default_rng(0).random((2, 2, 9, 9)).astype(np.float32)
    wide[0, :, :, np.setdiff1d(np.arange(9), inside)] = 0
    wide[:1, :, inside[:, None], inside] = small
    valid = np.ones((2, 9), bool)
    valid[0] = np.isin(np.arange(9), inside)
    ours = np.asarray(gtp.sparse(jnp.asarray(wide), 0.5, jnp.asarray(valid)))
    np.testing.assert_array_equal(ours[:1, :, inside[:, None], inside], gtp.sparse(jnp.asarray(small), 0.5))
    np.testing.assert_array_equal(ours[1:], gtp.sparse(jnp.asarray(wide[1:]), 0.5))


def test_scores_by_hand():
    weights = attention(5)
    diagonal, column = np.diagonal(weights, axis1=2, axis2=3), weights.sum(2)
    mean_rows = weights.mean(1) / np.linalg.norm(weights.mean(1), axis=-1, keepdims=True)
    expected = {
        "cls_mean": weights[:, :, 0].mean(1),
        "column_max": column.max(1),
        "diagonal_mean": diagonal.mean(1),
        "mixed_max": diagonal.max(1) * column.max(1),
        "sum_max": diagonal.max(1) + column.max(1),
        "cosine_mean": -(mean_rows @ mean_rows[:, 1:].swapaxes(1, 2)).sum(-1),
    }
    for selection, by_hand in expected.items():
        np.testing.assert_allclose(gtp.scores(jnp.asarray(weights), selection, prefix=1), by_hand, atol=1e-6)
    with pytest.raises(ValueError, match="selection='random': has no scores"):
        gtp.scores(jnp.asarray(weights), "random")


# Propagation.


def test_two_blocks_by_hand():
    x, maps, reducer = drawn(), (attention(), attention(10)), GTP(3, neighbours=2, alpha=0.3)
    tokens = with_graph(reducer, Tokens(jnp.asarray(x), prefix=1))
    graphs, xs = np.asarray(tokens.carry["gtp"]["graph"], np.float64), list(x.astype(np.float64))
    scales = [np.ones(13), np.ones(13)]
    for weights in maps:
        _, tokens = propagated(reducer, tokens, Signals(weights=jnp.asarray(weights)))
        rests = []
        for b in range(2):
            score = np.diagonal(weights[b], axis1=1, axis2=2).max(0) * weights[b].sum(1).max(0)
            order = np.argsort(-score[1:])
            stay, leave = order[:-3], order[-3:]
            flow = 0.3 * graphs[b][np.ix_(stay, leave)]
            whole = np.append(0, stay + 1)
            for values in (xs, scales):
                own = values[b]
                values[b] = own[whole]
                values[b][1:] += flow @ own[leave + 1]
            rests.append(graphs[b][np.ix_(stay, stay)])
        graphs = rests
        np.testing.assert_allclose(tokens.x, xs, atol=1e-5)
        np.testing.assert_allclose(tokens.size, scales, atol=1e-6)
    assert tokens.proportional
    np.testing.assert_array_equal(tokens.size[:, 0], 1)


def test_without_scales_none_are_tracked():
    reducer = GTP(3, token_scale=False)
    tokens = with_graph(reducer, Tokens(jnp.asarray(drawn()), prefix=1))
    assert propagated(reducer, tokens, Signals(weights=jnp.asarray(attention())))[1].size is None


def test_place_order_changes_the_order_alone():
    tokens, signals = Tokens(jnp.asarray(drawn()), prefix=1).traced(), Signals(weights=jnp.asarray(attention()))
    by_score, by_place = (
        propagated(reducer, with_graph(reducer, tokens), signals)
        for reducer in (GTP(3, place_order=False), GTP(3, place_order=True))
    )
    keep = np.asarray(by_place[0].map.keep)
    np.testing.assert_array_equal(keep, np.sort(by_score[0].map.keep, -1))
    rank = np.argsort(by_score[0].map.keep, -1)
    np.testing.assert_allclose(
        by_place[1].x, np.take_along_axis(np.asarray(by_score[1].x), rank[..., None], 1), atol=1e-6
    )


def test_dropping_and_appending_the_mean():
    x, signals = drawn(), Signals(weights=jnp.asarray(attention()))
    tokens = Tokens(jnp.asarray(x), size=jnp.full((2, 13), 2.0), prefix=1)
    dropped, appended = (propagated(GTP(4, propagation=kind), tokens, signals) for kind in ("none", "mean"))
    keep, left = np.asarray(dropped[0].map.keep), np.asarray(appended[0].map.moved)
    assert (dropped[1].length, appended[1].length) == (9, 10)
    for b in range(2):
        assert sorted([*keep[b], *left[b]]) == list(range(13))
        np.testing.assert_array_equal(dropped[1].x[b], x[b, keep[b]])
        np.testing.assert_array_equal(appended[1].x[b, :9], x[b, keep[b]])
        np.testing.assert_allclose(appended[1].x[b, 9], x[b, left[b]].mean(0), atol=1e-6)
        np.testing.assert_array_equal(dropped[1].size[b], 2)


def test_random_selection_draws_for_every_row_and_layer():
    tokens = Tokens(jnp.asarray(drawn()), prefix=1)
    reducer = GTP(6, "random", propagation="none")
    keep = reducer.plan(tokens, Signals()).map.keep
    assert not np.array_equal(keep[0], keep[1])
    np.testing.assert_array_equal(keep[:, 0], 0)
    for other in (dataclasses.replace(reducer, layer=1), dataclasses.replace(reducer, seed=1)):
        assert not np.array_equal(other.plan(tokens, Signals()).map.keep, keep)


def test_a_cls_selection_reads_the_cls_row_alone():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 13, 2, 4)), jnp.float32) for _ in range(3))
    tokens, signals = Tokens(jnp.asarray(drawn()), prefix=1), Signals(q, k, v, rule=AttentionRule(0.5))
    reducer = GTP(4, "cls_max", propagation="none")
    by_row, _ = propagated(reducer, tokens, signals)
    by_map, _ = propagated(reducer, tokens, reducer.attend(tokens, signals))
    np.testing.assert_array_equal(by_row.map.keep, by_map.map.keep)
    assert [hook.where for hook in reducer.hooks(INFO)] == ["after_attention"] * 4


def test_at_least_one_patch_stays():
    tokens = Tokens(jnp.asarray(drawn()), prefix=1)
    reducer = GTP(50)
    _, out = propagated(reducer, with_graph(reducer, tokens), Signals(weights=jnp.asarray(attention())))
    assert out.length == 2
    assert GTP(5).plan(Tokens(jnp.asarray(drawn(2)), prefix=1), Signals()) is None
    assert GTP(0).plan(tokens, Signals()) is None


@pytest.mark.parametrize(
    ("reducer", "prefix"),
    [
        (GTP(3, "mixed_mean", propagation="mean"), 1),
        (GTP(3, "cosine_max", propagation="none", sparsity=0.6), 0),
        (GTP(3, "random", propagation="none"), 2),
    ],
    ids=["mean", "cosine and sparse", "random"],
)
def test_padded_rows_give_what_rows_alone_give(reducer, prefix):
    rows_alone.check(reducer, prefix, patches=(16, 5, 1), steps=2, holes=True)


# Settings.


def test_hooks_make_the_graph_once():
    def laid_out(**settings):
        return [(hook.where, hook.layer, hook.reducer.propagated) for hook in GTP(**settings).hooks(INFO)]

    assert laid_out(propagated=(2, 0, 3)) == [
        ("input", 0, 0),
        ("attend", 0, 2),
        ("after_attention", 0, 2),
        ("attend", 2, 3),
        ("after_attention", 2, 3),
    ]
    assert [where for where, _, _ in laid_out(propagated=(2,), propagation="none")] == ["attend", "after_attention"]
    assert laid_out(propagated=0) == []
    assert [(w, i) for w, i, _ in laid_out(propagated=0, sparsity=0.5)] == [("attend", i) for i in range(4)]
    assert all(math.isfinite(alpha) and 0 < theta <= 1 for theta, alpha in gtp.DEIT_B.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"propagated": -1}, r"propagated=-1: must be at least 0"),
        ({"propagated": (3, -1)}, r"propagated=\(3, -1\): must be at least 0"),
        ({"selection": "MixedAttnMax"}, r"selection='MixedAttnMax': must be one of cls_mean, "),
        ({"graph_type": "full"}, r"graph_type='full': must be one of spatial, semantic, mixed"),
        ({"propagation": "sum"}, r"propagation='sum': must be one of graph, none, mean"),
        ({"neighbours": -1}, r"neighbours=-1: must be at least 0"),
        ({"alpha": float("nan")}, r"alpha=nan: must be at least 0"),
        ({"sparsity": 0.0}, r"sparsity=0.0: must be in \(0, 1\]"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        GTP(**settings)


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match=r"graph_type='mixed': needs a patch grid"):
        GTP().graph(Tokens(jnp.asarray(drawn()), prefix=1), Signals())
    with pytest.raises(ValueError, match=r"selection='cls_max': needs a class token"):
        GTP(selection="cls_max").hooks(dataclasses.replace(INFO, prefix=0))


def test_plans_that_cannot_be_made():
    tokens, signals = Tokens(jnp.asarray(drawn()), prefix=1), Signals(weights=jnp.asarray(attention()))
    with pytest.raises(ValueError, match=r"tokens.carry\['gtp'\] does not fit"):
        GTP(3).plan(tokens, signals)
    with pytest.raises(ValueError, match=r"propagated=\(3, 2\): a plan takes one number"):
        GTP((3, 2)).plan(tokens, signals)
    with pytest.raises(ValueError, match=r"grid=\(3, 4\): does not hold 10 patches"):
        GTP().graph(Tokens(jnp.asarray(drawn(11)), prefix=1), Signals(context=GRID))
    with pytest.raises(ValueError, match=r"selection='cls_max': needs a class token"):
        GTP(3, "cls_max").plan(Tokens(jnp.asarray(drawn())), signals)
