"""Where texts come from: documents in memory, as bytes, in groups (languages), perhaps with labels.

`embedded` needs no files; `files` reads text files, one document a line, a paragraph or a file; `languages` a folder
with one text file a language; `parquet` the files of a Hugging Face dataset. Bytes that are not UTF-8 become U+FFFD,
documents of nothing but white space are left out. What is wrong with path, split or column is a `UserError`.

Where splits have no files of their own, the last documents of each group are held out: neighbours in a text are alike,
so a random choice would show nearly the same in both.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
from pathlib import Path
import re
from string import Formatter
from typing import Literal

from absl import logging
from jaxtyping import Int32
import ml_collections
from ml_collections import config_dict
import numpy as np
import pyarrow as pa

from tokjax.data.sources import (
    HELD_OUT,
    class_names,
    find_split,
    listing,
    open_folder,
    open_parquet,
    parquet_files,
    pick_column,
    read_labels,
    subfolders,
)
from tokjax.errors import UserError

SOURCES = ("embedded", "files", "languages", "parquet", "auto")
ALL = "all"  # the split that is everything, where splits have no files of their own
Document = Literal["line", "paragraph", "file"]
Files = Mapping[str, Sequence[Path]]  # split -> its files


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Documents in a fixed order.

    Attributes:
        documents: not empty, valid UTF-8.
        group: the group of each, a number into `groups`.
        groups: their names, such as languages.
        labels: the class of each document; None: there are none.
        class_names: one name for each class.
    """

    documents: Sequence[bytes]
    group: Int32[np.ndarray, " n"]
    groups: tuple[str, ...]
    labels: Int32[np.ndarray, " n"] | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.documents)


def embedded(split: str) -> Texts:
    """Short reviews in English that a small grammar writes, with what they think (0 negative, 1 positive).

    Raises:
        UserError: a split other than train, test and its other names.
    """
    count, seed = {"train": (4000, 0)}.get(split, (400, 1))
    if split != "train" and split not in HELD_OUT:
        raise UserError(f"no split {split!r} in the embedded text: it has train, test")
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count).astype(np.int32)
    documents = [_review(rng, int(label)).encode() for label in labels]
    return Texts(documents, np.zeros(count, np.int32), ("english",), labels, ("negative", "positive"))


# The grammar of the embedded text: sentences with places for the words of the lists below; {mood} differs by label.
_SENTENCES = (
    "We went to the {place} {time}, and the {thing} was {mood}.",
    "The {person} who {past} the {thing} seemed {mood}.",
    "In the {place} there are {count} {thing}s, and {few} of them {verb} {manner}.",
    "{time}, my {person} {past} a {thing} near the {place}.",
    "It took {count} minutes to find the {place}; the {person} called it {mood}.",
    '"I have never seen such a {mood} {thing}," said the {person}.',
    "Why would a {person} {verb} in a {place} {time}?",
    "The {thing} cost {count} coins, which is {mood} for a {place} like this.",
    "Nobody {past} the {thing} until the {person} came back from the {place}.",
)
_WORDS = {
    "place": "harbour, market, garden, library, station, theatre, bakery, museum, valley, bridge, workshop, island",
    "thing": "lantern, violin, kettle, map, boat, clock, window, letter, blanket, machine, pear, stone, book, story",
    "person": "sailor, teacher, neighbour, painter, doctor, cousin, guard, pilot, farmer, stranger, captain, friend",
    "past": "carried, repaired, painted, forgot, borrowed, described, sold, followed, cleaned, watched, hid",
    "verb": "work, sing, wait, travel, listen, sleep, whistle, argue, dance, read",
    "manner": "quietly, slowly, together, every evening, without help, in the rain",
    "time": "last summer, on Monday, after lunch, before the storm, in the morning, two years ago",
    "few": "most, some, none, half, all",
}
_MOODS = (
    "dreadful, boring, broken, noisy, overpriced, dull, ugly, disappointing, clumsy, rotten, cold, useless",
    "wonderful, charming, bright, friendly, delicious, elegant, clever, splendid, cheerful, brilliant, warm, lovely",
)


