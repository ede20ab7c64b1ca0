"""Images with a class for every pixel: a local folder as people keep Pascal VOC, ADE20K or their own."""

import functools
import io
from pathlib import Path

from jaxtyping import Int, Int32
import numpy as np
from PIL import Image

from tokjax.data.sources import Example, Labelled, find_split, images_under, listing, open_folder, subfolders
from tokjax.data.transforms import ImageError, ResizeMode, decode, fit, fit_labels
from tokjax.errors import UserError

IGNORE = 255  # a pixel that does not count


class SegmentationFolder(Labelled):
    """`path/split/images/**/x.jpg` and `path/split/labels/**/x.png`, masks of class ids in which 255 does not count.

    Image and mask are resized and cut alike (the mask takes the nearest id), so an example has its final size and
    nobody else may move its pixels. `segmentation` int32 [h, w] is the most frequent class of each patch among the
    pixels that count, the lower of two that are equal; 255 where more than half of the patch does not count.

    Masks are single-channel PNG files: grey of 8 or 16 bits, or with a palette, whose numbers are the ids. They have
    the size of their image.

    Args:
        path: the folder; `classes.txt` in it names the classes, one a line, from 0.
        split: a folder in it (`val`, `validation` and `test` stand for each other); None: `path` itself.
        size: height and width of the examples, whole patches.
        patch_size: side of a patch in pixels; 1: a class for every pixel.
        classes: how many; None: as many as `classes.txt` names.
        mode: as in `fit`.
        crop_pct: as in `fit`.

    Raises:
        UserError: no such folder or split, no images, an image without a mask, or nothing that says how many classes.
        ValueError: `size`, `patch_size` or `classes` out of range.
    """

    dense = True

    def __init__(
        self,
        path: str | Path,
        split: str | None,
        *,
        size: tuple[int, int],
        patch_size: int = 1,
        classes: int | None = None,
        mode: ResizeMode = "short",
        crop_pct: float = 1.0,
    ):
        if patch_size < 1 or len(size) != 2 or min(size) < 1 or any(side % patch_size for side in size):
            raise ValueError(f"size must be height and width in whole patches of {patch_size}, got {size}")
        folder = open_folder(path)
        splits = {child.name: child for child in subfolders(folder)}
        self._root = folder if split is None else splits[find_split(split, splits, folder)]
        files = images_under(self._root / "images")
        if not files:
            raise UserError(f"no images in {self._root / 'images'}")
        self._names = files
        self._masks = [str(Path(name).with_suffix(".png")) for name in files]
        if lost := [name for name in self._masks if not (self._root / "labels" / name).is_file()]:
            raise UserError(f"images without a mask in {self._root / 'labels'}: {listing(lost)}")
        named = folder / "classes.txt"
        names = (
            [line.strip() for line in named.read_text("utf-8").splitlines() if line.strip()] if named.is_file() else []
        )
        if classes is None and not names:
            raise UserError(f"{folder} has no classes.txt: name the classes there, or say how many there are")
        classes = classes or len(names)
        if not 1 <= classes <= IGNORE or (names and classes != len(names)):
            raise ValueError(
                f"classes must be 1 to {IGNORE} and as many as {named} names ({len(names)}), got {classes}"
            )
        self.segments = tuple(names) or tuple(str(index) for index in range(classes))
        self._size, self._patch = size, patch_size
        self._fit = functools.partial(fit, size=size, mode=mode, crop_pct=crop_pct)
        self._fit_labels = functools.partial(fit_labels, size=size, mode=mode, crop_pct=crop_pct)
        # Classes of whole images there are none.
        self.class_names, self.labels = ("image",), np.zeros(len(files), np.int32)
        self.fields = {"segmentation": ((size[0] // patch_size, size[1] // patch_size), "int32")}

    def __getitem__(self, index: int) -> Example:
        try:
            image = decode((self._root / "images" / self._names[index]).read_bytes())
            data = (self._root / "labels" / self._masks[index]).read_bytes()
        except OSError as error:
            raise ImageError(error.strerror or str(error)) from error
        mask = decode_mask(data)
        if mask.shape != image.shape[:2]:
            raise ImageError(f"the mask is {mask.shape}, the image {image.shape[:2]}")
        if (wrong := mask[(mask >= len(self.segments)) & (mask != IGNORE)]).size:
            raise ImageError(f"the mask has class {wrong[0]}, the set {len(self.segments)} classes")
        return {
            "image": self._fit(image),
            "label": 0,
            "segmentation": patch_classes(self._fit_labels(mask), self._patch, len(self.segments)),
        }

    def name_of(self, index: int) -> str:
        return str(self._root / "images" / self._names[index])


def decode_mask(data: bytes) -> Int32[np.ndarray, "H W"]:
    """The numbers in a mask file; those of a palette are not turned into colours.

    Raises:
        ImageError: not an image, or one with several channels.
    """
    if not data:
        raise ImageError("the mask has no bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            mode, values = image.mode, np.asarray(image)
    except MemoryError:
        raise
    except Exception as error:  # as in `decode`
        raise ImageError(f"the mask does not decode: {error}") from error
    if mode not in ("1", "L", "P", "I") and not mode.startswith("I;16"):
        raise ImageError(f"the mask is {mode}, it must have one channel of class ids")
    return values.astype(np.int32)


def patch_classes(labels: Int[np.ndarray, "H W"], patch_size: int, classes: int) -> Int32[np.ndarray, "h w"]:
    """The most frequent class of each patch, as `SegmentationFolder` says."""
    if patch_size == 1:
        return labels.astype(np.int32)
    height, width = labels.shape[0] // patch_size, labels.shape[1] // patch_size
    area = patch_size * patch_size
    patches = labels.reshape(height, patch_size, width, patch_size).swapaxes(1, 2).reshape(height * width, area)
    counted = np.where(patches == IGNORE, classes, patches)
    bins = np.bincount((np.arange(height * width)[:, None] * (classes + 1) + counted).ravel(), None, 0)
    counts = np.pad(bins, (0, height * width * (classes + 1) - len(bins))).reshape(height, width, classes + 1)
    ignored = 2 * counts[..., classes] > area
    return np.where(ignored, IGNORE, counts[..., :classes].argmax(-1)).astype(np.int32)
