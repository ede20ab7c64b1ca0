"""K-Medoids: both starts, the choice of a medoid, empty clusters, and where it hooks in."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.hooks import ModelInfo
from tokjax.reducers.vit.dpcknn import distances
from tokjax.reducers.vit.kmedoids import KMedoids, farthest, medoids
from tokjax.signals import Signals
from tokjax.token_map import apply
from tokjax.tokens import Tokens

INFO = ModelInfo(depth=12, width=8, heads=2, length=17, prefix=1, grid=(4, 4))
PLACES = np.array([0.0, 1.0, 2.0, 10.0, 11.0, 13.0])


def line(places=PLACES):
    return jnp.asarray(places, jnp.float32)[None, :, None]


def test_farthest_start_takes_the_largest_maximum_distance():
    # From 10, 0 is farthest; then 13, as far from 0 as nobody else; then 1, which is far from 13 though near to 0.
    np.testing.assert_array_equal(farthest(distances(line()), 4, first=3), [[3, 0, 5, 1]])


def test_the_medoid_is_central_to_all_tokens_and_lightly_weighted():
    centres, to = medoids(line(), 2, jnp.array([[9.0, 1, 1, 1, 1, 8]]))
    # Start: 0 and 13. Sums of distances over all: 37, 33, 31, 31, 33, 41: 2 of the left ones, 10 of the right ones.
    np.testing.assert_array_equal(centres, [[2, 3]])
    np.testing.assert_array_equal(to, [[0, 0, 0, 1, 1, 1]])
    heavy, _ = medoids(line(), 2, jnp.array([[9.0, 1, 2, 1, 1, 8]]))
    np.testing.assert_array_equal(heavy, [[1, 3]])


def test_a_cluster_without_members_takes_token_0():
    centres, to = medoids(line([0.0, 0.0, 5.0, 6.0]), 2, jnp.array([[5.0, 4, 1, 1]]), iters=1)
    np.testing.assert_array_equal(centres, [[2, 0]])  # both started at place 0, and the second had nobody
    np.testing.assert_array_equal(to, [[1, 1, 0, 0]])


def test_the_medoids_stay_as_they_are_and_the_map_knows_the_clusters():
    tokens = Tokens(jnp.concatenate([jnp.full((1, 1, 1), 99.0), line()], 1), prefix=1).traced()
    weights = jnp.zeros((1, 1, 7, 7)).at[:, :, :, 1:].set(jnp.array([9.0, 1, 1, 1, 1, 8]) / 21)
    plan = KMedoids(kept=2).plan(tokens, Signals(weights=weights, key=tokens.x[:, :, None]))
    out = apply(plan, tokens)
    np.testing.assert_array_equal(out.x[..., 0], [[99, 2, 10]])
    np.testing.assert_array_equal(out.origin, [[0, 1, 1, 1, 2, 2, 2]])


def test_it_stands_behind_the_block_before():
    hooks = KMedoids(0.5, layers=(0, 6)).hooks(INFO)
    assert [(h.where, h.layer, h.reducer.start) for h in hooks] == [
        ("before_block", 0, "farthest"),
        ("after_block", 5, "attention"),
    ]
    far = KMedoids(0.5, start="farthest").hooks(INFO)
    assert {(h.where, h.reducer.start) for h in far} == {("before_block", "farthest")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "random"}, "start='random': must be one of attention, farthest"),
        ({"iters": 0}, "iters=0: must be at least 1"),
        ({"first": -1}, "first=-1: must be at least 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        KMedoids(**settings)
