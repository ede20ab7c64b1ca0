"""Images with captions: a local folder as people keep Flickr30k or COCO, and the way from captions to token ids."""

from collections.abc import Callable, Iterator, Sequence
import csv
import json
from pathlib import Path

from jaxtyping import Int32
import numpy as np

from tokjax.data.sources import Example, Labelled, Source, find_split, inherit, open_folder, subfolders
from tokjax.data.transforms import ImageError, decode
from tokjax.errors import UserError

FILES = ("captions.jsonl", "captions.csv")


class Captions(Labelled):
    """Images and what is said about them: `captions.jsonl` or `captions.csv` and the images that they name.

    Every line of `captions.jsonl` is an object with `file`, a path relative to the list, and `caption`, a string or a
    list of them; the first line of `captions.csv` names the columns `file` and `caption`. An image may have several
    captions, in one line or in several. Splits are folders with a list of their own (`path/test/captions.jsonl`), or
    `path/captions.jsonl` has a field `split` in every line.

    The `label` of an example numbers its image (in the order of first mention), so that two captions of one image are
    known as such; `class_names` are the files.

    Args:
        path: the folder.
        split: the split (`val`, `validation` and `test` stand for each other); None: everything `path`'s list has.
        pairs: every caption is an example of its own, as for training. Otherwise an image is one example, its `caption`
            the first one, and `captions` has all of them.

    Raises:
        UserError: no such folder, split or list, a line that is not as above, or no images.
    """

    def __init__(self, path: str | Path, split: str | None, pairs: bool = False):
        folder = open_folder(path)
        root, rows = _read_split(folder, split)
        texts: dict[str, list[str]] = {}
        for file, captions in rows:
            texts.setdefault(file, []).extend(captions)
        if not texts:
            raise UserError(f"no captions in {root}{f' for split {split!r}' if split else ''}")
        self._root = root
        self.class_names = tuple(texts)
        counts = [len(captions) for captions in texts.values()]
        self.labels = np.repeat(np.arange(len(texts), dtype=np.int32), counts if pairs else 1)
        self.captions = self._texts = (
            [(caption,) for group in texts.values() for caption in group] if pairs else list(map(tuple, texts.values()))
        )

    def __getitem__(self, index: int) -> Example:
        label = int(self.labels[index])
        try:
            data = (self._root / self.class_names[label]).read_bytes()
        except OSError as error:
            raise ImageError(error.strerror or str(error)) from error
        return {"image": decode(data), "label": label, "caption": self._texts[index][0]}

    def name_of(self, index: int) -> str:
        return str(self._root / self.class_names[self.labels[index]])


class Tokenized(Labelled):
    """A source with captions that also gives `ids`, the tokens of each example's `caption`.

    Args:
        source: whose examples have `caption`.
        tokenizer: from strings to ids int32 [B, T], such as `tokjax.pretrained.tokenizer.Tokenizer`.

    Raises:
        UserError: a source without captions.
    """

    def __init__(self, source: Source, tokenizer: Callable[[Sequence[str]], Int32[np.ndarray, "B T"]]):
        if getattr(source, "captions", None) is None:
            raise UserError(f"{type(source).__name__} has no captions: choose scenes or captions as the data source")
        self._source, self._tokenizer = source, tokenizer
        self.class_names, self.labels, self.in_memory = source.class_names, source.labels, source.in_memory
        inherit(self, source)
        length = tokenizer([""]).shape[1]
        self.fields = {**self.fields, "ids": ((length,), "int32")}

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        return {**example, "ids": self._tokenizer([example["caption"]])[0]}

    def name_of(self, index: int) -> str:
        return self._source.name_of(index)


def _read_split(folder: Path, split: str | None) -> tuple[Path, list[tuple[str, list[str]]]]:
    """The folder that file names start from, and (file, captions) of each line of the split."""
    lists = {child.name: file for child in subfolders(folder) if (file := _list_in(child))}
    if split and lists:
        file = lists[find_split(split, lists, folder)]
        return file.parent, [row for _, row in _rows(file)]
    here = _list_in(folder)
    if not here:
        raise UserError(f"no {' or '.join(FILES)} in {folder}" + (" or in the folder of a split" if split else ""))
    rows = list(_rows(here))
    if split:
        if missing := [number for number, (name, _) in enumerate(rows) if name is None]:
            raise UserError(
                f"split {split!r} asked of {here}, whose entry {missing[0] + 1} has no `split`: name one in every "
                "line, or give each split its folder"
            )
        found = dict.fromkeys(name for name, _ in rows)
        wanted = find_split(split, found, here)
        rows = [(name, row) for name, row in rows if name == wanted]
    return folder, [row for _, row in rows]


def _list_in(folder: Path) -> Path | None:
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def _rows(file: Path) -> Iterator[tuple[str | None, tuple[str, list[str]]]]:
    """(split or None, (file, captions)) of each line."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".csv":
                entries = list(enumerate(csv.DictReader(lines), 2))
            else:
                entries = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {file}: {str(error).splitlines()[0]}") from error
    for number, entry in entries:
        entry = entry if isinstance(entry, dict) else {}
        name, captions, split = entry.get("file"), entry.get("caption"), entry.get("split")
        texts = [captions] if isinstance(captions, str) else captions if isinstance(captions, list) else []
        right = texts and all(isinstance(text, str) for text in texts)
        if not (isinstance(name, str) and name and right and (split is None or isinstance(split, str))):
            raise UserError(f"{file}, line {number}: needs `file` and `caption` (a string or several), got {entry!r}")
        yield split or None, (name, texts)
