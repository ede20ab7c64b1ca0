"""Pictures of what merged with what, of deleted bytes, and the plots of a comparison.

Everything here runs on the host with numpy, Pillow and matplotlib; jax arrays are accepted wherever numpy arrays are.
Pictures are uint8 arrays `[H, W, 3]`, one image at a time. Plots are `matplotlib.figure.Figure` objects that were made
without pyplot, so nothing is global and no display is needed. `save_png` writes either.

Patches are counted row by row over a grid that need not be square. The rendering of merged regions (mean colour inside,
a coloured ring around every region) is the one that Bolya et al., "Token Merging: Your ViT but Faster" (ICLR 2023), use
for their figures; for the same source map and colours `merged_regions` gives their picture.
"""

from collections.abc import Iterable, Mapping, Sequence
import io
import itertools
import math
from pathlib import Path
import random
from typing import Any, Literal, NamedTuple, TypeGuard

from jaxtyping import Bool, Float, Int, UInt8
import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import FuncFormatter, MaxNLocator
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from tokjax import writing

Array = np.ndarray
Role = Literal["baseline", "control", "method"]

BASELINES = ("none", "unreduced")  # names under which the unreduced model stands in a table of results
# Okabe and Ito's colours without black and yellow, which are kept for text and are lost on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195")
GREYS = ("#6E6E6E", "#9A9A9A", "#B9B9B9")
MARKERS = "osD^vPX<>"
# Metrics of all tasks that are shares in 0..1, shown in percent, more is better: key of a row -> name.
SHARES = {
    "accuracy": "accuracy",
    "knn_accuracy": "k-NN accuracy",
    "mean_iou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "delta1": "depth within 1.25x",
    **{f"image_to_text@{k}": f"image to text R@{k}" for k in (1, 5, 10)},
    **{f"text_to_image@{k}": f"text to image R@{k}" for k in (1, 5, 10)},
    "agreement": "agreement with the unreduced model",
    "similarity": "cosine with the unreduced model's features",
    "retrieval": "answers from the prompt",
}
# Key of a row -> (axis label, factor from the stored number to the shown one).
AXES = {
    **{key: (f"{name} [%]", 100.0) for key, name in SHARES.items()},
    "macs": ("MACs per image [G]", 1e-9),
    "macs_relative": ("MACs relative to the unreduced model", 1.0),
    "cache_relative": ("cache relative to the unreduced model's", 1.0),
    "mean_tokens": ("mean tokens a layer", 1.0),
    "images_per_s": ("images per second", 1.0),
    "speedup": ("measured speed-up [×]", 1.0),
}
_INK, _FAINT = "#222222", "#D9D9D9"


class Picture(NamedTuple):
    """A uint8 picture `[H, W, 3]`, or a figure, with its caption."""

    image: Array | Figure
    caption: str = ""


# --- groups of patches ------------------------------------------------------------------------------------------------


def groups_of(source: Float[Array, "K N0"], prefix: int = 1) -> Int[Array, " P"]:
    """Group of every patch from a source map: the row that holds the largest share of it.

    Args:
        source: share of input token j in slot k, `[K, prefix + P]`; binary for merges.
        prefix: leading input tokens that are no patches (class, distillation and register tokens).

    Returns:
        Slot of every patch, `[P]`; -1 where the whole column is zero (the patch was dropped).

    Raises:
        ValueError: `source` is not a matrix of finite numbers with more than `prefix` columns.
    """
    source = np.asarray(source, np.float32)
    if source.ndim != 2 or 0 in source.shape:
        raise ValueError(f"source must be a matrix [slots, tokens] of one image, got shape {source.shape}")
    _check_prefix(prefix, source.shape[1], "source")
    if not np.isfinite(source).all():
        raise ValueError("source must hold finite numbers only")
    patches = source[:, prefix:]
    return np.where(np.any(patches != 0, 0), patches.argmax(0), -1)


def groups_of_origin(origin: Int[Array, " N0"], prefix: int = 1, slots: int | None = None) -> Int[Array, " P"]:
    """Group of every patch from `Tokens.origin`, the slot that now holds each input token.

    Args:
        origin: slot of every input token, `[prefix + P]`; the number of slots means dropped.
        prefix: leading input tokens that are no patches.
        slots: their number. None leaves the numbers as they are: whether the largest one is a slot or
            means dropped cannot be told from `origin` alone, so then give `num_groups` to `merged_regions`.

    Returns:
        Slot of every patch, `[P]`; with `slots`, -1 for dropped patches.

    Raises:
        ValueError: wrong shape or dtype, or a slot outside 0..slots.
    """
    origin = _integers("origin", origin)
    _check_prefix(prefix, len(origin), "origin")
    if origin.min() < 0 or (slots is not None and origin.max() > slots):
        highest = "" if slots is None else f"..{slots}"
        raise ValueError(f"origin must hold slots 0{highest}, got {origin.min()}..{origin.max()}")
    groups = origin[prefix:]
    return groups if slots is None else np.where(groups >= slots, -1, groups)


def region_colors(count: int, seed: int = 0) -> Float[Array, "K 3"]:
    """`count` RGB colours in 0..1: three draws of Python's `random.Random(seed)` each, as the published figures use."""
    draw = random.Random(seed).random
    return np.array([[draw(), draw(), draw()] for _ in range(count)], np.float64).reshape(count, 3)


