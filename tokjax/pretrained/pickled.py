"""Tensors of torch's checkpoint files, which are pickles, without torch and without running anything in them.

A pickle is a program for a small stack machine that may import and call any function. Here the opcodes are read with
`pickletools`, which only takes a pickle apart, and carried out by a machine that has no means to import anything: a
global is looked up in a closed table, and what it makes is a plain container, a number or a `Stored` tensor. Anything
else is refused by name. Work and memory stay in proportion to the file: nothing from it is hashed, printed or walked to
an unlimited depth.

Four kinds of file, told apart by their content:

* zip archives, as `torch.save` writes since 1.6: `<name>/data.pkl`, one member `<name>/data/<key>` for every storage;
* TorchScript archives (`torch.jit.save`), the same with objects of classes `__torch__.*`, whose nested attributes name
  the tensors (`visual.conv1.weight`);
* the older sequence of five pickles followed by the storages;
* neither: a pickle of something else, refused.

The formats follow `torch/serialization.py`, `torch/_utils.py` and `torch/csrc/jit/serialization/pickler.cpp`.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import io
import mmap
from pathlib import Path
import pickletools
import re
from typing import Any, BinaryIO, cast

import ml_dtypes
import numpy as np

from tokjax.errors import UserError
from tokjax.pretrained.archive import Archive
from tokjax.pretrained.stored import BFLOAT16, Stored, stored_array

# Where the weights lie inside a checkpoint with more than weights, first match first. The names that mean "the model"
# come before its averaged copies, so that what is loaded does not depend on whether a run kept averages; DINO's files
# have no "model" but a student and a teacher, which is the one to evaluate.
WRAPPERS = ("model", "state_dict", "model_state", "module", "model_ema", "teacher")
# What wrapping a model for several devices or for compilation puts before every name.
_PREFIXES = ("module.", "_orig_mod.")

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LARGEST_PICKLE = 2**28
_COPIES = 2**26
_DEPTH, _NODES = 64, 2 * 10**5
_KEY_PARTS, _KEY_BITS = 8, 64


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    fetch: Callable[[], np.ndarray]
    nbytes: int
    dtype: np.dtype


class _Namespace(dict[Any, Any]):
    """The attributes of an `argparse.Namespace`."""


class _Script(dict[Any, Any]):
    """The attributes of an object of TorchScript."""


@dataclasses.dataclass(eq=False)
class _DType:
    """A dtype of numpy, whose byte order comes with BUILD."""

    value: np.dtype


@dataclasses.dataclass(eq=False)
class _Array:
    """An array of numpy, whose content comes with BUILD."""

    value: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))


@dataclasses.dataclass(frozen=True)
class _Global:
    """Something that REDUCE or NEWOBJ may make."""

    name: str
    make: Callable[..., Any]


def load(path: Path) -> Any:
    """Everything that a torch file holds.

    Returns:
        dicts, lists, tuples, sets, strings and numbers with `Stored` for tensors; `argparse.Namespace`s and objects of
        TorchScript are dicts of their attributes, numpy's scalars Python numbers, its arrays the `value` of an object,
        devices and paths strings.

    Raises:
        UserError: the file is damaged or of another kind, or something in it is refused, which the message names.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        return _load_zip(Archive(path)) if zipped else _load_legacy(path)
    except ValueError as error:  # of mmap too, for a file without bytes
        named = isinstance(error, UserError) and str(path) in str(error)
        raise error if named else UserError(f"{path}: {error}") from error


def read_pickled(path: Path) -> dict[str, Stored]:
    """The state dict of a torch file.

    Where a dict has tensors under one of the keys `WRAPPERS`, the first of them is taken, again and again; then a
    `module.` or `_orig_mod.` that all names begin with is dropped. Of a TorchScript archive it is the tensors among the
    nested attributes. What is no tensor is left out.

    Raises:
        UserError: as `load`, or there are no tensors.
    """
    content = load(path)
    tensors = dict(_nested(content)) if isinstance(content, _Script) else _unwrap(content)
    if not tensors:
        keys = [key[:40] for key in content if isinstance(key, str)][:20] if isinstance(content, dict) else []
        held = f"a dict of {', '.join(keys)}" if keys else f"a {_kind(content)}"
        raise UserError(f"{path} holds {held}, and no tensors, there or under {', '.join(WRAPPERS)}.")
    for prefix in _PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _tensors(content: Mapping[Any, Any]) -> dict[str, Stored]:
    arrays = {name: stored_array(v.value) if isinstance(v, _Array) else v for name, v in content.items()}
    return {name: v for name, v in arrays.items() if isinstance(name, str) and isinstance(v, Stored)}


