"""Checkpoints of a run: written beside the training, whole or not at all, and checked before they are believed.

The only file that knows orbax. Orbax writes the arrays (asynchronously, from every process, whatever their sharding);
this file decides what a step is:

    <folder>/120/state/     the arrays, by orbax, under their path in the state: `params/blocks/0/attn/qkv/kernel`
    <folder>/120/step.json  metrics, place in the data, shapes, and the size and CRC-32 of every file of `state/`
    <folder>/140.tmp/       being written, or left by a run that was killed; it counts for nothing
    <folder>/160.aside/     was in the way of a step that was written again

A step becomes one by the rename of its finished `.tmp` folder, and older ones are deleted only after that. The
checksums are ours because orbax has none over the values: one flipped bit there is read back without an error.
"""

import base64
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
import json
import math
import os
from pathlib import Path
import shutil
from typing import Any, Literal, NamedTuple, Self
import warnings
import zlib

import jax
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree
import numpy as np
import orbax.checkpoint as ocp

from tokjax.errors import UserError
from tokjax.train.optimisers import path_name
from tokjax.train.state import TrainState

DataState = Any  # what a data iterator's get_state() gives: bytes, or anything that JSON keeps


class Restored(NamedTuple):
    """What `Checkpoints.restore` found."""

    step: int
    state: TrainState
    data_state: DataState
    metrics: dict[str, float | None]


class Unreadable(Exception):
    """A step whose files are not what was written; the text says in what."""


