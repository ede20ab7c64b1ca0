"""Several devices: a mesh over the batch, where a batch and the parameters go, and a model that runs part by part.

Every device runs a model and its reducers on rows of its own under `jax.shard_map`, so that no reducer adds a
collective, whatever it sorts or gathers. Losses are made of the whole batch outside, by automatic partitioning.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PyTree
import numpy as np

from tokjax.errors import UserError

AXIS = "data"


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
    count = devices or len(there)
    return None if count == 1 else jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=there[:count])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def whole(mesh: Mesh, tree: PyTree) -> PyTree:
    """The same tree with a sharding at each leaf: all of it on every device."""
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def place(mesh: Mesh, batch: PyTree) -> PyTree:
    """Puts this process's rows of a batch on the devices.

    Raises:
        UserError: the rows of all processes do not divide into as many parts as there are devices.
    """
    sharding = batch_sharding(mesh)

    def one(x: Any) -> jax.Array:
        rows = len(x) * jax.process_count()
        if rows % mesh.size:
            raise UserError(f"batch_size={rows}: must be a multiple of the {mesh.size} devices")
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(one, batch)


def row_keys(key: Key[Array, ""], batch: int) -> Key[Array, "B"]:
    """One key a row: what a row draws does not depend on how the batch is split."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(batch))


def by_rows(run: Callable[..., PyTree], mesh: Mesh | None) -> Callable[..., PyTree]:
    """`run(params, *inputs)` with the inputs, and what it gives, split over the devices by rows.

    Args:
        run: from parameters, which every device has, and trees of arrays with a leading batch axis, to a tree of
            arrays with the same leading axis, or of scalars that are means over the rows.
        mesh: as of `data_mesh`; None: nothing is split.

    Returns:
        The same function, to be called under `jax.jit`. Scalars are the means of those of the parts, which have equally
        many rows.
    """
    if mesh is None:
        return run

    def split(params: PyTree, *inputs: PyTree) -> PyTree:
        shapes = jax.eval_shape(run, params, *inputs)

        def part(params: PyTree, *inputs: PyTree) -> PyTree:
            # A scalar leaves its part as one row, and not by a collective in here.
            return jax.tree.map(lambda x: x if x.ndim else x[None], run(params, *inputs))

        specs = (PartitionSpec(), *[PartitionSpec(AXIS)] * len(inputs))
        # Reducers carry constants through loops, of which the check of what varies over devices makes an error.
        mapped = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False)
        return jax.tree.map(lambda x, shape: x if shape.ndim else x.mean(0), mapped(params, *inputs), shapes)

    return split
