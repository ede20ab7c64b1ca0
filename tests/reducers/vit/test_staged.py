"""Counts of the benchmark's table: of the patches at the input, at least one, in padded rows each row's own."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.hooks import ModelInfo
from tokjax.reducers.vit.staged import InputPatches, Tabled, input_patches, tabled
from tokjax.signals import Signals
from tokjax.token_map import apply
from tokjax.tokens import Tokens

INFO = ModelInfo(depth=12, width=8, heads=2, length=197, prefix=1, grid=(14, 14))


def test_counts_are_those_of_the_benchmark():
    published = {0.9: [176, 158, 142], 0.7: [137, 96, 67], 0.5: [98, 49, 24], 0.25: [49, 12, 3]}
    for rate, counts in published.items():
        note, *hooks = Tabled(rate).hooks(INFO)
        assert (note.where, note.layer) == ("input", 0)
        assert [(hook.where, hook.layer) for hook in hooks] == [("before_block", layer) for layer in (3, 6, 9)]
        assert [hook.reducer.count(196) for hook in hooks] == counts


def test_a_location_keeps_at_least_one_and_at_most_all():
    assert tabled(0.1, None, 5, 2) == 1
    assert tabled(1.0, None, 5, 2) == 5
    assert [tabled(0.5, (9, 3), 6, j) for j in (0, 1)] == [6, 3]


def test_locations_that_would_drop_nothing_have_no_hook():
    assert Tabled(1.0).hooks(INFO) == []
    assert [hook.layer for hook in Tabled(kept=(200, 50, 60)).located(INFO)] == [6]


def test_padded_rows_count_what_they_had_at_the_input():
    valid = jnp.arange(17) < jnp.array([[17], [9], [2], [1]])
    tokens = Tokens(jnp.zeros((4, 17, 1)), valid=valid, prefix=1)
    second = Tabled(0.5).located(ModelInfo(depth=12, width=8, heads=2, length=17, prefix=1))[1].reducer
    np.testing.assert_array_equal(input_patches(tokens), [16, 8, 1, 0])
    np.testing.assert_array_equal(second.row_counts(tokens), [4, 2, 1, 0])
    noted = apply(Tabled(0.5).hooks(INFO)[0](tokens, Signals()), tokens)
    np.testing.assert_array_equal(noted.carry["patches"], [16, 8, 1, 0])
    assert InputPatches().plan(noted.replace(valid=None), Signals()) is None, "the first note holds"
    later = tokens.replace(valid=jnp.arange(17) < 4, carry={"patches": jnp.array([16, 12, 8, 1])})
    later = later.replace(valid=jnp.broadcast_to(later.valid, (4, 17)))
    np.testing.assert_array_equal(second.row_counts(later), [3, 3, 2, 1])


def test_counts_that_do_not_fit_the_locations():
    with pytest.raises(ValueError, match=r"kept=\(4, 2\): must have one number for each of layers=\(3, 6, 9\)"):
        Tabled(kept=(4, 2)).hooks(INFO)