# --- pictures ---------------------------------------------------------------------------------------------------------


def to_uint8(
    image: Float[Array, "H W C"], mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0
) -> UInt8[Array, "H W 3"]:
    """Undoes `(pixels / 255 - mean) / std` and rounds to uint8; one channel becomes three equal ones.

    Raises:
        ValueError: not `[H, W, 1 or 3]`, numbers that are not finite, or a mean or std that does not fit the channels.
    """
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(f"image must be [height, width, 1 or 3], got shape {pixels.shape}")
    pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError("image must hold finite numbers only")
    moments = []
    for name, value in (("mean", mean), ("std", std)):
        moment = np.asarray(value, np.float32)
        if moment.shape not in ((), (1,), pixels.shape[-1:]) or not np.isfinite(moment).all():
            raise ValueError(f"{name} must be one number or one for each of {pixels.shape[-1]} channels, got {value}")
        moments.append(moment)
    if (moments[1] <= 0).any():
        raise ValueError(f"std must be positive, got {std}")
    pixels = np.clip(pixels * moments[1] + moments[0], 0, 1)
    return np.broadcast_to(np.round(255 * pixels).astype(np.uint8), (*pixels.shape[:2], 3)).copy()


def merged_regions(
    image: UInt8[Array, "H W 3"],
    groups: Int[Array, " P"],
    patch_size: int,
    grid: tuple[int, int] | None = None,
    colors: Float[Array, "K 3"] | None = None,
    seed: int = 0,
    num_groups: int | None = None,
) -> UInt8[Array, "H W 3"]:
    """Paints every group of patches in its mean colour with a ring in a colour of its own.

    The ring is what one erosion with a 3 x 3 cross takes away from the group's pixels, where everything outside the
    image counts as another group: it is one pixel wide and also runs along the image border. A group need not be
    connected. Dropped patches are no group: they show the picture itself, blue-grey and with little contrast.

    Args:
        image: uint8 `[H, W, 3]`, both sides multiples of `patch_size`.
        groups: group of every patch, row by row, `[P]`. -1, and `num_groups` or more, mean dropped.
        patch_size: side of a patch in pixels.
        grid: rows and columns of patches, checked against the image; None reads them from it.
        colors: ring colours in 0..1, `[K, 3]` with K >= `num_groups`; None draws `region_colors(num_groups, seed)`.
        seed: of the ring colours.
        num_groups: number of groups; None: the largest group plus one.

    Raises:
        ValueError: an argument of the wrong shape, dtype or range.
    """
    image = _check_image(image)
    rows, columns = _check_grid(image, patch_size, grid)
    groups = _integers("groups", groups)
    if len(groups) != rows * columns:
        raise ValueError(f"groups must name {rows} x {columns} = {rows * columns} patches, got {len(groups)}")
    if groups.min() < -1:
        raise ValueError(f"groups must be -1 (dropped) or more, got {groups.min()}")
    count = int(groups.max()) + 1 if num_groups is None else num_groups
    if count < 0:
        raise ValueError(f"num_groups must be 0 or more, got {num_groups}")
    ring = region_colors(count, seed) if colors is None else np.asarray(colors, np.float64)
    if ring.ndim != 2 or ring.shape[1] != 3 or len(ring) < count:
        raise ValueError(f"colors must be [{count} or more, 3], one RGB colour for each group, got shape {ring.shape}")
    if not ((ring >= 0) & (ring <= 1)).all():
        raise ValueError("colors must lie in 0..1")

    # One more group, the last, collects what was dropped; it gets painted over at the end.
    groups = np.where((groups < 0) | (groups >= count), count, groups)
    label = _pixels_of(groups.reshape(rows, columns), patch_size)
    area = np.maximum(np.bincount(label.ravel(), minlength=count + 1), 1)
    total = np.stack([np.bincount(label.ravel(), image[..., c].ravel(), count + 1) for c in range(3)], -1)
    mean = (total // area[:, None]).astype(np.uint8)  # sums of uint8 are exact, so this is the truncated mean
    around = np.pad(label, 1, constant_values=-1)
    neighbours = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    inside = np.logical_and.reduce([label == other for other in neighbours])
    ring = np.concatenate([(255 * ring[:count]).astype(np.uint8), np.zeros((1, 3), np.uint8)])
    painted = np.where(inside[..., None], mean[label], ring[label])
    return np.where((label == count)[..., None], _faded(image), painted)


def class_map(
    labels: Int[Array, "h w"], cell: int, ignore: int | None = 255, colors: UInt8[Array, "K 3"] | None = None
) -> UInt8[Array, "H W 3"]:
    """Every label as a square of `cell` pixels in the colour of its class; white where it does not count.

    Raises:
        ValueError: `labels` are not integers from 0, or have no colour.
    """
    labels = np.asarray(labels)
    counted = labels != ignore
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"labels must be integers from 0, [rows, columns], got {labels.dtype} {list(labels.shape)}")
    classes = int(labels.max(initial=0, where=counted)) + 1
    colors = class_colors(classes) if colors is None else np.asarray(colors)
    if len(colors) < classes:
        raise ValueError(f"colors must be one for each of {classes} classes, got {len(colors)}")
    painted = np.where(counted[..., None], colors[np.where(counted, labels, 0)], 255).astype(np.uint8)
    return _pixels_of(painted, cell)


