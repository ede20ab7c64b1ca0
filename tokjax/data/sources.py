"""Where images come from: random access, decoded on demand.

`Digits` is embedded (scikit-learn's copy of the UCI digits), `Parquet` reads the files of a Hugging Face dataset,
`ImageFolder` reads `path/split/class/image`. The sources of other tasks are in files of their own: `scenes`,
`captions`, `dense`. A damaged image raises `ImageError` when it is read; everything else that
is wrong (a missing path, split or column) is a `UserError` when the source is opened.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
import json
import os
from pathlib import Path
import re
import threading
from types import MappingProxyType
from typing import NotRequired, Protocol, TypedDict

from absl import logging
from jaxtyping import Float32, Int32, Int64, UInt8
import ml_collections
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokjax.data.transforms import ImageError, decode
from tokjax.errors import UserError

SOURCES = ("digits", "parquet", "imagefolder", "scenes", "captions", "segmentation", "auto")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"})
HELD_OUT = ("val", "validation", "valid", "dev", "test")  # names for the same thing, in the order they are tried
_PARQUET_NAME = re.compile(r"(?P<split>.+?)(?:[-_.]\d.*)?\.parquet")  # train.parquet, train-00000-of-00002-abc.parquet


class Example(TypedDict):
    image: UInt8[np.ndarray, "H W 3"]
    label: int
    caption: NotRequired[str]
    ids: NotRequired[Int32[np.ndarray, " T"]]
    segmentation: NotRequired[Int32[np.ndarray, "h w"]]
    depth: NotRequired[Float32[np.ndarray, "h w"]]


Fields = Mapping[str, tuple[tuple[int, ...], str]]  # name -> the shape and dtype that every example has


class Source(Protocol):
    """What the loader asks of a source.

    A source may also have `fields` (arrays of an example that belong in the batch), `captions` (for each example the
    texts that describe it), `dense` (a field tells where things lie, so nobody may move the image's pixels) and
    `segments` (names of the classes of `segmentation`).

    Attributes:
        class_names: one name for each class, in label order.
        labels: all labels, cheap (for stratifying).
        in_memory: reading needs no decoding, so threads would only get in the way.
    """

    class_names: tuple[str, ...]
    labels: Int32[np.ndarray, " n"]
    in_memory: bool

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Raises ImageError where the image does not decode."""
        ...

    def name_of(self, index: int) -> str:
        """The path or the row of an example, for messages."""
        ...


class Labelled:
    """What all sources share: their size and the number of classes follow from labels and names."""

    class_names: tuple[str, ...]
    labels: Int32[np.ndarray, " n"]
    in_memory = False
    fields: Fields = MappingProxyType({})
    captions: Sequence[tuple[str, ...]] | None = None
    dense = False
    segments: tuple[str, ...] = ()  # names of the classes of `segmentation`

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)


class Digits(Labelled):
    """1797 handwritten digits, 8x8 grey, ten classes, enlarged to `size` x `size` RGB.

    Args:
        split: `train` or `test`; both come from one random stratified split.
        size: side in pixels.
        seed: of the split.
        test_fraction: share of `test`.

    Raises:
        UserError: another split.
        ValueError: `size` below 1 or `test_fraction` outside (0, 1).
    """

    in_memory = True

    def __init__(self, split: str = "train", size: int = 32, seed: int = 0, test_fraction: float = 0.2):
        from sklearn import datasets  # half a second, only for those who use it

        if split not in ("train", "test"):
            raise UserError(f"no split {split!r} in digits: it has train, test")
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction}")
        grey, labels = datasets.load_digits(return_X_y=True)
        test = stratified(labels, round(test_fraction * len(labels)), seed)
        indices = test if split == "test" else np.setdiff1d(np.arange(len(labels)), test)
        self.class_names = tuple(str(digit) for digit in range(10))
        self.labels = labels[indices].astype(np.int32)
        self._names = tuple(f"digits/{split} row {index}" for index in indices)
        small = np.round(grey[indices].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        large = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in small]
        self._images = np.repeat(np.stack(large)[..., None], 3, axis=-1)

    def __getitem__(self, index: int) -> Example:
        return {"image": self._images[index], "label": int(self.labels[index])}

    def name_of(self, index: int) -> str:
        return self._names[index]


