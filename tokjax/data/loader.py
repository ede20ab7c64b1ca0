"""Batches for training and evaluation, on grain: exact to resume, disjoint between processes, tolerant of bad images.

Every batch is a pure function of its number. The order of an epoch depends on (seed, epoch), the augmentation of an
image on (seed, epoch, its index in the source), the mixing of a batch on (seed, batch number, process). So the state of
an iterator is one integer, and neither threads nor restarts nor (mixing aside) the number of processes change what a
model sees: process p of P takes rows p * B to (p + 1) * B of each global batch of P * B.
"""

from collections.abc import Mapping
from concurrent import futures
import itertools
import os
import threading
from typing import Any, NotRequired, Protocol, TypedDict, cast

from absl import logging
import grain
import jax
from jaxtyping import Bool, Float32, Int32, UInt8
import numpy as np

from tokjax.data.sources import Source
from tokjax.data.transforms import ImageError, Mix, Normalise
from tokjax.errors import UserError

_SHUFFLE, _AUGMENT, _MIX = range(3)  # what a random stream is for
_NO_ROW = -1
_LISTED = 5  # bad images named in an error


class Batch(TypedDict):
    image: Float32[np.ndarray, "B H W C"]
    label: Int32[np.ndarray, " B"] | Float32[np.ndarray, "B K"]
    valid: Bool[np.ndarray, " B"]
    # What the `fields` of source and transform name, such as:
    ids: NotRequired[Int32[np.ndarray, "B T"]]
    segmentation: NotRequired[Int32[np.ndarray, "B h w"]]
    depth: NotRequired[Float32[np.ndarray, "B h w"]]
    shape: NotRequired[Int32[np.ndarray, "B 2"]]


class Transform(Protocol):
    """One image to `size`; whatever is random in it comes from the generator.

    It gives RGB bytes, unless it has `channels` and `dtype` that say otherwise. One that has `fields` (name -> shape
    and dtype, as of sources) gives a mapping of them beside its "image".
    """

    @property
    def size(self) -> tuple[int, int]: ...

    def __call__(
        self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, /
    ) -> np.ndarray | Mapping[str, Any]: ...


class Normaliser(Protocol):
    """Pixels of a batch, as the transform gives them, to float32; into `out` where that is given."""

    def __call__(
        self, pixels: np.ndarray, out: Float32[np.ndarray, "B H W C"] | None = None, /
    ) -> Float32[np.ndarray, "B H W C"]: ...