def class_colors(count: int) -> UInt8[Array, "K 3"]:
    """One colour a class, black for class 0, by the rule of the Pascal VOC masks: bits 3k, 3k + 1 and 3k + 2 of the
    class are the k-th highest bits of red, green and blue."""
    classes = np.arange(count)[:, None]
    bits = [(classes >> (3 * k + np.arange(3)) & 1) << (7 - k) for k in range(8)]
    return np.sum(bits, 0).astype(np.uint8).reshape(count, 3)


def value_map(values: Float[Array, "h w"], cell: int, low: float, high: float) -> UInt8[Array, "H W 3"]:
    """Every value as a square of `cell` pixels, `low` dark blue to `high` yellow; grey where it is not finite.

    Raises:
        ValueError: `values` is not a matrix, or `high` not above `low`.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not high > low:
        raise ValueError(f"values must be a matrix and high above low, got {list(values.shape)}, {low} and {high}")
    finite = np.isfinite(values)
    shown = matplotlib.colormaps["viridis"]((np.where(finite, values, low) - low) / (high - low))[..., :3]
    return _pixels_of(np.where(finite[..., None], np.round(255 * shown), 128).astype(np.uint8), cell)


def enlarged(image: UInt8[Array, "H W 3"], side: int = 224) -> UInt8[Array, "H2 W2 3"]:
    """The image by the whole factor that brings its longer side nearest to `side`; never smaller.

    Raises:
        ValueError: not a uint8 picture, or a side below 1.
    """
    image = _check_image(image)
    return _pixels_of(image, _factor(image, side))


def kept_pictures(
    image: UInt8[Array, "H W 3"],
    kept: Bool[Array, "L P"] | Sequence[Bool[Array, " P"]],
    patch_size: int,
    grid: tuple[int, int] | None = None,
    *,
    layers: Sequence[int] | None = None,
    side: int = 224,
) -> list[Picture]:
    """The image, and what is left of it after each chosen layer; dropped patches turn blue-grey and lose contrast.

    Args:
        image: uint8 `[H, W, 3]`.
        kept: whether patch p is still there after layer l, bool `[L, P]` or L arrays `[P]`.
        patch_size: side of a patch in pixels.
        grid: rows and columns of patches, checked against the image.
        layers: which rows of `kept` to show, counted from 0 (captions count from 1); None: all.
        side: smaller images are enlarged by a whole factor to about this many pixels.

    Raises:
        ValueError: an argument of the wrong shape, dtype or range.
    """
    image = _check_image(image)
    shape = _check_grid(image, patch_size, grid)
    masks = [np.asarray(mask) for mask in kept]
    count = shape[0] * shape[1]
    for layer, mask in enumerate(masks):
        if mask.dtype != np.bool_ or mask.shape != (count,):
            raise ValueError(
                f"kept[{layer}] must be bool [{count}], one for each of {shape[0]} x {shape[1]} patches, "
                f"got {mask.dtype} {list(mask.shape)}"
            )
    chosen = _check_layers(layers, len(masks), "kept")
    factor = _factor(image, side)
    image = _pixels_of(image, factor)
    pictures = [Picture(image, f"image\n{count} patches")]
    for layer in chosen:
        alive = _pixels_of(masks[layer].reshape(shape), factor * patch_size)
        seen = np.where(alive[..., None], image, _faded(image))
        pictures.append(Picture(seen, f"after layer {layer + 1} of {len(masks)}\n{masks[layer].sum()} patches"))
    return pictures


def kept_patches(
    image: UInt8[Array, "H W 3"],
    kept: Bool[Array, "L P"] | Sequence[Bool[Array, " P"]],
    patch_size: int,
    grid: tuple[int, int] | None = None,
    *,
    columns: int = 7,
    **options: Any,
) -> UInt8[Array, "H2 W2 3"]:
    """`kept_pictures`, with the same options, as one strip that wraps after `columns` pictures."""
    return strip(kept_pictures(image, kept, patch_size, grid, **options), columns)


def merge_pictures(
    image: UInt8[Array, "H W 3"],
    origins: Sequence[Int[Array, " N0"]],
    slots: Sequence[int],
    patch_size: int,
    grid: tuple[int, int] | None = None,
    *,
    prefix: int = 1,
    layers: Sequence[int] | None = None,
    side: int = 224,
    seed: int = 0,
) -> list[Picture]:
    """The image, and its merged regions after each chosen layer, with the layer and its token count as captions.

    A region takes the ring colour of its first patch, so that it keeps its colour from layer to layer although its
    slot changes.

    Args:
        image: uint8 `[H, W, 3]`.
        origins: slot of every input token after each layer, L arrays `[prefix + P]` (`Tokens.origin` of one image).
        slots: their number after each layer, L integers; an origin that equals it was dropped.
        patch_size: side of a patch in pixels.
        grid: rows and columns of patches, checked against the image.
        prefix: leading tokens that are no patches.
        layers: which layers to show, counted from 0 (captions count from 1); None: all.
        side: smaller images are enlarged by a whole factor to about this many pixels.
        seed: of the ring colours.

    Raises:
        ValueError: an argument of the wrong shape, dtype or range.
    """
    image = _check_image(image)
    shape = _check_grid(image, patch_size, grid)
    if len(origins) != len(slots):
        raise ValueError(f"origins and slots must be as long as each other, got {len(origins)} and {len(slots)}")
    chosen = _check_layers(layers, len(origins), "origins")
    factor = _factor(image, side)
    image = _pixels_of(image, factor)
    count = shape[0] * shape[1]
    pictures = [Picture(image, f"image\n{prefix + count} tokens")]
    for layer in chosen:
        groups = _named_by_first(groups_of_origin(origins[layer], prefix, int(slots[layer])))
        regions = merged_regions(image, groups, factor * patch_size, shape, seed=seed, num_groups=count)
        pictures.append(Picture(regions, f"after layer {layer + 1} of {len(origins)}\n{int(slots[layer])} tokens"))
    return pictures


def merge_strip(
    image: UInt8[Array, "H W 3"],
    origins: Sequence[Int[Array, " N0"]],
    slots: Sequence[int],
    patch_size: int,
    grid: tuple[int, int] | None = None,
    *,
    columns: int = 7,
    **options: Any,
) -> UInt8[Array, "H2 W2 3"]:
    """`merge_pictures`, with the same options, as one strip that wraps after `columns` pictures."""
    return strip(merge_pictures(image, origins, slots, patch_size, grid, **options), columns)


def image_grid(
    images: Sequence[UInt8[Array, "H W 3"]],
    labels: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    gap: int = 10,
    font_size: int = 14,
) -> UInt8[Array, "H2 W2 3"]:
    """Pictures on a white grid, each with its caption below; captions break into lines where they do not fit.

    Args:
        images: uint8 `[H, W, 3]` each; sizes may differ, every cell is as large as the largest.
        labels: one caption a picture; None: no captions.
        columns: pictures in a row; None: about as many as there are rows, at least four.
        gap: pixels between and around the cells.
        font_size: of the captions, in pixels.

    Raises:
        ValueError: no pictures, pictures of the wrong kind, or another number of captions than of pictures.
    """
    pictures = [_check_image(image, f"images[{i}]") for i, image in enumerate(images)]
    if not pictures:
        raise ValueError("images must hold at least one picture")
    if labels is not None and len(labels) != len(pictures):
        raise ValueError(f"labels must hold one caption for each of {len(pictures)} images, got {len(labels)}")
    columns = max(4, math.ceil(math.sqrt(len(pictures)))) if columns is None else columns
    if columns < 1 or gap < 0 or font_size < 1:
        raise ValueError(
            f"columns and font_size must be 1 or more and gap 0 or more, got {columns}, {font_size}, {gap}"
        )
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    font = ImageFont.truetype(_DEJAVU, font_size)
    height = max(picture.shape[0] for picture in pictures)
    width = max(picture.shape[1] for picture in pictures)
    if labels is not None:
        width = max(width, 7 * font_size)  # a caption needs some room under a small picture
    captions = [_wrapped(label, font, width) for label in labels] if labels is not None else [[]]
    line = math.ceil(1.25 * font_size)
    below = max(map(len, captions)) * line
    below += gap // 2 if below else 0
    cell_height, cell_width = height + below + gap, width + gap
    canvas = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, picture in enumerate(pictures):
        left, top = gap + i % columns * cell_width, gap + i // columns * cell_height
        h, w = picture.shape[:2]
        canvas.paste(Image.fromarray(picture), (left + (width - w) // 2, top + (height - h) // 2))
        for j, text in enumerate(captions[i] if labels is not None else []):
            place = (left + width / 2, top + height + gap // 2 + j * line)
            draw.text(place, text, _INK if j == 0 else "#555555", font, anchor="ma")
    return np.asarray(canvas)


# --- bytes ------------------------------------------------------------------------------------------------------------


def deleted_bytes(
    rows: Sequence[tuple[str, bytes | str, Bool[Array, " n"]]],
    *,
    columns: int = 80,
    font_size: int = 15,
    fonts: Sequence[str | Path] | None = None,
) -> UInt8[Array, "H W 3"]:
    """Texts with the bytes that a model deleted, one text below the other.

    Every byte is a box below its character, filled where it is kept and empty where it is deleted; a character of
    several bytes stands over all of its boxes. Characters without a kept byte are pale. Where no font has a character
    (matplotlib's own has neither Chinese nor Devanagari, say) its bytes are written in hexadecimal, and a line below
    the picture says so. Code points stand one by one from left to right in the order of their bytes, also in scripts
    that are written otherwise.

    Args:
        rows: (name, text, whether each byte is kept); bytes that are no UTF-8 are written in hexadecimal.
        columns: bytes in a line, at least 8; characters are not parted.
        font_size: in pixels.
        fonts: files to look for characters in, after matplotlib's; None: all that the system has.

    Raises:
        ValueError: no rows, a mask that does not fit its text, or a number out of range.
    """
    if not rows:
        raise ValueError("rows must hold at least one text")
    if columns < 8 or font_size < 6:
        raise ValueError(f"columns and font_size must be at least 8 and 6, got {columns} and {font_size}")
    texts = []
    for name, text, kept in rows:
        data = text.encode("utf-8", "replace") if isinstance(text, str) else bytes(text)
        mask = np.asarray(kept)
        if mask.dtype != np.bool_ or mask.shape != (len(data),):
            raise ValueError(f"kept of {name!r} must be bool [{len(data)}], got {mask.dtype} {list(mask.shape)}")
        texts.append((name, data, mask))
    characters = {character for _, data, _ in texts for character, _ in _characters(data) if character}
    faces = _faces(characters, font_size, fonts)
    face = ImageFont.truetype(_DEJAVU, font_size)
    small = ImageFont.truetype(_DEJAVU, max(6, round(0.55 * font_size)))

    width, line = math.ceil(0.78 * font_size), math.ceil(2.3 * font_size)
    label = max(math.ceil(face.getlength(name)) for name, _, _ in texts)
    label = max(label, math.ceil(small.getlength("100% of 0000 bytes deleted")))
    placed: list[tuple[int, int, str | None, bytes, Array]] = []  # line, column, character, its bytes, which are kept
    heads: list[tuple[int, str, str]] = []
    row = 0
    for name, data, mask in texts:
        gone = f"{1 - mask.mean():.0%} of {len(mask)} bytes deleted" if len(mask) else "no bytes"
        heads.append((row, name, gone))
        column = start = 0
        for character, size in _characters(data):
            if column + size > columns:
                row, column = row + 1, 0
            placed.append((row, column, character, data[start : start + size], mask[start : start + size]))
            column, start = column + size, start + size
        row += 1
    notes = ["filled: kept, empty: deleted"]
    if any(character not in faces for _, _, character, _, _ in placed):
        notes.append("hexadecimal: not UTF-8, or no font here has the character")

    gap = font_size
    canvas = Image.new("RGB", (label + columns * width + 3 * gap, row * line + gap + 2 * font_size), "white")
    draw = ImageDraw.Draw(canvas)
    for number, name, gone in heads:
        top = gap // 2 + number * line
        draw.text((gap + label, top + font_size // 2), name, _INK, face, anchor="rm")
        draw.text((gap + label, top + 3 * font_size // 2), gone, "#555555", small, anchor="rm")
    for number, column, character, data, mask in placed:
        left, top = 2 * gap + label + column * width, gap // 2 + number * line
        ink = _INK if mask.any() else "#B0B0B0"
        bottom = top + math.ceil(1.3 * font_size)
        shown = _VISIBLE.get(character or "", character or "")
        if character in faces:
            middle = left + len(data) * width / 2
            draw.text((middle, top + 1.05 * font_size), shown, ink, faces[character], anchor="ms")
        for index, (byte, alive) in enumerate(zip(data, mask, strict=True)):
            x = left + index * width
            if character not in faces:
                draw.text((x + width / 2, top + 1.0 * font_size), f"{byte:02x}", ink, small, anchor="ms")
            box = (x + (2 if index == 0 else 0), bottom, x + width - (2 if index == len(data) - 1 else 0), bottom + 5)
            draw.rectangle(box, PALETTE[0] if alive else "white", "#8FA9BD")
    draw.text((2 * gap + label, row * line + gap), ";  ".join(notes), "#555555", small)
    return np.asarray(canvas)


def shaded_tokens(
    rows: Sequence[tuple[str, Sequence[str], Float[Array, " n"]]],
    *,
    columns: int = 96,
    font_size: int = 15,
    fonts: Sequence[str | Path] | None = None,
) -> UInt8[Array, "H W 3"]:
    """Texts whose tokens stand on a colour that tells a share, such as that of the layers that hold them.

    A token of share 0 is pale, on white; of share 1 on the full colour. Line ends in a text are shown as signs.

    Args:
        rows: (name, the text of each token, the share of each in 0..1).
        columns: characters in a line, at least 16.
        font_size: in pixels.
        fonts: files to look for characters in, after matplotlib's; None: all that the system has.

    Raises:
        ValueError: no rows, shares that do not fit their tokens or lie outside of 0..1, or a number out of range.
    """
    if not rows:
        raise ValueError("rows must hold at least one text")
    if columns < 16 or font_size < 6:
        raise ValueError(f"columns and font_size must be at least 16 and 6, got {columns} and {font_size}")
    for name, tokens, share in rows:
        given = np.asarray(share)
        if given.shape != (len(tokens),) or not ((given >= 0) & (given <= 1)).all():
            raise ValueError(f"share of {name!r} must be [{len(tokens)}] in 0..1, got {list(given.shape)}")
    faces = _faces({character for _, tokens, _ in rows for token in tokens for character in token}, font_size, fonts)
    face = ImageFont.truetype(_DEJAVU, font_size)
    width, line = math.ceil(0.68 * font_size), math.ceil(1.6 * font_size)
    label = max(math.ceil(face.getlength(name)) for name, _, _ in rows)
    placed: list[tuple[int, int, str, float]] = []  # line, column, character, share
    heads, number = [], 0
    for name, tokens, share in rows:
        heads.append((number, name))
        characters = [(c, float(value)) for token, value in zip(tokens, share, strict=True) for c in token]
        placed += [(number + i // columns, i % columns, *one) for i, one in enumerate(characters)]
        number += max(1, -(-len(characters) // columns)) + 1
    gap = font_size
    canvas = Image.new("RGB", (label + columns * width + 3 * gap, (number - 1) * line + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for number, name in heads:
        draw.text((gap + label, gap // 2 + (number + 0.5) * line), name, _INK, face, anchor="rm")
    full = np.array(ImageColor.getrgb(PALETTE[5]))
    for number, column, character, value in placed:
        left, top = 2 * gap + label + column * width, gap // 2 + number * line
        colour = tuple(np.round(255 + value * (full - 255)).astype(int).tolist())
        draw.rectangle((left, top, left + width - 1, top + line - 2), colour)
        if character in faces and character != " ":
            ink = _INK if value else "#B0B0B0"
            shown = _VISIBLE.get(character, character)
            draw.text((left + width / 2, top + 0.72 * line), shown, ink, faces[character], anchor="ms")
    return np.asarray(canvas)


_DEJAVU = str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))
_VISIBLE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}


def _characters(data: bytes) -> list[tuple[str | None, int]]:
    """The characters of a text, each with the number of its bytes; None for a byte that is no UTF-8."""
    found: list[tuple[str | None, int]] = []
    start = 0
    while start < len(data):
        for size in (1, 2, 3, 4):
            try:
                found.append((data[start : start + size].decode(), size))
                break
            except UnicodeDecodeError:
                continue
        else:
            found.append((None, 1))
        start += found[-1][1]
    return found


def _faces(characters: set[str], size: int, fonts: Sequence[str | Path] | None) -> dict[str, ImageFont.FreeTypeFont]:
    """A font for each character that one has: matplotlib's own first, then as few others as possible are opened."""
    faces: dict[str, ImageFont.FreeTypeFont] = {}
    wanted = {character for character in characters if character.isprintable() or character in _VISIBLE}
    others = map(str, sorted(font_manager.findSystemFonts()) if fonts is None else fonts)
    for path in itertools.chain((_DEJAVU,), others):
        if not wanted:
            break
        try:
            known = FT2Font(path).get_charmap()
            here = {character for character in wanted if ord(_VISIBLE.get(character, character)) in known}
            face = ImageFont.truetype(path, size) if here else None
        except (OSError, RuntimeError):  # bitmap fonts, damaged files
            continue
        if face is not None:
            faces |= dict.fromkeys(here, face)
            wanted -= here
    return faces


# --- plots ------------------------------------------------------------------------------------------------------------


def row_role(row: Mapping[str, Any], baseline: str | None = None, controls: Iterable[str] = ()) -> Role:
    """What a row of results is: the unreduced model, a control, or a method.

    Args:
        row: `{"method": ..., "control": bool, ...}`.
        baseline: method name of the unreduced model; None: any of `BASELINES`.
        controls: method names that are controls, beside the rows that say `"control": True`.
    """
    method = row.get("method")
    if method == baseline or (baseline is None and method in BASELINES):
        return "baseline"
    return "control" if row.get("control") or method in tuple(controls) else "method"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a row of results is one finite number: numpy and jax scalars are, truth values are not."""
    if isinstance(value, (bool, np.bool_, str)) or np.ndim(value):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def method_label(method: str, role: Role) -> str:
    """How tables and plots call a method: its name, and what it is if it is no plain method."""
    if role == "baseline":
        return "unreduced" if method in BASELINES else f"{method} (unreduced)"
    return f"{method} (control)" if role == "control" else method


def pareto_plot(
    rows: Sequence[Mapping[str, Any]],
    x: str = "macs_relative",
    y: str = "accuracy",
    by: str = "method",
    baseline: str | None = None,
    controls: Sequence[str] = (),
    title: str | None = None,
    spread: str | None = None,
) -> Figure:
    """Quality over cost: a line for each method, controls dashed and grey, the unreduced model as a star and a line.

    Args:
        rows: results; those without a finite `x` and `y` (a target that was not reachable) are left out.
        x: key of the cost, in `AXES` or any other numeric key.
        y: key of the quality.
        by: key that names a line.
        baseline: method name of the unreduced model; None: any of `BASELINES`.
        controls: method names that are controls, beside the rows that say `"control": True`.
        title: above the plot.
        spread: key of how far a bar reaches up and down from the quality, in its unit; where it has no number: no bar.

    Raises:
        ValueError: no row has both numbers.
    """
    series: dict[tuple[Role, str], list[tuple[float, float, float]]] = {}
    for row in rows:
        if is_number(row.get(x)) and is_number(row.get(y)):
            bar = row.get(spread) if spread else None
            bar = float(bar) * _axis(y)[1] if is_number(bar) else 0.0
            point = float(row[x]) * _axis(x)[1], float(row[y]) * _axis(y)[1], bar
            series.setdefault((row_role(row, baseline, controls), str(row.get(by, "?"))), []).append(point)
    if not series:
        raise ValueError(f"rows must hold at least one with finite numbers under {x!r} and {y!r}, got {len(rows)} rows")
    figure, (axes,) = _figure(1, len(series))
    taken = dict.fromkeys(("baseline", "control", "method"), 0)
    for (role, name), points in series.items():
        xs, ys, bars = zip(*sorted(points), strict=True)
        place, taken[role] = taken[role], taken[role] + 1
        if any(bars):
            colour = {"baseline": _INK, "control": GREYS[place % len(GREYS)], "method": _style(place)["color"]}[role]
            axes.errorbar(xs, ys, bars, fmt="none", ecolor=colour, elinewidth=1.0, capsize=3, zorder=2)
        if role == "baseline":
            axes.axhline(max(ys), color=_INK, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
            axes.plot(xs, ys, "*", color=_INK, markersize=13, label=method_label(name, role), zorder=4)
        elif role == "control":
            axes.plot(xs, ys, label=method_label(name, role), zorder=2, **_control_style(place))
        else:
            axes.plot(xs, ys, label=name, zorder=3, **_style(place))
    _finish(figure, axes, _axis(x)[0], _axis(y)[0], title)
    return figure


def token_count_plot(counts: Mapping[str, Sequence[float]], title: str | None = None) -> Figure:
    """How many tokens each layer works on: one staircase a name, `{name: [tokens in layer 1, in layer 2, ...]}`.

    Raises:
        ValueError: nothing to draw, or a count that is not a finite number from 0.
    """
    if not counts:
        raise ValueError("counts must name at least one list of token counts")
    figure, (axes,) = _figure(1, len(counts))
    names = [name for name in counts if name not in BASELINES]  # colours skip the unreduced model, as in pareto_plot
    for name, values in counts.items():
        place = names.index(name) if name in names else 0
        tokens = np.asarray(values, np.float64)
        if tokens.ndim != 1 or not len(tokens) or not np.isfinite(tokens).all() or tokens.min() < 0:
            raise ValueError(f"counts[{name!r}] must be one number from 0 for each layer, got {values}")
        layer = np.arange(1, len(tokens) + 1)
        style = _style(place) | {"markersize": 4 if len(tokens) <= 32 else 0}
        label = name
        if name in BASELINES:
            label = method_label(name, "baseline")
            style |= {"color": _INK, "linestyle": (0, (1, 2)), "markersize": 0}
        axes.plot(layer, tokens, label=label, drawstyle="steps-mid", **style)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_ylim(bottom=0)
    _finish(figure, axes, "layer", "tokens", title)
    return figure


def curves_plot(
    runs: Mapping[str, Sequence[Mapping[str, Any]]] | Sequence[Mapping[str, Any]],
    panels: Sequence[str] = ("loss", "accuracy"),
    x: str = "step",
    title: str | None = None,
) -> Figure:
    """Training curves, one panel a quantity, from the rows that training wrote.

    A panel shows every key that is its name or ends in it after `_` or `/` (`loss`, `train_loss`, `val/loss`). Rows
    need not hold every key; numbers that are missing or not finite leave no point. Panels without any are left out.

    Args:
        runs: rows `{"step": 10, "loss": 2.1, ...}` of one run, or `{name: rows}` of several.
        panels: names of the quantities.
        x: key of the horizontal axis.
        title: above the plot.

    Raises:
        ValueError: no panel has anything to show.
    """
    named = runs if isinstance(runs, Mapping) else {"": runs}
    lines: dict[str, dict[str, tuple[list[float], list[float]]]] = {panel: {} for panel in panels}
    for run, rows in named.items():
        for row in rows:
            for key, value in row.items():
                panel = next((p for p in panels if key == p or key.endswith((f"_{p}", f"/{p}"))), None)
                if panel and is_number(value) and is_number(row.get(x)):
                    label = f"{run} · {key}" if run and len(named) > 1 else key
                    xs, ys = lines[panel].setdefault(label, ([], []))
                    xs.append(float(row[x]))
                    ys.append(float(value) * _axis(panel)[1])
    filled = {panel: found for panel, found in lines.items() if found}
    if not filled:
        raise ValueError(f"runs must hold finite numbers under {x!r} and one of {list(panels)}")
    figure, all_axes = _figure(len(filled), max(map(len, filled.values())))
    for axes, (panel, found) in zip(all_axes, filled.items(), strict=True):
        for place, (label, (xs, ys)) in enumerate(found.items()):
            dots = {"markersize": 4 if len(xs) <= 25 else 0}
            axes.plot(xs, ys, label=label, **(_style(place) | dots))
        _finish(figure, axes, x, _axis(panel)[0], None)
    if title:
        figure.suptitle(title, color=_INK, fontsize=12)
    return figure


# --- files ------------------------------------------------------------------------------------------------------------


def png_bytes(picture: Figure | UInt8[Array, "H W *C"], dpi: int = 160) -> bytes:
    """A figure or a uint8 picture (`[H, W]`, `[H, W, 3]` or `[H, W, 4]`) as a PNG file's content.

    Raises:
        ValueError: neither of them.
    """
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=dpi, facecolor="white")
        return buffer.getvalue()
    pixels = np.asarray(picture)
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise ValueError(f"a picture must be a Figure or uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
    Image.fromarray(pixels).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def save_png(picture: Figure | UInt8[Array, "H W *C"], path: str | Path, dpi: int = 160) -> Path:
    """Writes a figure or a picture as PNG, whole or not at all; missing folders are made.

    Raises:
        ValueError: `picture` is neither a figure nor a uint8 picture, or `path` does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, got {str(path)!r}")
    return write_whole(path, png_bytes(picture, dpi))


def write_whole(path: str | Path, content: bytes) -> Path:
    """Writes a file so that no reader ever sees half of it."""
    return writing.write_whole(path, lambda beside: beside.write_bytes(content))


# --- shared pieces ----------------------------------------------------------------------------------------------------


def _check_image(image: Any, name: str = "image") -> UInt8[Array, "H W 3"]:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"{name} must be uint8 [height, width, 3], got {image.dtype} {list(image.shape)}")
    return image