def _review(rng: np.random.Generator, label: int) -> str:
    words = {name: choices.split(", ") for name, choices in (*_WORDS.items(), ("mood", _MOODS[label]))}

    def fill(match: re.Match[str]) -> str:
        choices = words.get(match[1])
        return str(rng.integers(2, 100)) if choices is None else choices[rng.integers(len(choices))]

    chosen = rng.permutation(len(_SENTENCES))[: rng.integers(3, 7)]
    lines = [re.sub(r"\{(\w+)\}", fill, _SENTENCES[index]) for index in chosen]
    lines.append(f"all in all it was {words['mood'][rng.integers(len(words['mood']))]}.")
    return " ".join(line[0].upper() + line[1:] for line in lines)


SAMPLES: Mapping[str, str] = {
    "english": "The river carries the old songs to the sea.",
    "german": "Der Fluss trägt die alten Lieder über die Wiesen zum Meer.",
    "french": "La rivière porte les vieilles chansons jusqu'à la mer.",
    "greek": "Το ποτάμι φέρνει τα παλιά τραγούδια στη θάλασσα.",
    "russian": "Река несёт старые песни к морю.",
    "arabic": "يحمل النهر الأغاني القديمة إلى البحر.",
    "hindi": "नदी पुराने गीत समुद्र तक ले जाती है।",
    "thai": "แม่น้ำพาเพลงเก่าไปสู่ทะเล",
    "chinese": "河流把古老的歌带到大海。",
    "japanese": "川は古い歌を海へ運ぶ。",
    "korean": "강은 오래된 노래를 바다로 나른다.",
}
"""One sentence in several languages and scripts, for pictures and tests."""


def files(path: str | Path, split: str, document: Document = "line", held_out: float = 0.05) -> Texts:
    """Text files, all in one group.

    Args:
        path: a folder with files or folders named after splits (`train.txt`, `valid/*.txt`); a pattern such as
            `news_{split}.txt`; or a file, or a folder of `*.txt` files, of which the last documents are held out.
        split: `val`, `validation`, `valid`, `dev` and `test` stand for each other; `all` where splits have no files.
        document: what a document is; paragraphs have empty lines between them.
        held_out: share of the documents of `test`, where splits have no files.

    Raises:
        UserError: nothing there, no such split, no text in it.
        ValueError: another `document`, or `held_out` outside (0, 1).
    """
    found, whole = _split_files(path)
    chosen = found[ALL] if whole else found[find_split(split, dict(found), Path(path))]
    documents = [text for file in chosen for text in read_documents(file, document)]
    if whole:
        documents = _held_out(documents, split, held_out, str(path))
    return _texts([("text", documents)], str(path))


def languages(path: str | Path, split: str, document: Document = "line", held_out: float = 0.05) -> Texts:
    """A folder with one text file a language, `path/deu.txt`, or with such folders named after splits.

    Args:
        path: the folder.
        split: as of `files`; without folders of their own, the last documents of every language are held out.
        document: what a document is.
        held_out: share of the documents of `test`, where splits have no folders.

    Raises:
        UserError: no such folder or split, no `*.txt` in it, a language without text.
        ValueError: another `document`, or `held_out` outside (0, 1).
    """
    folder = open_folder(path)
    splits = {child.name: child for child in subfolders(folder) if any(child.glob("*.txt"))}
    here = splits[find_split(split, splits, folder)] if splits else folder
    groups = [(file.stem, list(read_documents(file, document))) for file in sorted(here.glob("*.txt"))]
    if not splits:
        groups = [(name, _held_out(texts, split, held_out, f"{here} ({name})")) for name, texts in groups]
    return _texts(groups, str(here))


