"""Batches of texts, as bytes or a tokenizer's ids: `make(config, split, ...)` opens a source and returns a loader.

Every field of a config stands in `default_config`. With no path it is the embedded text, so everything runs without any
data at hand.
"""

from typing import Any, NotRequired, TypedDict, cast

from jaxtyping import Bool, Int, Int32
import ml_collections
from ml_collections import config_dict
import numpy as np

from tokjax.data import texts
from tokjax.data.bytes import PAD
from tokjax.data.config import complete
from tokjax.data.corruption import IGNORE, shift_right
from tokjax.data.sources import stratified
from tokjax.data.stream import AUGMENT, Stream
from tokjax.data.text_tasks import (
    DIAGNOSTICS,
    Classify,
    DecoderOnly,
    Diagnostic,
    Part,
    SpanCorruption,
    Spelling,
    TextTask,
)
from tokjax.errors import UserError

TASKS = ("span_corruption", *DIAGNOSTICS, "spelling", "classify")
_HELD_OUT_SEED = 1 << 32  # between the seeds of training and evaluation of generated tasks


class TextBatch(TypedDict):
    ids: Int32[np.ndarray, "B N"]  # of the encoder; 0 pads
    decoder_ids: Int32[np.ndarray, "B T"]  # labels shifted right, 0 first
    labels: Int32[np.ndarray, "B T"]  # -100 is not predicted
    group: Int32[np.ndarray, " B"]  # language
    valid: Bool[np.ndarray, " B"]
    label: NotRequired[Int32[np.ndarray, " B"]]  # class