def _unwrap(content: Any, depth: int = 4) -> dict[str, Stored]:
    """The tensors under the first of the keys that lead to any, else those of the dict itself.

    In this order, because beside the weights there may be tensors that are none, such as the state of a generator.
    """
    if not isinstance(content, dict) or not depth:
        return {}
    found = (_unwrap(content[key], depth - 1) for key in WRAPPERS if key in content)
    return next(filter(None, found), None) or _tensors(content)


def _kind(content: Any) -> str:
    return "tensor" if isinstance(content, Stored) else type(content).__name__.strip("_").lower()


def _nested(content: _Script) -> Iterator[tuple[str, Stored]]:
    """(dotted path, tensor) of all tensors among the attributes of nested objects, as a state dict would name them."""
    # Shared references make exponentially many paths out of few objects, cycles endless ones.
    left = _NODES

    def walk(value: _Script, path: tuple[str, ...]) -> Iterator[tuple[str, Stored]]:
        nonlocal left
        left -= len(value) + 1
        if left < 0 or len(path) > _DEPTH:
            raise UserError("Its objects are nested too deeply or too often.")
        for name, inner in value.items():
            if not isinstance(name, str):
                raise UserError("An object has an attribute whose name is no string.")
            if isinstance(inner, Stored):
                yield ".".join((*path, name)), inner
            elif isinstance(inner, _Script):
                yield from walk(inner, (*path, name))

    return walk(content, ())


# Containers


def _load_zip(archive: Archive) -> Any:
    pickles = sorted((name for name in archive if name.endswith("/data.pkl")), key=len)
    if not pickles:
        raise UserError(f"{archive.path} is a zip archive without the data.pkl of torch.")
    folder = pickles[0].removesuffix("data.pkl")
    if archive.size(pickles[0]) > _LARGEST_PICKLE:
        raise UserError(f"{archive.path}: data.pkl is too large ({archive.size(pickles[0])} bytes).")
    order = folder + "byteorder"
    if order in archive and archive.read(order, 6).tobytes() != b"little":
        raise UserError(f"{archive.path} was written on a big-endian machine; only little-endian files are read.")

    def storage(pid: tuple[Any, ...]) -> _Storage:
        dtype, key, length, _ = _storage_id(pid)
        member = f"{folder}data/{key}"
        if member not in archive:
            raise UserError(f"Storage {key!r} is missing.")
        size = _nbytes(dtype, length)
        if size > archive.size(member):
            raise UserError(f"Storage {key!r} has {archive.size(member)} bytes instead of {size}.")
        return _Storage(lambda: archive.read(member), size, dtype)

    return _unpickle(io.BytesIO(archive.read(pickles[0]).tobytes()), storage)


def _load_legacy(path: Path) -> Any:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(mapped, np.uint8)
    stream = cast(BinaryIO, mapped)  # unlike a file it never sets memory aside for more than it has left
    starts: dict[str, int] = {}
    stored: dict[str, tuple[np.dtype, int]] = {}

    def storage(pid: tuple[Any, ...]) -> _Storage:
        dtype, key, length, view = _storage_id(pid)
        first, count = view[1:] if view else (0, length)
        begin, end = _nbytes(dtype, first), _nbytes(dtype, first) + _nbytes(dtype, count)
        if stored.setdefault(key, (dtype, length)) != (dtype, length) or end > _nbytes(dtype, length):
            raise UserError(f"Storage {key!r} has a view that does not fit it.")
        return _Storage(lambda: data[starts[key] + begin : starts[key] + end], end - begin, dtype)

    magic = _unpickle(stream, _no_storage)
    if magic != _MAGIC or _unpickle(stream, _no_storage) != _PROTOCOL:
        raise UserError(f"{path} is a pickle, but not one of torch.")
    system = _unpickle(stream, _no_storage)
    if not isinstance(system, dict) or not system.get("little_endian"):
        raise UserError(f"{path} was written on a big-endian machine; only little-endian files are read.")
    content = _unpickle(stream, storage)
    keys = _unpickle(stream, _no_storage)
    at = stream.tell()
    for key in keys if isinstance(keys, list) else []:
        length = int.from_bytes(data[at : at + 8].tobytes(), "little")
        if type(key) is not str or key not in stored or length != stored[key][1]:
            raise UserError(f"{path}: a storage is damaged or cut off.")
        starts[key] = at + 8
        at += 8 + _nbytes(*stored[key])
    if at > len(data) or stored.keys() - starts.keys():
        raise UserError(f"{path} is cut off.")
    return content


