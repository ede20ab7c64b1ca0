"""The correspondence between the tensors of a checkpoint and the parameter tree of a model, in both directions.

A naming is a table of rows, "this part of the tree is these tensors". The layout rules that checkpoints share are
applied here once, by the kind of a row:

| kind | tensors | tree |
| --- | --- | --- |
| linear | `.weight` [out, in], `.bias` | kernel [in, out], bias |
| in_proj | `_weight` [out, in], `_bias` | kernel, bias |
| matrix | [in, out], as `x @ matrix` | kernel |
| patch | `.weight` [C, channels, p, p], `.bias` | kernel [p * p * channels, C] (row, column, channel), bias |
| norm | `.weight`, `.bias` | scale, bias |
| array | any | the same |
| vector | [C] | [1, 1, C] |
| rows | [T, C] | [1, T, C] |
| one | [1] | a scalar |
| positions | timm's table, in which registers may have rows | [1, T, C] without them |

Several tensors are joined along the output axis in the order in which a row names them, so that query, key and value
are one fused `qkv`; a name that ends in ":2" holds two equal parts of what is joined.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import math
from typing import Any, Literal, Protocol

import jax
from jaxtyping import Float32
import numpy as np

from tokjax.errors import UserError
from tokjax.models.bert import BertConfig
from tokjax.models.decoder import DecoderConfig
from tokjax.models.dual import DualConfig
from tokjax.models.t5 import T5Config
from tokjax.models.vit import ViTConfig
from tokjax.pretrained.stored import check_float, forget

Kind = Literal["linear", "in_proj", "matrix", "patch", "norm", "array", "vector", "rows", "one", "positions"]
Path = tuple[str | int, ...]
TextModel = BertConfig | T5Config | DecoderConfig
Config = ViTConfig | DualConfig | TextModel
Place = Callable[[Path, np.ndarray], Any]
Index = tuple[slice, ...]  # one slice an axis, of step 1
PlaceParts = Callable[[Path, tuple[int, ...], Callable[[Index], np.ndarray]], Any]

_ROWS = 64  # transposed at a time: twice as fast as a whole matrix, whose columns lie too far apart
_WHOLE = {"": ""}
_SUFFIX: dict[Kind, dict[str, str]] = {
    "linear": {"kernel": ".weight", "bias": ".bias"},
    "in_proj": {"kernel": "_weight", "bias": "_bias"},
    "matrix": {"kernel": ""},
    "patch": {"kernel": ".weight", "bias": ".bias"},
    "norm": {"scale": ".weight", "bias": ".bias"},
    "array": _WHOLE,
    "vector": _WHOLE,
    "rows": _WHOLE,
    "one": _WHOLE,
    "positions": _WHOLE,
}


class Readable(Protocol):
    """What a checkpoint's tensors are read through: a lazy mapping that knows shapes without reading."""

    def __getitem__(self, name: str) -> np.ndarray: ...
    def view(self, name: str) -> np.ndarray: ...
    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: object) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True)
