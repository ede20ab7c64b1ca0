"""Numbered batches of any kind of data, on grain: exact to resume and disjoint between processes.

Every batch is a pure function of its number. The order of an epoch depends on (seed, epoch), what is random in an
example on (seed, epoch, its index in the source). So the state of an iterator is one integer, and neither threads nor
restarts nor the number of processes change what a model sees: process p of P takes rows p * B to (p + 1) * B of each
global batch of P * B.
"""

import abc
from collections.abc import Mapping
import threading
from typing import Any

import grain
import jax
from jaxtyping import Int
import numpy as np

from tokjax.errors import UserError

_SHUFFLE, AUGMENT, MIX = range(3)  # what a random stream is for
NO_ROW = -1


class Stream(abc.ABC):
    """An iterable of batches, which a subclass makes from their numbers in `batch`.

    In training every epoch has its own global shuffle, in evaluation the order is that of the examples. All processes
    make the same number of batches.

    Args:
        examples: how many there are.
        batch_size: B, rows of this process.
        train: shuffle and repeat.
        seed: of the order and of whatever is random.
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
        examples: int,
        *,
        batch_size: int,
        train: bool,
        seed: int = 0,
        process_index: int | None = None,
        process_count: int | None = None,
        num_epochs: int | None = None,
        num_threads: int = 0,
        drop_remainder: bool | None = None,
    ):
        process_index = jax.process_index() if process_index is None else process_index
        process_count = jax.process_count() if process_count is None else process_count
        drop_remainder = train if drop_remainder is None else drop_remainder
        if num_epochs is None and not train:
            num_epochs = 1
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index must be in 0..{process_count - 1}, got {process_index}")
        if num_epochs is not None and num_epochs < 1:
            raise ValueError(f"num_epochs must be at least 1 or None, got {num_epochs}")
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed must be in 0..2**63 - 1, got {seed}")
        if num_threads < 0:
            raise ValueError(f"num_threads must not be negative, got {num_threads}")
        global_batch = batch_size * process_count
        whole, rest = divmod(examples, global_batch)
        if drop_remainder and not whole:
            raise UserError(f"{examples} examples do not fill a batch of {batch_size} x {process_count} process(es)")
        self.batches_per_epoch = whole + (rest > 0 and not drop_remainder)  # the same in every process
        self.examples, self.batch_size, self.train, self.seed = examples, batch_size, train, seed
        self._global_batch, self._process_index = global_batch, process_index
        self._num_epochs, self._num_threads = num_epochs, num_threads
        self._orders: dict[int, np.ndarray] = {}  # of the last two epochs
        self._lock = threading.Lock()

    @abc.abstractmethod
    def batch(self, step: int) -> Any:
        """The batch of a number: a dict of numpy arrays."""

    def shuffled(self, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """The examples in the order of an epoch of training."""
        return rng.permutation(self.examples)

    def __iter__(self) -> "LoaderIterator":
        builders = min(self._num_threads, 2)  # while one batch is finished, another one is under way
        numbers = grain.MapDataset.range(self.batches_per_epoch).repeat(self._num_epochs)
        batches = numbers.map_with_index(lambda step, _: self.batch(step)).to_iter_dataset(
            grain.ReadOptions(num_threads=builders, prefetch_buffer_size=2 if builders else 0)
        )
        position = {"examples": self.examples, "global_batch": self._global_batch, "seed": self.seed}
        return LoaderIterator(iter(batches), position)

    def places(self, step: int) -> tuple[int, range]:
        """The epoch of a batch, and the places in the epoch's order that its rows show; those past the end pad."""
        epoch, batch = divmod(step, self.batches_per_epoch)
        first = batch * self._global_batch + self._process_index * self.batch_size
        return epoch, range(first, first + self.batch_size)

    def order(self, epoch: int) -> Int[np.ndarray, " n"]:
        if not self.train:
            epoch = 0
        with self._lock:
            if epoch not in self._orders:
                order = self.shuffled(self.generator(epoch, _SHUFFLE, 0)) if self.train else np.arange(self.examples)
                self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: order}
            return self._orders[epoch]

    def generator(self, time: int, purpose: int, index: int) -> np.random.Generator:
        # Philox is counter-based: (seed, time) is the key, (purpose, index) the upper half of the counter, the lower
        # half counts the draws. So no two streams meet.
        key = np.array([self.seed, time], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, purpose, index], np.uint64)))


class LoaderIterator(grain.DatasetIterator[Mapping[str, np.ndarray]]):
    """A grain iterator whose state also says which stream it counts, so that it does not resume in another one."""

    def __init__(self, batches: grain.DatasetIterator[Mapping[str, np.ndarray]], position: dict[str, int]):
        super().__init__(batches)
        self._position = position

    def __next__(self) -> Any:
        try:
            return next(self._parent)
        except StopIteration:
            raise
        except Exception:
            # grain has dropped the batch that failed from its buffer without counting it: start again from the count.
            self._parent.set_state(self._parent.get_state())
            raise

    def get_state(self) -> dict[str, Any]:
        return {"batches": self._parent.get_state(), **self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the last batch that had been returned when the state was taken.

        Raises:
            ValueError: the state counts batches of another stream (number of examples, global batch size or seed).
        """
        saved = {name: state.get(name) for name in self._position}
        if saved != self._position:
            raise ValueError(f"the saved position counts batches of {saved}, this loader has {self._position}")
        self._parent.set_state(state["batches"])
