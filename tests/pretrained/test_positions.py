import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from tokjax.pretrained.positions import resize_grid, resize_matrix, resize_positions

MODES = [(method, antialias) for method in ("bicubic", "bilinear") for antialias in (False, True)]


@pytest.mark.parametrize("mode", [("bicubic", True), ("bilinear", False), ("bilinear", True)])
@pytest.mark.parametrize("size", [(24, 24), (7, 7), (10, 20), (1, 3)])
def test_equals_jax_image_where_jax_has_the_mode(mode, size):
    grid = np.random.default_rng(0).standard_normal((14, 11, 3), dtype=np.float32)
    method = {"bicubic": "cubic", "bilinear": "linear"}[mode[0]]
    want = jax.image.resize(grid, (*size, 3), method, antialias=mode[1])
    np.testing.assert_allclose(resize_grid(grid, size, *mode), want, atol=1e-5)


def test_plain_bicubic_is_keys_with_three_quarters_and_repeated_edges():
    # Doubling: centres lie a quarter off the rows. k(t) for a = -0.75 at 1/4, 3/4, 5/4, 7/4:
    near, middle, far, edge = 0.87890625, 0.26171875, -0.10546875, -0.03515625
    matrix = resize_matrix(4, 8, "bicubic", antialias=False)
    np.testing.assert_allclose(matrix[3], [far, near, middle, edge], atol=1e-12)
    # Output 0 lies at -0.25: its taps -2, -1 and 0 are all row 0.
    np.testing.assert_allclose(matrix[0], [edge + middle + near, far, 0, 0], atol=1e-12)


def test_plain_bicubic_is_what_jax_does_not_have():
    grid = np.random.default_rng(0).standard_normal((14, 14, 1), dtype=np.float32)
    jaxs = jax.image.resize(grid, (7, 7, 1), "cubic", antialias=False)
    assert np.abs(resize_grid(grid, (7, 7)) - jaxs).max() > 0.01


@hypothesis.given(old=st.integers(1, 20), new=st.integers(1, 40), mode=st.sampled_from(MODES))
@hypothesis.settings(deadline=None)
def test_rows_sum_to_one_and_mirror(old, new, mode):
    matrix = resize_matrix(old, new, *mode)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)
    if old == new:
        np.testing.assert_array_equal(matrix, np.eye(old))


@pytest.mark.parametrize("mode", MODES)
def test_jax_arrays_stay_jax_and_trace(mode):
    grid = np.random.default_rng(0).standard_normal((5, 4, 3), dtype=np.float32)
    traced = jax.jit(lambda g: resize_grid(g, (8, 3), *mode))(grid)
    assert isinstance(traced, jax.Array)
    assert traced.dtype == np.float32
    np.testing.assert_allclose(traced, resize_grid(grid, (8, 3), *mode), atol=1e-6)


def test_prefix_rows_are_kept_and_low_precision_is_widened():
    table = np.random.default_rng(0).standard_normal((1, 2 + 12, 8)).astype(np.float16)
    out = resize_positions(table, 2, (3, 4), (6, 2), "bicubic", antialias=True)
    assert out.shape == (1, 2 + 12, 8)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out[:, :2], table[:, :2])
    want = resize_grid(table[0, 2:].reshape(3, 4, 8).astype(np.float32), (6, 2), "bicubic", antialias=True)
    np.testing.assert_array_equal(out[0, 2:], want.reshape(12, 8))


def test_the_same_grid_changes_nothing():
    table = np.random.default_rng(0).standard_normal((1, 13, 8), dtype=np.float32)
    np.testing.assert_array_equal(resize_positions(table, 1, (3, 4), (3, 4)), table)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resize_matrix(4, 0), "4 rows cannot be resized to 0"),
        (lambda: resize_matrix(4, 4, "nearest"), "'nearest'"),
        (lambda: resize_grid(np.zeros((4, 4)), (2, 2)), r"\(4, 4\)"),
        (lambda: resize_positions(np.zeros((1, 17, 8)), 0, (4, 4), (2, 2)), r"\[1, 16, C\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