def parquet(
    path: str | Path,
    split: str,
    text_column: str | None = None,
    label_column: str | None = None,
    template: str | None = None,
    labelled: bool = True,
    classes: int | None = None,
) -> Texts:
    """A split of a folder of parquet files, or of a pattern such as `reviews_{split}.parquet`.

    Args:
        path: the folder (as `tokjax.data.Parquet` reads it) or the pattern.
        split: the split; `val`, `validation`, `valid`, `dev` and `test` stand for each other.
        text_column: None: the one column of strings (`text` if there are several).
        label_column: None: the one column of integers (`label` if there are several).
        template: a text of several columns, such as "Premise: {premise} Hypothesis: {hypothesis}"; in place of
            `text_column`.
        labelled: read labels.
        classes: how many, where the schema does not name them.

    Raises:
        UserError: nothing there, no such split or column, rows without text, labels that are missing or negative.
    """
    if "{split}" in str(path):
        found, folder = _pattern_files(str(path)), Path(path).parent
    else:
        folder = open_folder(path)
        found = parquet_files(folder)
    name = find_split(split, dict(found), folder)
    readers = [open_parquet(file) for file in found[name]]
    schema, where = readers[0].schema_arrow, found[name][0]
    if template is None:
        usual = ("text", "sentence", "content", "document")
        columns = [pick_column(schema, "text_column", text_column, _is_text, usual, where)]
        template = f"{{{columns[0]}}}"
    else:
        columns = [field for _, field, _, _ in Formatter().parse(template) if field]
        if not columns:
            raise UserError(f"template {template!r} names no column: write one as {{{schema.names[0]}}}")
        for column in columns:
            pick_column(schema, "a column of the template", column, _is_text, (), where)
    rows = [row for reader in readers for row in reader.read(columns).to_pylist()]
    if not rows:
        raise UserError(f"split {name!r} of {folder} has no rows")
    for index, row in enumerate(rows):
        if missing := [column for column in columns if row[column] is None]:
            raise UserError(f"row {index} of split {name!r} of {folder} has no text in column {missing[0]!r}")
    documents = [template.format(**row).strip().encode("utf-8", "replace") for row in rows]
    labels: Int32[np.ndarray, " n"] | None = None
    names: tuple[str, ...] = ()
    if labelled:
        label = pick_column(schema, "label_column", label_column, pa.types.is_integer, ("label",), where)
        labels = read_labels(readers, label, where)
        names = class_names(label, labels, found, name, classes)
    kept = np.array([bool(text) for text in documents])
    if not kept.any():
        raise UserError(f"no text in split {name!r} of {folder}")
    if dropped := int((~kept).sum()):
        logging.warning("%d rows of split %r of %s are empty and left out", dropped, name, folder)
    documents = [text for text in documents if text]
    labels = None if labels is None else labels[kept]
    return Texts(documents, np.zeros(len(documents), np.int32), ("text",), labels, names)


def default_config() -> ml_collections.ConfigDict:
    """The fields of a data config that `open_texts` reads, with their meaning."""
    config = ml_collections.ConfigDict()
    # embedded, files, languages, parquet; auto: embedded without a path, else what the path holds
    config.source = "auto"
    config.path = ""  # a folder, a file, or a pattern such as news_{split}.txt
    config.train_split = "train"
    config.test_split = "test"  # val, valid, validation, dev and test stand for each other; all: everything
    config.document = "line"  # what a document is: line, paragraph, file
    config.held_out = 0.05  # share of the documents of test, where splits have no files of their own
    config.text_column = config_dict.placeholder(str)  # of parquet; None: found by its type
    config.label_column = config_dict.placeholder(str)
    config.template = config_dict.placeholder(str)  # "Premise: {premise} Hypothesis: {hypothesis}"; None: one column
    config.classes = config_dict.placeholder(int)  # of parquet that does not name them
    return config


def open_texts(config: ml_collections.ConfigDict, split: str, labelled: bool = False) -> Texts:
    """Opens what a data config names.

    Args:
        config: with `source` (one of `SOURCES`; `auto`: embedded without a path, else parquet, languages or files,
            what the path holds), `path`, `document`, `held_out`, `text_column`, `label_column`, `template`, `classes`.
        split: the name of the split in the source.
        labelled: the documents need a class.

    Raises:
        UserError: an unknown source, one without labels where they are needed, or whatever the source finds wrong.
    """
    kind, path = config.source, config.path
    if kind not in SOURCES:
        raise UserError(f"unknown text source {kind!r}: choose from {', '.join(SOURCES)}")
    if kind == "auto":
        kind = _guess(path)
    if kind == "embedded":
        return embedded(split)
    if not path:
        raise UserError(f"text source {kind!r} needs a path")
    if kind == "parquet":
        columns = config.text_column, config.label_column
        return parquet(path, split, *columns, config.template, labelled, config.classes)
    if labelled:
        raise UserError(f"text source {kind!r} has no labels: choose parquet, or embedded")
    read = languages if kind == "languages" else files
    return read(path, split, config.document, config.held_out)