def _check_grid(image: Array, patch_size: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    height, width = image.shape[:2]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"patch_size must divide the image's {height} x {width} pixels, got {patch_size}")
    shape = height // patch_size, width // patch_size
    if grid is not None and tuple(grid) != shape:
        raise ValueError(
            f"grid must be {shape}, as {height} x {width} pixels have with patch_size {patch_size}, got {tuple(grid)}"
        )
    return shape


def _check_prefix(prefix: int, tokens: int, name: str) -> None:
    if not 0 <= prefix < tokens:
        raise ValueError(f"prefix must be from 0 to below the {tokens} tokens of {name}, got {prefix}")


def _check_layers(layers: Sequence[int] | None, count: int, name: str) -> list[int]:
    chosen = list(range(count)) if layers is None else [int(layer) for layer in layers]
    if not chosen or any(not 0 <= layer < count for layer in chosen):
        raise ValueError(f"layers must be one or more of 0..{count - 1}, the entries of {name}, got {chosen}")
    return chosen


def _integers(name: str, values: Any) -> Int[Array, " P"]:
    values = np.asarray(values)
    if values.ndim != 1 or not len(values) or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must be integers [P] of one image, got {values.dtype} {list(values.shape)}")
    return values.astype(np.int64)


def _pixels_of(cells: Array, size: int) -> Array:
    """Every cell of `[rows, columns, ...]` as a square of `size` x `size`."""
    return cells.repeat(size, 0).repeat(size, 1)


