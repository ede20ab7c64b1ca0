"""A-CLIP's masks: maps between boxes, which patches stay, and a watched teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokjax
from tokjax.hooks import ModelInfo
from tokjax.models.vit import ViTConfig
from tokjax.reducers.vit.aclip import AClip, Watch, moved, relevance, super_patch
from tokjax.signals import Context, Signals
from tokjax.tokens import Tokens

RNG = np.random.default_rng(0)
CONFIG = ViTConfig((24, 24), 4, width=16, depth=2, heads=2, num_classes=0)
MAP = RNG.random((2, 6, 6), np.float32)


def images_of_pixels(map, view, whole, grid):
    """The definition: the map as an image of pixels, cut, and looked at in the middles of the cells."""

    def bilinear(image, height, width):
        for axis, size in ((0, height), (1, width)):
            old = image.shape[axis]
            at = np.maximum((np.arange(size) + 0.5) * old / size - 0.5, 0)
            low = np.minimum(at.astype(int), old - 1)
            high, share = np.minimum(low + 1, old - 1), np.expand_dims(at - low, 1 - axis)
            image = image.take(low, axis) * (1 - share) + image.take(high, axis) * share
        return image

    (top, left, height, width), (above, before, tall, wide) = view, whole
    large = np.pad(bilinear(map.astype(np.float64), tall, wide), 100)
    row, column = 100 + top - above, 100 + left - before
    return bilinear(large[row : row + height, column : column + width], *grid)


@pytest.mark.parametrize("grid", [(6, 6), (4, 10)])
def test_a_map_moves_as_an_image_of_pixels_would(grid):
    boxes = [[[5, 7, 40, 21], [2, 0, 60, 50]], [[0, 30, 9, 33], [4, 10, 30, 41]]]  # the second view sticks out
    got = jax.jit(moved, static_argnums=2)(MAP, jnp.array(boxes), grid)
    want = [images_of_pixels(map, *pair, grid) for map, pair in zip(MAP, boxes, strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert (got[1][:, -1] == 0).all() and (got[1][0] == 0).all() and got[1].max() > 0


def test_the_same_box_gives_the_map_again():
    box = jnp.tile(jnp.array([3, 1, 6, 6]), (2, 2, 1))
    np.testing.assert_allclose(moved(MAP, box, (6, 6)), MAP, atol=1e-6)


def kept(reducer, relevance, boxes=None, prefix=1):
    b, h, w = relevance.shape
    context = Context(grid=(h, w), relevance=jnp.asarray(relevance), boxes=boxes)
    plan = reducer.plan(Tokens(jnp.zeros((b, prefix + h * w, 1)), prefix=prefix), Signals(context=context))
    return np.asarray(plan.map.keep)


def test_whole_super_patches_stay_in_place_order_and_ties_go_to_the_lower_one():
    ones = np.ones((1, 4, 6), np.float32)
    np.testing.assert_array_equal(kept(AClip(0.2), ones), [[0, 1, 2, 3, 4, 7, 8, 9, 10]])
    last = ones.copy()
    last[0, 3, 5] = 5
    np.testing.assert_array_equal(kept(AClip(0.2), last, prefix=0), [[0, 1, 6, 7, 16, 17, 22, 23]])


def test_counts():
    assert [AClip(rate).count(49) for rate in (0.5, 0.3, 0.75, 0, 1)] == [25, 15, 37, 1, 49]
    assert [super_patch(grid, 2) for grid in ((14, 14), (4, 5), (7, 7))] == [(2, 2), (2, 1), (1, 1)]
    assert kept(AClip(0.5), np.ones((1, 4, 5), np.float32)).shape == (1, 1 + 2 * 6)


def test_a_watched_teacher_guides_a_student_which_else_stays_whole():
    """What goes through the model: the map has the attention of every block, and the student's tokens are fewer."""
    model, images = tokjax.build(CONFIG), RNG.normal(size=(2, 24, 24, 3)).astype(np.float32)
    teacher, student = tokjax.reduce(model, Watch()), tokjax.reduce(model, "a_clip", keep_rate=0.5)
    boxes = jnp.tile(jnp.array([[0, 0, 24, 24], [0, 0, 24, 24]]), (2, 1, 1))

    @jax.jit
    def both(params, images):
        watched = teacher.forward(params, images)
        map = relevance(watched.tokens.aux, CONFIG.grid)
        out = student.forward(params, images, context=Context(relevance=map, boxes=boxes), trace=True)
        return watched.logits, map, out.logits, out.trace[0].tokens

    whole, map, masked, tokens = both(model.params, images)
    np.testing.assert_allclose(whole, student(images), atol=1e-5)
    assert student.token_counts() == model.token_counts()
    assert map.shape == (2, 6, 6) and (map.sum((1, 2)) > 0).all() and (map.sum((1, 2)) < 1).all()
    np.testing.assert_array_equal(tokens, [1 + 4 * 5] * 2)
    assert np.abs(masked - whole).max() > 1e-3


def test_bad_input_is_named():
    for settings, message in (({"keep_rate": 1.5}, r"keep_rate=1.5: must be in \[0, 1\]"), ({"pool": 0}, "pool=0")):
        with pytest.raises(ValueError, match=message):
            AClip(**settings)
    info = ModelInfo(depth=2, width=8, heads=2, length=36)
    for reducer in (AClip(), Watch()):
        with pytest.raises(ValueError, match="grid=None"):
            reducer.hooks(info)
    with pytest.raises(ValueError, match=r"relevance has shape \(2, 6, 6\): without context.boxes .* \(4, 9\)"):
        AClip().plan(Tokens(jnp.zeros((2, 36, 1))), Signals(context=Context(grid=(4, 9), relevance=MAP)))
    with pytest.raises(ValueError, match=r"boxes has shape \(2, 4\): must be \(2, 2, 4\)"):
        kept(AClip(), MAP, jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(ValueError, match="2 tokens: a_clip needs all patches"):
        AClip().plan(Tokens(jnp.zeros((2, 2, 1))), Signals(context=Context(grid=(6, 6), relevance=MAP)))
    with pytest.raises(ValueError, match="has no attention of CLS"):
        relevance({}, (6, 6))