def _no_storage(pid: object) -> _Storage:
    raise UserError("A storage is asked for where none can be.")


def _storage_id(pid: tuple[Any, ...]) -> tuple[np.dtype, str, int, Any]:
    """dtype, key, number of elements, and view (key, first, number) of older files from a persistent id."""
    if type(pid) is not tuple or len(pid) not in (5, 6):
        raise UserError("Something other than a storage is asked for.")
    tag, dtype, key, _, length, *view = pid
    if tag != "storage" or type(key) is not str or type(length) is not int or not isinstance(dtype, np.dtype):
        raise UserError("Something other than a storage with a dtype, key and length is asked for.")
    return dtype, key, length, view[0] if view else None


def _nbytes(dtype: np.dtype, length: object) -> int:
    if type(length) is not int or length < 0:
        raise UserError("A storage has no length.")
    return length * dtype.itemsize


# What the globals make


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *rest: Any, dtype: Any = None) -> Stored:
    if not isinstance(storage, _Storage):
        raise UserError("A tensor has no storage.")
    if len(rest) > 2 and rest[2]:
        raise UserError("Tensors that are conjugated or negated views are not read.")
    return Stored(storage.fetch, storage.nbytes, dtype or storage.dtype, tuple(shape), offset, tuple(strides))


def _tensor_v3(
    storage: _Storage, offset: int, shape: tuple, strides: tuple, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Stored:
    if not isinstance(dtype, np.dtype):
        raise UserError("A tensor has no dtype.")
    return _tensor(storage, offset, shape, strides, grad, hooks, *rest, dtype=dtype)


def _with_attributes(make: Any, kind: Any, args: tuple, state: Any) -> Stored:
    """A tensor of a subclass, or with attributes, which are left out."""
    if not isinstance(make, _Global) or make.make not in (_tensor, _tensor_v3, _first):
        raise UserError("A tensor of a subclass that is not made from a plain one is not read.")
    return make.make(*args)


def _first(value: Any, *rest: Any) -> Any:
    return value


def _dict(items: Any = ()) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, dict) else items
    return {_key(key): value for key, value in pairs}


def _set(items: Any = ()) -> set[Any]:
    return {_key(item) for item in items}


def _key(value: Any) -> Any:
    """A key of a dict or element of a set.

    Deep tuples overflow the interpreter's stack when hashed; long tuples and numbers are hashed anew at every use, and
    numbers beyond a word can be made to collide.
    """
    scalars = value if type(value) is tuple else (value,)
    if len(scalars) > _KEY_PARTS or not all(
        isinstance(v, (str, bytes, int, float, type(None), np.dtype)) for v in scalars
    ):
        raise UserError(f"A {_kind(value)} as a key is not read.")
    if any(isinstance(v, int) and v.bit_length() > _KEY_BITS for v in scalars):
        raise UserError("A number of so many digits as a key is not read.")
    return value


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1") or type(text) is not str:
        raise UserError("_codecs.encode is refused for anything but strings to latin1.")
    return text.encode("latin-1")


def _dtype(name: str, *_: Any) -> _DType:
    if not re.fullmatch(r"[<>|=]?[biufc]\d{1,2}", name):
        raise UserError(f"numpy's dtype {name[:20]!r} is not read.")
    return _DType(np.dtype(name))


def _scalar(dtype: _DType, content: Any = b"") -> Any:
    raw = content.encode("latin-1") if isinstance(content, str) else content
    return np.frombuffer(raw, dtype.value, count=1)[0].item()


def _path(*parts: str) -> str:
    return "/".join(parts)


