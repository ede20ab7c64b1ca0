"""Scored: every score, every matcher, where the others go, and padded rows of all combinations."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rows_alone

import tokjax
from tokjax.models.vit import ViTConfig
from tokjax.reducers.vit import scored
from tokjax.reducers.vit.pitome import energy
from tokjax.reducers.vit.scored import Match, Score, Scored
from tokjax.signals import AttentionRule, Context, Signals, attention_rows, mean_key
from tokjax.token_map import apply
from tokjax.tokens import Tokens


def seen(n=12, batch=2, seed=0):
    q, k, v = jax.random.normal(jax.random.key(seed), (3, batch, n, 2, 4))
    return Signals(q, k, v, rule=AttentionRule(0.5), context=Context(key=jax.random.key(5)))


def keys(points) -> Signals:
    """One head, whose keys are these points of a plane."""
    key = jnp.asarray(points, jnp.float32)[None, :, None]
    return Signals(key, key, key, rule=AttentionRule(1.0))


def tokens_of(n=12, batch=2, prefix=1, **fields):
    return Tokens(jax.random.normal(jax.random.key(9), (batch, n, 3)), prefix=prefix, **fields)


def test_scores():
    signals, tokens = seen(), tokens_of()

    def of(score, **settings):
        return np.asarray(Scored(score=score, **settings).scores(tokens, signals))[:, 1:]

    rows = np.asarray(attention_rows(signals), np.float64)
    np.testing.assert_allclose(of("cls_attention"), rows[:, :, 0, 1:].mean(1), rtol=1e-5)
    flat = np.asarray(signals.key).reshape(2, 12, -1)
    np.testing.assert_allclose(of("key_norm"), np.linalg.norm(flat, axis=-1)[:, 1:], rtol=1e-5)
    np.testing.assert_allclose(of("key_norm", highest=False), -of("key_norm"))
    np.testing.assert_allclose(of("entropy"), (rows * np.log(rows)).sum(-1).mean(1)[:, 1:], rtol=1e-4)
    np.testing.assert_allclose(of("energy"), -energy(mean_key(signals)[:, 1:], 0.5), rtol=1e-5)
    assert (of("random") != of("random", layer=1)).all() and (of("random") == of("random")).all()
    assert (of("random")[0] != of("random")[1]).all()


@pytest.mark.parametrize("block", [4, 5, 12, 128])
def test_entropy_in_blocks_of_rows(block):
    signals = seen()
    np.testing.assert_allclose(scored.entropy(signals, block), scored.entropy(signals, 1), rtol=1e-5)
    given = signals.replace(weights=attention_rows(signals))
    np.testing.assert_allclose(scored.entropy(given, block), scored.entropy(signals), rtol=1e-5)


def test_the_best_stay_in_place_order_and_the_others_join_the_most_similar():
    signals = keys([[9, 9], [3, 0], [1, 0.1], [0, 2], [0.2, 1.9], [1, 1]])
    tokens = Tokens(jnp.arange(12.0).reshape(1, 6, 2), size=jnp.array([[1.0, 1, 3, 1, 1, 2]]), prefix=1).traced()
    plan = Scored(score="key_norm", kept=2).plan(tokens, signals)
    out = apply(plan, tokens)
    np.testing.assert_array_equal(plan.map.keep, [[0, 1, 3]])
    np.testing.assert_array_equal(out.origin, [[0, 1, 1, 2, 2, 1]])  # token 5 is as near to both: the first
    np.testing.assert_array_equal(out.size, [[1, 6, 2]])
    x = np.asarray(tokens.x[0])
    np.testing.assert_allclose(out.x[0, 1], (x[1] + 3 * x[2] + 2 * x[5]) / 6, rtol=1e-6)
    dropped = apply(Scored(score="key_norm", kept=2, rest="drop").plan(tokens, signals), tokens)
    np.testing.assert_array_equal(dropped.x, tokens.x[:, jnp.array([0, 1, 3])])
    np.testing.assert_array_equal(dropped.size, [[1, 1, 1]])


def test_greedy_takes_what_is_farthest():
    angles = np.radians([0, 3, 90, 94, 180, 2])
    metric = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], -1)[None], jnp.float32)
    every, even = jnp.ones((1, 6), bool), jnp.ones((1, 6))
    np.testing.assert_array_equal(scored.greedy(metric, even, every, 3), [[0, 4, 2]])
    first = jnp.array([[0.1, 0.2, 0.3, 0.4, 0.5, 1.0]])
    assert scored.greedy(metric, first, every, 1)[0, 0] == 5
    # A distance of 2 at a weight of 0.1 counts less than one of 1 at 0.4.
    low = jnp.array([[1.0, 0.9, 0.2, 0.4, 0.1, 0.9]])
    np.testing.assert_array_equal(scored.greedy(metric, low, every, 2), [[0, 3]])
    same = jnp.ones((1, 4, 2))
    np.testing.assert_array_equal(scored.greedy(same, even[:, :4], every[:, :4], 4), [[0, 1, 2, 3]])


def test_density_takes_the_centre_of_every_cluster():
    angles = np.radians([0, 4, 8, 120, 124, 128, 132, 136, 250])
    metric = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], -1)[None], jnp.float32)
    every, even = jnp.ones((1, 9), bool), jnp.ones((1, 9))
    assert np.asarray(scored.density(metric, even, every, 2))[0].tolist() == [5, 1]
    low = even.at[0, 5].set(0.01)
    assert 5 not in np.asarray(scored.density(metric, low, every, 2))[0]


@pytest.mark.parametrize("match", get_args(Match))
@pytest.mark.parametrize("score", get_args(Score))
def test_padded_rows_give_what_rows_alone_give(score, match):
    rest = "drop" if (score, match) == ("entropy", "greedy") else "merge"
    rows_alone.check(Scored(0.6, score=score, match=match, rest=rest), 1, steps=2, holes=True, patches=(16, 9, 2, 1))


def test_without_prefix_and_with_two():
    for prefix in (0, 2):
        plan = Scored(kept=4, match="greedy").plan(tokens_of(prefix=prefix), seen())
        assert plan.map.num_out == prefix + 4
        np.testing.assert_array_equal(plan.map.keep[:, :prefix], [list(range(prefix))] * 2)
        assert (np.asarray(plan.map.into) >= prefix).all()


def test_any_pair_from_a_config():
    model = tokjax.build(ViTConfig((16, 16), 4, width=16, depth=4, heads=2, num_classes=3))
    for match in get_args(Match):
        reduced = tokjax.reduce(model, "scored", score="entropy", match=match, keep_rate=0.5, layers=[1])
        assert reduced.token_counts() == (17, 9, 9, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "size"}, r"score='size': must be one of cls_attention, key_norm, energy, entropy, random"),
        ({"match": "nearest"}, r"match='nearest': must be one of bipartite, greedy, density"),
        ({"rest": "keep"}, r"rest='keep': must be one of merge, drop"),
        ({"how": "sum"}, r"how='sum': must be one of size, mean"),
        ({"margin": 1.0}, r"margin=1.0: must be in \[-1, 1\)"),
        ({"keep_rate": 0.0}, r"keep_rate=0.0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Scored(**settings)
