import itertools
import re

import numpy as np
import pytest

from tokjax.data.scenes import BACKGROUND, COLOURS, SEGMENTS, WORDS, Scenes
from tokjax.data.sources import Digits, subset
from tokjax.errors import UserError


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes("train", count=300)


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


class TestForm:
    def test_of_an_example(self, scenes):
        example = scenes[3]
        assert {k: (v.dtype.name, v.shape) for k, v in example.items() if isinstance(v, np.ndarray)} == {
            "image": ("uint8", (48, 48, 3)),
            "segmentation": ("int32", (6, 6)),
            "depth": ("float32", (6, 6)),
        }
        assert example["caption"] == scenes.captions[3][0] and example["label"] == scenes.labels[3]
        assert len(scenes) == len(scenes.captions) == 300
        assert (scenes.num_classes, scenes.class_names[8], len(SEGMENTS)) == (10, "eight", 11)

    def test_size_and_patches(self):
        wide = Scenes("test", size=(32, 64), patch_size=4, count=20)
        assert wide[0]["image"].shape == (32, 64, 3)
        assert wide[0]["depth"].shape == (8, 16)
        assert wide.fields == {"segmentation": ((8, 16), "int32"), "depth": ((8, 16), "float32")}

    def test_how_many_digits(self):
        for few, many in ((1, 1), (2, 3), (3, 3)):
            found = {len(scene.digits) for scene in Scenes("test", digits=(few, many), count=60).scenes}
            assert found == set(range(few, many + 1))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": (50, 48)}, "whole patches of 8"),
            ({"size": (8, 8)}, "at least 16"),
            ({"digits": (0, 2)}, "digits"),
            ({"digits": (2, 4)}, "digits"),
            ({"count": 0}, "count"),
            ({"seed": -1}, "seed"),
        ],
    )
    def test_wrong_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            Scenes("train", **options)
        with pytest.raises(UserError, match="no split 'val' in scenes"):
            Scenes("val")


class TestDeterminism:
    def test_depends_on_split_seed_and_index(self, scenes):
        again, fewer = Scenes("train", count=300), Scenes("train", count=10)
        assert all(equal(scenes[i], again[i]) for i in range(300))
        assert all(equal(scenes[i], fewer[i]) for i in range(10))
        for other in (Scenes("train", count=10, seed=1), Scenes("test", count=10)):
            assert not any(equal(scenes[i], other[i]) for i in range(10))

    def test_splits_share_no_digit(self, scenes):
        for source in (scenes, Scenes("test", count=300)):
            split = re.match(r"scenes/(\w+)", source.name_of(0))[1]
            digits = Digits(split)
            for i, scene in enumerate(source.scenes):
                assert all(digits.labels[digit.image] == digit.value for digit in scene.digits)
                assert all(digits.name_of(digit.image) in source.name_of(i) for digit in scene.digits)


def read(caption: str) -> tuple[str | None, list[tuple[str, str]]]:
    """What a caption says: the layout, and colour and digit from left to right or from top to bottom."""
    named = re.findall(rf"an? (?:({'|'.join(COLOURS)}) )?({'|'.join(WORDS)})\b", caption)
    if len(named) == 1:
        return None, named
    down = bool(re.search("above|over|below|under|top|bottom", caption))
    assert down != bool(re.search("left|right", caption))
    if "between" in caption:
        named = [named[1], named[0], named[2]]
    elif re.search("right of|below|under|from right|from bottom", caption):
        named = named[::-1]
    return ("down" if down else "across"), named


class TestCaptions:
    @pytest.mark.parametrize("colours", [True, False])
    def test_are_true(self, colours):
        source = Scenes("test", colours=colours, count=400)
        for scene in source.scenes:
            layout, named = read(scene.caption)
            along = sorted(scene.digits, key=lambda digit: digit.box[layout == "across"])
            assert named == [(digit.colour if colours else "", WORDS[digit.value]) for digit in along], scene.caption
            for first, second in itertools.pairwise(along):
                axis = int(layout == "across")
                assert first.box[axis] + first.box[2] <= second.box[axis]

    def test_use_many_words(self, scenes):
        kinds = {re.sub("|".join([*COLOURS, *WORDS]), "_", text) for (text,) in scenes.captions}
        assert len(kinds) == 20

    def test_articles(self):
        captions = " ".join(text for (text,) in Scenes("test", colours=False, count=200).captions)
        assert "an eight" in captions and "a eight" not in captions and "an seven" not in captions

    def test_can_be_distinct(self):
        source = Scenes("test", digits=(2, 2), distinct=True, count=500)
        facts = {(s.layout, tuple((d.value, d.colour) for d in s.digits)) for s in source.scenes}
        assert len(facts) == 500
        assert len(Scenes("test", digits=(1, 1), colours=False, distinct=True, count=10)) == 10
        with pytest.raises(UserError, match="only about 10 of 11 can be distinct"):
            Scenes("test", digits=(1, 1), colours=False, distinct=True, count=11)


class TestLabels:
    def test_agree_with_the_pixels(self, scenes):
        """A patch's colour is that of the digit it belongs to, its brightness tells the distance."""
        for index, scene in enumerate(scenes.scenes):
            example = scenes[index]
            patches = example["image"].reshape(6, 8, 6, 8, 3).swapaxes(1, 2)
            shown = {digit.value + 1 for digit in scene.digits}
            assert set(np.unique(example["segmentation"])) <= {0, *shown}
            behind = example["segmentation"] == 0
            assert (example["depth"][behind] == BACKGROUND).all()
            assert np.isin(example["depth"][~behind], np.float32([d.distance for d in scene.digits])).all()
            # Of the bytes of ink at most a few lie in background patches.
            ink = patches.max(-1).sum((2, 3))
            assert ink[behind].sum() < 0.35 * ink.sum()
            assert (ink[~behind] > 0.1 * 64 * 255 * 0.4).all()

    def test_every_digit_has_a_patch(self, scenes):
        for index, scene in enumerate(scenes.scenes):
            assert {0, *(d.value + 1 for d in scene.digits)} == set(np.unique(scenes[index]["segmentation"]))

    def test_depth_is_visible(self):
        source = Scenes("train", digits=(1, 1), count=300)
        distance = np.array([scene.digits[0].distance for scene in source.scenes])
        images = np.stack([source[i]["image"] for i in range(300)]).max(-1).astype(int)
        lit = images > 40
        tall = lit.any(2).sum(1)
        assert np.corrcoef(distance, tall)[0, 1] < -0.9
        assert np.corrcoef(distance, images.max((1, 2)))[0, 1] < -0.8
        assert distance.min() < 1.05 and distance.max() > 1.95

    def test_subset_keeps_its_captions(self, scenes):
        part = subset(scenes, 50)
        assert [part[i]["caption"] for i in range(50)] == [text for (text,) in part.captions]
        assert part.fields == scenes.fields and part.dense
