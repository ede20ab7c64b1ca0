"""Batches of images for training and evaluation: exact to resume, disjoint between processes, tolerant of bad images.

A `Stream`, whose batches are pure functions of their numbers. The augmentation of an image depends on (seed, epoch, its
index in the source), the mixing of a batch on (seed, batch number, process): so, mixing aside, the number of processes
does not change what a model sees.
"""

from collections.abc import Mapping
from concurrent import futures
import itertools
import os
import threading
from typing import Any, NotRequired, Protocol, TypedDict, cast

from absl import logging
from jaxtyping import Bool, Float32, Int32, UInt8
import numpy as np

from tokjax.data.sources import Source
from tokjax.data.stream import AUGMENT, MIX, NO_ROW, Stream
from tokjax.data.transforms import ImageError, Mix, Normalise
from tokjax.errors import UserError

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


class Loader(Stream):
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
        drop_remainder = train if drop_remainder is None else drop_remainder
        if num_threads is None:
            num_threads = 0 if source.in_memory else min(os.cpu_count() or 1, 16)
        if bad_image_limit < 0:
            raise ValueError(f"bad_image_limit must not be negative, got {bad_image_limit}")
        if mix is not None and not (train and drop_remainder):
            raise ValueError("mix needs train and drop_remainder: a row that only pads must not be mixed into others")
        if mix is not None and mix.num_classes < source.num_classes:
            raise ValueError(f"mix.num_classes is {mix.num_classes}, the source has {source.num_classes} classes")
        fields = {**getattr(source, "fields", {}), **getattr(transform, "fields", {})}
        if mix is not None and fields:
            raise ValueError(f"mix blends images and labels, source or transform also have {', '.join(fields)}")
        super().__init__(
            len(source),
            batch_size=batch_size,
            train=train,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            num_epochs=num_epochs,
            num_threads=num_threads,
            drop_remainder=drop_remainder,
        )
        self.source = source
        self._fields = fields
        self._transform, self._mix = transform, mix
        self._normalise: Normaliser = normalise or Normalise()
        self._form = (*transform.size, getattr(transform, "channels", 3)), getattr(transform, "dtype", "uint8")
        self._bad: dict[int, str] = {}  # index -> what is wrong
        self._bad_image_limit = bad_image_limit
        self._bad_lock = threading.Lock()
        # The rows of a batch are spread over a pool; with two batches under way it has work while one is finished.
        self._pool = futures.ThreadPoolExecutor(num_threads, "tokjax-data") if num_threads > 1 else None

    @property
    def bad_images(self) -> list[str]:
        """Names of the images that did not decode so far, in this process and including what was read ahead."""
        with self._bad_lock:
            indices = sorted(self._bad)
        return [self.source.name_of(index) for index in indices]

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    def batch(self, step: int) -> Batch:
        epoch, places = self.places(step)
        order = self.order(epoch)
        shape, dtype = self._form
        image = np.empty((self.batch_size, *shape), np.float32)
        label = np.zeros(self.batch_size, np.int32)
        valid = np.zeros(self.batch_size, bool)
        fields = {name: np.zeros((self.batch_size, *shape), dtype) for name, (shape, dtype) in self._fields.items()}

        def fill(rows: slice) -> None:
            pixels = np.zeros((len(places[rows]), *shape), dtype)
            for row, place in zip(range(*rows.indices(self.batch_size)), places[rows], strict=True):
                index = self._read(
                    order, place, epoch, pixels[row - rows.start], {name: fields[name][row, ...] for name in fields}
                )
                if index != NO_ROW:
                    label[row], valid[row] = self.source.labels[index], True
            self._normalise(pixels, image[rows])

        if self._pool is None:
            fill(slice(0, self.batch_size))
        else:
            chunk = -(-self.batch_size // (2 * self._num_threads))
            starts = range(0, self.batch_size, chunk)
            tasks = [self._pool.submit(fill, slice(s, min(s + chunk, self.batch_size))) for s in starts]
            for task in tasks:
                task.result()

        if self._mix is None:
            return cast(Batch, {"image": image, "label": label, "valid": valid, **fields})
        image, mixed = self._mix(image, label, self.generator(step, MIX, self._process_index))
        return {"image": image, "label": mixed, "valid": valid}

    def _read(
        self,
        order: np.ndarray,
        place: int,
        epoch: int,
        out: np.ndarray,
        fields: dict[str, np.ndarray],
    ) -> int:
        """Writes the example at a place of the epoch's order and returns its index, `NO_ROW` if there is none.

        Training passes over a bad image: the place goes to the next good one in the order, so that batches stay full
        and every process makes the same number of steps.
        """
        if place >= len(order):
            return NO_ROW
        rng = self.generator(epoch, AUGMENT, int(order[place]))
        for candidate in itertools.chain(order[place:], order[:place]) if self.train else (order[place],):
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
        if self.train:
            raise UserError(f"none of the {len(order)} images can be read, the first: {self.bad_images[0]}")
        return NO_ROW

    def _note_bad(self, index: int, reason: str) -> None:
        with self._bad_lock:
            if index not in self._bad:
                self._bad[index] = reason
                logging.warning("bad image %s: %s", self.source.name_of(index), reason)

    def _check_bad(self) -> None:
        with self._bad_lock:
            bad = list(self._bad.items())
        if len(bad) > self._bad_image_limit:
            shown = "; ".join(f"{self.source.name_of(index)} ({reason})" for index, reason in bad[:_LISTED])
            more = "; ..." if len(bad) > _LISTED else ""
            raise UserError(f"{len(bad)} bad images, bad_image_limit is {self._bad_image_limit}: {shown}{more}")
