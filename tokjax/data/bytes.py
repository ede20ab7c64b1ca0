"""Text as bytes, in ByT5's vocabulary (Xue et al. 2022, "ByT5", arXiv 2105.13626, section 3.1): byte b has id b + 3.

Ids: 0 pad, 1 end of sequence, 2 unknown (never made here), 3 to 258 the bytes, up to 383 spare ones of the published
embeddings. The bytes 245 to 255 occur in no UTF-8 text, so span corruption takes their ids as sentinels, 258 first.
Everything here is numpy and independent of any model.
"""

from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any, Self

from jaxtyping import Int, Int32
import numpy as np

from tokjax.errors import UserError
from tokjax.writing import write_whole

PAD, EOS, UNK = 0, 1, 2
OFFSET = 3  # id of byte 0
VOCABULARY = 384
FIRST_SENTINEL = OFFSET + 255  # of the first span; the next spans count downwards
LAST_SENTINEL = OFFSET + 245  # the smallest byte that no UTF-8 text has

# What script a character is of: its name and the ranges of code points; what none has is "other".
_SCRIPTS = {
    "latin": ((0x80, 0x24F), (0x1E00, 0x1EFF)),
    "greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "cyrillic": ((0x400, 0x52F),),
    "hebrew": ((0x590, 0x5FF),),
    "arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFE)),
    "devanagari": ((0x900, 0x97F),),
    "thai": ((0xE00, 0xE7F),),
    "kana": ((0x3040, 0x30FF),),
    "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)),
    "han": ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),
}
SCRIPTS = (*_SCRIPTS, "other")
_ASCII = ("letter", "digit", "space", "punctuation", "control")
_PLAIN = ("pad", "special", "sentinel", *_ASCII, "broken")
CLASSES = (*_PLAIN, *(f"{script} {part}" for script in SCRIPTS for part in ("first", "later")))
"""Names of the byte classes: `pad`; `special` (end, unknown, spare ids); `sentinel`; ASCII bytes by kind; `broken`,
bytes that are not UTF-8; the `first` byte of a character of several bytes, and its `later` bytes, by script."""


def encode(texts: Sequence[str | bytes], length: int) -> Int32[np.ndarray, "B T"]:
    """The ids of each text and EOS, padded with 0; a text that is too long loses its end, but not its EOS.

    Args:
        texts: strings, or bytes as they are, valid UTF-8 or not. What UTF-8 cannot hold (lone surrogates) becomes "?".
        length: T, at least 1.

    Raises:
        ValueError: a single string in place of several, something that is neither string nor bytes, or `length`.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if isinstance(texts, str | bytes):
        raise ValueError(f"texts must be a list of strings, got {type(texts).__name__} {texts[:40]!r}")
    ids = np.full((len(texts), length), PAD, np.int32)
    for index, (row, text) in enumerate(zip(ids, texts, strict=True)):
        if not isinstance(text, str | bytes):
            raise ValueError(f"texts[{index}] must be a string or bytes, got {type(text).__name__} {text!r}")
        content = to_ids(text)[: length - 1]
        row[: len(content)], row[len(content)] = content, EOS
    return ids


def to_ids(text: str | bytes) -> Int32[np.ndarray, " n"]:
    """The ids of one text's bytes, nothing before or after them."""
    data = text.encode("utf-8", "replace") if isinstance(text, str) else text
    return np.frombuffer(data, np.uint8).astype(np.int32) + OFFSET


