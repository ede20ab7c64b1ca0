"""DPC-KNN: densities, peaks, clusters and their means, by hand and with duplicates."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.reducers.vit.dpcknn import DPCKNN, clusters, density, distances
from tokjax.signals import Signals
from tokjax.token_map import apply
from tokjax.tokens import Tokens

BLOBS = np.array([0.0, 0.1, 0.2, 5.0, 5.15, 5.2, 5.3, 9.0, 9.2, 9.4])  # on a line


def line(places=BLOBS):
    return jnp.asarray(places, jnp.float32)[None, :, None]


def test_distances_are_exact_on_the_diagonal_and_for_copies():
    x = np.random.default_rng(0).normal(size=(2, 9, 6)).astype(np.float32)
    x[:, 4] = x[:, 2]
    d = np.asarray(distances(jnp.asarray(x)))
    expected = np.linalg.norm(x[:, :, None].astype(np.float64) - x[:, None], axis=-1)
    assert (np.abs(d - expected) <= np.where(expected == 0, 2e-3, 1e-5)).all()
    assert (d[:, np.arange(9), np.arange(9)] == 0).all()


def test_density_is_that_of_the_nearest_tokens_with_every_copy():
    d = np.abs(BLOBS[:, None] - BLOBS)
    expected = np.exp(-np.square(np.sort(d, -1)[:, :3]).mean(-1))
    np.testing.assert_allclose(density(jnp.asarray(d, jnp.float32)[None], 3)[0], expected, rtol=1e-5)
    copies = np.abs(np.array([0, 0, 0, 0, 1.0])[:, None] - np.array([0, 0, 0, 0, 1.0]))
    np.testing.assert_allclose(
        density(jnp.asarray(copies, jnp.float32)[None], 3)[0], [1, 1, 1, 1, np.exp(-2 / 3)], rtol=1e-6
    )
    np.testing.assert_allclose(density(jnp.zeros((1, 2, 2)), 5), 1)  # fewer tokens than neighbours


def test_peaks_are_centres_and_tokens_go_to_the_nearest():
    found = clusters(line(), 3, neighbours=3)
    assert sorted(found.keep[0].tolist()) == [1, 5, 8]
    groups = np.asarray(found.keep)[0][np.asarray(found.dest())[0]]
    np.testing.assert_array_equal(groups, [1, 1, 1, 5, 5, 5, 5, 8, 8, 8])


def test_clusters_are_averaged_plainly_or_by_size():
    size = jnp.array([[1.0, 1, 2, 1, 1, 1, 1, 3, 1, 1]])
    tokens = Tokens(line(), size=size)
    plain, sized = (
        apply(DPCKNN(kept=3, neighbours=3, how=how).plan(tokens, Signals()), tokens) for how in ("mean", "size")
    )
    np.testing.assert_allclose(np.sort(plain.x[0, :, 0]), [0.1, 5.1625, 9.2], rtol=1e-5)
    np.testing.assert_allclose(np.sort(sized.x[0, :, 0]), [0.125, 5.1625, 9.12], rtol=1e-5)
    np.testing.assert_array_equal(np.sort(sized.size[0]), [4, 4, 5])
    untracked = Tokens(line())
    assert apply(DPCKNN(kept=3).plan(untracked, Signals()), untracked).size is None


def test_all_equal_tokens_come_in_index_order():
    np.testing.assert_array_equal(clusters(jnp.ones((1, 6, 4)), 3).keep, [[0, 1, 2]])


def test_noise_breaks_ties_and_is_off_by_default():
    tokens = Tokens(jnp.ones((1, 6, 4)).at[0, 5].set(2))
    plain = DPCKNN(kept=2).plan(tokens, Signals())
    again = DPCKNN(kept=2).plan(tokens, Signals())
    np.testing.assert_array_equal(plain.map.keep, again.map.keep)
    drawn = {int(DPCKNN(kept=2, noise=1e-2, seed=s).plan(tokens, Signals()).map.keep[0, 0]) for s in range(12)}
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neighbours": 0}, "neighbours=0: must be at least 1"),
        ({"how": "max"}, "how='max': must be 'mean' or 'size'"),
        ({"noise": -1.0}, "noise=-1.0: must be at least 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        DPCKNN(**settings)