class Made:
    """A tensor that is computed from stored ones when it is asked for."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


class View:
    """Tensors under other names.

    Args:
        tensors: the tensors as stored.
        rename: stored name -> name here.
        made: tensors to add, or to put in place of stored ones.
        without: names (as here) that are left out.
    """

    def __init__(
        self,
        tensors: Readable,
        rename: Callable[[str], str] = lambda name: name,
        made: Mapping[str, Made] | None = None,
        without: frozenset[str] = frozenset(),
    ):
        self._tensors, self._made = tensors, dict(made or {})
        self._stored = {rename(name): name for name in tensors if rename(name) not in without | self._made.keys()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._made[name].make() if name in self._made else self._tensors[self._stored[name]]

    def view(self, name: str) -> np.ndarray:
        return self._made[name].make() if name in self._made else self._tensors.view(self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter([*self._stored, *self._made])

    def __contains__(self, name: object) -> bool:
        return name in self._stored or name in self._made

    def shape(self, name: str) -> tuple[int, ...]:
        return self._made[name].shape if name in self._made else self._tensors.shape(self._stored[name])


@dataclasses.dataclass(frozen=True)
class Row:
    """A part of the tree and the tensors that hold it. `*` stands for the number of a block.

    Attributes:
        kind: which layout rule turns one into the other.
        tree: dotted path in the parameter tree.
        files: names in the file without the kind's suffixes; several are joined along the output axis.
    """

    kind: Kind
    tree: str
    files: tuple[str, ...]


def table(*rows: tuple[str, ...]) -> dict[str, Row]:
    """Rows of (kind, path in the tree, names in the file); without a name it is the path."""
    return {tree: Row(kind, tree, tuple(files) or (tree,)) for kind, tree, *files in rows}  # type: ignore[arg-type]


def under(tree: str, file: str, rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows with a prefix to their paths and one to their names: a tower within a larger model."""
    moved = (Row(row.kind, tree + row.tree, tuple(file + name for name in row.files)) for row in rows.values())
    return {row.tree: row for row in moved}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the tree: the names of its tensors, and how it is made from them and taken apart."""

    names: tuple[str, ...]
    parts: tuple[int, ...]
    kind: Kind
    transposed: bool

    def decode(self, tensors: list[np.ndarray], out: np.ndarray, config: Config) -> None:
        """Fills the tree's array from the file's tensors, widening them on the way."""
        if self.kind == "patch" and self.transposed:
            tensors = [tensors[0].transpose(2, 3, 1, 0).reshape(out.shape)]
        elif self.kind == "positions":
            tensors = [np.delete(tensors[0], _register_rows(config), axis=1)]
        elif self.transposed:
            columns = np.cumsum([0, *(len(tensor) for tensor in tensors)])
            for start, tensor in zip(columns[:-1], tensors, strict=True):
                for row in range(0, len(tensor), _ROWS):
                    out[:, start + row : start + min(row + _ROWS, len(tensor))] = tensor[row : row + _ROWS].T
            return
        if len(tensors) == 1:
            out[...] = tensors[0].reshape(out.shape)
            return
        at = 0
        for tensor in tensors:
            out[..., at : at + tensor.shape[-1]] = tensor
            at += tensor.shape[-1]

    def decode_part(
        self, tensors: list[np.ndarray], shape: tuple[int, ...], index: Index, config: Config
    ) -> Float32[np.ndarray, "..."]:
        """A part of the tree's array, for which no more of the tensors is read than it holds where layouts allow it.

        That is so for all but patch kernels and timm's tables of positions, which are small.
        """
        first, last = index[0] if index else slice(None), index[-1] if index else slice(None)
        joined = self.transposed or len(tensors) > 1
        if self.kind in ("patch", "positions") or not (joined or tensors[0].shape == shape):
            out = _aligned(shape)
            self.decode(tensors, out, config)
            return out[index]
        if not joined:
            return np.array(tensors[0][index], np.float32)
        start, stop, _ = last.indices(shape[-1])
        pieces, at = [], 0
        for tensor in tensors:  # joined along the last axis of the tree's array
            size = len(tensor) if self.transposed else tensor.shape[-1]
            inside = slice(max(start - at, 0), max(min(stop - at, size), 0))
            if inside.start < inside.stop:
                part = tensor[inside, first].T if self.transposed else tensor[(*index[:-1], inside)]
                pieces.append(np.asarray(part, np.float32))
            at += size
        return np.concatenate(pieces, -1)

    def encode(self, array: np.ndarray, config: Config) -> list[np.ndarray]:
        """The file's tensors from the tree's array."""
        if self.kind == "patch" and self.transposed:
            p, channels = _vision(config).patch_size, _vision(config).channels
            return [array.reshape(p, p, channels, -1).transpose(3, 2, 0, 1)]
        if self.kind == "positions":
            rows = _register_rows(config)
            return [np.insert(array, [rows.start] * (rows.stop - rows.start), 0, axis=1)]
        if self.kind in ("vector", "rows", "one"):
            drop = {"vector": 2, "rows": 1, "one": 0}[self.kind]
            return [array.reshape(array.shape[drop:] or (1,))]
        if len(self.names) == 1:
            return [array.T if self.transposed else array]
        each = array.shape[-1] // sum(self.parts)
        pieces = np.split(array, np.cumsum(self.parts[:-1]) * each, axis=-1)
        return [piece.T if self.transposed else piece for piece in pieces]


def _vision(config: Config) -> ViTConfig:
    assert not isinstance(config, TextModel)  # which has no images
    return config.vision if isinstance(config, DualConfig) else config


def _register_rows(config: Config) -> slice:
    """Rows for registers in a timm table, which has them unless it has patches alone; this tree never does."""
    vision = _vision(config)
    return slice(vision.table_prefix, vision.table_prefix + vision.position_prefix * vision.registers)


def leaf(rows: Mapping[str, Row], path: Path) -> Leaf:
    """The tensors of one array of the tree.

    Raises:
        UserError: the naming has no row for this path.
    """
    dotted = ".".join("*" if isinstance(part, int) else part for part in path)
    stem, _, last = dotted.rpartition(".")
    row, last = (rows[dotted], "") if dotted in rows else (rows.get(stem), last)
    if row is None or last not in _SUFFIX[row.kind]:
        raise UserError(f"Parameter {'.'.join(map(str, path))} has no name in this kind of checkpoint.")
    block = next((str(part) for part in path if isinstance(part, int)), "")
    pairs = [name.partition(":") for name in row.files]
    names = tuple(name.replace("*", block) + _SUFFIX[row.kind][last] for name, _, _ in pairs)
    parts = tuple(int(part or 1) for _, _, part in pairs)
    return Leaf(names, parts, row.kind, transposed=last == "kernel" and row.kind != "matrix")


def flatten(tree: Mapping[Any, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, array) of a nested dict; digits in keys, as some checkpoint libraries write them, become ints."""
    for key, value in tree.items():
        here = (*path, int(key) if str(key).isdigit() else key)
        if isinstance(value, Mapping):
            yield from flatten(value, here)
        else:
            yield here, value