class Parquet(Labelled):
    """A split of a folder of parquet files, as Hugging Face `datasets` writes them.

    Files: `split.parquet`, `split-00000-of-00002.parquet`, the same under `data/`, or every parquet file of a folder
    `split/`. The image column is a struct with `bytes`, or plain bytes; the label column is an integer.
    Class names come from the schema's `huggingface` entry; without it there are `classes`, else as many as the labels
    of this split and of `train` show.

    Encoded bytes are kept by row group, the least recently used leaving first when they pass `cache_bytes`; nothing is
    decoded ahead. Random access to a split larger than that reads row groups again and again: a warning says so.

    Args:
        path: the folder.
        split: the split.
        image_column: its name; None: the one column of such a type (`image` or `img` if there are several).
        label_column: the same; `label` if there are several.
        cache_bytes: of encoded images in memory.
        classes: how many, where the schema does not name them.

    Raises:
        UserError: no such folder, split or column, no rows, labels that are missing or negative, or not of `classes`.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        image_column: str | None = None,
        label_column: str | None = None,
        cache_bytes: int = 4 << 30,
        classes: int | None = None,
    ):
        folder = open_folder(path)
        found = parquet_files(folder)
        name = find_split(split, found, folder)
        self._files = [open_parquet(file) for file in found[name]]
        self._paths = [str(file.relative_to(folder)) for file in found[name]]
        schema = self._files[0].schema_arrow
        where = found[name][0]
        image = pick_column(schema, "image_column", image_column, _is_image, ("image", "img"), where)
        label = pick_column(schema, "label_column", label_column, pa.types.is_integer, ("label",), where)
        self._column = image
        self._leaf = f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image

        self.labels = read_labels(self._files, label, where)
        if not len(self.labels):
            raise UserError(f"split {name!r} of {folder} has no rows")
        self.class_names = class_names(label, self.labels, found, name, classes)

        # Row groups in order: where each starts in the split, and which file it is in.
        self._groups = [(file, group) for file, f in enumerate(self._files) for group in range(f.num_row_groups)]
        sizes = [self._files[file].metadata.row_group(group).num_rows for file, group in self._groups]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._cache_bytes, self._cached = cache_bytes, 0
        self._lock = threading.Lock()
        total = sum(_column_bytes(f, self._leaf) for f in self._files)
        if total > cache_bytes:
            logging.warning(
                "%s split %r holds %.1f GB of images, more than the cache of %.1f GB: shuffled reading will be slow",
                folder,
                name,
                total / 1e9,
                cache_bytes / 1e9,
            )

    def __getitem__(self, index: int) -> Example:
        group, row = self._locate(index)
        scalar = self._row_group(group)[row]
        data = scalar.as_buffer() if scalar.is_valid else None
        return {"image": decode(None if data is None else memoryview(data)), "label": int(self.labels[index])}

    def name_of(self, index: int) -> str:
        group, row = self._locate(index)
        file, _ = self._groups[group]
        first = next(g for g, (other, _) in enumerate(self._groups) if other == file)
        return f"{self._paths[file]} row {self._starts[group] - self._starts[first] + row}"

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} rows")
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return group, int(index - self._starts[group])

    def _row_group(self, group: int) -> pa.ChunkedArray:
        # One lock for looking and reading: a parquet file is not safe to read from two threads, and two readers of the
        # same group would do the work twice.
        with self._lock:
            if group not in self._cache:
                file, inner = self._groups[group]
                column = self._files[file].read_row_group(inner, columns=[self._leaf])[self._column]
                column = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
                self._cache[group] = column
                self._cached += column.nbytes
                while self._cached > self._cache_bytes and len(self._cache) > 1:
                    _, oldest = self._cache.popitem(last=False)
                    self._cached -= oldest.nbytes
            self._cache.move_to_end(group)
            return self._cache[group]


class ImageFolder(Labelled):
    """Images in folders named after their class: `path/split/class/**/image.jpg`.

    Labels number the sorted class folders. They are those of the `train` folder if there is one, so that a class
    without a held-out image does not shift the others.

    Args:
        path: the folder.
        split: a folder in it (`val`, `validation` and `test` stand for each other); None: `path` itself holds classes.

    Raises:
        UserError: no such folder or split, no image in it, or a class that `train` does not have.
    """

    def __init__(self, path: str | Path, split: str | None):
        folder = open_folder(path)
        splits = {child.name: child for child in subfolders(folder)}
        self._root = folder if split is None else splits[find_split(split, splits, folder)]
        here = [child.name for child in subfolders(self._root)]
        names = here if split is None or "train" not in splits else [c.name for c in subfolders(splits["train"])]
        if unknown := sorted(set(here) - set(names)):
            raise UserError(f"{self._root} has classes that {splits['train']} lacks: {listing(unknown)}")
        files, labels = [], []
        for label, name in enumerate(names):
            inside = images_under(self._root / name)
            files += [f"{name}/{file}" for file in inside]
            labels += [label] * len(inside)
        if not files:
            raise UserError(f"no images in {self._root}: expected class folders with {listing(sorted(IMAGE_SUFFIXES))}")
        self.class_names = tuple(names)
        self.labels = np.asarray(labels, np.int32)
        self._names = files

    def __getitem__(self, index: int) -> Example:
        path = self._root / self._names[index]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ImageError(error.strerror or str(error)) from error
        return {"image": decode(data), "label": int(self.labels[index])}

    def name_of(self, index: int) -> str:
        return str(self._root / self._names[index])


class Subset(Labelled):
    """Some examples of a source, with the classes of the whole."""

    def __init__(self, source: Source, indices: Int64[np.ndarray, " n"]):
        self._source, self._indices = source, indices
        self.class_names = source.class_names
        self.labels = source.labels[indices]
        self.in_memory = source.in_memory
        inherit(self, source)
        if self.captions is not None:
            self.captions = [self.captions[index] for index in indices]

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]

    def name_of(self, index: int) -> str:
        return self._source.name_of(int(self._indices[index]))


class Only(Subset):
    """The examples of some classes, which alone are counted: label i is the i-th of the names.

    Args:
        source: of images, each of one class.
        names: of the classes, at least two; numbers as text where the source has no names.

    Raises:
        UserError: a name that the source does not have, one twice, fewer than two, or no example of any.
    """

    def __init__(self, source: Source, names: Sequence[str]):
        known = {name: label for label, name in enumerate(source.class_names)}
        if unknown := [name for name in names if name not in known]:
            has = listing(source.class_names, 20)
            raise UserError(f"data config: only has {listing(unknown)}; the classes of the data are {has}")
        if len(names) < 2 or len(set(names)) != len(names):
            raise UserError(f"data config: only is {tuple(names)}; it must be at least two different classes")
        numbers = np.full(len(known), -1, np.int32)
        numbers[[known[name] for name in names]] = np.arange(len(names))
        indices = np.flatnonzero(numbers[source.labels] >= 0)
        if not len(indices):
            raise UserError(f"data config: only is {tuple(names)}; the split has no example of any of them")
        super().__init__(source, indices.astype(np.int64))
        self.class_names, self.labels = tuple(names), numbers[source.labels[indices]]

    def __getitem__(self, index: int) -> Example:
        return {**super().__getitem__(index), "label": int(self.labels[index])}


class Decoded(Labelled):
    """A source of small images that decodes each of them once, and keeps it while there is room.

    Opening a JPEG file of 32x32 pixels takes longer than everything that training does to it.
    """

    in_memory = True

    def __init__(self, source: Source, max_bytes: int):
        self._source = source
        self.class_names, self.labels = source.class_names, source.labels
        inherit(self, source)
        self._examples: dict[int, Example] = {}
        self._room = max_bytes
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> Example:
        example = self._examples.get(index)
        if example is None:
            example = self._source[index]
            size = _bytes(example)
            with self._lock:
                if index not in self._examples and size <= self._room:
                    self._examples[index] = example
                    self._room -= size
        return example

    def name_of(self, index: int) -> str:
        return self._source.name_of(index)


def keep_decoded(source: Source, max_bytes: int) -> Source:
    """`Decoded` if all images, judged by the size of the first, fit into `max_bytes`; else the source as it is."""
    if source.in_memory:
        return source
    try:
        size = _bytes(source[0])
    except ImageError:  # whoever iterates will count it
        return source
    return Decoded(source, max_bytes) if size * len(source) <= max_bytes else source


def _bytes(example: Example) -> int:
    return sum(value.nbytes for value in example.values() if isinstance(value, np.ndarray))


def inherit(wrapper: Labelled, source: Source) -> None:
    """Gives a wrapper what sources may have beside images and labels."""
    for name in ("fields", "captions", "dense", "segments"):
        if hasattr(source, name):
            setattr(wrapper, name, getattr(source, name))


def subset(source: Source, n: int, seed: int = 0) -> Subset:
    """A random part of `n` examples in which every class keeps its share.

    Raises:
        ValueError: `n` outside 1..len(source).
    """
    if not 1 <= n <= len(source):
        raise ValueError(f"a subset must have 1 to {len(source)} examples, got {n}")
    return Subset(source, stratified(source.labels, n, seed))


def stratified(labels: np.ndarray, n: int, seed: int) -> Int64[np.ndarray, " n"]:
    """`n` random positions, sorted, drawn from each class in proportion to its size (largest remainders win)."""
    rng = np.random.default_rng(seed)
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    quota = sizes * n / len(labels)
    counts = np.floor(quota).astype(int)
    counts[np.argsort(counts - quota, kind="stable")[: n - counts.sum()]] += 1
    picked = [rng.permutation(np.flatnonzero(inverse == group))[:count] for group, count in enumerate(counts)]
    return np.sort(np.concatenate(picked)).astype(np.int64)


def open_source(config: ml_collections.ConfigDict, split: str | None, train: bool = False) -> Source:
    """Opens what a data config names.

    Args:
        config: with `source` (one of `SOURCES`; `auto`: digits without a path, else parquet or imagefolder, whichever
            the folder holds), `path`, `image_size` (of digits, scenes and segmentation), `image_column`,
            `label_column` and `cache_gb` (of parquet), and where they matter `scenes`, `patch_size`, `classes` and
            `resize` (of segmentation; `classes` of parquet too).
        split: the name of the split in the source; None or "": the path itself is the split.
        train: every caption of an image is an example of its own.

    Raises:
        UserError: an unknown source, or whatever the source finds wrong.
    """
    from tokjax.data import captions, dense, scenes  # they build on this module

    kind, path = config.source, config.path
    if kind not in SOURCES:
        raise UserError(f"unknown data source {kind!r}: choose from {', '.join(SOURCES)}")
    if kind == "auto":
        kind = "digits" if not path else "parquet" if parquet_files(open_folder(path)) else "imagefolder"
    if kind == "digits":
        return Digits(split or "train", size=min(config.image_size))
    if kind == "scenes":
        options = config.scenes
        return scenes.Scenes(
            split or "train",
            size=tuple(config.image_size),
            patch_size=config.patch_size,
            digits=tuple(options.digits),
            colours=options.colours,
            distinct=options.distinct and split == "test",
            count=options.test_count if split == "test" else options.train_count,
            seed=options.seed,
        )
    if not path:
        raise UserError(f"data source {kind!r} needs a path")
    if kind == "imagefolder":
        return ImageFolder(path, split or None)
    if kind == "captions":
        return captions.Captions(path, split or None, pairs=train)
    if kind == "segmentation":
        return dense.SegmentationFolder(
            path,
            split or None,
            size=tuple(config.image_size),
            patch_size=config.patch_size,
            classes=config.classes,
            mode=config.resize.mode,
            crop_pct=config.resize.crop_pct,
        )
    if not split:
        raise UserError("data source 'parquet' needs the name of a split")
    cache_bytes = int(config.get("cache_gb", 4.0) * (1 << 30))
    columns = config.get("image_column"), config.get("label_column")
    return Parquet(path, split, *columns, cache_bytes, config.get("classes"))


def open_folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder" if folder.exists() else f"no such folder: {folder}")
    return folder


def subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def find_split(split: str, found: dict, folder: Path) -> str:
    """The name under which a split exists: its own, or another name for held-out data."""
    candidates = [split, *(HELD_OUT if split in HELD_OUT else ())]
    for name in candidates:
        if name in found:
            if name != split:
                logging.info("no split %r in %s, reading %r", split, folder, name)
            return name
    has = f"it has {listing(sorted(found))}" if found else "it has none"
    raise UserError(f"no split {split!r} in {folder}: {has}")


def listing(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def images_under(folder: Path) -> list[str]:
    """Image files below a folder, as paths relative to it, in a fixed order."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(parent).relative_to(folder)
        found += [
            str(inside / file)
            for file in sorted(files)
            if not file.startswith(".") and Path(file).suffix.lower() in IMAGE_SUFFIXES
        ]
    return found


