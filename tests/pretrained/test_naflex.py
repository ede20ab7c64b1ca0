import json

import jax
import numpy as np
from PIL import Image
import pytest

from tokjax.errors import UserError
from tokjax.models.vit import Patches
from tokjax.pretrained.images import resize_square
from tokjax.pretrained.naflex import Naflex, fit


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


# What transformers' get_image_size_for_max_num_patches gives.
SIZES = {
    (256, 256, 16, 256): (256, 256),
    (375, 500, 16, 256): (224, 288),
    (1000, 10, 16, 256): (2048, 32),
    (1, 10000, 16, 256): (16, 4096),
    (1, 1, 16, 256): (112, 112),  # scales end at 100
    (480, 640, 14, 1): (14, 14),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes(case):
    assert fit(*case) == SIZES[case]


@pytest.mark.parametrize("seed", range(20))
def test_the_largest_size_that_fits(seed):
    rng = np.random.default_rng(seed)
    height, width, most = (int(x) for x in (rng.integers(50, 2000), rng.integers(50, 2000), rng.integers(16, 600)))
    down, across = (side // 16 for side in fit(height, width, 16, most))
    assert down * across <= most
    # The next larger scale at which a side gains a patch does not fit.
    larger = 1.0001 * min(down * 16 / height, across * 16 / width)
    assert np.ceil(height * larger / 16) * np.ceil(width * larger / 16) > most


def test_patches_are_rows_columns_channels():
    run = Naflex(4, 20, mean=(0.0,) * 3, std=(1.0,) * 3, rescale=1.0)
    images = [noise(40, 60), Image.fromarray(noise(64, 16)).convert("RGBA"), noise(30, 30)]
    out = run(images)
    assert isinstance(out, Patches)
    assert (out.patches.dtype, out.valid.dtype, out.shape.dtype) == (np.float32, bool, np.int32)
    assert out.patches.shape == (3, 20, 48)
    assert out.shape.tolist() == [[4, 5], [8, 2], [4, 4]]
    out.check(48)
    for i, image in enumerate(images):
        down, across = out.shape[i]
        n = down * across
        np.testing.assert_array_equal(out.valid[i], np.arange(20) < n)
        assert not out.patches[i, n:].any()
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
        resized = np.asarray(resize_square(picture, (4 * down, 4 * across), "bilinear"))
        for row in range(down):
            for column in range(across):
                patch = resized[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                np.testing.assert_array_equal(out.patches[i, row * across + column], patch.ravel())


def test_normalised_pixels():
    image = noise(16, 32, 1)
    out = Naflex(16, 2, resize=False, mean=(0.25,), std=(0.5,))([image])
    want = (image.reshape(16, 2, 16).transpose(1, 0, 2).reshape(2, 256) / 255 - 0.25) / 0.5
    np.testing.assert_allclose(out.patches[0], want, atol=1e-6)


def test_batches_and_files(tmp_path):
    batch = np.stack([noise(30, 40, seed=i) for i in range(3)])
    path = tmp_path / "image.png"
    Image.fromarray(batch[0]).save(path)
    run = Naflex(8, 12)
    jax.tree.map(np.testing.assert_array_equal, run(batch), run([path, batch[1], batch[2]]))
    assert run([]).patches.shape == (0, 12, 192)


def test_images_that_are_not_resized():
    run = Naflex(8, 12, resize=False)
    assert run([noise(24, 32)]).shape.tolist() == [[3, 4]]
    for height, width in ((24, 30), (32, 32)):
        with pytest.raises(ValueError, match=rf"images\[0\]: .*{height}x{width} pixels.*multiples of 8.*12 patches"):
            run([noise(height, width)])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("cat.jpg", "one str"),
        (noise(8, 8), r"\(8, 8, 3\)"),
        ([noise(8, 8).astype(np.float32)], "float32"),
    ],
)
def test_bad_images_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        Naflex()(images)


def test_files_that_cannot_be_read():
    with pytest.raises(UserError, match=r"images\[1\]: nowhere\.png"):
        Naflex()([noise(8, 8), "nowhere.png"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filter": "nearest"}, "filter = 'nearest'"),
        ({"patch_size": 0}, "patch_size = 0"),
        ({"max_patches": 0}, "max_patches = 0"),
        ({"max_patches": 12.0}, r"max_patches = 12\.0; it must be a whole number"),
        ({"patch_size": 16.0}, r"patch_size = 16\.0; it must be a whole number"),
        ({"std": (0.0,) * 3}, "std ="),
        ({"mean": (0.5, 0.5)}, "mean ="),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Naflex(**fields)


def test_to_and_from_plain_values():
    run = Naflex(14, 100, False, "bicubic", (0.1,), (0.2,), 1.0)
    again = Naflex.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again == run
    assert hash(again) == hash(run)
    assert run.at((64, 64)) is run
    with pytest.raises(ValueError, match="colour"):
        Naflex.from_dict({**run.to_dict(), "colour": True})