def check(
    rows: Mapping[str, Row],
    shapes: Mapping[Any, Any],
    tensors: Readable,
    config: Config,
    ignored: Callable[[str], object] = lambda name: False,
) -> dict[Path, Leaf]:
    """The leaves of a tree, if exactly their tensors are there; nothing is read.

    Args:
        rows: the naming.
        shapes: the tree wanted, with anything that has a `shape` for leaves; blocks unstacked.
        tensors: where they should be.
        config: of the model.
        ignored: names in the file that may be left unread (decoders, poolers).

    Raises:
        UserError: tensors are missing, unexpected, or of another shape; the message lists all of them.
    """
    wanted = {path: (leaf(rows, path), array.shape) for path, array in flatten(shapes)}
    expected: dict[str, tuple[int, ...]] = {}
    for part, shape in wanted.values():
        # Encoding an array that takes no memory tells the shapes in the file.
        parts = part.encode(np.broadcast_to(np.float32(0), shape), config)
        expected.update(zip(part.names, (p.shape for p in parts), strict=True))
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected and not ignored(name)]
    wrong = [
        f"{name} is {_shape(tensors.shape(name))} instead of {_shape(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors.shape(name)) != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    if any(problems.values()):
        lists = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in problems.items() if names)
        raise UserError(f"The tensors do not fit the configuration. {lists[0].upper()}{lists[1:]}.")
    return {path: part for path, (part, _) in wanted.items()}