class Loader:
    """An iterable of batches `{"image": float32 [B,H,W,C], "label": int32 [B] or float32 [B,K], "valid": bool [B]}`.

    In training every epoch has its own global shuffle. In evaluation the order is that of the source, and rows that
    pad the last batch (or whose image is bad) are black, of label 0 and not `valid`: all processes make the same
    number of batches of the same shape, and together they show every example once.

    Fields that source and transform have beside image and label are stacked under their names; in rows that only pad
    they are 0.

    Args:
        source: what to read.
        batch_size: B, rows of this process.
        train: shuffle, repeat, and replace bad images instead of masking their rows.
        transform: from an image of the source to the size of a batch.
        normalise: to float32; None: mean and std 0.5.
        mix: mixup, CutMix and label smoothing of a batch; None: integer labels.
        seed: of order, augmentation and mixing.
        process_index: None: jax's.
        process_count: None: jax's.
        num_epochs: None: endless in training, one in evaluation.
        num_threads: decoding threads; 1 prepares batches ahead in one thread, 0 makes them in the caller's. None: one
            for each core, at most 16, and 0 for a source in memory.
        bad_image_limit: how many different bad images are passed over before it is an error.
        drop_remainder: drop an epoch's last, incomplete batch; None: in training.

    Raises:
        ValueError: an argument out of range, or `mix` where some rows may not be valid or have fields that do not mix.
        UserError: fewer examples than a batch; while iterating, more bad images than the limit.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        train: bool,
        transform: Transform,
        normalise: Normaliser | None = None,
        mix: Mix | None = None,
        seed: int = 0,
        process_index: int | None = None,
        process_count: int | None = None,
        num_epochs: int | None = None,
        num_threads: int | None = None,
        bad_image_limit: int = 0,
        drop_remainder: bool | None = None,
    ):
        process_index = jax.process_index() if process_index is None else process_index
        process_count = jax.process_count() if process_count is None else process_count
        drop_remainder = train if drop_remainder is None else drop_remainder
        if num_epochs is None and not train:
            num_epochs = 1
        if num_threads is None:
            num_threads = 0 if source.in_memory else min(os.cpu_count() or 1, 16)
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
        if bad_image_limit < 0:
            raise ValueError(f"bad_image_limit must not be negative, got {bad_image_limit}")
        if mix is not None and not (train and drop_remainder):
            raise ValueError("mix needs train and drop_remainder: a row that only pads must not be mixed into others")
        if mix is not None and mix.num_classes < source.num_classes:
            raise ValueError(f"mix.num_classes is {mix.num_classes}, the source has {source.num_classes} classes")
        fields = {**getattr(source, "fields", {}), **getattr(transform, "fields", {})}
        if mix is not None and fields:
            raise ValueError(f"mix blends images and labels, source or transform also have {', '.join(fields)}")
        global_batch = batch_size * process_count
        whole, rest = divmod(len(source), global_batch)
        if drop_remainder and not whole:
            raise UserError(f"{len(source)} examples do not fill a batch of {batch_size} x {process_count} process(es)")

        self.source = source
        self.batches_per_epoch = whole + (rest > 0 and not drop_remainder)  # the same in every process
        self._batch_size, self._global_batch, self._process_index = batch_size, global_batch, process_index
        self._train, self._num_epochs, self._seed = train, num_epochs, seed
        self._fields = fields
        self._transform, self._mix = transform, mix
        self._normalise: Normaliser = normalise or Normalise()
        self._form = (*transform.size, getattr(transform, "channels", 3)), getattr(transform, "dtype", "uint8")
        self._orders: dict[int, np.ndarray] = {}  # of the last two epochs
        self._bad: dict[int, str] = {}  # index -> what is wrong
        self._bad_image_limit = bad_image_limit
        self._lock = threading.Lock()  # guards the two dicts
        # The rows of a batch are spread over a pool; with two batches under way it has work while one is finished.
        self._num_threads = num_threads
        self._pool = futures.ThreadPoolExecutor(num_threads, "tokjax-data") if num_threads > 1 else None

    @property
    def bad_images(self) -> list[str]:
        """Names of the images that did not decode so far, in this process and including what was read ahead."""
        with self._lock:
            indices = sorted(self._bad)
        return [self.source.name_of(index) for index in indices]

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    def __iter__(self) -> "LoaderIterator":
        builders = min(self._num_threads, 2)
        numbers = grain.MapDataset.range(self.batches_per_epoch).repeat(self._num_epochs)
        batches = numbers.map_with_index(lambda step, _: self._batch(step)).to_iter_dataset(
            grain.ReadOptions(num_threads=builders, prefetch_buffer_size=2 if builders else 0)
        )
        position = {"examples": len(self.source), "global_batch": self._global_batch, "seed": self._seed}
        return LoaderIterator(iter(batches), position)

    def _batch(self, step: int) -> Batch:
        epoch, batch = divmod(step, self.batches_per_epoch)
        first = batch * self._global_batch + self._process_index * self._batch_size
        order = self._order(epoch)
        places = range(first, first + self._batch_size)
        shape, dtype = self._form
        image = np.empty((self._batch_size, *shape), np.float32)
        label = np.zeros(self._batch_size, np.int32)
        valid = np.zeros(self._batch_size, bool)
        fields = {name: np.zeros((self._batch_size, *shape), dtype) for name, (shape, dtype) in self._fields.items()}

        def fill(rows: slice) -> None:
            pixels = np.zeros((len(places[rows]), *shape), dtype)
            for row, place in zip(range(*rows.indices(self._batch_size)), places[rows], strict=True):
                index = self._read(
                    order, place, epoch, pixels[row - rows.start], {name: fields[name][row, ...] for name in fields}
                )
                if index != _NO_ROW:
                    label[row], valid[row] = self.source.labels[index], True
            self._normalise(pixels, image[rows])

        if self._pool is None:
            fill(slice(0, self._batch_size))
        else:
            chunk = -(-self._batch_size // (2 * self._num_threads))
            starts = range(0, self._batch_size, chunk)
            tasks = [self._pool.submit(fill, slice(s, min(s + chunk, self._batch_size))) for s in starts]
            for task in tasks:
                task.result()

        if self._mix is None:
            return cast(Batch, {"image": image, "label": label, "valid": valid, **fields})
        image, mixed = self._mix(image, label, self._generator(step, _MIX, self._process_index))
        return {"image": image, "label": mixed, "valid": valid}

    def _read(
        self,
        order: np.ndarray,
        place: int,
        epoch: int,
        out: np.ndarray,
        fields: dict[str, np.ndarray],
    ) -> int:
        """Writes the example at a place of the epoch's order and returns its index, `_NO_ROW` if there is none.

        Training passes over a bad image: the place goes to the next good one in the order, so that batches stay full
        and every process makes the same number of steps.
        """
        if place >= len(order):
            return _NO_ROW
        rng = self._generator(epoch, _AUGMENT, int(order[place]))
        for candidate in itertools.chain(order[place:], order[:place]) if self._train else (order[place],):
            index = int(candidate)
            if index not in self._bad:
                try:
                    example: Mapping[str, Any] = self.source[index]
                    made = self._transform(example["image"], rng)
                    example = {**example, **made} if isinstance(made, Mapping) else {**example, "image": made}
                    out[:] = example["image"]
                    for name, row in fields.items():
                        row[...] = example[name]
                    return index
                except ImageError as error:
                    self._note_bad(index, str(error))
            self._check_bad()
        if self._train:
            raise UserError(f"none of the {len(order)} images can be read, the first: {self.bad_images[0]}")
        return _NO_ROW

    def _note_bad(self, index: int, reason: str) -> None:
        with self._lock:
            if index not in self._bad:
                self._bad[index] = reason
                logging.warning("bad image %s: %s", self.source.name_of(index), reason)

    def _check_bad(self) -> None:
        with self._lock:
            bad = list(self._bad.items())
        if len(bad) > self._bad_image_limit:
            shown = "; ".join(f"{self.source.name_of(index)} ({reason})" for index, reason in bad[:_LISTED])
            more = "; ..." if len(bad) > _LISTED else ""
            raise UserError(f"{len(bad)} bad images, bad_image_limit is {self._bad_image_limit}: {shown}{more}")

    def _order(self, epoch: int) -> np.ndarray:
        if not self._train:
            epoch = 0
        with self._lock:
            if epoch not in self._orders:
                n = len(self.source)
                order = self._generator(epoch, _SHUFFLE, 0).permutation(n) if self._train else np.arange(n)
                self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: order}
            return self._orders[epoch]

    def _generator(self, time: int, purpose: int, index: int) -> np.random.Generator:
        # Philox is counter-based: (seed, time) is the key, (purpose, index) the upper half of the counter, the lower
        # half counts the draws. So no two streams meet.
        key = np.array([self._seed, time], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, purpose, index], np.uint64)))


class LoaderIterator(grain.DatasetIterator[Batch]):
    """A grain iterator whose state also says which stream it counts, so that it does not resume in another one."""

    def __init__(self, batches: grain.DatasetIterator[Batch], position: dict[str, int]):
        super().__init__(batches)
        self._position = position

    def __next__(self) -> Batch:
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
