import contextlib
import io

from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import encode, plain
import numpy as np
from PIL import Image
import pytest

from tokjax.data.transforms import (
    Evaluation,
    ImageError,
    Mix,
    Normalise,
    Training,
    cutmix_box,
    decode,
    fit,
    pad_crop,
    resize,
    resized_crop_box,
    smooth_one_hot,
)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


class TestDecode:
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_turns_upright(self, orientation):
        upright = Image.fromarray(noise(4, 6, 3))
        # How a camera stores an upright scene under each orientation: the inverse of what a viewer must do.
        stored = {
            1: lambda image: image,
            2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
            3: lambda image: image.rotate(180),
            4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
            5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
            6: lambda image: image.rotate(90, expand=True),
            7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
            8: lambda image: image.rotate(-90, expand=True),
        }[orientation](upright)
        exif = Image.Exif()
        exif[0x0112] = orientation
        np.testing.assert_array_equal(decode(saved(stored, exif=exif)), np.asarray(upright))

    def test_modes_become_rgb(self):
        grey = noise(5, 7)
        as_rgb = np.repeat(grey[..., None], 3, axis=-1)
        image = Image.fromarray(grey)
        np.testing.assert_array_equal(decode(saved(image)), as_rgb)
        np.testing.assert_array_equal(decode(saved(image.convert("LA"))), as_rgb)
        np.testing.assert_array_equal(decode(saved(image.convert("RGBA"))), as_rgb)
        np.testing.assert_array_equal(decode(saved(Image.fromarray(grey.astype(np.uint16) * 257))), as_rgb)
        cmyk = decode(saved(Image.fromarray(as_rgb).convert("CMYK"), "JPEG", quality=100))
        assert abs(cmyk.astype(int) - as_rgb).mean() < 8
        palette = Image.fromarray(grey % 4).convert("P")
        assert decode(saved(palette, transparency=b"\x00\xff\x80\x10")).shape == (5, 7, 3)

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (None, "no bytes"),
            (b"", "no bytes"),
            (b"plain text", "not an image"),
            (saved(Image.fromarray(noise(64, 64, 3)), "JPEG")[:800], "truncated"),
            (encode(noise(64, 64, 3))[:4000], "truncated"),
            (encode(noise(8, 8, 3))[:20], r"."),
        ],
    )
    def test_damage_is_an_image_error(self, data, reason):
        with pytest.raises(ImageError, match=reason):
            decode(data)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 1000), st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP"]))
    def test_a_changed_byte_gives_an_image_or_an_image_error(self, where, value, file_format):
        data = bytearray(encode(noise(16, 16, 3), file_format))
        data[where % len(data)] = value
        with contextlib.suppress(ImageError):
            assert decode(bytes(data)).shape[-1] == 3