def read_tree(
    leaves: Mapping[Path, Leaf],
    shapes: Mapping[Any, Any],
    tensors: Readable,
    config: Config,
    *,
    stacked: bool = False,
    place: Place | None = None,
    place_parts: PlaceParts | None = None,
) -> dict[str, Any]:
    """Reads a parameter tree: every tensor once, widened, laid out and placed before the next one is read.

    Args:
        leaves: as `check` gives them.
        shapes: the tree wanted.
        tensors: where to read.
        config: of the model.
        stacked: whether the arrays of equal blocks become one with a leading L axis, filled block by block.
        place: what becomes of an array once it is there, for example `jax.device_put` with a sharding for its path. It
            gets float32 numpy arrays that nobody else holds, aligned so that a CPU device takes them without a copy.
        place_parts: in place of it, for arrays of which only parts are wanted: it gets the shape, and a function from
            an index to that part, which reads it.

    Returns:
        The tree, with what `place` or `place_parts` gives for leaves.

    Raises:
        UserError: tensors that are no floats.
    """
    sizes = {path: array.shape for path, array in flatten(shapes)}

    together: dict[Path, list[Path]] = {}  # path in the tree returned -> paths of the blocks that it holds
    for path in sizes:
        together.setdefault(tuple(key for key in path if not (stacked and isinstance(key, int))), []).append(path)

    def shape(path: Path) -> tuple[int, ...]:
        return sizes[path] if path in sizes else (len(together[path]), *sizes[together[path][0]])

    def read(path: Path, out: np.ndarray) -> None:
        part = leaves[path]
        views = {name: tensors.view(name) for name in part.names}
        for name, view in views.items():
            check_float(name, view.dtype)
        part.decode(list(views.values()), out, config)
        for view in views.values():
            forget(view)

    def part_of(path: Path, index: Index) -> np.ndarray:
        if path not in sizes:
            blocks = together[path][index[0]]
            return np.stack([part_of(block, index[1:]) for block in blocks])
        views = {name: tensors.view(name) for name in leaves[path].names}
        for name, view in views.items():
            check_float(name, view.dtype)
        found = leaves[path].decode_part(list(views.values()), sizes[path], index, config)
        for view in views.values():
            forget(view)
        return found

    def whole(path: Path, blocks: list[Path]) -> np.ndarray:
        array = _aligned(shape(path))
        if path in sizes:
            read(path, array)
        else:
            for i, block in enumerate(blocks):
                read(block, array[i])
        return array

    tree: dict[str, Any] = {}
    for path, blocks in together.items():
        at: dict[Any, Any] = tree
        for key in path[:-1]:
            at = at.setdefault(key, {})
        if place_parts is not None:
            at[path[-1]] = place_parts(path, shape(path), functools.partial(part_of, path))
        else:
            array = whole(path, blocks)
            at[path[-1]] = array if place is None else place(path, array)
            del array
    return tree


def _aligned(shape: tuple[int, ...], to: int = 64) -> np.ndarray:
    """An array at an address that is a multiple of `to` bytes, float32, not filled."""
    size = 4 * math.prod(shape)
    raw = np.empty(size + to, np.uint8)
    start = -raw.ctypes.data % to
    return raw[start : start + size].view(np.float32).reshape(shape)


def write_tree(
    rows: Mapping[str, Row], shapes: Mapping[Any, Any], params: Mapping[Any, Any], config: Config
) -> dict[str, np.ndarray]:
    """The inverse of `read_tree`: float32 tensors by name in the file.

    Raises:
        ValueError: the tree is not the one of `shapes`; the message lists what is missing, unexpected or misshapen.
    """
    wanted = {path: tuple(array.shape) for path, array in flatten(shapes)}
    given = dict(flatten(params))
    found = {path: np.shape(array) for path, array in given.items()}
    if found != wanted:
        differ = [
            f"{'.'.join(map(str, path))} is {_shape(found.get(path))} instead of {_shape(wanted.get(path))}"
            for path in {**wanted, **found}
            if found.get(path) != wanted.get(path)
        ]
        raise ValueError(f"params do not fit the config: {'; '.join(differ)}.")
    tensors: dict[str, np.ndarray] = {}
    for path, array in given.items():
        part = leaf(rows, path)
        pieces = part.encode(np.asarray(jax.device_get(array), np.float32), config)
        tensors.update((name, np.asarray(piece, order="C")) for name, piece in zip(part.names, pieces, strict=True))
    return tensors


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a scalar"
