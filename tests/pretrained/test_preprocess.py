import io
import json

import numpy as np
from PIL import Image
import pytest

from tokjax.errors import UserError
from tokjax.pretrained import preprocess as pp
from tokjax.pretrained.preprocess import Preprocess


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


PLAIN = Preprocess((8, 8), "square", (8, 8), crop=False, mean=(0.0,) * 3, std=(1.0,) * 3, rescale=1.0)


def test_normalised_pixels_of_a_batch_of_that_size():
    batch = np.stack([noise(8, 8, seed=i) for i in range(5)])
    run = Preprocess((8, 8), "square", (8, 8), crop=False)
    want = (batch / 255 - np.array(pp.IMAGENET_MEAN)) / np.array(pp.IMAGENET_STD)
    got = run(batch)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_array_equal(got, run([Image.fromarray(image) for image in batch]))
    np.testing.assert_array_equal(got, run(list(batch)))


def test_resizing_is_pillows():
    image = Image.fromarray(noise(37, 53))
    run = Preprocess((20, 20), "short", 24, mean=(0.0,) * 3, std=(1.0,) * 3, rescale=1.0)
    resized = np.asarray(image.resize((34, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(run([image])[0], resized[2:22, 7:27])
    square = Preprocess(
        (24, 20), "square", (24, 20), "bilinear", crop=False, mean=(0.0,) * 3, std=(1.0,) * 3, rescale=1.0
    )
    np.testing.assert_array_equal(square([image])[0], np.asarray(image.resize((20, 24), Image.Resampling.BILINEAR)))


def test_short_side_of_either_orientation():
    assert pp.resize_short(Image.new("RGB", (53, 37)), 24).size == (34, 24)
    assert pp.resize_short(Image.new("RGB", (37, 53)), 24).size == (24, 34)
    assert pp.resize_short(Image.new("RGB", (30, 30)), 24).size == (24, 24)


def test_targets_that_are_not_square_are_just_covered():
    resized = pp.resize_short(Image.new("RGB", (100, 100)), (40, 20))
    assert resized.size == (40, 40)
    run = pp.timm_eval((48, 32), crop_pct=0.9)
    assert run.resize_to == (53, 35)
    assert run([noise(60, 200), noise(200, 60)]).shape == (2, 48, 32, 3)


@pytest.mark.parametrize(("rule", "offsets"), [("torchvision", (0, 2)), ("hf", (0, 1))])
def test_the_odd_pixel_of_a_crop(rule, offsets):
    # 1 and 3 spare pixels: halves 0.5 and 1.5 go to the even 0 and 2, or down.
    image = noise(9, 11)
    top, left = offsets
    cropped = pp.centre_crop(Image.fromarray(image), (8, 8), rule)
    np.testing.assert_array_equal(np.asarray(cropped), image[top : top + 8, left : left + 8])


def test_other_kinds_of_images_become_rgb():
    rgb = Image.fromarray(noise(8, 8))
    grey = rgb.convert("L")
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    cases = {
        "grey": (grey, np.repeat(np.asarray(grey)[..., None], 3, -1)),
        "grey array": (np.asarray(grey), np.repeat(np.asarray(grey)[..., None], 3, -1)),
        "grey array with an axis": (np.asarray(grey)[..., None], np.repeat(np.asarray(grey)[..., None], 3, -1)),
        "alpha": (np.concatenate([np.asarray(rgb), np.zeros((8, 8, 1), np.uint8)], -1), np.asarray(rgb)),
        "palette": (palette, np.asarray(palette.convert("RGB"))),
        "cmyk": (rgb.convert("CMYK"), np.asarray(rgb.convert("CMYK").convert("RGB"))),
        "16 bit": (
            Image.fromarray((np.asarray(grey).astype(np.uint16) << 8) + 7),
            np.repeat(np.asarray(grey)[..., None], 3, -1),
        ),
    }
    for name, (image, want) in cases.items():
        np.testing.assert_array_equal(PLAIN([image])[0], want, err_msg=name)


def test_a_palette_with_transparency_gives_its_colours(recwarn):
    image = Image.fromarray(noise(8, 8)).convert("P", palette=Image.Palette.ADAPTIVE)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes(range(256)))
    np.testing.assert_array_equal(PLAIN([Image.open(file)])[0], np.asarray(image.convert("RGB")))
    assert not recwarn.list


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    file = io.BytesIO()
    image = noise(6, 8)
    Image.fromarray(image).save(file, "PNG", exif=exif)
    turned = Preprocess((8, 6), "square", (8, 6), crop=False, mean=(0.0,) * 3, std=(1.0,) * 3, rescale=1.0)
    np.testing.assert_array_equal(turned([Image.open(file)])[0], np.rot90(image, -1))


def test_grey_models():
    run = Preprocess((8, 8), "square", 8, crop=False, mean=(0.5,), std=(0.5,))
    batch = noise(8, 8, 1)[None]
    np.testing.assert_allclose(run(batch), (batch / 255 - 0.5) / 0.5, atol=1e-6)


def test_an_empty_batch():
    assert PLAIN([]).shape == (0, 8, 8, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (noise(8, 8), r"\(8, 8, 3\)"),
        (Image.new("RGB", (8, 8)), "one Pillow image"),
        ([noise(8, 8).astype(np.float32)], "float32"),
        ([noise(8, 8, 2)], r"\(8, 8, 2\)"),
        ("cat.jpg", "one str"),
        ([3], "int"),
        ([Image.fromarray(np.zeros((8, 8), np.float32))], "'F'"),
    ],
)
def test_bad_images_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        PLAIN(images)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filter": "nearest"}, "filter = 'nearest'"),
        ({"resize": "long"}, "resize = 'long'"),
        ({"crop_rule": "up"}, "crop_rule = 'up'"),
        ({"resize_to": 200}, "smaller than the crop"),
        ({"crop": False}, "resize must be 'square'"),
        ({"mean": (0.5, 0.5)}, "mean ="),
        ({"std": (0.0, 1.0, 1.0)}, "std ="),
        ({"size": (0, 224)}, "size ="),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**{"size": (224, 224), **fields})