def _device(kind: str, index: int | None = None) -> str:
    return kind if type(index) is not int else ":".join((kind, str(index)))


# dtype, its names in torch, and the storage classes that hold it.
_DTYPES: tuple[tuple[Any, str, str], ...] = (
    (np.float64, "float64 double", "Double"),
    (np.float32, "float32 float", "Float"),
    (np.float16, "float16 half", "Half"),
    (BFLOAT16, "bfloat16", "BFloat16"),
    (np.int64, "int64 long", "Long"),
    (np.int32, "int32 int", "Int"),
    (np.int16, "int16 short", "Short"),
    (np.int8, "int8", "Char"),
    (np.uint8, "uint8", "Byte Untyped"),
    (np.uint16, "uint16", ""),
    (np.uint32, "uint32", ""),
    (np.uint64, "uint64", ""),
    (np.bool_, "bool", "Bool"),
    (np.complex64, "complex64 cfloat", "ComplexFloat"),
    (np.complex128, "complex128 cdouble", "ComplexDouble"),
    (ml_dtypes.float8_e4m3fn, "float8_e4m3fn", ""),
    (ml_dtypes.float8_e5m2, "float8_e5m2", ""),
    (ml_dtypes.float8_e4m3fnuz, "float8_e4m3fnuz", ""),
    (ml_dtypes.float8_e5m2fnuz, "float8_e5m2fnuz", ""),
)

# Globals that stand for a value: dtypes, storage classes (by their dtype), and types that are only mentioned.
_VALUES: dict[str, Any] = {
    **{f"torch.{name}": np.dtype(dtype) for dtype, names, _ in _DTYPES for name in names.split()},
    **{
        f"{module}.{name}Storage": np.dtype(dtype)
        for dtype, _, names in _DTYPES
        for name in names.split()
        for module in ("torch", "torch.cuda", "torch.storage")
    },
    **{f"{module}.{name}": name for module in ("builtins", "__builtin__") for name in ("int", "float", "str", "bool")},
    "torch.Tensor": "torch.Tensor",
    "torch.nn.parameter.Parameter": "torch.nn.parameter.Parameter",
    "numpy.ndarray": "numpy.ndarray",
}

_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.Size": tuple,
    "torch.device": _device,
    **{f"torch.jit._pickle.build_{kind}list": _first for kind in ("int", "tensor", "double", "bool")},
    "torch.jit._pickle.restore_type_tag": _first,
    "argparse.Namespace": lambda: _Namespace(),  # a dict made from arguments would hash keys that nobody has checked
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": lambda factory=None: {},
    **{
        f"{module}.{name}": make
        for module in ("builtins", "__builtin__")
        for name, make in (("set", _set), ("frozenset", _set), ("list", list), ("dict", _dict))
    },
    **{
        f"{module}.{name}": _path
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
    "_codecs.encode": _encode,
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: _Array() for core in ("core", "_core")},
}


def _global(module: str, name: str) -> Any:
    """What a global stands for.

    Raises:
        UserError: it is not in the tables.
    """
    full = f"{module}.{name}"
    if full in _VALUES:
        return _VALUES[full]
    if full in _MAKERS:
        return _Global(full, _MAKERS[full])
    if module == "__torch__" or module.startswith("__torch__."):
        return _Global(full, lambda *_: _Script())
    raise UserError(
        f"{full[:200]} is refused: only tensors, numbers and plain containers are read, and nothing is run. "
        "A file that holds whole Python objects must be saved again as a state dict by the library that wrote it."
    )


# The machine

# Opcodes that push what pickletools has decoded already.
_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_FROM_MARK: dict[str, Callable[[list[Any]], Any]] = {
    "LIST": list,
    "TUPLE": tuple,
    "FROZENSET": _set,
    "DICT": lambda items: _dict(zip(items[::2], items[1::2], strict=True)),
}


def _unpickle(stream: BinaryIO, storage: Callable[[tuple[Any, ...]], _Storage]) -> Any:
    """Carries out one pickle and leaves the stream behind it.

    Raises:
        UserError: it is damaged, or asks for something that is refused.
    """
    try:
        return _Machine(storage).run(stream)
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"The pickle in it is damaged or cut off: {error}") from error


