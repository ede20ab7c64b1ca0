"""Checks golden vectors: arrays that published code produced, against what ours makes of the same inputs.

A folder of vectors `<root>/<folder>/*.npz` has one adapter, `golden_adapters/<folder>.py`, with

- `INPUTS`: a tuple of name patterns (`fnmatch`, case-sensitive): the arrays that `run` gets as values;
- `run(case, arrays)`: the path of the file and its arrays, values for inputs and only a `jax.ShapeDtypeStruct` for all
  others, so that no answer can be copied; it returns our arrays by the names of the golden ones;
- `TOLERANCE` (optional): pattern -> (rtol, atol), the first match counts; a pattern with a slash is one of
  `<case>/<array>`, for the arrays of some cases only. Without a match floats are compared exactly too. A relative
  tolerance says nothing about indices and counts: of whole numbers only `atol` counts, of booleans and strings nothing;
- `COMPARE` (optional): pattern -> function of the inputs that gives a boolean mask, broadcastable to the array, of the
  elements to compare, where the source leaves the others undefined. The share compared is printed;
- `EXCUSED` (optional): pattern -> the reason why such arrays are not compared.

Every array of a file must be an input, compared or excused; nothing is left out in silence.
"""

from collections.abc import Iterable, Mapping
import dataclasses
from fnmatch import fnmatchcase
import importlib.util
from pathlib import Path
import sys
from types import ModuleType
from typing import Any

import jax
import numpy as np

Tolerance = tuple[float, float]  # rtol, atol


class GoldenError(AssertionError):
    """All that is wrong with one case, a line each."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the arrays of a case: `compared` maps a name to the share of its elements that was compared."""

    inputs: tuple[str, ...]
    compared: Mapping[str, float]
    excused: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.inputs)} inputs, {len(self.compared)} compared, {len(self.excused)} excused"]
        lines += [f"  {name}: compared {share:.1%} of the elements" for name, share in self.compared.items()]
        lines += [f"  {name}: excused, {reason}" for name, reason in self.excused.items()]
        return "\n".join(lines)


def find_cases(root: Path) -> list[Path]:
    """The cases under `root`, at any depth; files named `weights*` lie beside cases and are none."""
    return sorted(path for path in root.rglob("*.npz") if not path.name.startswith("weights"))


def folder_of(case: Path, root: Path) -> str:
    """The folder directly under `root`, which names the adapter."""
    parts = case.relative_to(root).parts
    if len(parts) < 2:
        raise GoldenError(f"{case.name} lies directly in the golden root: it belongs in a folder that has an adapter")
    return parts[0]


def load_adapter(path: Path) -> ModuleType:
    """Imports an adapter by path, as folder names need not be Python names, and checks what it declares."""
    if not path.is_file():
        raise GoldenError(f"there are golden vectors for {path.stem!r} but no adapter {path.parent.name}/{path.name}")
    name = "golden_adapter_" + path.stem.replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    adapter = importlib.util.module_from_spec(spec)
    sys.modules[name] = adapter  # dataclasses look their module up
    spec.loader.exec_module(adapter)
    check_adapter(adapter)
    return adapter


def check_adapter(adapter: Any) -> None:
    """Raises GoldenError if the adapter's declarations are malformed."""
    problems = []
    inputs = getattr(adapter, "INPUTS", None)
    if not isinstance(inputs, tuple) or not all(isinstance(pattern, str) for pattern in inputs):
        problems.append(f"INPUTS must be a tuple of name patterns, got {inputs!r}")
    if not callable(getattr(adapter, "run", None)):
        problems.append("run(case, arrays) is missing")
    for pattern, tolerance in getattr(adapter, "TOLERANCE", {}).items():
        if not isinstance(tolerance, tuple) or len(tolerance) != 2 or not all(0 <= t < np.inf for t in tolerance):
            problems.append(f"TOLERANCE[{pattern!r}] must be a finite (rtol, atol), got {tolerance!r}")
    for pattern, mask in getattr(adapter, "COMPARE", {}).items():
        if not callable(mask):
            problems.append(f"COMPARE[{pattern!r}] must be a function of the inputs, got {mask!r}")
    for pattern, reason in getattr(adapter, "EXCUSED", {}).items():
        if not isinstance(reason, str) or not reason.strip():
            problems.append(f"EXCUSED[{pattern!r}] needs a reason, got {reason!r}")
    _raise(problems)