def test_an_image_smaller_than_its_crop():
    with pytest.raises(ValueError, match="10x10 pixels is smaller than the crop of 12x8"):
        pp.centre_crop(Image.new("RGB", (10, 10)), (12, 8))


@pytest.mark.parametrize(
    "run",
    [
        pp.timm_eval((224, 224)),
        pp.timm_eval((48, 32), 0.9),
        pp.timm_eval((384, 384), 1.0, "bilinear", crop_mode="squash"),
        pp.script_eval((224, 224)),
        PLAIN,
    ],
)
def test_to_and_from_plain_values(run):
    again = Preprocess.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again == run
    assert hash(again) == hash(run)


def test_unknown_plain_values_are_refused():
    with pytest.raises(ValueError, match="colour"):
        Preprocess.from_dict({**PLAIN.to_dict(), "colour": True})


def test_published_sizes():
    assert pp.timm_eval((224, 224), 0.9).resize_to == 248
    assert pp.timm_eval((224, 224), 0.875).resize_to == 256
    assert pp.timm_eval((384, 384), 1.0).resize_to == 384
    assert pp.script_eval((224, 224)).resize_to == 256
    assert pp.script_eval((448, 448)).resize_to == 448


def test_another_size_grows_in_proportion():
    run = pp.script_eval((224, 224)).at((112, 112))
    assert (run.size, run.resize_to) == ((112, 112), 128)
    assert pp.script_eval((224, 224)).at((112, 224)).resize_to == (128, 256)
    assert PLAIN.at((8, 8)) is PLAIN


DEFAULT = Preprocess((224, 224), "square", 224, "bilinear", crop=False, mean=pp.HALF, std=pp.HALF)
PROCESSORS = {
    "vit, old": (
        {"size": 384, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        "square",
        384,
        (384, 384),
    ),
    "vit, new": ({"size": {"height": 96, "width": 64}, "resample": 2}, "square", (96, 64), (96, 64)),
    "deit": ({"size": 256, "do_center_crop": True, "crop_size": 224, "resample": 3}, "square", 256, (224, 224)),
    "clip": ({"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}, "short", 224, (224, 224)),
    "crop switched off": ({"size": 224, "crop_size": 200, "do_center_crop": False}, "square", 224, (224, 224)),
    "silent": ({"size": None, "crop_size": None}, "square", 224, (224, 224)),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_reads_hugging_face_processors(name):
    processor, resize, resize_to, size = PROCESSORS[name]
    run = pp.from_processor(processor, DEFAULT)
    assert (run.resize, run.resize_to, run.size) == (resize, resize_to, size)
    assert run.filter == ("bicubic" if processor.get("resample") == 3 else "bilinear")


def test_switches_of_processors():
    run = pp.from_processor({"do_rescale": False, "do_normalize": False}, DEFAULT)
    assert (run.rescale, run.mean, run.std) == (1.0, (0.0,) * 3, (1.0,) * 3)
    assert pp.from_processor({"rescale_factor": 0.5, "image_mean": [0.1] * 3}, DEFAULT).mean == (0.1,) * 3


@pytest.mark.parametrize("processor", [{"size": {"longest_edge": 5}}, {"resample": 0}, {"size": 8, "crop_size": 9}])
def test_processors_that_are_not_understood(processor):
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        pp.from_processor(processor, DEFAULT)


@pytest.mark.parametrize(
    "run",
    [
        DEFAULT,
        Preprocess((224, 224), "square", 256, crop_rule="hf"),
        Preprocess((224, 224), "short", 256, "bilinear", crop_rule="hf", rescale=0.5),
    ],
)
def test_processors_round_trip(run):
    again = pp.from_processor(pp.to_processor(run), Preprocess((99, 99)))
    assert again == Preprocess(**{**run.to_dict(), "crop_rule": "hf"})


def test_no_processor_covers_a_rectangle():
    assert pp.to_processor(pp.timm_eval((48, 32), 0.9)) is None


@pytest.mark.parametrize("run", [pp.timm_eval((224, 224), c) for c in (0.9, 0.875, 0.95, 0.9375, 1.0)])
def test_timm_round_trip(run):
    fields = pp.to_timm(run)
    assert len(str(fields["crop_pct"])) <= 6
    assert fields.pop("input_size") == [3, 224, 224]
    assert pp.timm_eval((224, 224), **fields) == run


def test_timm_crop_modes_and_filters_that_are_not_known():
    with pytest.raises(UserError, match="'border'"):
        pp.timm_eval((224, 224), crop_mode="border")
    with pytest.raises(UserError, match="'random'"):
        pp.timm_eval((224, 224), interpolation="random")