class _Machine:
    """The stack machine. No opcode can import or call anything: `_global` and `_Global.make` are all it reaches.

    Args:
        storage: gives the storage of a persistent id.
    """

    def __init__(self, storage: Callable[[tuple[Any, ...]], _Storage]):
        self.storage = storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copies = _COPIES

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("its stack is empty")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        value = self.pop()
        self.stack.append(value)
        if not isinstance(value, kind):
            raise UserError(f"The pickle in it treats a {_kind(value)} as a {kind.__name__}.")
        return value

    def run(self, stream: BinaryIO) -> Any:
        for opcode, arg, _ in pickletools.genops(stream):
            name = opcode.name
            if name in _PUSHED:
                self.stack.append(arg)
            elif name == "STOP":
                return self.pop()
            else:
                self.step(name, arg)
        raise ValueError("it has no end")

    def step(self, name: str, arg: Any) -> None:
        stack = self.stack
        match name:
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[arg] = self.top(object)
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top(object)
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[arg])
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple([self.pop() for _ in range(int(name[-1]))][::-1]))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(_CONSTANTS[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_SET" | "EMPTY_TUPLE":
                stack.append(_EMPTY[name]())
            case "LIST" | "TUPLE" | "FROZENSET" | "DICT":
                stack.append(_FROM_MARK[name](self.pop_to_mark()))
            case "APPEND":
                value = self.pop()
                self.top(list).append(value)
            case "APPENDS":
                items = self.pop_to_mark()
                self.top(list).extend(items)
            case "ADDITEMS":
                items = self.pop_to_mark()
                self.top(set).update(_set(items))
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.top(dict)[_key(key)] = value
            case "SETITEMS":
                items = self.pop_to_mark()
                self.top(dict).update(_dict(zip(items[::2], items[1::2], strict=True)))
            case "GLOBAL":
                stack.append(_global(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                if type(attribute) is not str or type(module) is not str:
                    raise ValueError("a global's name is no string")
                stack.append(_global(module, attribute))
            case "BINPERSID":
                stack.append(self.storage(self.pop()))
            case "REDUCE" | "NEWOBJ":
                args, make = self.pop(), self.pop()
                stack.append(self.make(make, args))
            case "BUILD":
                state = self.pop()
                self.charge(state if isinstance(state, tuple) else (state,))
                _build(self.top(object), state)
            case "DUP":
                stack.append(self.top(object))
            case "POP":
                self.pop()
            case "POP_MARK":
                self.pop_to_mark()
            case "PROTO" | "FRAME":
                pass
            case _:
                what = str(arg).replace(" ", ".")[:200] if name == "INST" else "the opcode"
                raise UserError(f"{what} is refused ({name}): checkpoints have no use for it, and nothing is run.")

    def make(self, make: Any, args: Any) -> Any:
        if not isinstance(make, _Global):
            raise UserError(f"Calling a {_kind(make)} is refused.")
        if type(args) is not tuple:
            raise ValueError("its arguments are no tuple")
        self.charge(args)
        return make.make(*args)

    def charge(self, values: tuple[Any, ...]) -> None:
        """Counts what may be copied: a few bytes of pickle could ask for a copy of something large again and again."""
        self.copies -= sum(len(v) for v in (values, *values) if isinstance(v, (str, bytes, list, tuple, dict, set)))
        if self.copies < 0:
            raise UserError("The pickle in it makes too many copies.")


def _build(target: Any, state: Any) -> None:
    """BUILD: gives an object its state."""
    if isinstance(target, (_Namespace, _Script)):
        if not isinstance(state, dict):
            raise UserError(f"The state of an object is a {_kind(state)} instead of a dict.")
        target.update(state)
    elif isinstance(target, _DType):
        order = state[1]
        if order in ("<", ">"):
            target.value = target.value.newbyteorder(order)
    elif isinstance(target, _Array):
        _, shape, dtype, fortran, raw = state
        flat = np.frombuffer(raw.encode("latin-1") if isinstance(raw, str) else raw, dtype.value)
        target.value = flat.reshape(shape, order="F" if fortran else "C")
    elif not isinstance(target, dict):  # a state dict's attributes (`_metadata`) are left out
        raise UserError(f"BUILD of a {getattr(target, 'name', _kind(target))} is refused.")
