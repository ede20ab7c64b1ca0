"""Two views and the box around them."""

import numpy as np
from PIL import Image
import pytest

from tokjax import data
from tokjax.data.views import Box, Colours, Views, enclosing_box

PLAIN = Colours(jitter=0, grey=0, blur=0, solarise=0)
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)


def test_the_third_box_holds_the_others_and_reaches_every_border():
    rng, first, second = np.random.default_rng(0), Box(9, 7, 20, 11), Box(5, 12, 12, 30)
    boxes = np.array([enclosing_box(first, second, 40, 56, rng) for _ in range(400)])
    top, left, height, width = boxes.T
    assert top.min() == 0 and top.max() == 5 and left.min() == 0 and left.max() == 7
    assert (top + height).min() == 29 and (top + height).max() == 40
    assert (left + width).min() == 42 and (left + width).max() == 56


def test_views_are_crops_of_the_image():
    transform = Views((16, 20), colours=PLAIN)
    made = transform(IMAGE, np.random.default_rng(3))
    assert made["image"].shape == (*transform.size, 3) == (48, 20, 3) and made["boxes"].shape == (3, 4)
    for view, box in zip(made["image"].reshape(3, 16, 20, 3), made["boxes"], strict=True):
        top, left, height, width = box
        crop = Image.fromarray(IMAGE[top : top + height, left : left + width])
        np.testing.assert_array_equal(view, crop.resize((20, 16), Image.Resampling.BICUBIC))
    area = made["boxes"][:2, 2:].prod(1) / (40 * 56)
    assert (area > 0.45).all()
    again = transform(IMAGE, np.random.default_rng(3))
    assert all((made[name] == again[name]).all() for name in made)


def test_crops_alone_are_recoloured():
    boxes, changed = [], []
    for seed in range(20):
        plain, coloured = (Views((16, 16), colours=c)(IMAGE, np.random.default_rng(seed)) for c in (PLAIN, Colours()))
        boxes.append((plain["boxes"] == coloured["boxes"]).all())
        changed.append((plain["image"] != coloured["image"]).reshape(3, -1).any(1))
    assert all(boxes)
    assert np.mean(changed, 0).tolist()[2] == 0 and (np.mean(changed, 0)[:2] > 0.6).all()


OFF = {"jitter": 0, "grey": 0, "blur": 0, "solarise": 0}


def test_each_operation():
    rng = np.random.default_rng(0)
    grey = Colours(**{**OFF, "grey": 1})(IMAGE, rng)
    assert (grey == grey[..., :1]).all() and np.ptp(grey) > 100
    blurred = Colours(**{**OFF, "blur": 1}, sigma=(1.5, 1.5))(IMAGE, rng)
    assert blurred.std() < 0.6 * IMAGE.std() and abs(blurred.mean() - IMAGE.mean()) < 3
    inverted = Colours(**{**OFF, "solarise": 1})(IMAGE, rng)
    np.testing.assert_array_equal(inverted, np.where(IMAGE < 128, IMAGE, 255 - IMAGE))
    still = Colours(jitter=1, brightness=0, contrast=0, saturation=0, hue=0, grey=0, blur=0, solarise=0)(IMAGE, rng)
    np.testing.assert_array_equal(still, IMAGE)
    red = np.tile(np.array([255, 0, 0], np.uint8), (4, 4, 1))
    only = {**OFF, "jitter": 1, "brightness": 0, "contrast": 0, "saturation": 0}
    turned = np.array([Colours(**only, hue=0.5)(red, np.random.default_rng(seed))[0, 0] for seed in range(30)])
    assert (turned.max(1) == 255).all() and (turned[:, 2] > 200).any() and (turned[:, 1] > 200).any()


def test_in_batches_and_after_a_restart():
    """On scenes, whose labels of places such views leave behind; the place in the stream decides what is drawn."""
    config = data.default_config()
    config.source, config.image_size, config.augment.crop = "scenes", (48, 48), "none"
    config.scenes.train_count = 16

    def loader():
        return data.make(config, "train", batch_size=4, train=True, seed=1, transform=Views((24, 24)))

    batches, again = iter(loader()), iter(loader())
    first = [next(batches) for _ in range(2)]
    state, third = batches.get_state(), next(batches)
    assert third["image"].shape == (4, 72, 24, 3) and third["boxes"].dtype == np.int32
    again.set_state(state)
    resumed = next(again)
    for name in ("image", "boxes", "label"):
        np.testing.assert_array_equal(resumed[name], third[name])
    assert (first[0]["boxes"] != first[1]["boxes"]).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Colours(grey=1.5), "grey must be between 0 and 1, got 1.5"),
        (lambda: Colours(hue=0.6), "hue must be between 0 and 0.5"),
        (lambda: Colours(sigma=(2.0, 1.0)), "sigma must be two rising numbers"),
        (lambda: Views((0, 4)), "size must be"),
        (lambda: Views((4, 4), scale=(0.9, 0.5)), "scale must be two rising numbers"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