class TestFit:
    @pytest.mark.parametrize("shape", [(300, 200), (200, 300), (37, 91), (224, 224)])
    @pytest.mark.parametrize("crop_pct", [1.0, 0.875])
    def test_short_side_then_centre(self, shape, crop_pct):
        image = noise(*shape, 3)
        short = int(32 / crop_pct)
        height, width = shape
        large = (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
        whole = np.asarray(Image.fromarray(image).resize(large[::-1], Image.Resampling.BICUBIC))
        top, left = round((large[0] - 32) / 2), round((large[1] - 32) / 2)
        np.testing.assert_array_equal(fit(image, (32, 32), crop_pct=crop_pct), whole[top : top + 32, left : left + 32])

    @settings(max_examples=50, deadline=None)
    @given(st.tuples(*[st.integers(1, 60)] * 4), st.floats(0.3, 1), st.sampled_from(["short", "square"]))
    def test_always_reaches_the_size(self, sides, crop_pct, mode):
        assert fit(noise(*sides[:2], 3), sides[2:], mode=mode, crop_pct=crop_pct).shape == (*sides[2:], 3)

    def test_square_cuts_nothing(self):
        image = noise(20, 40, 3)
        np.testing.assert_array_equal(fit(image, (16, 16), mode="square", crop_pct=0.5), resize(image, (16, 16)))
        assert fit(image, (20, 40), mode="short") is not None
        np.testing.assert_array_equal(Evaluation((20, 40))(image), image)

    @pytest.mark.parametrize("options", [{"mode": "long"}, {"crop_pct": 0}, {"crop_pct": 1.2}])
    def test_wrong_arguments(self, options):
        with pytest.raises(ValueError, match=next(iter(options)).split("_")[0]):
            fit(noise(8, 8, 3), (8, 8), **options)
        with pytest.raises(ValueError):
            Evaluation((8, 8), **options)


class TestTraining:
    def test_pad_crop_is_a_window_of_the_padded_image(self):
        image = noise(8, 6, 3)
        padded = np.pad(image, ((3, 3), (3, 3), (0, 0)))
        windows = {padded[y : y + 8, x : x + 6].tobytes() for y in range(7) for x in range(7)}
        rng = np.random.default_rng(0)
        seen = {pad_crop(image, 3, rng).tobytes() for _ in range(600)}
        assert seen == windows

    def test_flips_half_of_the_images(self):
        image = plain(1)
        transform = Training((8, 8), flip=True)
        rng = np.random.default_rng(0)
        results = [transform(image, rng) for _ in range(400)]
        flipped = sum(np.array_equal(result, image[:, ::-1]) for result in results)
        kept = sum(np.array_equal(result, image) for result in results)
        assert flipped + kept == 400
        assert 150 < flipped < 250
        assert all(np.array_equal(Training((8, 8), flip=False)(image, rng), image) for _ in range(20))

    @settings(max_examples=100, deadline=None)
    @given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 99))
    def test_resized_crop_boxes_lie_inside(self, height, width, seed):
        top, left, box_height, box_width = resized_crop_box(height, width, np.random.default_rng(seed))
        assert box_height >= 1 and box_width >= 1 and top >= 0 and left >= 0
        assert top + box_height <= height and left + box_width <= width

    def test_resized_crop_boxes_have_the_area_and_the_ratio(self):
        rng = np.random.default_rng(0)
        boxes = np.array([resized_crop_box(400, 400, rng, (0.2, 0.5), (0.5, 2.0)) for _ in range(500)])
        area, ratio = boxes[:, 2] * boxes[:, 3] / 400**2, boxes[:, 3] / boxes[:, 2]
        assert 0.19 < area.min() < 0.22 and 0.48 < area.max() < 0.51
        assert 0.49 < ratio.min() < 0.6 and 1.7 < ratio.max() < 2.02
        assert abs(np.log(ratio).mean()) < 0.1

    def test_the_fallback_of_a_very_long_image_is_its_centre(self):
        assert resized_crop_box(10, 1000, np.random.default_rng(0), scale=(1, 1)) == (0, 493, 10, 13)
        assert resized_crop_box(1000, 10, np.random.default_rng(0), scale=(1, 1)) == (493, 0, 13, 10)

    @pytest.mark.parametrize("crop", ["pad", "resized", None])
    def test_same_generator_same_image(self, crop):
        transform = Training((16, 24), crop=crop, mode="square")
        image = noise(40, 50, 3)
        first, again, other = (transform(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert first.shape == (16, 24, 3)
        assert first.dtype == np.uint8
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other) or crop is None

    @pytest.mark.parametrize(
        "options",
        [{"crop": "random"}, {"crop": "pad", "pad": 9}, {"scale": (0, 1)}, {"scale": (0.5, 1.5)}, {"ratio": (2, 1)}],
    )
    def test_wrong_arguments(self, options):
        with pytest.raises(ValueError, match=list(options)[-1]):
            Training((8, 8), **options)
        with pytest.raises(ValueError, match="size"):
            Training((8, 0))


class TestNormalise:
    def test_is_the_formula(self):
        images = noise(3, 5, 7, 3)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        result = Normalise(mean, std)(images)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, (images / 255 - mean) / std, atol=1e-6)

    def test_writes_where_it_is_told(self):
        images = noise(4, 5, 7, 3)
        out = np.zeros((4, 5, 7, 3), np.float32)
        Normalise()(images[1:3], out=out[1:3])
        np.testing.assert_array_equal(out[1:3], Normalise()(images)[1:3])
        assert not out[[0, 3]].any()

    def test_another_factor(self):
        images = noise(2, 3, 4, 3)
        np.testing.assert_allclose(Normalise(rescale=1 / 127.5)(images), (images / 127.5 - 0.5) / 0.5, atol=1e-6)
        with pytest.raises(ValueError, match="must have 3 channels, got 1"):
            Normalise()(images[..., :1])

    @pytest.mark.parametrize(
        ("name", "value"),
        [("std", (1, 0, 1)), ("std", (1, 1)), ("mean", (0, 0, np.nan)), ("rescale", np.inf)],
    )
    def test_wrong_arguments(self, name, value):
        with pytest.raises(ValueError, match=name):
            Normalise(**{name: value})


