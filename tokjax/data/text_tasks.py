"""What a byte-level encoder-decoder learns from: pairs of input ids and target ids, one pair an index.

A task is a pure function of (index, random generator). Both sides are one-dimensional, without padding, and end with
EOS (1). The loader of `tokjax.data.text` pads them.
"""

from collections.abc import Sequence
import dataclasses
import re
import string
from typing import Any, Literal, Protocol

from absl import logging
from jaxtyping import Int, Int32
import numpy as np

from tokjax.data import corruption
from tokjax.data.bytes import EOS, encode, to_ids
from tokjax.data.texts import Texts
from tokjax.errors import UserError

Pair = tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]  # input and target


class TextTask(Protocol):
    """What the loader asks of a task.

    Attributes:
        length: N, the longest input.
        target_length: T, the longest target.
        group: the group (language) of each example, a number into `groups`.
        labels: the class of each example; None: it has none.
    """

    length: int
    target_length: int
    group: Int32[np.ndarray, " n"]
    groups: tuple[str, ...]
    labels: Int32[np.ndarray, " n"] | None
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __call__(self, index: int, rng: np.random.Generator, /) -> Pair: ...


class Task:
    """What tasks share: examples are counted by their groups."""

    group: Int32[np.ndarray, " n"]
    groups: tuple[str, ...] = ("text",)
    labels: Int32[np.ndarray, " n"] | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.group)


