"""Arrays of an `.npz` file, read one at a time: shapes come from numpy's headers, pickled objects are refused."""

import io
from pathlib import Path

import numpy as np

from tokjax.errors import UserError
from tokjax.pretrained.archive import Archive
from tokjax.pretrained.stored import BFLOAT16, Stored

# Numpy refuses longer headers by default; the rest is its magic string, version and length field.
_HEADER = 10_000 + 16

_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npz(path: Path) -> dict[str, Stored]:
    """The arrays of a file that `numpy.savez` wrote.

    Names are as stored, with two rules for big_vision's training states: where there are names under `params/`, all
    others (the optimiser's `opt/`, counters) are left out and the prefix is dropped. Its bfloat16 arrays, which numpy
    writes as two bytes of no type, are bfloat16 again.

    Raises:
        UserError: the archive is damaged, or a member is no array or holds Python objects.
    """
    archive = Archive(path)
    arrays = {name.removesuffix(".npy"): _array(archive, name) for name in archive if not name.endswith("/")}
    params = {name.removeprefix("params/"): array for name, array in arrays.items() if name.startswith("params/")}
    return params or arrays


def _array(archive: Archive, name: str) -> Stored:
    try:
        header = io.BytesIO(archive.read(name, _HEADER).tobytes())
        shape, fortran, dtype = _READERS[np.lib.format.read_magic(header)](header)
    except (ValueError, KeyError, EOFError) as error:
        raise UserError(f"{archive.path}: {name} is not an array of numpy: {error}") from error
    if dtype == np.dtype("V2"):
        dtype = BFLOAT16
    if dtype.kind not in "biufc" and dtype != BFLOAT16:
        kind = "Python objects, which are pickled" if dtype.hasobject else dtype.name
        raise UserError(f"{archive.path}: {name} holds {kind}; only numbers are read.")
    start = header.tell()
    strides = tuple(int(np.prod(shape[:axis], dtype=object)) for axis in range(len(shape))) if fortran else None
    try:
        return Stored(lambda: archive.read(name)[start:], archive.size(name) - start, dtype, shape, 0, strides)
    except UserError as error:
        raise UserError(f"{archive.path}: {name}: {error}") from error
