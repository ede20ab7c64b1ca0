"""The correspondence between the tensors of a torch checkpoint and the parameter tree of a model, in both directions.

A naming is a table of rows, "this part of the tree is these tensors". The layout rules that all torch checkpoints share
are applied here once:

* a linear weight `[out, in]` is a kernel `[in, out]`;
* a patch convolution `[C, channels, p, p]` is a kernel `[p * p * channels, C]` for patches flattened in (row, column,
  channel) order;
* a norm's weight is a scale;
* separate query, key and value weights are one fused `qkv`, in that order.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
from typing import Any, Literal, Protocol

import jax
import numpy as np

from tokjax.errors import UserError
from tokjax.models.vit import ViTConfig

Kind = Literal["linear", "norm", "patch", "array", "positions"]
Path = tuple[str | int, ...]

_SUFFIX: dict[Kind, dict[str, str]] = {
    "linear": {"kernel": ".weight", "bias": ".bias"},
    "patch": {"kernel": ".weight", "bias": ".bias"},
    "norm": {"scale": ".weight", "bias": ".bias"},
    "array": {"": ""},
    "positions": {"": ""},
}


class Readable(Protocol):
    """What a checkpoint's tensors are read through: a lazy mapping that knows shapes without reading."""

    def __getitem__(self, name: str) -> np.ndarray: ...
    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: object) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...


class Renamed:
    """Tensors under other names.

    Args:
        tensors: the tensors as stored.
        rename: stored name -> name here.
        extra: tensors to add, or to put in place of stored ones.
        without: names (as here) that are left out.
    """

    def __init__(
        self,
        tensors: Readable,
        rename: Callable[[str], str],
        extra: Mapping[str, np.ndarray] | None = None,
        without: frozenset[str] = frozenset(),
    ):
        self._tensors, self._extra = tensors, dict(extra or {})
        self._stored = {rename(name): name for name in tensors if rename(name) not in without | self._extra.keys()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._extra[name] if name in self._extra else self._tensors[self._stored[name]]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._stored, *self._extra])

    def __contains__(self, name: object) -> bool:
        return name in self._stored or name in self._extra

    def shape(self, name: str) -> tuple[int, ...]:
        return self._extra[name].shape if name in self._extra else self._tensors.shape(self._stored[name])


@dataclasses.dataclass(frozen=True)
class Row:
    """A part of the tree and the tensors that hold it. `*` stands for the number of a block.

    Attributes:
        kind: which layout rule turns one into the other.
        tree: dotted path in the parameter tree.
        files: names in the file without ".weight" and ".bias"; several are joined along the output axis.
    """

    kind: Kind
    tree: str
    files: tuple[str, ...]


def table(*rows: tuple[str, ...]) -> dict[str, Row]:
    """Rows of (kind, path in the tree, names in the file); without a name it is the path."""
    return {tree: Row(kind, tree, tuple(files) or (tree,)) for kind, tree, *files in rows}  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the tree: the names of its tensors, and how it is made from them and taken apart."""

    names: tuple[str, ...]
    kind: Kind
    kernel: bool

    def decode(self, tensors: list[np.ndarray], config: ViTConfig) -> np.ndarray:
        """The tree's array from the file's tensors."""
        if self.kind == "patch" and self.kernel:
            return tensors[0].transpose(2, 3, 1, 0).reshape(-1, tensors[0].shape[0])
        if self.kind == "positions":
            return _without_register_rows(tensors[0], config)
        if self.kernel:
            return np.concatenate([tensor.T for tensor in tensors], axis=1)
        return np.concatenate(tensors) if len(tensors) > 1 else tensors[0]

    def encode(self, array: np.ndarray, config: ViTConfig) -> list[np.ndarray]:
        """The file's tensors from the tree's array."""
        if self.kind == "patch" and self.kernel:
            p = config.patch_size
            return [array.reshape(p, p, config.channels, -1).transpose(3, 2, 0, 1)]
        if self.kind == "positions":
            return [_with_register_rows(array, config)]
        if self.kernel:
            return [part.T for part in np.split(array, len(self.names), axis=1)]
        return np.split(array, len(self.names)) if len(self.names) > 1 else [array]


def _register_rows(config: ViTConfig) -> int:
    """Rows for registers in a timm table, which has them whenever it has one for CLS; this tree never does."""
    return config.registers if config.table_prefix else 0


def _with_register_rows(array: np.ndarray, config: ViTConfig) -> np.ndarray:
    rows, at = _register_rows(config), config.table_prefix
    return np.insert(array, [at] * rows, 0, axis=1) if rows else array


def _without_register_rows(tensor: np.ndarray, config: ViTConfig) -> np.ndarray:
    rows, at = _register_rows(config), config.table_prefix
    if rows and np.any(tensor[:, at : at + rows]):
        raise UserError("The position table has rows for the registers; add them to the register tokens and zero them.")
    return np.delete(tensor, slice(at, at + rows), axis=1) if rows else tensor


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
    names = tuple(name.replace("*", block) + _SUFFIX[row.kind][last] for name in row.files)
    return Leaf(names, row.kind, kernel=last == "kernel")


def flatten(tree: Mapping[Any, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, array) of a nested dict; digits in keys, as some checkpoint libraries write them, become ints."""
    for key, value in tree.items():
        here = (*path, int(key) if str(key).isdigit() else key)
        if isinstance(value, Mapping):
            yield from flatten(value, here)
        else:
            yield here, value


def read_tree(
    rows: Mapping[str, Row],
    shapes: Mapping[Any, Any],
    tensors: Readable,
    config: ViTConfig,
    ignored: Callable[[str], object] = lambda name: False,
) -> dict[str, Any]:
    """Reads a parameter tree, every tensor once.

    Args:
        rows: the naming.
        shapes: the tree wanted, with anything that has a `shape` for leaves.
        tensors: where to read.
        config: of the model.
        ignored: names in the file that may be left unread (decoders, poolers).

    Returns:
        The tree with float32 numpy arrays.

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
    tree: dict[str, Any] = {}
    for path, (part, _) in wanted.items():
        array = part.decode([tensors[name].astype(np.float32, copy=False) for name in part.names], config)
        at: dict[Any, Any] = tree
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = np.ascontiguousarray(array)
    return tree


def write_tree(
    rows: Mapping[str, Row], shapes: Mapping[Any, Any], params: Mapping[Any, Any], config: ViTConfig
) -> dict[str, np.ndarray]:
    """The inverse of `read_tree`: float32 tensors by name in the file.

    Raises:
        ValueError: the tree is not the one of `shapes`; the message lists what is missing, unexpected or misshapen.
    """
    wanted = {path: array.shape for path, array in flatten(shapes)}
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
        tensors.update((name, np.ascontiguousarray(piece)) for name, piece in zip(part.names, pieces, strict=True))
    return tensors


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a scalar"