class SpanCorruption(Task):
    """Spans of a text are cut out, and the target has them (see `tokjax.data.corruption`).

    With `pack`, the documents of a group follow each other, each with EOS behind it, and every T ids are an example;
    the tail that fills none is left out. Otherwise a document is an example: one that is too long loses its end, one
    that is short has fewer spans, but at least one.

    Args:
        texts: documents.
        length: N, of the corrupted input.
        density: share of the bytes that are cut out.
        mean_span: bytes in a span on average.
        pack: see above.

    Raises:
        ValueError: as `corruption.lengths`, or a length too short for one span of this mean.
        UserError: no group has as many bytes as an example needs.
    """

    def __init__(
        self, texts: Texts, length: int = 1024, density: float = 0.15, mean_span: float = 20.0, pack: bool = True
    ):
        tokens, target = corruption.lengths(length, density, mean_span)
        if round(round(tokens * density) / mean_span) < 1:
            raise ValueError(
                f"length={length} has {round(tokens * density)} bytes to cut out, less than half a span of "
                f"{mean_span:g}: choose a longer text, a higher density or a smaller mean_span"
            )
        self.length, self.target_length, self.tokens = length, target, tokens
        self._density, self._mean_span = density, mean_span
        self.groups = texts.groups
        group, starts, stops, parts, end = [], [], [], [], 0
        for number in range(len(texts.groups)):
            documents = [texts.documents[index] for index in np.flatnonzero(texts.group == number).tolist()]
            # \xff stands in no UTF-8 text: here it is EOS until the ids are made.
            joined = np.frombuffer(b"\xff".join([*documents, b""]), np.uint8)
            if pack:
                begins = np.arange(len(joined) // tokens) * tokens
                ends = begins + tokens
            else:
                sizes = np.array([len(text) + 1 for text in documents])
                begins = np.cumsum(sizes) - sizes
                ends = begins + np.minimum(sizes, tokens)
            group += [number] * len(begins)
            starts.append(end + begins)
            stops.append(end + ends)
            parts.append(joined)
            end += len(joined)
        self.group = np.array(group, np.int32)
        self._starts, self._stops = np.concatenate(starts), np.concatenate(stops)
        self._bytes = np.concatenate(parts)
        if not len(self):
            raise UserError(f"an example needs {tokens} bytes of text, the longest group has {max(map(len, parts))}")
        if missing := sorted(set(range(len(self.groups))) - set(group)):
            logging.warning("too little text for an example: %s", ", ".join(self.groups[index] for index in missing))

    def raw(self, index: int) -> Int32[np.ndarray, " n"]:
        """The ids of an example before anything is cut out."""
        data = self._bytes[self._starts[index] : self._stops[index]].astype(np.int32)
        return np.where(data == 0xFF, EOS, data + 3)

    def __call__(self, index: int, rng: np.random.Generator) -> Pair:
        ids = self.raw(index)
        noise = corruption.noise_mask(len(ids), rng, self._density, self._mean_span)
        inputs, targets = corruption.corrupt(ids[None], noise[None])
        return inputs[0], targets[0]


_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
_LETTERS = string.ascii_letters
_WORD = 47  # bytes of the longest word that is a target of its own
_ATTEMPTS = 500  # places tried for what is inserted
DIAGNOSTICS = ("vowels", "contextual_vowels", "merge")


class Diagnostic(Task):
    """The synthetic tasks of Kallini et al. 2025 (MrT5, arXiv 2410.20771, section 4): which bytes a model can drop.

    The input is "#" and random letters, made from seed and index alone. In the target of

    - `vowels` no vowel is left;
    - `contextual_vowels` no vowel is left that stands behind a lower-case consonant;
    - `merge` every "ABC" is "D".

    For the last two the letters are overwritten in random places with pairs of consonant and vowel (25 in 62 letters
    on average, standard deviation half of it) or with "ABC" (5), at least one, as far as 500 attempts find room.

    Args:
        kind: one of `DIAGNOSTICS`.
        length: N, "#" and EOS included, at least 8.
        count: how many examples.
        seed: examples of different seeds are independent of each other.

    Raises:
        ValueError: another kind, or a number out of range.
    """

    groups: tuple[str, ...] = ("letters",)

    def __init__(self, kind: str, length: int = 64, count: int = 6_400_000, seed: int = 0):
        if kind not in DIAGNOSTICS:
            raise ValueError(f"kind must be one of {', '.join(DIAGNOSTICS)}, got {kind!r}")
        if length < 8 or count < 1 or not 0 <= seed < 1 << 63:
            raise ValueError(f"length, count and seed must be at least 8, 1 and 0, got {length}, {count} and {seed}")
        self.kind, self.length, self.target_length, self.seed = kind, length, length, seed
        self.group = np.broadcast_to(np.zeros((), np.int32), (count,))

    def __call__(self, index: int, rng: Any = None) -> Pair:
        texts = self.texts(index)
        first, second = (encode([text], self.length)[0] for text in texts)
        return first[first > 0], second[second > 0]

    def texts(self, index: int) -> tuple[str, str]:
        """Input and target of an example."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], np.uint64)))
        count = self.length - 2
        letters = [_LETTERS[letter] for letter in rng.integers(0, len(_LETTERS), count).tolist()]
        if self.kind == "contextual_vowels":
            places = self._places(rng, count, 2, 25 / 62)
            for letters_of, offset in ((_CONSONANTS, 0), (_VOWELS, 1)):
                choices = letters_of + letters_of.upper()
                for place, letter in zip(places, rng.integers(0, len(choices), len(places)), strict=True):
                    letters[place + offset] = choices[letter]
        elif self.kind == "merge":
            for place in self._places(rng, count, 3, 5 / 62):
                letters[place : place + 3] = "ABC"
        text = "#" + "".join(letters)
        return text, _SOLUTIONS[self.kind](text)

    @staticmethod
    def _places(rng: np.random.Generator, count: int, width: int, share: float) -> list[int]:
        """Random places at least `width` apart, `share` of `count` on average."""
        wanted = max(1, round(rng.normal(share * count, share * count / 2)))
        places, taken = [], 0  # bits
        for place in rng.integers(0, count - width + 1, _ATTEMPTS).tolist():
            here = (1 << width) - 1 << place
            if not taken & here:
                places.append(place)
                taken |= here
                if len(places) == wanted:
                    break
        return places


_SOLUTIONS = {
    "vowels": lambda text: re.sub("[aeiouAEIOU]", "", text),
    "contextual_vowels": lambda text: re.sub(f"(?<=[{_CONSONANTS}])[aeiouAEIOU]", "", text),
    "merge": lambda text: text.replace("ABC", "D"),
}


@dataclasses.dataclass(frozen=True)
class _Window:
    document: int
    start: int  # bytes
    stop: int


class Spelling(Task):
    """Words with errors, and the text without them: a character task in the kind of Huang et al. 2023 (arXiv
    2212.09897), made from any text. The errors are ours: in a share of the words that have three letters or more, at
    least in one, a letter is left out, put in, replaced by another one of the text, or changes place with its
    neighbour.

    Texts are cut between words into windows of at most 7/8 of the length, so that what is put in has room; an error
    that has none is not made. A window without such a word stays as it is, a word that is longer than a window is left
    out.

    Args:
        texts: documents.
        length: N, of the input with its errors.
        target: `text`, the whole window; or `word`: one word has an error and stands in brackets, "a [wrod] in it",
            and the target is that word, of at most 47 bytes.
        noise: share of the words with an error; of `text`.

    Raises:
        ValueError: another target, `length` below 16 or `noise` outside (0, 1].
        UserError: no word in the texts.
    """

    def __init__(self, texts: Texts, length: int = 64, target: Literal["text", "word"] = "text", noise: float = 0.15):
        if target not in ("text", "word"):
            raise ValueError(f"target must be text or word, got {target!r}")
        if length < 16:
            raise ValueError(f"length must be at least 16, got {length}")
        if not 0 < noise <= 1:
            raise ValueError(f"noise must be above 0 and at most 1, got {noise}")
        self.length, self.target_length = length, length if target == "text" else min(length, _WORD + 1)
        self._texts, self._target, self._noise = texts, target, noise
        room = length * 7 // 8 - (2 if target == "word" else 0)
        self._windows = [
            window
            for number, document in enumerate(texts.documents)
            for window in _windows(number, document, room)
            if target == "text" or _words(document[window.start : window.stop].decode(), _WORD)
        ]
        self.group = np.array([texts.group[window.document] for window in self._windows], np.int32)
        self.groups = texts.groups
        if not self._windows:
            raise UserError(f"no words of {'three letters and ' if target == 'word' else ''}at most {room} bytes")

    def __call__(self, index: int, rng: np.random.Generator) -> Pair:
        window = self._windows[index]
        text = self._texts.documents[window.document][window.start : window.stop].decode()
        wrong, right = self._with_errors(text, rng)
        return _closed(wrong), _closed(right)

    def _with_errors(self, text: str, rng: np.random.Generator) -> tuple[str, str]:
        """The text with errors, and what the model shall write."""
        words = _words(text, _WORD if self._target == "word" else self.length)
        if not words:
            return text, text
        letters = [letter for letter in text if letter.isalpha()]
        chosen = rng.permutation(len(words))
        if self._target == "word":
            start, stop = words[chosen[0]]
            changed = self._change(text, (start, stop), letters, rng)
            stop_now = stop + len(changed) - len(text)
            return f"{changed[:start]}[{changed[start:stop_now]}]{changed[stop_now:]}", text[start:stop]
        count = max(1, rng.binomial(len(words), self._noise))
        wrong = text
        for place in sorted(chosen[:count], reverse=True):  # from the end, so that places before it stay
            wrong = self._change(wrong, words[place], letters, rng)
        return wrong, text

    def _change(self, text: str, word_at: tuple[int, int], letters: Sequence[str], rng: np.random.Generator) -> str:
        """The text with one error in a word of it, or as it is where the error would make it too long."""
        start, stop = word_at
        word = text[start:stop]
        place = int(rng.integers(len(word)))
        other = letters[int(rng.integers(len(letters)))]
        near = min(place, len(word) - 2)
        changed = (
            word[:place] + word[place + 1 :],
            word[:place] + other + word[place:],
            word[:place] + other + word[place + 1 :],
            word[:near] + word[near + 1] + word[near] + word[near + 2 :],
        )[rng.integers(4)]
        if changed == word:  # equal letters: leaving one out is always an error
            changed = word[:place] + word[place + 1 :]
        wrong = text[:start] + changed + text[stop:]
        marks = 2 if self._target == "word" else 0
        return wrong if len(wrong.encode()) + marks < self.length else text


def _windows(number: int, document: bytes, room: int) -> list[_Window]:
    """Parts of a document, whole words each, of at most `room` bytes."""
    windows: list[_Window] = []
    start = stop = -1
    for match in re.finditer(rb"\S+", document):
        if start >= 0 and match.end() - start > room:
            windows.append(_Window(number, start, stop))
            start = -1
        if match.end() - match.start() > room:
            continue
        start, stop = (match.start() if start < 0 else start), match.end()
    return [*windows, _Window(number, start, stop)] if start >= 0 else windows


def _words(text: str, most: int) -> list[tuple[int, int]]:
    """Where the words of three letters and more are, those of more than `most` bytes left out."""
    return [match.span() for match in re.finditer(r"[^\W\d_]{3,}", text) if len(match[0].encode()) <= most]


class Classify(Task):
    """A text and the number of its class as text, "0" or "1"; the class also stands in the batch as `label`.

    Args:
        texts: documents with labels.
        length: N; a longer text loses its end.
        tokenizer: from texts to ids of this length, padding included; None: bytes.

    Raises:
        ValueError: `length` below 2, or texts without labels.
    """

    def __init__(self, texts: Texts, length: int = 1024, tokenizer: Any = None):
        if length < 2:
            raise ValueError(f"length must be at least 2, got {length}")
        if texts.labels is None:
            raise ValueError("texts must have labels")
        self._texts, self._tokenizer = texts, tokenizer
        self.length, self.target_length = length, len(str(len(texts.class_names) - 1)) + 1
        self.group, self.groups = texts.group, texts.groups
        self.labels, self.class_names = texts.labels, texts.class_names

    def __call__(self, index: int, rng: Any = None) -> Pair:
        assert self.labels is not None
        text = self._texts.documents[index]
        if self._tokenizer is not None:
            return self._tokenizer([text.decode()])[0][: self.length], _closed(str(self.labels[index]))
        ids = _closed(text[: self.length - 1])
        return ids, _closed(str(self.labels[index]))


class DecoderOnly(Task):
    """The targets of a task with nothing but EOS as input: how much the encoder is worth (a baseline of MrT5)."""

    def __init__(self, task: TextTask):
        self._task = task
        self.length, self.target_length = 1, task.target_length
        self.group, self.groups = task.group, task.groups
        self.labels, self.class_names = task.labels, task.class_names

    def __call__(self, index: int, rng: np.random.Generator) -> Pair:
        return np.array([EOS]), self._task(index, rng)[1]


class Part(Task):
    """Some examples of a task."""

    def __init__(self, task: TextTask, indices: Int[np.ndarray, " n"]):
        self._task, self._indices = task, indices
        self.length, self.target_length = task.length, task.target_length
        self.group, self.groups = task.group[indices], task.groups
        self.labels = None if task.labels is None else task.labels[indices]
        self.class_names = task.class_names

    def __call__(self, index: int, rng: np.random.Generator) -> Pair:
        return self._task(int(self._indices[index]), rng)


def _closed(text: str | bytes) -> Int32[np.ndarray, " n"]:
    return np.append(to_ids(text), np.int32(EOS))
