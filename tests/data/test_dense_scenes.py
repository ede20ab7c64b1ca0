import io
from pathlib import Path

from image_files import encode, plain
import numpy as np
from PIL import Image
import pytest

from tokjax.data.dense import SegmentationFolder, decode_mask, patch_classes
from tokjax.data.transforms import ImageError, fit_labels
from tokjax.errors import UserError


def blocks(classes, side=8):
    return np.kron(np.array(classes, np.uint8), np.ones((side, side), np.uint8))


def write(root: Path, masks: dict[str, np.ndarray], names="background\ncat\ndog\n") -> Path:
    """Images whose red channel is 40 times the class."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, mask in masks.items():
        (root / "labels" / f"{name}.png").write_bytes(encode(mask))
        image = np.zeros((*mask.shape, 3), np.uint8)
        image[..., 0] = 40 * np.minimum(mask, 5)
        (root / "images" / f"{name}.png").write_bytes(encode(image))
    if names:
        (root / "classes.txt").write_text(names)
    return root


class TestSegmentationFolder:
    @pytest.mark.parametrize("size", [(16, 24), (32, 48), (8, 12)])
    def test_image_and_labels_stay_together(self, tmp_path, size):
        write(tmp_path, {"x": blocks([[0, 1, 2], [2, 255, 1]])})
        source = SegmentationFolder(tmp_path, None, size=size, patch_size=size[0] // 4)
        example = source[0]
        assert example["image"].shape == (*size, 3) and example["segmentation"].dtype == np.int32
        assert example["segmentation"].tolist() == np.kron([[0, 1, 2], [2, 255, 1]], np.ones((2, 2))).tolist()
        centres = example["image"][size[0] // 4 :: size[0] // 2, size[1] // 6 :: size[1] // 3, 0]
        np.testing.assert_allclose(centres, [[0, 40, 80], [80, 200, 40]], atol=12)
        assert source.fields == {"segmentation": ((4, 6), "int32")}
        assert (source.num_classes, source.labels.tolist(), source.segments) == (1, [0], ("background", "cat", "dog"))

    def test_every_pixel(self, tmp_path):
        mask = np.random.default_rng(0).integers(0, 3, (20, 30)).astype(np.uint8)
        write(tmp_path, {"x": mask})
        source = SegmentationFolder(tmp_path, None, size=(20, 20))
        np.testing.assert_array_equal(source[0]["segmentation"], mask[:, 5:25])
        np.testing.assert_array_equal(source[0]["image"][..., 0], 40 * mask[:, 5:25])

    def test_splits_and_subfolders(self, tmp_path):
        for split, names in (("train", ("a", "b")), ("val", ("c",))):
            write(tmp_path / split, {name: blocks([[0, 1]]) for name in names}, names="")
        (tmp_path / "val" / "images" / "deep").mkdir()
        (tmp_path / "val" / "labels" / "deep").mkdir()
        for folder in ("images", "labels"):
            (tmp_path / "val" / folder / "c.png").rename(tmp_path / "val" / folder / "deep" / "c.png")
        source = SegmentationFolder(tmp_path, "test", size=(8, 16), patch_size=8, classes=2)
        assert source.name_of(0).endswith("images/deep/c.png") and source.segments == ("0", "1")
        assert source[0]["segmentation"].tolist() == [[0, 1]]
        assert len(SegmentationFolder(tmp_path, "train", size=(8, 16), classes=2)) == 2

    def test_wrong_folders(self, tmp_path):
        with pytest.raises(UserError, match="no images in"):
            SegmentationFolder(tmp_path, None, size=(8, 8))
        write(tmp_path, {"x": blocks([[0, 1]])}, names="")
        with pytest.raises(UserError, match=r"no classes.txt"):
            SegmentationFolder(tmp_path, None, size=(8, 8))
        with pytest.raises(ValueError, match="classes must be 1 to 255"):
            SegmentationFolder(tmp_path, None, size=(8, 8), classes=256)
        with pytest.raises(ValueError, match="whole patches of 3"):
            SegmentationFolder(tmp_path, None, size=(8, 8), patch_size=3, classes=2)
        (tmp_path / "classes.txt").write_text("a\nb\n")
        with pytest.raises(ValueError, match=r"as many as .*classes.txt names \(2\), got 3"):
            SegmentationFolder(tmp_path, None, size=(8, 8), classes=3)
        (tmp_path / "labels" / "x.png").unlink()
        with pytest.raises(UserError, match=r"images without a mask in .*labels: x.png"):
            SegmentationFolder(tmp_path, None, size=(8, 8))

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (blocks([[0, 3]]), "the mask has class 3, the set 3 classes"),
            (blocks([[0, 1]], side=4), r"the mask is \(4, 8\), the image \(8, 16\)"),
            (plain(1), "the mask is RGB, it must have one channel"),
        ],
    )
    def test_bad_masks(self, tmp_path, mask, message):
        write(tmp_path, {"x": blocks([[0, 1]])})
        (tmp_path / "labels" / "x.png").write_bytes(encode(mask))
        with pytest.raises(ImageError, match=message):
            SegmentationFolder(tmp_path, None, size=(8, 8))[0]


class TestMasks:
    def test_modes(self):
        ids = np.arange(12).reshape(3, 4)
        palette = Image.fromarray(ids.astype(np.uint8), "L").convert("P")
        palette.putpalette([255 - value for value in range(256) for _ in range(3)])
        for image in (Image.fromarray(ids.astype(np.uint8)), Image.fromarray(ids.astype(np.uint16)), palette):
            file = io.BytesIO()
            image.save(file, "PNG")
            np.testing.assert_array_equal(decode_mask(file.getvalue()), ids)

    @pytest.mark.parametrize("data", [b"", b"nothing", encode(plain(1))[:60]])
    def test_damage(self, data):
        with pytest.raises(ImageError, match="the mask"):
            decode_mask(data)

    def test_majority(self):
        labels = np.array([[0, 1, 2, 2], [1, 0, 255, 2], [255, 255, 255, 255], [255, 1, 2, 0]])
        assert patch_classes(labels, 2, 3).tolist() == [[0, 2], [255, 0]]
        np.testing.assert_array_equal(patch_classes(labels, 1, 3), labels)

    def test_nearest_is_that_of_pillow(self):
        labels = np.random.default_rng(1).integers(0, 200, (13, 29)).astype(np.int32)
        for size in ((13, 29), (26, 58), (7, 11), (40, 9)):
            want = Image.fromarray(labels.astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
            np.testing.assert_array_equal(fit_labels(labels, size, mode="square"), want)