class Checkpoints:
    """The checkpoints in a folder. Reading changes nothing there, so that a running training can be evaluated.

    With several processes, all make the same calls, and the folder is one that they share.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int = 2,
        keep_best: bool = True,
        metric: str = "accuracy",
        mode: str = "max",
    ) -> None:
        """Names a folder, which need not be there yet.

        Args:
            folder: where the steps lie.
            keep_last: how many of the last steps stay. With 1, nothing stands behind a step that cannot be read.
            keep_best: whether the step with the best metric stays too.
            metric: the name that is looked up in a step's metrics.
            mode: "max" or "min".

        Raises:
            UserError: keep_last below 1 or another mode.
        """
        if keep_last < 1:
            raise UserError(f"keep_last is {keep_last}; it must be at least 1")
        if mode not in ("max", "min"):
            raise UserError(f"mode is {mode!r}; it must be 'max' or 'min'")
        self.folder = Path(folder).absolute()
        self.keep_last, self.keep_best, self.metric, self.mode = keep_last, keep_best, metric, mode
        self._writer: ocp.AsyncCheckpointer | None = None
        self._commit_thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    # What is there

    def steps(self) -> list[int]:
        """The finished steps, in order, readable or not."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal() and p.is_dir())

    def latest(self) -> int | None:
        """The last finished step."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the best metric, the earliest of equals; None if no step has it."""
        ranked = self._ranked()
        return ranked[0] if ranked else None

    def improves(self, metrics: Mapping[str, Any]) -> bool:
        """Whether a step with these metrics would be the best one so far. Waits for a save that is under way."""
        self.wait()
        score, best = self._score(metrics), self.best()
        reached = None if best is None else self._score(self._metrics(best))
        better = score is not None and (reached is None or score > reached)
        if jax.process_count() > 1:  # process 0 may still be renaming what the others already see as written
            better = bool(multihost_utils.broadcast_one_to_all(np.bool_(better)))
        return better

    def _ranked(self) -> list[int]:
        scores = {step: self._score(self._metrics(step)) for step in self.steps()}
        found = {step: score for step, score in scores.items() if score is not None}
        return sorted(found, key=lambda step: (-found[step], step))

    def _score(self, metrics: Mapping[str, Any]) -> float | None:
        value = metrics.get(self.metric)
        if value is None or not math.isfinite(value):
            return None
        return float(value) if self.mode == "max" else -float(value)

    def _metrics(self, step: int) -> dict[str, float | None]:
        try:
            return self._record(step)["metrics"]
        except Unreadable:
            return {}

    # Writing

    def save(
        self,
        step: int,
        state: TrainState,
        data_state: DataState = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to save and returns once the state is copied: its arrays may be given away at once.

        Waits for the save before it, and raises what that one failed with.

        Args:
            step: its number; what lies there under this or a later number is moved aside, with a warning.
            state: any tree of arrays, typed keys among them; in practice a TrainState.
            data_state: of this process's data iterator.
            metrics: scalars to choose the best step by.

        Raises:
            OSError, ValueError: the save before this one could not be written; the steps before it are still there.
        """
        self.wait()
        if self._writer is None:
            self._writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
            self._commit_thread = ThreadPoolExecutor(1, "checkpoint")
        assert self._commit_thread is not None
        beside = self.folder / f"{step}.tmp"
        if jax.process_index() == 0:
            self._make_room(step)
            beside.mkdir(parents=True)
        arrays = _flat(state)
        record = {
            "step": step,
            "metrics": {name: _finite(value) for name, value in (metrics or {}).items()},
            "data": _gather(data_state),
            "shapes": {name: list(x.shape) for name, x in arrays.items()},
        }
        self._writer.save(beside / "state", args=ocp.args.PyTreeSave(arrays))
        self._pending = self._commit_thread.submit(self._commit, step, record)

    def _make_room(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob("[0-9]*.tmp"):
            shutil.rmtree(left)
        for later in (s for s in self.steps() if s >= step):
            aside = self.folder / f"{later}.aside"
            if aside.exists():
                shutil.rmtree(aside)
            (self.folder / str(later)).replace(aside)
            warnings.warn(f"checkpoint {self.folder / str(later)} is in the way: moved to {aside}", stacklevel=3)

    def _commit(self, step: int, record: dict[str, Any]) -> None:
        assert self._writer is not None
        self._writer.wait_until_finished()  # on process 0 this includes every other process's part
        if jax.process_index():
            return
        beside = self.folder / f"{step}.tmp"
        files = sorted(p for p in (beside / "state").rglob("*") if p.is_file())
        record["files"] = {p.relative_to(beside).as_posix(): _checksum(p) for p in files}
        text = json.dumps(record)
        with (beside / "step.json").open("w") as file:
            file.write(f"{text}\n{zlib.crc32(text.encode())}\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.folder / str(step))
        kept = set(self.steps()[-self.keep_last :]) | set(self._ranked()[:1] if self.keep_best else [])
        for old in set(self.steps()) - kept:
            going = self.folder / f"{old}.tmp"  # so that half a deleted step never looks like one
            (self.folder / str(old)).replace(going)
            shutil.rmtree(going)

    def wait(self) -> None:
        """Waits until the save that is under way is finished, and raises what it failed with."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, then gives the writing threads back. The object can still be used."""
        try:
            self.wait()
        finally:
            if self._writer is not None and self._commit_thread is not None:
                self._commit_thread.shutdown()
                self._writer.close()
            self._writer = self._commit_thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Reading

    def restore(self, target: TrainState, step: int | Literal["latest", "best"] = "latest") -> Restored:
        """Reads a whole state.

        Args:
            target: the state to fill, arrays or their shapes (`jax.eval_shape`); where a leaf has a sharding, it is
                restored with it, else onto the first device.
            step: a number, "latest", or "best". A latest or best step that cannot be read gives way to the one before
                it (the next best), with a warning that names it; if no step has the metric, the latest is the best.

        Raises:
            UserError: no checkpoint, none that can be read, or one of another model.
        """
        step, record = self._choose(step)
        state = self._read(step, record, target, "")
        data = record["data"]
        if len(data) == jax.process_count():
            return Restored(step, state, _decode(data[jax.process_index()]), record["metrics"])
        if any(each != data[0] for each in data):
            raise UserError(
                f"checkpoint {self.folder / str(step)} was written by {len(data)} processes, each at another place in "
                f"the data; the place is unknown for {jax.process_count()}"
            )
        return Restored(step, state, _decode(data[0]), record["metrics"])

    def restore_params(
        self, target: PyTree, step: int | Literal["latest", "best"] = "latest", *, ema: bool = True
    ) -> PyTree[Array]:
        """Reads only the parameters, whatever optimiser trained them.

        Args:
            target: the parameters to fill, arrays or their shapes.
            step: as for `restore`.
            ema: take the moving average if there is one.

        Raises:
            UserError: as for `restore`.
        """
        step, record = self._choose(step)
        average = ema and any(name.startswith("ema/") for name in record["shapes"])
        return self._read(step, record, target, "ema/" if average else "params/")

    def _choose(self, wanted: int | str) -> tuple[int, dict[str, Any]]:
        """The step to read and its record. One process looks, so that all read the same step."""
        self.wait()
        chosen, problem = -1, ""
        if jax.process_index() == 0:
            try:
                chosen = self._readable(wanted)
            except UserError as error:
                problem = str(error)
        if jax.process_count() > 1:
            chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
            problem = problem or f"process 0 found no readable checkpoint in {self.folder}"
        if chosen < 0:
            raise UserError(problem)
        return chosen, self._record(chosen)

    def _readable(self, wanted: int | str) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(
                f"{self.folder} holds no checkpoint; train one with "
                f"python -m tokjax.main --config=<a file of configs/> --workdir={self.folder.parent}"
            )
        if wanted == "latest":
            candidates = steps[::-1]
        elif wanted == "best":
            candidates = self._ranked()
            if not candidates:
                warnings.warn(
                    f"no checkpoint in {self.folder} has the metric {self.metric!r}: the latest is used", stacklevel=5
                )
                candidates = steps[::-1]
        elif wanted in steps:
            candidates = [int(wanted)]
        else:
            raise UserError(f"{self.folder} holds no checkpoint of step {wanted!r}; there are steps {steps}")
        problems = []
        for step in candidates:
            try:
                self._verify(step)
                return step
            except Unreadable as problem:
                problems.append(f"checkpoint {self.folder / str(step)} cannot be read: {problem}")
                if len(problems) < len(candidates):
                    warnings.warn(f"{problems[-1]}; the one before it is used", stacklevel=5)
        raise UserError("; ".join(problems))

    def _record(self, step: int) -> dict[str, Any]:
        try:
            text, checksum, *_ = (self.folder / str(step) / "step.json").read_text().split("\n")
            if zlib.crc32(text.encode()) == int(checksum):
                return json.loads(text)
        except (OSError, ValueError) as error:
            raise Unreadable(f"step.json: {error}") from None
        raise Unreadable("step.json is not what was written")

    def _verify(self, step: int) -> None:
        for name, (size, checksum) in self._record(step)["files"].items():
            path = self.folder / str(step) / name
            if not path.is_file():
                raise Unreadable(f"{name} is missing")
            if path.stat().st_size != size:
                raise Unreadable(f"{name} has {path.stat().st_size} bytes instead of {size}")
            if _checksum(path) != [size, checksum]:
                raise Unreadable(f"{name} is not what was written")

    def _read(self, step: int, record: dict[str, Any], target: Any, prefix: str) -> Any:
        wanted = {prefix + name: x for name, x in _flat(target).items()}
        saved = {name: tuple(shape) for name, shape in record["shapes"].items() if name.startswith(prefix)}
        for name in [*wanted, *saved]:
            there, here = saved.get(name), wanted[name].shape if name in wanted else None
            if there != here:
                raise UserError(
                    f"checkpoint {self.folder / str(step)} is of another model: {name} "
                    f"{'has shape ' + str(there) if there is not None else 'does not exist'} there and "
                    f"{'has shape ' + str(here) if here is not None else 'does not exist'} in this run"
                )
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or device)
            for name, x in wanted.items()
        }
        args = ocp.args.PyTreeRestore(
            shapes, ocp.checkpoint_utils.construct_restore_args(shapes), partial_restore=bool(prefix)
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays = reader.restore(self.folder / str(step) / "state", args=args)
        return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in wanted])


def _flat(tree: Any) -> dict[str, Any]:
    """A tree as a dict from path to leaf, in the tree's order: how arrays are named on disk."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _checksum(path: Path) -> list[int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _finite(value: Any) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _encode(data_state: DataState) -> Any:
    if isinstance(data_state, bytes):
        return {"bytes": base64.b64encode(data_state).decode()}
    return {"json": data_state}


def _decode(encoded: Any) -> DataState:
    return base64.b64decode(encoded["bytes"]) if "bytes" in encoded else encoded["json"]


def _gather(data_state: DataState) -> list[Any]:
    """Every process's data state, in the order of the processes."""
    encoded = _encode(data_state)
    if jax.process_count() == 1:
        return [encoded]
    mine = np.frombuffer(json.dumps(encoded).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(mine.size))
    padded = multihost_utils.process_allgather(np.pad(mine, (0, int(sizes.max()) - mine.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(padded, sizes, strict=True)]
