"""The controls: random and strided dropping, and average pooling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rows_alone

from tokjax.hooks import ModelInfo
from tokjax.reducers.vit.controls import AvgPool, Random, Strided
from tokjax.signals import Context, Signals
from tokjax.token_map import apply
from tokjax.tokens import Tokens

INFO = ModelInfo(depth=12, width=8, heads=2, length=17, prefix=1, grid=(4, 4))


def tokens_of(n=17, prefix=1, batch=2, **fields):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, n, 3)), jnp.float32)
    return Tokens(x, prefix=prefix, **fields)


def kept(reducer, tokens, **context):
    return np.asarray(reducer.plan(tokens, Signals(context=Context(**context))).map.keep)


# Random.


def test_random_keeps_a_sorted_subset_of_its_own_for_every_row():
    keep = kept(Random(kept=6), tokens_of(batch=40))
    assert keep.shape == (40, 7)
    assert (keep[:, 0] == 0).all()
    assert (np.diff(keep) > 0).all()
    assert len(np.unique(keep, axis=0)) > 30
    np.testing.assert_array_equal(kept(Random(kept=6), tokens_of(batch=3)), keep[:3])  # whatever the batch


def test_random_draws_anew_for_keys_layers_and_seeds():
    tokens, key = tokens_of(), jax.random.key(1)
    first = kept(Random(kept=6), tokens)
    np.testing.assert_array_equal(first, kept(Random(kept=6), tokens))
    others = [
        kept(Random(kept=6, seed=1), tokens),
        kept(Random(kept=6, layer=1), tokens),
        kept(Random(kept=6), tokens, key=key),
    ]
    assert not any(np.array_equal(first, other) for other in others)
    np.testing.assert_array_equal(others[-1], kept(Random(kept=6, seed=9), tokens, key=key))  # a key goes before seeds
    assert [hook.reducer.layer for hook in Random().hooks(INFO)] == [3, 6, 9]


def test_random_keeps_every_token_equally_often():
    keep = kept(Random(kept=4), tokens_of(batch=4000))[:, 1:]
    share = np.bincount(keep.ravel(), minlength=17)[1:] / 4000
    assert np.abs(share - 4 / 16).max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


# Strided.


def test_strided_keeps_evenly_spaced_tokens():
    np.testing.assert_array_equal(kept(Strided(kept=4), tokens_of()), [[0, 3, 7, 11, 15]] * 2)
    np.testing.assert_array_equal(kept(Strided(kept=3), tokens_of(8, prefix=0)), [[1, 4, 6]] * 2)
    for k in range(1, 16):
        chosen = kept(Strided(kept=k), tokens_of())[0, 1:]
        gaps = np.diff(chosen)
        assert len(np.unique(chosen)) == k
        assert k == 1 or gaps.max() - gaps.min() <= 1


# Average pooling.


def test_avgpool_averages_runs_of_neighbours():
    tokens = tokens_of().traced()
    out = apply(AvgPool(kept=5).plan(tokens, Signals()), tokens)
    cell = np.arange(16) * 5 // 16
    np.testing.assert_array_equal(np.bincount(cell), [4, 3, 3, 3, 3])
    for k in range(5):
        np.testing.assert_allclose(out.x[:, 1 + k], tokens.x[:, 1:][:, cell == k].mean(1), atol=1e-6)
    np.testing.assert_array_equal(out.x[:, 0], tokens.x[:, 0])
    np.testing.assert_array_equal(out.origin[0], [0, *(1 + cell)])
    assert out.size is None
    assert out.attention_bias() is None


def test_avgpool_tracks_sizes_where_they_count():
    sizes = jnp.asarray(np.random.default_rng(1).integers(1, 4, (2, 17)), jnp.float32)
    tokens = tokens_of(size=sizes)
    out = apply(AvgPool(kept=4).plan(tokens, Signals()), tokens)
    cells, weights = np.asarray(tokens.x)[:, 1:].reshape(2, 4, 4, 3), np.asarray(sizes)[:, 1:].reshape(2, 4, 4, 1)
    np.testing.assert_allclose(out.x[:, 1:], (cells * weights).sum(2) / weights.sum(2), atol=1e-6)
    np.testing.assert_array_equal(out.size[:, 1:], weights.sum((2, 3)))
    assert not out.proportional
    counted = apply(AvgPool(kept=4, proportional=True).plan(tokens_of(), Signals()), tokens_of())
    np.testing.assert_allclose(counted.attention_bias(), np.log([[1, 4, 4, 4, 4]] * 2), atol=1e-6)


def test_avgpool_over_windows_of_the_grid():
    tokens = tokens_of(1 + 15)
    context = Context(grid=(3, 5))
    out = apply(AvgPool(window=(2, 2)).plan(tokens, Signals(context=context)), tokens)
    patches = np.asarray(tokens.x)[:, 1:].reshape(2, 3, 5, 3)
    expected = [patches[:, i : i + 2, j : j + 2].mean((1, 2)) for i in (0, 2) for j in (0, 2, 4)]
    np.testing.assert_allclose(out.x[:, 1:], np.stack(expected, 1), atol=1e-6)
    assert AvgPool(window=(1, 1)).plan(tokens, Signals(context=context)) is None
    assert len(AvgPool(window=(2, 2)).hooks(INFO)) == 1
    for wrong in (Context(), Context(grid=(4, 4))):
        with pytest.raises(ValueError, match=r"window=\(2, 2\): needs all patches of a grid; here are 15 tokens"):
            AvgPool(window=(2, 2)).plan(tokens, Signals(context=wrong))


@pytest.mark.parametrize("window", [(0, 2), (2,)])
def test_windows_that_cannot_be(window):
    with pytest.raises(ValueError, match=r"window=.*: must be two numbers of at least 1"):
        AvgPool(window=window)


# All of them.


@pytest.mark.parametrize("make", [Random, Strided, AvgPool])
def test_counts_are_those_of_topk(make):
    tokens = tokens_of()
    assert make(0.7).plan(tokens, Signals()).map.num_out == 1 + 12
    assert make(1.0).plan(tokens, Signals()) is None
    assert make(kept=16).plan(tokens, Signals()) is None
    assert [hook.reducer.kept for hook in make(kept=(9, 5, 2)).hooks(INFO)] == [9, 5, 2]
    with pytest.raises(ValueError, match=r"keep_rate=0: must be in \(0, 1\]"):
        make(keep_rate=0)
    with pytest.raises(ValueError, match=r"kept=0: must be at least 1"):
        dataclasses.replace(make(), kept=0)


@pytest.mark.parametrize("make", [Random, Strided, AvgPool])
@pytest.mark.parametrize(("prefix", "holes"), [(1, False), (0, True)])
def test_padded_rows_give_what_rows_alone_give(make, prefix, holes):
    rows_alone.check(make(0.6), prefix, holes=holes)