def to_bytes(ids: Int[np.ndarray, " n"]) -> bytes:
    """The bytes among ids; every other id (pad, EOS, unknown, spare, out of the vocabulary) is left out.

    Raises:
        ValueError: `ids` are not integers [n].
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"ids must be integers [n], got {ids.dtype} {list(ids.shape)}")
    return (ids[(ids >= OFFSET) & (ids <= FIRST_SENTINEL)] - OFFSET).astype(np.uint8).tobytes()


def decode(ids: Int[np.ndarray, " n"]) -> str:
    """The text of one row of ids, with U+FFFD where they are not UTF-8 (sentinels are not either).

    Raises:
        ValueError: `ids` are not integers [n].
    """
    return to_bytes(ids).decode("utf-8", "replace")


def show(ids: Int[np.ndarray, " n"]) -> str:
    """One row of ids to read: as `decode`, with `</s>` for EOS and `<0>`, `<1>`, ... for sentinels; no pads.

    Raises:
        ValueError: `ids` are not integers [n].
    """
    ids = np.asarray(ids)
    marks = np.flatnonzero((ids == EOS) | ((ids >= LAST_SENTINEL) & (ids <= FIRST_SENTINEL)))
    parts, start = [], 0
    for mark in marks.tolist():
        name = "</s>" if ids[mark] == EOS else f"<{FIRST_SENTINEL - ids[mark]}>"
        parts += [decode(ids[start:mark]), name]
        start = mark + 1
    return "".join([*parts, decode(ids[start:])])


def byte_classes(ids: Int[np.ndarray, "*B N"]) -> Int32[np.ndarray, "*B N"]:
    """The class of each id, a number into `CLASSES`.

    Characters are recognised within a row alone: one that the row's start or end cuts through is `broken`.

    Raises:
        ValueError: `ids` are not integers with at least one axis.
    """
    ids = np.asarray(ids)
    if not ids.ndim or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids must be integers [..., N], got {ids.dtype} {list(ids.shape)}")
    number = {name: index for index, name in enumerate(CLASSES)}
    classes = np.full(ids.shape, number["special"], np.int32)
    classes[ids == PAD] = number["pad"]
    byte = np.where((ids >= OFFSET) & (ids <= FIRST_SENTINEL), ids - OFFSET, -1)
    is_ascii = (byte >= 0) & (byte < 128)
    classes[is_ascii] = _ASCII_CLASS[byte[is_ascii]]
    classes[byte >= 128] = number["broken"]
    classes[ids >= LAST_SENTINEL] = number["sentinel"]
    classes[ids > FIRST_SENTINEL] = number["special"]

    # Characters of 2, 3 and 4 bytes: what stands behind a first byte, from which the code point follows.
    beside = np.pad(byte, [(0, 0)] * (byte.ndim - 1) + [(0, 3)], constant_values=-1)
    later = [beside[..., k : k + byte.shape[-1]] for k in range(4)]
    continues = [(part & 0xC0) == 0x80 for part in later]  # -1 has the bits of no continuation
    for count, (low, high), smallest in ((2, (0xC2, 0xDF), 0x80), (3, (0xE0, 0xEF), 0x800), (4, (0xF0, 0xF4), 1 << 16)):
        first = (byte >= low) & (byte <= high) & np.logical_and.reduce(continues[1:count])
        point = byte & (0xFF >> (count + 1))
        for part in later[1:count]:
            point = point << 6 | (part & 0x3F)
        surrogate = (point >= 0xD800) & (point < 0xE000)
        first &= (point >= smallest) & (point <= 0x10FFFF) & ~surrogate
        script = number["broken"] + 1 + 2 * _script(point)
        classes[first] = script[first]
        for k in range(1, count):
            here = np.nonzero(first)
            classes[(*here[:-1], here[-1] + k)] = script[first] + 1
    return classes


def _script(points: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """Number into `SCRIPTS` of each code point."""
    found = np.full(points.shape, len(SCRIPTS) - 1)
    for index, ranges in enumerate(_SCRIPTS.values()):
        for low, high in ranges:
            found[(points >= low) & (points <= high)] = index
    return found


def _ascii_class(byte: int) -> str:
    character = chr(byte)
    if character.isalpha():
        return "letter"
    if character.isdigit():
        return "digit"
    if character in " \t\n\r\v\f":
        return "space"
    return "punctuation" if character.isprintable() else "control"


_ASCII_CLASS = np.array([CLASSES.index(_ascii_class(byte)) for byte in range(128)], np.int32)


class ByteTokenizer:
    """Texts to ids of one length, with the interface of `tokjax.pretrained.tokenizer.Tokenizer`.

    Args:
        length: T, EOS included; at least 1.

    Raises:
        ValueError: another length.
    """

    pad_id, bos_id, eos_id = PAD, None, EOS
    pad_side = "right"
    vocab_size = VOCABULARY

    def __init__(self, length: int):
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.length = length

    def __call__(self, texts: Sequence[str | bytes]) -> Int32[np.ndarray, "B T"]:
        """`encode` to this length."""
        return encode(texts, self.length)

    def prompts(self, texts: Sequence[str | bytes], *, special: bool = True) -> list[list[int]]:
        """The ids of each text to be gone on with: neither padded, nor cut, nor ended; there is no start of text."""
        raw = (text if isinstance(text, bytes) else text.encode("utf-8", "replace") for text in texts)
        return [[byte + OFFSET for byte in text] for text in raw]

    def decode(self, ids: Int[np.ndarray, " n"]) -> str:
        """`decode`: the text of one row of ids."""
        return decode(ids)

    @classmethod
    def load(cls, folder: str | Path, *, length: int | None = None) -> Self:
        """The tokenizer of a ByT5 checkpoint's folder: there is only the length to read.

        Args:
            folder: with a `tokenizer_config.json`.
            length: T; None: its `model_max_length`.

        Raises:
            UserError: no such file, one of another tokenizer, or no telling the length.
            ValueError: as the class.
        """
        path = Path(folder).expanduser() / "tokenizer_config.json"
        try:
            settings: Any = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        kind = settings.get("tokenizer_class") if isinstance(settings, dict) else None
        if kind != "ByT5Tokenizer":
            raise UserError(f"{path} has tokenizer_class {kind!r}, bytes need 'ByT5Tokenizer'")
        if length is None:
            said = settings.get("model_max_length")
            length = int(said) if isinstance(said, int | float) and 0 < said < 1_000_000 else None
        if length is None:
            raise UserError(f"{path} does not say how long texts are: give length")
        return cls(length)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer_config.json`, which `load` and transformers read to the same ids."""
        settings = {
            "tokenizer_class": "ByT5Tokenizer",
            "model_max_length": self.length,
            "extra_ids": VOCABULARY - OFFSET - 256,
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
        text = json.dumps(settings, indent=2) + "\n"
        write_whole(Path(folder) / "tokenizer_config.json", lambda path: path.write_text(text, encoding="utf-8"))
