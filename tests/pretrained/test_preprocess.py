import dataclasses
import json

import numpy as np
from PIL import Image
import pytest

from tokjax.errors import UserError
from tokjax.pretrained import preprocess as pp
from tokjax.pretrained.naflex import Naflex
from tokjax.pretrained.preprocess import Preprocess


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


PLAIN = Preprocess((8, 8), "square", (8, 8), crop=False, mean=(0.0,) * 3, std=(1.0,) * 3, rescale=1.0)
FLOATS = Preprocess((8, 6), "square", (8, 6), "bilinear", crop=False, float_resize=True)


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


def test_targets_that_are_not_square_are_just_covered():
    resized = pp.resize_short(Image.new("RGB", (100, 100)), (40, 20))
    assert resized.size == (40, 40)
    run = pp.timm_eval((48, 32), crop_pct=0.9)
    assert run.resize_to == (53, 35)
    assert run([noise(60, 200), noise(200, 60)]).shape == (2, 48, 32, 3)


@pytest.mark.parametrize("crop_pct", [0, -0.5, 1.1])
def test_a_share_that_no_crop_has(crop_pct):
    with pytest.raises(ValueError, match=f"crop_pct = {crop_pct}; allowed is above 0 and at most 1"):
        pp.timm_eval((32, 32), crop_pct)


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
        ({"mean": (float("nan"),) * 3}, "finite"),
        ({"rescale": float("inf")}, "finite"),
        ({"std": (1e-44, 1.0, 1.0)}, "finite"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**{"size": (224, 224), **fields})


@pytest.mark.parametrize(
    "run",
    [
        pp.timm_eval((224, 224)),
        pp.timm_eval((48, 32), 0.9),
        pp.timm_eval((384, 384), 1.0, "bilinear", crop_mode="squash"),
        pp.script_eval((224, 224)),
        PLAIN,
        FLOATS,
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
        Preprocess((96, 64), "square", (96, 64), crop=False, mean=pp.HALF, std=pp.HALF),
        FLOATS,
    ],
)
def test_processors_round_trip(run):
    again = pp.from_processor(json.loads(json.dumps(pp.to_processor(run))), Preprocess((99, 99), filter="bicubic"))
    assert again == Preprocess(**{**run.to_dict(), "crop_rule": "hf"})


@pytest.mark.parametrize(
    "run",
    [
        pp.timm_eval((48, 32), 0.9),  # covers a rectangle
        Preprocess((224, 224), "square", 256, float_resize=True),
        Preprocess((224, 224), "short", 256, float_resize=True),
    ],
)
def test_what_no_processor_does(run):
    assert pp.to_processor(run) is None


def test_the_class_of_a_processor_can_be_chosen():
    assert pp.to_processor(DEFAULT)["image_processor_type"] == "ViTImageProcessor"
    assert pp.to_processor(DEFAULT, "SiglipImageProcessor")["image_processor_type"] == "SiglipImageProcessor"
    with pytest.raises(ValueError, match=r"CLIPImageProcessor.*ViTImageProcessor or SiglipImageProcessor"):
        pp.to_processor(DEFAULT, "CLIPImageProcessor")


# Where a file is silent, transformers' classes decide, not the default given.
CLASSES = {
    "CLIPImageProcessor": ("short", 224, True, "bicubic", pp.CLIP_MEAN),
    "CLIPImageProcessorFast": ("short", 224, True, "bicubic", pp.CLIP_MEAN),
    "CLIPFeatureExtractor": ("short", 224, True, "bicubic", pp.CLIP_MEAN),
    "BitImageProcessor": ("short", 224, True, "bicubic", pp.CLIP_MEAN),
    "SiglipImageProcessor": ("square", 224, False, "bicubic", pp.HALF),
    "ViTImageProcessor": ("square", 224, False, "bilinear", pp.HALF),
    "ViTFeatureExtractor": ("square", 224, False, "bilinear", pp.HALF),
    "DeiTImageProcessorFast": ("square", 256, True, "bicubic", pp.HALF),
    "DINOv3ViTImageProcessor": ("square", 224, False, "bilinear", pp.IMAGENET_MEAN),
    "DINOv3ViTImageProcessorFast": ("square", 224, False, "bilinear", pp.IMAGENET_MEAN),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_processors(name):
    run = pp.from_processor({"image_processor_type": name}, Preprocess((99, 99), "short", 111))
    assert (run.resize, run.resize_to, run.crop, run.filter, run.mean) == CLASSES[name]
    assert run.size == (224, 224)
    assert run.crop_rule == "hf"
    assert run.float_resize == name.startswith("DINOv3")


def test_one_number_is_the_short_side_of_clip():
    """The files of OpenAI's CLIP on the hub."""
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}
    assert pp.from_processor(old, DEFAULT) == dataclasses.replace(pp.clip_eval((224, 224)), crop_rule="hf")
    assert pp.from_processor({**old, "feature_extractor_type": "ViTFeatureExtractor"}, DEFAULT).resize == "square"
    unnamed = {"size": 256, "crop_size": 224}
    assert pp.from_processor(unnamed, pp.clip_eval((224, 224))).resize == "short"
    assert pp.from_processor({"size": 256}, pp.clip_eval((224, 224))).resize == "square"


