"""Batches for decoders: every token of a text and the one behind it, and questions whose answers stand in the text.

`make(config, split, tokenizer, ...)` opens a source of texts and gives a loader of `tokjax.data.text.TextBatch`es, in
whose `labels` every place has the token behind it. Groups tell running text ("text") from questions ("facts").

Facts are pairs of words of the text that are put into it, and a question is a fact begun again:

    In the garden there are 40 lanterns, harbour= pilot; and most of them sing. ... harbour=

The answer, " pilot;", is a matter of one place far above: a model that has lost it cannot answer. In tests the prompt
ends before the "=", which is the first token that the cache is asked with.
"""

from collections import Counter
from collections.abc import Sequence
import re
from typing import Any

from jaxtyping import Int, Int32
import ml_collections
from ml_collections import config_dict
import numpy as np

from tokjax.data import texts
from tokjax.data.config import complete
from tokjax.data.corruption import IGNORE
from tokjax.data.text import TextLoader
from tokjax.data.text_tasks import Pair, Part, Task, TextTask
from tokjax.errors import UserError

_AT_ONCE = 1024  # documents that are tokenized together
GROUPS = TEXT, FACTS = "text", "facts"


def default_config() -> ml_collections.ConfigDict:
    """The embedded text, and every field with its meaning; configs start from it."""
    config = texts.default_config()
    config.length = 256  # N, tokens of an example
    config.prompt = 192  # P, tokens of a test example that are read at once; those behind it are made one by one
    config.test_subset = config_dict.placeholder(int)  # examples of running text in the test; None: all
    config.num_threads = 1  # that prepare batches ahead; 0: none

    config.facts = facts = ml_collections.ConfigDict()  # questions whose answers stand in the text
    facts.share = 0.5  # of the examples of training; 0: none, in the test neither
    facts.count = 6  # facts in a text
    facts.questions = 6  # in an example of training, one behind the other; in the test there is one
    facts.words = 100  # keys and values: of twice as many most frequent words those of the fewest tokens
    facts.test_count = 200
    return config


def token_stream(documents: texts.Texts, tokenizer: Any, eos_id: int) -> Int32[np.ndarray, " n"]:
    """All documents one behind the other, with the end of text behind each."""
    parts = []
    for start in range(0, len(documents), _AT_ONCE):
        some = [document.decode() for document in documents.documents[start : start + _AT_ONCE]]
        parts += [np.array([*ids, eos_id], np.int32) for ids in tokenizer.prompts(some, special=False)]
    return np.concatenate(parts)