class TestMix:
    images = np.random.default_rng(0).standard_normal((6, 12, 10, 3)).astype(np.float32)
    labels = np.array([0, 1, 2, 3, 4, 0], np.int32)

    def test_smoothing_only(self):
        images, targets = Mix(5, label_smoothing=0.1)(self.images, self.labels, np.random.default_rng(0))
        np.testing.assert_array_equal(images, self.images)
        np.testing.assert_allclose(targets, np.eye(5)[self.labels] * 0.9 + 0.1 / 5, atol=1e-7)
        assert targets.dtype == np.float32

    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(0, 10**6),
        st.floats(0.05, 2),
        st.floats(0.05, 2),
        st.floats(0, 1),
        st.floats(0, 1),
    )
    def test_targets_are_distributions(self, seed, mixup, cutmix, prob, smoothing):
        mix = Mix(5, mixup=mixup, cutmix=cutmix, prob=prob, label_smoothing=smoothing)
        images, targets = mix(self.images, self.labels, np.random.default_rng(seed))
        np.testing.assert_allclose(targets.sum(1), 1, atol=1e-5)
        assert targets.min() >= 0
        assert images.dtype == targets.dtype == np.float32
        assert np.isfinite(images).all()

    @pytest.mark.parametrize("seed", range(5))
    def test_mixup_is_one_blend_of_images_and_targets(self, seed):
        images, targets = Mix(5, mixup=1.0)(self.images, self.labels, np.random.default_rng(seed))
        share = targets[1, 1]  # row 1 (class 1) meets row 4 (class 4)
        assert 0 < share < 1
        np.testing.assert_allclose(images, share * self.images + (1 - share) * self.images[::-1], atol=1e-5)
        eye = np.eye(5)[self.labels]
        np.testing.assert_allclose(targets, share * eye + (1 - share) * eye[::-1], atol=1e-6)

    @pytest.mark.parametrize("seed", range(12))
    def test_cutmix_share_is_the_area_that_stayed(self, seed):
        before = self.images.copy()
        images, targets = Mix(5, cutmix=1.0)(self.images, self.labels, np.random.default_rng(seed))
        np.testing.assert_array_equal(self.images, before)
        stayed = (images == self.images).all(-1)
        pasted = (images == self.images[::-1]).all(-1)
        assert (stayed ^ pasted).all()
        assert (stayed == stayed[0]).all()
        np.testing.assert_allclose(targets[1, 1], stayed[1].mean(), atol=1e-6)
        np.testing.assert_allclose(targets[1, 4], pasted[1].mean(), atol=1e-6)
        rows, columns = np.nonzero(pasted[0])
        if len(rows):
            assert np.ptp(rows) + 1 == len(set(rows)) and len(rows) == len(set(rows)) * len(set(columns))

    def test_boxes_follow_the_share(self):
        rng = np.random.default_rng(0)
        boxes = np.array([cutmix_box(100, 50, 0.75, rng) for _ in range(300)])
        height, width = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
        assert (height.max(), width.max()) == (50, 24)
        assert boxes.min() == 0 and boxes[:, 1].max() == 100 and boxes[:, 3].max() == 50

    def test_probabilities(self):
        mix = Mix(5, mixup=1.0, cutmix=1.0, prob=0.6, switch_prob=0.25)
        rng = np.random.default_rng(0)
        kinds = {"none": 0, "mixup": 0, "cutmix": 0}
        for _ in range(2000):
            alpha, boxed = mix._draw(rng)
            kinds["none" if not alpha else "cutmix" if boxed else "mixup"] += 1
        np.testing.assert_allclose([kinds[k] / 2000 for k in kinds], [0.4, 0.45, 0.15], atol=0.03)

    def test_one_hot_with_one_class(self):
        np.testing.assert_array_equal(smooth_one_hot(np.zeros(2, np.int32), 1, 0.3), np.ones((2, 1)))

    @pytest.mark.parametrize(
        "options",
        [{"mixup": -1.0}, {"cutmix": np.inf}, {"prob": 1.1}, {"switch_prob": -0.1}, {"label_smoothing": 2.0}],
    )
    def test_wrong_arguments(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            Mix(5, **options)
        with pytest.raises(ValueError, match="num_classes"):
            Mix(0)