def _guess(path: str) -> str:
    if not path:
        return "embedded"
    if path.endswith(".parquet"):
        return "parquet"
    if "{split}" in path or Path(path).expanduser().is_file():
        return "files"
    folder = open_folder(path)
    if parquet_files(folder):
        return "parquet"
    split_names = {"train", *HELD_OUT}
    texts = [file.stem for file in folder.glob("*.txt")]
    named = split_names & {*texts, *(child.name for child in subfolders(folder))}
    return "files" if named or len(texts) < 2 else "languages"


def read_documents(file: Path, document: Document = "line") -> Iterator[bytes]:
    """The documents of a text file, without white space around them; empty ones are left out.

    Raises:
        UserError: a file that cannot be read.
        ValueError: another `document`.
    """
    if document not in ("line", "paragraph", "file"):
        raise ValueError(f"document must be line, paragraph or file, got {document!r}")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    data = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        logging.warning("%s is not UTF-8 (%s): what is not becomes U+FFFD", file, error.reason)
        data = data.decode("utf-8", "replace").encode()
    separate: dict[str, Callable[[bytes], Iterable[bytes]]] = {
        "line": lambda text: text.split(b"\n"),
        "paragraph": lambda text: re.split(rb"\n[ \t]*\n", text),
        "file": lambda text: [text],
    }
    return (stripped for part in separate[document](data) if (stripped := part.strip()))


def _split_files(path: str | Path) -> tuple[Files, bool]:
    """The files of each split, or all of them as `ALL` and True where splits have no files."""
    if "{split}" in str(path):
        return _pattern_files(str(path)), False
    place = Path(path).expanduser()
    if place.is_file():
        return {ALL: [place]}, True
    folder = open_folder(place)
    texts = sorted(folder.glob("*.txt"))
    named: dict[str, list[Path]] = {f.stem: [f] for f in texts if f.stem in ("train", *HELD_OUT)}
    for child in subfolders(folder):
        if child.name in ("train", *HELD_OUT) and (inside := sorted(child.glob("*.txt"))):
            named.setdefault(child.name, inside)
    if named:
        return named, False
    if not texts:
        raise UserError(f"no *.txt files in {folder}")
    return {ALL: texts}, True


def _pattern_files(pattern: str) -> Files:
    """Split -> its file, for a path with `{split}` in its last part."""
    place = Path(pattern).expanduser()
    if place.name.count("{split}") != 1:
        raise UserError(f"path {pattern!r} must have {{split}} once, in its last part")
    before, after = place.name.split("{split}")
    rule = re.compile(f"{re.escape(before)}(.+){re.escape(after)}")
    folder = open_folder(place.parent)
    return {match[1]: [file] for file in sorted(folder.iterdir()) if (match := rule.fullmatch(file.name))}


def _held_out(documents: list[bytes], split: str, share: float, where: str) -> list[bytes]:
    """The documents of a split: the last ones are `test`, the others `train`."""
    if not 0 < share < 1:
        raise ValueError(f"held_out must be above 0 and below 1, got {share}")
    if split == ALL:
        return documents
    if split != "train" and split not in HELD_OUT:
        raise UserError(f"no split {split!r} in {where}: it has train, test and {ALL}")
    first = len(documents) - max(1, round(share * len(documents)))
    if first < 1:
        raise UserError(f"{where} has {len(documents)} documents, too few for train and test: use split {ALL!r}")
    return documents[:first] if split == "train" else documents[first:]


def _texts(groups: Sequence[tuple[str, list[bytes]]], where: str) -> Texts:
    if empty := [name for name, documents in groups if not documents]:
        raise UserError(f"no text in {where}" + (f": {listing(empty)} is empty" if len(groups) > 1 else ""))
    if not groups:
        raise UserError(f"no *.txt files in {where}")
    sizes = [len(documents) for _, documents in groups]
    group = np.repeat(np.arange(len(groups), dtype=np.int32), sizes)
    return Texts([text for _, documents in groups for text in documents], group, tuple(name for name, _ in groups))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