class NextToken(Task):
    """Every token of a stream, and the one behind it; N tokens are an example, the tail that fills none is left out.

    Args:
        stream: tokens.
        length: N.
        moved: in training, begin every example up to N tokens later, anew each time.

    Raises:
        UserError: fewer than N + 1 tokens.
    """

    groups: tuple[str, ...] = (TEXT,)

    def __init__(self, stream: Int32[np.ndarray, " n"], length: int, moved: bool = False):
        if (count := (len(stream) - 1) // length) < 1:
            raise UserError(f"an example needs {length + 1} tokens of text, there are {len(stream)}")
        self.length = self.target_length = length
        self.group = np.zeros(count, np.int32)
        self._stream, self._moved = stream, moved

    def __call__(self, index: int, rng: np.random.Generator) -> Pair:
        start = index * self.length
        if self._moved:
            start = min(start + int(rng.integers(self.length)), len(self._stream) - 1 - self.length)
        window = self._stream[start : start + self.length + 1]
        return window[:-1], window[1:]


class Facts(Task):
    """A text with facts in it and questions behind it; only the answers are labels.

    Where the facts stand, between words, what they say and which of them are asked is drawn for every example.

    Args:
        stream: tokens of a text.
        tokenizer: of it.
        words: keys and values.
        length: N.
        examples: how many there are.
        facts: in a text, each with a key of its own.
        questions: one behind the other; of different facts, as far as there are.
        prompt: tokens before the last one of the one question, so that its answer is looked up behind the prompt, in
            what a cache still holds of it; None: the last answer ends the example.

    Raises:
        ValueError: a number out of range.
        UserError: too few words, or facts that leave no room for a text.
    """

    groups: tuple[str, ...] = (FACTS,)

    def __init__(
        self,
        stream: Int32[np.ndarray, " n"],
        tokenizer: Any,
        words: Sequence[str],
        length: int,
        *,
        examples: int,
        facts: int = 6,
        questions: int = 1,
        prompt: int | None = None,
    ):
        for name, value in (("facts", facts), ("questions", questions)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if prompt is not None and questions != 1:
            raise ValueError(f"questions={questions}: must be 1 with a prompt")
        if len(words) < facts:
            raise UserError(f"facts={facts}: the text has {len(words)} words of three letters, each fact needs one")
        self.length = self.target_length = length
        self.group = np.zeros(examples, np.int32)
        self._stream, self._facts, self._questions, self._prompt = stream, facts, questions, prompt
        self._asked = _ids(tokenizer, [f" {word}=" for word in words])
        self._answers = _ids(tokenizer, [f" {word};" for word in words])
        asked, answer = (max(map(len, pieces)) for pieces in (self._asked, self._answers))
        end = length + 1 if prompt is None else prompt + 1
        most = (facts + questions) * (asked + answer) - (0 if prompt is None else answer)
        if most >= end:
            raise UserError(f"facts={facts}, questions={questions}: take up to {most} of {end} tokens; choose fewer")
        if end + answer > length and prompt is not None:
            raise UserError(f"prompt={prompt}: answers have up to {answer} tokens, of {length} in all")
        if len(stream) < end:
            raise UserError(f"an example needs {end} tokens of text, there are {len(stream)}")
        opens = {index: tokenizer.decode([index])[:1].isspace() for index in np.unique(stream).tolist()}
        self._opens = np.array([opens[index] for index in stream.tolist()])  # where a word begins

    def __call__(self, index: int, rng: np.random.Generator) -> Pair:
        chosen = rng.permutation(len(self._asked))[: self._facts]
        values = rng.integers(len(self._answers), size=self._facts)
        asked, answers = [self._asked[i] for i in chosen], [self._answers[i] for i in values]
        tail, labelled = [], []
        rounds = -(-self._questions // self._facts)
        order = np.concatenate([rng.permutation(self._facts) for _ in range(rounds)])
        for fact in order[: self._questions].tolist():
            tail += [asked[fact], answers[fact]]
            labelled += [np.zeros(len(asked[fact]), bool), np.ones(len(answers[fact]), bool)]
        facts = [np.concatenate(pair) for pair in zip(asked, answers, strict=True)]
        before = sum(map(len, facts)) + sum(map(len, tail))
        last = self.length + 1 if self._prompt is None else self._prompt + 1 + len(tail[-1])
        room = last - before
        start = int(rng.integers(len(self._stream) - room + 1))
        text, opens = self._stream[start : start + room], np.flatnonzero(self._opens[start : start + room])
        places = np.sort(rng.choice(opens if len(opens) else room, size=self._facts))
        parts = [part for pair in zip(np.split(text, places), [*facts, facts[0][:0]], strict=True) for part in pair]
        ids = np.concatenate([*parts, *tail])
        labels = np.full(len(ids), IGNORE, np.int32)
        answer = np.concatenate(labelled)
        labels[-len(answer) :][answer] = ids[-len(answer) :][answer]
        return ids[:-1], labels[1:]


class Joined(Task):
    """Several tasks as one; every example is of the group of its task.

    Args:
        tasks: of one length, each with one group.
    """

    def __init__(self, tasks: Sequence[TextTask]):
        self._tasks = tasks
        self._starts = np.cumsum([0, *map(len, tasks)])
        self.length, self.target_length = tasks[0].length, tasks[0].target_length
        self.groups = tuple(name for task in tasks for name in task.groups)
        self.group = np.repeat(np.arange(len(tasks), dtype=np.int32), [len(task) for task in tasks])

    def __call__(self, index: int, rng: np.random.Generator) -> Pair:
        task = int(self.group[index])
        return self._tasks[task](index - int(self._starts[task]), rng)


class CausalLoader(TextLoader):
    """A `TextLoader` that knows how many tokens the running text has for a byte, line ends counted."""

    tokens_per_byte: float


def frequent_words(documents: texts.Texts, count: int) -> list[str]:
    """The most frequent words of three letters and more, lower-case as they stand; of equally frequent ones by name."""
    counts: Counter[str] = Counter()
    for document in documents.documents:
        counts.update(re.findall(r"\b[^\W\d_A-Z]{3,}\b", document.decode()))
    return sorted(counts, key=lambda word: (-counts[word], word))[:count]


def make(
    config: ml_collections.ConfigDict,
    split: str,
    tokenizer: Any,
    *,
    eos_id: int,
    batch_size: int,
    train: bool,
    seed: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> CausalLoader:
    """Opens a split and returns its loader.

    Args:
        config: fields of `default_config`; those that are missing have its values.
        split: `train` or `test` for the config's `train_split` or `test_split`, or the name of another split.
        tokenizer: with `prompts` and `decode`, such as `ByteTokenizer` or `tokjax.pretrained.tokenizer.Tokenizer`.
        eos_id: what stands behind every document.
        batch_size: rows of this process.
        train: shuffled, drawn anew in every epoch and endless, with several questions an example; or in order, once
            and padded, with one question, of which all but the last token are in the first `config.prompt`.
        seed: of order and examples.
        process_index: None: jax's.
        process_count: None: jax's.

    Raises:
        UserError: a field that does not exist or has a wrong value, or whatever the source or the loader finds.
    """
    config = complete(config, default_config())
    facts, length = config.facts, config.length
    if not 1 <= config.prompt < length:
        raise UserError(f"data config: prompt={config.prompt}: must be at least 1 and below length={length}")
    if not 0 <= facts.share < 1:
        raise UserError(f"data config: facts.share={facts.share}: must be in [0, 1)")
    documents = texts.open_texts(config, {"train": config.train_split, "test": config.test_split}.get(split, split))
    stream = token_stream(documents, tokenizer, eos_id)
    text: TextTask = NextToken(stream, length, moved=train)
    tasks: list[TextTask] = [text]
    try:
        if not train and config.test_subset is not None:
            if not 1 <= config.test_subset <= len(text):
                raise ValueError(f"test_subset={config.test_subset}: must be at least 1 and at most {len(text)}")
            tasks = [Part(text, np.arange(config.test_subset))]
        if facts.share:
            examples = round(len(text) * facts.share / (1 - facts.share)) if train else facts.test_count
            questions, prompt = (facts.questions, None) if train else (1, config.prompt)
            words = frequent_words(documents, 2 * facts.words)
            sizes = [len(ids) for ids in _ids(tokenizer, [f" {word}" for word in words])]
            words = [words[i] for i in np.argsort(sizes, kind="stable")[: facts.words]]
            drawn = Facts(
                stream,
                tokenizer,
                words,
                length,
                examples=max(1, examples),
                facts=facts.count,
                questions=questions,
                prompt=prompt,
            )
            tasks.append(drawn)
        loader = CausalLoader(
            Joined(tasks),
            batch_size=batch_size,
            train=train,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            num_threads=config.num_threads,
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"data config: {error}") from error
    loader.tokens_per_byte = len(stream) / sum(len(document) + 1 for document in documents.documents)
    return loader


def _ids(tokenizer: Any, pieces: Sequence[str]) -> list[Int[np.ndarray, " n"]]:
    return [np.array(ids, np.int32) for ids in tokenizer.prompts(pieces, special=False)]