def _factor(image: Array, side: int) -> int:
    if side < 1:
        raise ValueError(f"side must be 1 or more, got {side}")
    return max(1, round(side / max(image.shape[:2])))


def strip(pictures: Sequence[Picture], columns: int = 7) -> UInt8[Array, "H W 3"]:
    return image_grid([np.asarray(p.image) for p in pictures], [p.caption for p in pictures], columns=columns)


def _faded(image: Array) -> Array:
    """Blue-grey with a quarter of the contrast: told apart from dark, bright and grey patches alike."""
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return (0.25 * grey[..., None] + np.array([90, 108, 142], np.float32)).astype(np.uint8)


def _named_by_first(groups: Int[Array, " P"]) -> Int[Array, " P"]:
    """Names each group after its first patch; -1 stays."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return np.where(groups < 0, -1, first[inverse])


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of `text` that are at most `width` pixels wide; a word that is too long alone ends in an ellipsis."""
    lines = []
    for paragraph in str(text).split("\n"):
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            if font.getlength(word) > width:
                while word and font.getlength(f"{word}…") > width:
                    word = word[:-1]
                word += "…"
            line = f"{line} {word}" if line else word
        lines.append(line)
    return lines


def _axis(key: str) -> tuple[str, float]:
    return AXES.get(key, (key.replace("_", " "), 1.0))