def test_dinov2s_processor():
    file = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 256, "longest_edge": None},
        "crop_size": {"height": 224, "width": 224},
        "image_mean": list(pp.IMAGENET_MEAN),
        "image_std": list(pp.IMAGENET_STD),
    }
    want = Preprocess((224, 224), "short", 256, crop_rule="hf")
    assert pp.from_processor(file, DEFAULT) == want
    assert pp.from_processor({"image_processor": file, "processor_class": "X"}, DEFAULT) == want


def test_one_mean_for_all_channels():
    run = pp.from_processor({"image_mean": 0.25, "image_std": 0.5}, DEFAULT)
    assert (run.mean, run.std) == ((0.25,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("processor", "default", "message"),
    [
        ({"image_processor_type": "Siglip2ImageProcessor"}, DEFAULT, "patches of images of any size"),
        ({"image_processor_type": "SiglipImageProcessor"}, Naflex(), "images of one size"),
        ({"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875}, DEFAULT, "crop_pct"),
        ({"do_pad": True}, DEFAULT, "do_pad"),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, DEFAULT, "Without a crop"),
        ({"size": "224"}, DEFAULT, "size = '224'"),
    ],
)
def test_processors_that_do_something_else(processor, default, message):
    with pytest.raises(UserError, match=message):
        pp.from_processor(processor, default)


def test_naflex_processors():
    file = {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 576, "patch_size": 14, "resample": 3}
    run = pp.from_processor(file, Naflex())
    assert run == Naflex(14, 576, filter="bicubic")
    assert pp.from_processor(json.loads(json.dumps(pp.to_processor(run))), Naflex(8, 8)) == run
    still = Naflex(resize=False, mean=(0.1, 0.2, 0.3))
    assert pp.from_processor(pp.to_processor(still, "Siglip2ImageProcessor"), Naflex()) == still


def test_openclips_settings():
    assert pp.from_openclip({}, (224, 224)) == pp.clip_eval((224, 224))
    siglip = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash", "size": 256}
    run = pp.from_openclip(siglip, (224, 224))
    assert run == Preprocess((256, 256), "square", 256, crop=False, mean=pp.HALF, std=pp.HALF)
    assert pp.from_openclip({"interpolation": "bilinear", "size": [48, 32], "fill_color": 0}, (9, 9)).size == (48, 32)


@pytest.mark.parametrize(
    "settings", [{"resize_mode": "longest"}, {"interpolation": "nearest"}, {"std": [0, 1, 1]}, {"size": "large"}]
)
def test_openclips_settings_that_are_not_known(settings):
    with pytest.raises(UserError, match="preprocess_cfg"):
        pp.from_openclip(settings, (224, 224))


def test_floats_are_resized_without_rounding():
    image = noise(37, 53)
    run = dataclasses.replace(FLOATS, mean=(0.0,) * 3, std=(1.0,) * 3)
    bands = [Image.fromarray(np.float32(image[..., c]) * np.float32(1 / 255)) for c in range(3)]
    want = np.stack([np.asarray(band.resize((6, 8), Image.Resampling.BILINEAR)) for band in bands], -1)
    np.testing.assert_allclose(run([image])[0], want, atol=1e-6)
    rounded = dataclasses.replace(run, float_resize=False)
    assert 1e-4 < np.abs(run([image]) - rounded([image])).max() < 2 / 255
    np.testing.assert_array_equal(np.asarray(run.transform(image)), np.asarray(rounded.transform(image)))


def test_either_kind_from_plain_values():
    for run in (PLAIN, FLOATS, Naflex(14, 100)):
        assert pp.from_dict(run.to_dict()) == run


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
