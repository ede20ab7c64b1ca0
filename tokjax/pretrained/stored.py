"""A tensor that is still in its file: what it looks like is known, its numbers are read when asked for."""

from collections.abc import Callable
import dataclasses
import math
import mmap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tokjax.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64))

# A view may repeat its storage (`expand`), so a file of a few bytes could ask for any amount of memory.
_REPEATED = 2**24
_DIMENSIONS = 32


def map_bytes(path: Path) -> np.ndarray:
    """The bytes of a file that is not empty, mapped, not read: uint8 [size], which cannot be written to."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A strided view into bytes that are fetched when it is read.

    Attributes:
        fetch: gives the storage's bytes, uint8 [nbytes]; a slice of a mapped file, so that only the pages read count.
        nbytes: size of the storage.
        dtype: numpy's, or one of ml_dtypes.
        shape: of the tensor.
        offset: first element, counted in elements from the storage's start.
        strides: in elements; None for row-major.

    Raises:
        UserError: the view does not lie within the storage, or repeats it to an absurd size.
    """

    fetch: Callable[[], np.ndarray]
    nbytes: int
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int = 0
    strides: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.shape) > _DIMENSIONS or (self.strides is not None and len(self.strides) != len(self.shape)):
            raise UserError(f"A tensor with {len(self.shape)} axes is not possible here.")
        numbers = (self.offset, *self.shape, *(self.strides or ()))
        if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
            raise UserError("A tensor's shape, strides and offset must be integers from 0.")
        held = self.nbytes // self.dtype.itemsize
        if self.offset + self._extent > held or self.size > max(held, _REPEATED):
            raise UserError(
                f"A tensor of shape {self.shape}, strides {self._strides}, offset {self.offset} does not fit its "
                f"storage of {held} elements."
            )

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def _strides(self) -> tuple[int, ...]:
        if self.strides is not None:
            return self.strides
        return tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))

    @property
    def _extent(self) -> int:
        """Elements from the first to the last one of the view, both counted."""
        if not self.size:
            return 0
        return 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self._strides, strict=True))

    def read(self) -> np.ndarray:
        """The tensor, contiguous; copied once."""
        seen = self.view()
        array = np.array(seen, order="C")
        forget(seen)
        return array

    def view(self) -> np.ndarray:
        """The tensor where it lies, in any order, not to be written to; a mapped file is read as it is looked at."""
        item = self.dtype.itemsize
        if not self.size:
            return np.empty(self.shape, self.dtype)
        used = self.fetch()[self.offset * item : (self.offset + self._extent) * item]
        # An axis of length 1 may have any stride in a file, which numpy could not multiply.
        pairs = zip(self.shape, self._strides, strict=True)
        strides = [stride * item if length > 1 else item for length, stride in pairs]
        return np.ndarray(self.shape, self.dtype, buffer=used, strides=strides)


def forget(view: np.ndarray) -> None:
    """Lets go of the pages of a mapped file that a view has read; looked at again, they are read again."""
    base: Any = view
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if not isinstance(base, mmap.mmap) or not view.size or not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = np.lib.array_utils.byte_bounds(view)[0] - np.frombuffer(base, np.uint8).ctypes.data
    last = np.lib.array_utils.byte_bounds(view)[1] - np.frombuffer(base, np.uint8).ctypes.data
    start = first // mmap.PAGESIZE * mmap.PAGESIZE
    base.madvise(mmap.MADV_DONTNEED, start, last - start)


def stored_array(array: np.ndarray) -> Stored:
    """An array that came with the file's description instead of lying beside it."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return Stored(lambda: flat, flat.nbytes, array.dtype, array.shape)


def check_float(name: str, dtype: np.dtype) -> None:
    """Refuses what is no weight.

    Raises:
        UserError: it is not a float16, bfloat16, float32 or float64 tensor: quantised and integer weights would be
            converted without their scales.
    """
    if dtype not in FLOATS:
        allowed = ", ".join(each.name for each in FLOATS)
        raise UserError(f"{name} has the wrong dtype: {dtype.name}; a weight must be one of {allowed}.")


def to_float32(name: str, array: np.ndarray) -> np.ndarray:
    """A weight as float32, not copied if it is; raises as `check_float` does."""
    check_float(name, array.dtype)
    return array.astype(np.float32, copy=False)