def _style(place: int) -> dict[str, Any]:
    """Colour, marker and dashes of the n-th line: all three change, at different periods."""
    return {
        "color": PALETTE[place % len(PALETTE)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": ("-", (0, (6, 2)), (0, (2, 1.5)))[place // len(PALETTE) % 3],
        "markersize": 6,
        "markeredgecolor": "white",
        "markeredgewidth": 0.8,
        "linewidth": 1.7,
    }


def _control_style(place: int) -> dict[str, Any]:
    grey = {"color": GREYS[place % len(GREYS)], "marker": MARKERS[place % len(MARKERS)]}
    return _style(place) | grey | {"linestyle": (0, (4, 2)), "linewidth": 1.3, "markersize": 5}


def _figure(panels: int, lines: int) -> tuple[Figure, list[Axes]]:
    """A figure with `panels` axes side by side and room for a legend of `lines` beside them if it is long."""
    width = (7.0 if panels == 1 else 5.2 * panels) + (1.8 if lines > 5 else 0)
    figure = Figure(figsize=(width, 4.4), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _finish(figure: Figure, axes: Axes, x: str, y: str, title: str | None) -> None:
    """Labels, a light grid, no frame where there is no axis, and a legend outside if it is long."""
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    if title:
        axes.set_title(title, color=_INK, fontsize=12)
    axes.grid(color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(colors="#444444")
    if axes.get_xlim()[1] >= 10_000:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value else "0"))
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) > 5:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9, borderaxespad=0)
    elif len(labels) > 1:
        axes.legend(frameon=False, fontsize=9)
