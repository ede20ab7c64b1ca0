"""A mesh of devices, a batch on it, and a model that runs on every part of the batch by itself.

The mesh has three axes: `data` and `fsdp` split the batch, `fsdp` also splits what is stored of the parameters, `model`
splits the work on a row (see `tokjax.parallel.rules`). Every part of the batch runs a model and its reducers on rows of
its own under `jax.shard_map`, so that no reducer adds a collective over the batch, whatever it sorts or gathers. Losses
are made of the whole batch outside, by automatic partitioning.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import math
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PyTree
import numpy as np

from tokjax.errors import UserError

AXES = ("data", "fsdp", "model")
BATCH = ("data", "fsdp")  # those that split the batch
PRESETS = {name: {name: -1} for name in AXES}
_GATHERED = "gathered"


def make_mesh(shape: str | Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """A mesh over the devices of all processes; None for a single one.

    Args:
        shape: sizes of `data`, `fsdp` and `model`, of which one may be -1: what is left. As a dict, as JSON, or the
            name of an axis that gets every device. An axis that is not named has size 1.
        devices: None: all.

    Raises:
        UserError: no such shape, one of more devices than there are, or, with several processes, of fewer.
    """
    there = jax.devices() if devices is None else list(devices)
    sizes = dict.fromkeys(AXES, 1) | _sizes(shape)
    known = math.prod(size for size in sizes.values() if size > 0)
    sizes = {name: max(1, len(there) // known) if size == -1 else size for name, size in sizes.items()}
    count = math.prod(sizes.values())
    if count > len(there) or (-1 in _sizes(shape).values() and count < len(there)):
        raise UserError(f"mesh={shape!r}: does not divide the {len(there)} devices that are there")
    if count < len(there) and jax.process_count() > 1:
        raise UserError(f"mesh={shape!r}: must use all {len(there)} devices of the {jax.process_count()} processes")
    if count == 1:
        return None
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=there[:count])


def _sizes(shape: str | Mapping[str, int]) -> dict[str, int]:
    allowed = f"must be one of {', '.join(PRESETS)}, or sizes such as {json.dumps({'data': -1, 'fsdp': 4, 'model': 2})}"
    if isinstance(shape, str) and shape not in PRESETS:
        try:
            found = json.loads(shape)
        except json.JSONDecodeError:
            found = None
    else:
        found = PRESETS[shape] if isinstance(shape, str) else dict(shape)
    if not isinstance(found, dict) or not found:
        raise UserError(f"mesh={shape!r}: {allowed}")
    for name, size in found.items():
        if name not in AXES or not isinstance(size, int) or isinstance(size, bool) or not (size >= 1 or size == -1):
            raise UserError(f"mesh={shape!r}: has {name}={size!r}; {allowed}")
    if list(found.values()).count(-1) > 1:
        raise UserError(f"mesh={shape!r}: only one size may be -1")
    return found


def data_mesh(devices: int = 0) -> Mesh | None:
    """The first `devices` devices (0: all of them), for a batch to be split over; None for a single one.

    Raises:
        UserError: fewer devices are there, or several processes would have no part in it.
    """
    there = jax.devices()
    if not 0 <= devices <= len(there):
        raise UserError(f"devices={devices}: must be 0 (all) or at most {len(there)}, which are there")
    if devices and devices < len(there) and jax.process_count() > 1:
        raise UserError(f"devices={devices}: must be 0 (all), as there are {jax.process_count()} processes")
    return make_mesh({"data": devices or len(there)})


def parts(mesh: Mesh) -> int:
    """How many parts a batch has."""
    return math.prod(mesh.shape[name] for name in BATCH)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def _held(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """The parts of a batch that the devices of every process hold."""
    part = np.arange(parts(mesh)).reshape(*[mesh.shape[name] for name in BATCH], 1)
    held: dict[int, set[int]] = {}
    for device, number in zip(mesh.devices.flat, np.broadcast_to(part, mesh.devices.shape).flat, strict=True):
        held.setdefault(device.process_index, set()).add(int(number))
    return {process: tuple(sorted(numbers)) for process, numbers in held.items()}


def data_part(mesh: Mesh | None) -> tuple[int, int]:
    """Which share of every batch this process reads, and how many shares there are.

    Processes that together hold one part of a batch, split over `model`, read the same rows.

    Raises:
        UserError: two processes hold some of the same rows, but not all.
    """
    if mesh is None:
        return 0, 1
    held = _held(mesh)
    shares = sorted(set(held.values()))
    if len({len(share) for share in shares}) > 1 or len({n for share in shares for n in share}) < sum(map(len, shares)):
        raise UserError(
            f"mesh {dict(mesh.shape)}: the devices of a process must hold whole parts of a batch, or all processes of "
            f"a part the same one"
        )
    return shares.index(held[jax.process_index()]), len(shares)


def place(mesh: Mesh | None, batch: PyTree, *, pad: bool = False) -> PyTree:
    """Puts this process's rows of a batch on the devices.

    Args:
        mesh: None: the batch stays as it is.
        batch: arrays whose first axis is the rows, see `data_part`.
        pad: add rows of zeros (not `valid`) until they divide.

    Raises:
        UserError: the rows of all processes do not divide into as many parts as split them.
    """
    if mesh is None:
        return batch
    sharding, mine = batch_sharding(mesh), _held(mesh)[jax.process_index()]
    shares = data_part(mesh)[1]

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)
        if pad:
            x = np.pad(x, [(0, -len(x) % len(mine)), *[(0, 0)] * (x.ndim - 1)])
        if len(x) % len(mine):
            raise UserError(
                f"batch_size={len(x) * shares}: must be a multiple of {parts(mesh)}, the devices that split it"
            )
        rows = len(x) // len(mine)

        def piece(where: Any) -> np.ndarray:
            start = rows * mine.index((where[0].start or 0) // rows)
            return x[start : start + rows]

        return jax.make_array_from_callback((rows * parts(mesh), *x.shape[1:]), sharding, piece)

    return jax.tree.map(one, batch)


def fetch(tree: PyTree) -> PyTree[np.ndarray]:
    """The values of arrays, wherever their parts lie. With several processes, all make the same calls."""

    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(one, tree)


def row_keys(key: Key[Array, ""], batch: int) -> Key[Array, "B"]:
    """One key a row: what a row draws does not depend on how the batch is split."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(batch))