def check_case(case: Path, adapter: Any) -> Report:
    """Runs an adapter on one file and compares.

    Raises:
        GoldenError: with every problem found: arrays that are neither input, compared nor excused, unknown names,
            wrong shapes or values, masks that select nothing, or nothing compared at all.
    """
    check_adapter(adapter)
    try:
        with np.load(case, allow_pickle=False) as file:
            golden = {name: file[name] for name in file.files}
    except (ValueError, OSError) as error:
        raise GoldenError(f"{case.name} cannot be read: {error}") from error

    inputs = {name: value for name, value in golden.items() if _matches(name, adapter.INPUTS)}
    for value in inputs.values():
        value.setflags(write=False)
    shapes = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in golden.items() if name not in inputs}
    returned = adapter.run(case, {**inputs, **shapes})

    problems = [
        f"{name}: returned by run, but no array of the file has this name" for name in returned if name not in golden
    ]
    compared, excused = {}, {}
    for name, want in golden.items():
        if name in inputs:
            continue
        if name in returned:
            tolerance = _tolerance(case.stem, name, adapter)
            share, wrong = _compare(name, np.asarray(returned[name]), want, adapter, inputs, tolerance)
            compared[name] = share
            problems += [f"{name}: {text}" for text in wrong]
        elif (reason := _first(name, getattr(adapter, "EXCUSED", {}))) is not None:
            excused[name] = reason
        else:
            problems.append(f"{name}: neither an input, nor returned by run, nor excused")
    if not any(golden[name].size for name in compared):
        problems.append("nothing is compared: every array is an input, excused or empty")
    _raise(problems)
    return Report(tuple(inputs), compared, excused)


def _tolerance(case: str, name: str, adapter: Any) -> Tolerance:
    for pattern, tolerance in getattr(adapter, "TOLERANCE", {}).items():
        if fnmatchcase(f"{case}/{name}" if "/" in pattern else name, pattern):
            return tolerance
    return 0.0, 0.0


def _compare(
    name: str, got: np.ndarray, want: np.ndarray, adapter: Any, inputs: Mapping[str, Any], tolerance: Tolerance
) -> tuple[float, list[str]]:
    """The share of the elements that was compared, and what is wrong."""
    if got.shape != want.shape:
        return 0.0, [f"shape {got.shape}, expected {want.shape}"]
    mask = np.ones(want.shape, bool)
    if (function := _first(name, getattr(adapter, "COMPARE", {}))) is not None:
        chosen = np.asarray(function(inputs))
        if chosen.dtype != bool:
            return 0.0, [f"its COMPARE mask has dtype {chosen.dtype}, expected bool"]
        try:
            mask = np.broadcast_to(chosen, want.shape)
        except ValueError:
            return 0.0, [f"its COMPARE mask of shape {chosen.shape} does not broadcast to {want.shape}"]
        if not mask.any():
            return 0.0, ["its COMPARE mask selects nothing"]
    rtol, atol = tolerance
    wrong = mask & ~_close(got, want, rtol, atol)
    share = float(mask.mean()) if mask.size else 1.0
    if not wrong.any():
        return share, []
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    text = f"{wrong.sum()} of {mask.sum()} elements differ (rtol {rtol:g}, atol {atol:g}), first at {at}: "
    return share, [text + f"{got[at]}, expected {want[at]}" + _largest(got, want, wrong)]


def _close(got: np.ndarray, want: np.ndarray, rtol: float, atol: float) -> np.ndarray:
    kinds = {got.dtype.kind, want.dtype.kind}
    if "U" in kinds:
        return np.asarray(got == want) if len(kinds) == 1 else np.zeros(want.shape, bool)
    if want.dtype == bool:
        return np.asarray(got == want)
    if want.dtype.kind in "iu":
        equal = np.asarray(got == want)
        return equal | (np.abs(got.astype(np.float64) - want) <= atol) if atol >= 1 else equal
    wide = np.complex128 if "c" in kinds else np.float64
    got, want = got.astype(wide), want.astype(wide)
    with np.errstate(invalid="ignore"):  # infinity minus itself: equal already
        near = np.abs(got - want) <= atol + rtol * np.abs(want)
    near &= np.isfinite(want)
    return (got == want) | near | (np.isnan(got) & np.isnan(want))


def _largest(got: np.ndarray, want: np.ndarray, wrong: np.ndarray) -> str:
    if want.dtype.kind not in "fiu" or got.dtype.kind in "bU":
        return ""
    with np.errstate(invalid="ignore"):
        difference = np.abs(got[wrong].astype(np.float64) - want[wrong].astype(np.float64))
    return "" if not np.isfinite(difference).all() else f", largest difference {difference.max():.3g}"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _first(name: str, table: Mapping[str, Any]) -> Any:
    return next((value for pattern, value in table.items() if fnmatchcase(name, pattern)), None)


def _raise(problems: list[str]) -> None:
    if problems:
        raise GoldenError("\n".join(problems))
