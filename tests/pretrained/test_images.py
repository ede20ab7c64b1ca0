import io
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from tokjax.errors import UserError
from tokjax.pretrained import images as im
from tokjax.pretrained.preprocess import Preprocess


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PLAIN = Preprocess((8, 8), "square", (8, 8), crop=False, mean=(0.0,) * 3, std=(1.0,) * 3, rescale=1.0)
RGB = Image.fromarray(noise(8, 8))
GREY = RGB.convert("L")
GREYS = np.repeat(np.asarray(GREY)[..., None], 3, -1)
PALETTE = RGB.convert("P", palette=Image.Palette.ADAPTIVE)
DEEP = (np.asarray(GREY).astype(np.uint16) << 8) + 7
WITH_ALPHA = np.concatenate([np.asarray(RGB), noise(8, 8, 1, seed=1)], -1)

KINDS = {
    "grey": (GREY, GREYS),
    "grey array": (np.asarray(GREY), GREYS),
    "grey array with an axis": (np.asarray(GREY)[..., None], GREYS),
    "grey with alpha": (Image.merge("LA", (GREY, GREY)), GREYS),
    "black and white": (GREY.convert("1"), np.asarray(GREY.convert("1").convert("RGB"))),
    "alpha": (Image.fromarray(WITH_ALPHA), np.asarray(RGB)),
    "alpha array": (WITH_ALPHA, np.asarray(RGB)),
    "palette": (PALETTE, np.asarray(PALETTE.convert("RGB"))),
    "palette with alpha": (PALETTE.convert("PA"), np.asarray(PALETTE.convert("RGB"))),
    "cmyk": (RGB.convert("CMYK"), np.asarray(RGB.convert("CMYK").convert("RGB"))),
    "cmyk file": (encoded(RGB.convert("CMYK"), "TIFF"), np.asarray(RGB.convert("CMYK").convert("RGB"))),
    "ycbcr": (RGB.convert("YCbCr"), np.asarray(RGB.convert("YCbCr").convert("RGB"))),
    "16 bit": (Image.fromarray(DEEP), GREYS),
    "16 bit file": (encoded(Image.fromarray(DEEP)), GREYS),
    "film": (encoded(PALETTE, "GIF", save_all=True, append_images=[GREY]), np.asarray(PALETTE.convert("RGB"))),
    "encoded": (encoded(RGB), np.asarray(RGB)),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_becomes_rgb(name, recwarn):
    image, want = KINDS[name]
    np.testing.assert_array_equal(PLAIN([image])[0], want)
    assert not recwarn.list


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_becomes_grey(name):
    image = im.to_mode(KINDS[name][0], "L")
    assert (image.mode, image.size) == ("L", (8, 8))
    if "palette" not in name and "film" not in name and np.ptp(KINDS[name][1], axis=-1).max() == 0:
        np.testing.assert_array_equal(np.asarray(image), KINDS[name][1][..., 0])


def test_premultiplied_alpha_is_undone():
    opaque = Image.merge("RGBA", (*RGB.split(), Image.new("L", (8, 8), 255)))
    np.testing.assert_array_equal(np.asarray(im.to_mode(opaque.convert("RGBa"))), np.asarray(RGB))


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_transparent_colours_give_their_colours(mode, recwarn):
    image = PALETTE if mode == "P" else RGB.convert(mode)
    transparency = {"P": bytes(range(256)), "RGB": (1, 2, 3), "L": 7}[mode]
    np.testing.assert_array_equal(
        PLAIN([encoded(image, transparency=transparency)])[0], np.asarray(image.convert("RGB"))
    )
    assert not recwarn.list


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_orientation_is_applied_once(format):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    image = noise(6, 8)
    file = encoded(Image.fromarray(image), format, exif=exif)
    turned = np.asarray(im.to_mode(file))
    assert turned.shape == (8, 6, 3)
    np.testing.assert_array_equal(np.asarray(im.to_mode(Image.open(io.BytesIO(file)))), turned)
    if format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(turned, np.rot90(image, -1))


def test_paths_bytes_and_images_are_one(tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(encoded(RGB))
    batch = PLAIN([path, str(path), path.read_bytes(), Image.open(path), RGB])
    np.testing.assert_array_equal(batch, np.stack([np.asarray(RGB)] * 5))


def test_one_lazy_image_many_times():
    image = Image.open(io.BytesIO(encoded(Image.fromarray(noise(300, 300)), "JPEG")))
    batch = Preprocess((32, 32), resize_to=32)([image] * 16)
    assert (batch == batch[0]).all()


JPEG = encoded(Image.fromarray(noise(64, 64)), "JPEG")
DAMAGED = {
    "empty": b"",
    "text": b"not an image, whatever its name says",
    "cut": JPEG[: len(JPEG) // 2],
    "cut in the header": JPEG[:100],
    "cut png": encoded(Image.fromarray(noise(64, 64)))[:5000],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(name, tmp_path):
    path = tmp_path / "damaged.jpg"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(UserError, match=r"images\[1\]: .*damaged\.jpg: "):
        PLAIN([RGB, path, RGB])
    with pytest.raises(UserError, match=f"of {len(DAMAGED[name])} bytes: "):
        PLAIN([DAMAGED[name]])


def test_a_damaged_lazy_image(tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(DAMAGED["cut"])
    for images in ([Image.open(path)], [Image.open(path)] * 2):
        with pytest.raises(UserError, match=r"images\[.\]: .*cut\.jpg: .*truncated"):
            PLAIN(images)


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.png: cannot be read as an image: No such file"):
        PLAIN([tmp_path / "nowhere.png"])
    with pytest.raises(UserError, match=f"{tmp_path.name}: cannot be read"):
        PLAIN([tmp_path])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("I", (8, 8)), "mode 'I'"),
        (Image.new("F", (8, 8)), "mode 'F'"),
        (np.zeros((8, 8, 3), np.float32), "float32"),
        (np.full((8, 8), np.nan), "float64"),
        (np.zeros((8, 8), np.uint16), "uint16"),
        (np.zeros((8, 8, 2), np.uint8), r"\(8, 8, 2\)"),
        (np.zeros((8,), np.uint8), r"\(8,\)"),
        (np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\).*not empty"),
        (None, "NoneType"),
    ],
)
def test_other_things_are_named_with_their_place(image, message):
    with pytest.raises(ValueError, match=rf"images\[2\]: .*{message}"):
        PLAIN([RGB, RGB, image])


@pytest.mark.parametrize("images", ["cat.jpg", Path("cat.jpg"), b"GIF89a", RGB, noise(8, 8)])
def test_one_image_is_no_batch(images):
    with pytest.raises(ValueError, match="a list of images and"):
        PLAIN(images)


def test_short_side_of_either_orientation():
    assert im.resize_short(Image.new("RGB", (53, 37)), 24).size == (34, 24)
    assert im.resize_short(Image.new("RGB", (37, 53)), 24).size == (24, 34)
    assert im.resize_short(Image.new("RGB", (30, 30)), 24).size == (24, 24)


def test_rows_are_resized_before_columns():
    """Pillow 13 begins with columns here, earlier versions with rows: the bytes differ."""
    image = Image.fromarray(noise(130, 76))
    rows = image.resize((205, 130), Image.Resampling.BICUBIC)
    want = np.asarray(rows.resize((205, 114), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(np.asarray(im.resize_square(image, (114, 205))), want)


@pytest.mark.parametrize(("rule", "offsets"), [("torchvision", (0, 2)), ("hf", (0, 1))])
def test_the_odd_pixel_of_a_crop(rule, offsets):
    # 1 and 3 spare pixels: halves 0.5 and 1.5 go to the even 0 and 2, or down.
    image = noise(9, 11)
    top, left = offsets
    cropped = im.centre_crop(Image.fromarray(image), (8, 8), rule)
    np.testing.assert_array_equal(np.asarray(cropped), image[top : top + 8, left : left + 8])


def test_an_image_smaller_than_its_crop():
    with pytest.raises(ValueError, match="10x10 pixels is smaller than the crop of 12x8"):
        im.centre_crop(Image.new("RGB", (10, 10)), (12, 8))


@pytest.mark.parametrize("rule", ["torchvision", "hf"])
@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (20, 20), (1, 1), (1, 40), (40, 1), (200, 9)])
def test_resizing_and_cropping_in_one(shape, rule):
    image = Image.fromarray(noise(*shape))
    resized = im.short_size(*shape, 25)
    got = im.resize_and_crop(image, resized, (21, 22), "bicubic", rule)
    want = im.centre_crop(im.resize_square(image, resized), (21, 22), rule)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("shape", [(40, 200), (200, 40), (3, 301), (301, 3)])
def test_very_elongated_images_are_resampled_where_the_crop_lies(shape, monkeypatch):
    image = Image.fromarray(noise(*shape))
    run = Preprocess((32, 32), resize_to=36, mean=(0.0,) * 3, std=(1.0,) * 3, rescale=1.0)
    whole = run([image])
    monkeypatch.setattr(im, "_MOST_PIXELS", 0)
    assert np.abs(run([image]) - whole).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 10_000), (10_000, 1), (65_000, 2)])
def test_extreme_shapes(shape):
    image = np.full((*shape, 3), 51, np.uint8)
    batch = Preprocess((32, 32), resize_to=36, mean=(0.0,) * 3, std=(1.0,) * 3)([image])
    np.testing.assert_allclose(batch, 0.2, atol=1e-6)