def by_rows(
    run: Callable[..., PyTree], mesh: Mesh | None, specs: Callable[[PyTree], PyTree[PartitionSpec]] | None = None
) -> Callable[..., PyTree]:
    """`run(params, *inputs)` with the inputs, and what it gives, split over the devices by rows.

    Args:
        run: from parameters and trees of arrays with a leading batch axis, to a tree of arrays with the same leading
            axis, or of scalars that are means over the rows.
        mesh: as of `make_mesh`; None: nothing is split.
        specs: from parameters to how they are split, as `tokjax.parallel.specs`; None: every device has them all. What
            is split over `fsdp` is gathered where it is used, and again for the backward pass.

    Returns:
        The same function, to be called under `jax.jit`. Scalars are the means of those of the parts, which have equally
        many rows.
    """
    if mesh is None:
        return run
    # What is split over `model` stays with the compiler, which knows which heads meet.
    manual = set(AXES) if mesh.shape["model"] == 1 else set(BATCH)
    if mesh.shape["fsdp"] == 1:
        specs = None

    def split(params: PyTree, *inputs: PyTree) -> PyTree:
        shapes = jax.eval_shape(run, params, *inputs)
        stored = jax.tree.map(lambda _: PartitionSpec(), params)
        if specs is not None:
            stored = jax.tree.map(_over_fsdp, specs(params), is_leaf=lambda x: isinstance(x, PartitionSpec))

        def part(params: PyTree, *inputs: PyTree) -> PyTree:
            # A scalar leaves its part as one row, and not by a collective in here.
            return jax.tree.map(lambda x: x if x.ndim else x[None], run(jax.tree.map(_whole, params, stored), *inputs))

        if specs is not None:
            part = jax.checkpoint(part, policy=jax.checkpoint_policies.save_anything_except_these_names(_GATHERED))
        rows = PartitionSpec(BATCH)
        # Reducers carry constants through loops, of which the check of what varies over devices makes an error.
        mapped = jax.shard_map(
            part,
            mesh=mesh,
            in_specs=(stored, *[rows] * len(inputs)),
            out_specs=rows,
            axis_names=manual,
            check_vma=False,
        )
        return jax.tree.map(lambda x, shape: x if shape.ndim else x.mean(0), mapped(params, *inputs), shapes)

    return split


def _over_fsdp(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*["fsdp" if "fsdp" in (axis or ()) else None for axis in spec])


def _whole(x: Array, spec: PartitionSpec) -> Array:
    """A parameter that is split over `fsdp`."""
    if "fsdp" not in spec:
        return x
    return checkpoint_name(jax.lax.all_gather(x, "fsdp", axis=spec.index("fsdp"), tiled=True), _GATHERED)