def parquet_files(folder: Path) -> dict[str, list[Path]]:
    """Split -> its files. Files of a folder `split/` belong to it, the others tell their split by name."""
    found: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for file in sorted(place.glob("*.parquet")):
            if match := _PARQUET_NAME.fullmatch(file.name):
                found.setdefault(match["split"], []).append(file)
        for child in subfolders(place) if place.is_dir() else ():
            if child != folder / "data" and (files := sorted(child.glob("*.parquet"))):
                found.setdefault(child.name, files)
    return found


def open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(child.name == "bytes" and _is_image(child.type) for child in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def pick_column(schema: pa.Schema, role: str, name: str | None, fits, usual: tuple[str, ...], where: Path) -> str:
    fitting = [field.name for field in schema if fits(field.type)]
    if name is not None:
        if name not in schema.names:
            raise UserError(f"{role} {name!r} is not in {where}: its columns are {listing(schema.names)}")
        if name not in fitting:
            kind = schema.field(name).type
            raise UserError(
                f"{role} {name!r} of {where} has type {kind}; fitting columns: {listing(fitting) or 'none'}"
            )
        return name
    if len(fitting) == 1:
        return fitting[0]
    for name in usual:
        if name in fitting:
            return name
    if fitting:
        raise UserError(f"several columns of {where} could be the {role}, name one: {listing(fitting)}")
    raise UserError(
        f"no column of {where} can be the {role}: it has {listing([f'{f.name} ({f.type})' for f in schema])}"
    )


def read_labels(files: list[pq.ParquetFile], column: str, where: Path) -> Int32[np.ndarray, " n"]:
    try:
        chunks = [chunk.cast(pa.int64()) for file in files for chunk in file.read([column])[column].chunks]
        labels = pa.chunked_array(chunks, pa.int64())
    except (KeyError, pa.ArrowException) as error:
        raise UserError(f"column {column!r} is not an integer in {where} and the files beside it") from error
    if labels.null_count:
        raise UserError(f"column {column!r} of {where} has {labels.null_count} rows without a label")
    values = labels.to_numpy()
    if len(values) and values.min() < 0:
        raise UserError(f"column {column!r} of {where} has the label {values.min()}: is this split without labels?")
    return values.astype(np.int32)


def class_names(
    column: str, labels: Int32[np.ndarray, " n"], found: Mapping[str, Sequence[Path]], split: str, classes: int | None
) -> tuple[str, ...]:
    """Names of the classes of a parquet split: the schema's, else as many numbers as this split and `train` show.

    Args:
        column: of the labels.
        labels: of the split, at least one.
        found: the files of each split.
        split: which one.
        classes: how many, where the schema does not name them.

    Raises:
        UserError: labels that are not of `classes`, or of the schema's.
    """
    where = found[split][0]
    names = _hf_class_names(open_parquet(where).schema_arrow, column)
    if names is None:
        top = int(labels.max())
        if "train" in found and split != "train":  # a rare class may be missing here, and the model was built there
            train = read_labels([open_parquet(f) for f in found["train"]], column, found["train"][0])
            top = max(top, int(train.max(initial=0)))
        if classes is not None and classes <= top:
            raise UserError(f"classes={classes}: column {column!r} of {where} or of train has label {top}")
        return tuple(str(index) for index in range(classes or top + 1))
    if classes not in (None, len(names)):
        raise UserError(f"classes={classes}: the schema of {where} names {len(names)}")
    if labels.max() >= len(names):
        raise UserError(f"column {column!r} of {where} has label {labels.max()}, its schema names {len(names)} classes")
    return names


def _hf_class_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """The names of a `ClassLabel` feature in the schema's metadata; None where there are none."""
    try:
        entry = json.loads((schema.metadata or {})[b"huggingface"])
        names = entry["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(str(name) for name in names) if isinstance(names, list) and names else None


def _column_bytes(file: pq.ParquetFile, leaf: str) -> int:
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == leaf)