class TextLoader(Stream):
    """An iterable of `TextBatch`es of one shape.

    In training every epoch has its own global shuffle, and what is random in an example depends on (seed, epoch, its
    index). In evaluation the order is that of the task, every epoch shows the same, and rows that pad the last batch
    are all 0, -100 in the labels and not `valid`: so each example counts once.

    Args:
        task: where the examples come from.
        batch_size: B, rows of this process.
        train: shuffle and repeat.
        balance: in training, show as many examples of each group, in place of each example once: a language that has
            fewer repeats them.
        seed: of order and examples.
        process_index: None: jax's.
        process_count: None: jax's.
        num_epochs: None: endless in training, one in evaluation.
        num_threads: 1 or more prepare batches ahead, 0 makes them in the caller's thread.
        drop_remainder: drop an epoch's last, incomplete batch; None: in training.

    Raises:
        ValueError: an argument out of range.
        UserError: fewer examples than a batch.
    """

    def __init__(
        self,
        task: TextTask,
        *,
        batch_size: int,
        train: bool,
        balance: bool = False,
        seed: int = 0,
        process_index: int | None = None,
        process_count: int | None = None,
        num_epochs: int | None = None,
        num_threads: int = 1,
        drop_remainder: bool | None = None,
    ):
        super().__init__(
            len(task),
            batch_size=batch_size,
            train=train,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            num_epochs=num_epochs,
            num_threads=num_threads,
            drop_remainder=drop_remainder,
        )
        self.task, self._balance = task, balance

    @property
    def groups(self) -> tuple[str, ...]:
        return self.task.groups

    @property
    def num_classes(self) -> int:
        return len(self.task.class_names)

    def batch(self, step: int) -> TextBatch:
        epoch, places = self.places(step)
        order = self.order(epoch)
        ids = np.full((self.batch_size, self.task.length), PAD, np.int32)
        labels = np.full((self.batch_size, self.task.target_length), IGNORE, np.int32)
        chosen = order[places.start : places.stop]
        for row, index in enumerate(chosen.tolist()):
            inputs, target = self.task(index, self.generator(epoch if self.train else 0, AUGMENT, index))
            ids[row, : len(inputs)], labels[row, : len(target)] = inputs, target
        valid = np.arange(self.batch_size) < len(chosen)
        batch: dict[str, Any] = {"ids": ids, "decoder_ids": shift_right(labels), "labels": labels, "valid": valid}
        for name, values in (("group", self.task.group), ("label", self.task.labels)):
            if values is not None:
                batch[name] = np.zeros(self.batch_size, np.int32)
                batch[name][valid] = values[chosen]
        return cast(TextBatch, batch)

    def shuffled(self, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        if not self._balance:
            return super().shuffled(rng)
        members = [found for g in range(len(self.groups)) if len(found := np.flatnonzero(self.task.group == g))]
        share = -(-self.examples // len(members))
        drawn = [
            np.concatenate([rng.permutation(found) for _ in range(-(-share // len(found)))])[:share]
            for found in members
        ]
        return rng.permutation(np.concatenate(drawn))[: self.examples]


def default_config() -> ml_collections.ConfigDict:
    """Span corruption of the embedded text, every field with its meaning; configs start from it."""
    config = texts.default_config()
    config.task = "span_corruption"  # vowels, contextual_vowels, merge, spelling, classify
    config.length = 1024  # N, bytes of the encoder's input with EOS; 64 for the diagnostic tasks
    config.decoder_only = False  # a baseline: the encoder reads nothing but EOS
    config.balance = False  # in training as many examples of each language
    config.subset = config_dict.placeholder(int)  # this many training examples, groups in proportion; None: all
    config.test_subset = config_dict.placeholder(int)
    config.num_threads = 1  # that prepare batches ahead; 0: none

    config.corruption = corruption = ml_collections.ConfigDict()
    corruption.density = 0.15  # share of the bytes that are cut out
    corruption.mean_span = 20.0  # bytes
    corruption.pack = True  # documents behind each other in chunks of one length, else one document an example

    config.diagnostic = diagnostic = ml_collections.ConfigDict()
    diagnostic.train_count = 6_400_000
    diagnostic.test_count = 32_000
    diagnostic.seed = 0

    config.spelling = spelling = ml_collections.ConfigDict()
    spelling.target = "text"  # word: one word stands in brackets, and the target is that word
    spelling.noise = 0.15  # share of the words with an error
    return config


def make(
    config: ml_collections.ConfigDict,
    split: str,
    *,
    batch_size: int,
    train: bool,
    seed: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
    num_epochs: int | None = None,
    tokenizer: Any = None,
) -> TextLoader:
    """Opens a split and returns its loader.

    Args:
        config: fields of `default_config`; those that are missing have its values.
        split: `train` or `test` for the config's `train_split` or `test_split`, or the name of another split.
        batch_size: rows of this process.
        train: shuffled, drawn anew in every epoch and endless; or in order, once and padded.
        seed: of order and examples. The subset and the diagnostic strings do not depend on it.
        process_index: None: jax's.
        process_count: None: jax's.
        num_epochs: None: endless in training, one in evaluation.
        tokenizer: from texts to ids of the config's length, for classification; None: bytes.

    Raises:
        UserError: a field that does not exist or has a wrong value, or whatever the source or the loader finds.
    """
    config = complete(config, default_config())
    try:
        task = make_task(config, split, tokenizer)
        part = config.subset if split in ("train", config.train_split) else config.test_subset
        if part is not None:
            if not 1 <= part <= len(task):
                raise ValueError(f"a subset must have 1 to {len(task)} examples, got {part}")
            task = Part(task, stratified(task.group, part, seed=0))
        return TextLoader(
            task,
            batch_size=batch_size,
            train=train,
            balance=config.balance,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            num_epochs=num_epochs,
            num_threads=config.num_threads,
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"data config: {error}") from error


def make_task(config: ml_collections.ConfigDict, split: str, tokenizer: Any = None) -> TextTask:
    """The examples of a split of a complete config, without order or batches.

    Raises:
        UserError: an unknown task or split, or whatever the source finds.
        ValueError: a value out of range.
    """
    kind = config.task
    if kind not in TASKS:
        raise UserError(f"unknown text task {kind!r}: choose from {', '.join(TASKS)}")
    if tokenizer is not None and kind != "classify":
        raise ValueError(f"task={kind!r}: is of bytes; a tokenizer goes with classify")
    task: TextTask
    if kind in DIAGNOSTICS:
        options, training = config.diagnostic, split in ("train", config.train_split)
        count = options.train_count if training else options.test_count
        if not 0 <= options.seed < _HELD_OUT_SEED:
            raise ValueError(f"diagnostic.seed must be in 0..2**32 - 1, got {options.seed}")
        task = Diagnostic(kind, config.length, count, options.seed + (0 if training else _HELD_OUT_SEED))
    else:
        name = {"train": config.train_split, "test": config.test_split}.get(split, split)
        documents = texts.open_texts(config, name, labelled=kind == "classify")
        if kind == "span_corruption":
            options = config.corruption
            task = SpanCorruption(documents, config.length, options.density, options.mean_span, options.pack)
        elif kind == "spelling":
            task = Spelling(documents, config.length, config.spelling.target, config.spelling.noise)
        else:
            task = Classify(documents, config.length, tokenizer)
    return DecoderOnly(task) if config.decoder_only else task
