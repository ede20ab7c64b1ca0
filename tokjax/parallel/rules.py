"""Which axis of which parameter is split over what: regular expressions over the paths of parameters.

The one place that says it; modules know nothing of devices. `fsdp` splits what a device stores: it gathers a kernel
when it runs it, and keeps its part of the gradient and of the optimiser's moments (Rajbhandari et al. 2020, arXiv
1910.02054, ZeRO stage 3). `model` splits what a device computes: heads of attention and hidden channels of the MLP
(Shoeybi et al. 2019, arXiv 1909.08053, section 3).

Queries, keys and values that share one kernel are whole along `model`: its columns lie part by part, so that no
contiguous share of them is one of heads. Every device of `model` takes those of its heads, without asking another.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
import numpy as np

from tokjax.errors import UserError
from tokjax.parallel.mesh import AXES
from tokjax.train.optimisers import path_name

Axis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where parameters go whose path, or the end of it from any `/` on, is an expression.

    Attributes:
        pattern: the expression, such as `mlp/fc1/kernel` or `blocks/0/.*`.
        axes: of the mesh, for the last axes of the parameter: `("fsdp", "model")` splits the rows of a kernel over
            `fsdp` and its columns over `model`, also where kernels of equal blocks are stacked. None: whole.
        optional: whether it may match nothing, as most of the defaults do in any one model.
    """

    pattern: str
    axes: tuple[Axis, ...] = ()
    optional: bool = False


def _defaults(*rules: tuple[str, tuple[Axis, ...]]) -> tuple[Rule, ...]:
    return tuple(Rule(pattern, axes, optional=True) for pattern, axes in rules)


# Of encoders and decoders of images and texts; the first that matches counts.
DEFAULT_RULES = _defaults(
    # What learns beside a model is small.
    (r"reducers/.*", ()),
    (r"heads/.*", ()),
    # Attention.
    (r"(qkv|kv)/kernel", ("fsdp", None)),
    (r"q/kernel", ("fsdp", "model")),
    (r"q/bias", ("model",)),
    (r"proj/kernel", ("model", "fsdp")),
    # MLP.
    (r"fc1/kernel", ("fsdp", "model")),
    (r"fc1/bias", ("model",)),
    (r"fc2/kernel", ("model", "fsdp")),
    # What stands before and behind the blocks: the width is what surely divides.
    (r"(patch_embed|project_in)/kernel", (None, "fsdp")),
    (r"(head|head_dist|pooler|project_out)/kernel", ("fsdp", None)),
    (r"(embedding|token_embed|positions)", (None, "fsdp")),
    # Vectors, tokens and tables.
    (r".*(bias|scale|gamma|_token|pos_embed|type_embed|probe)", ()),
)


def specs(mesh: Mesh, params: PyTree, rules: Sequence[Rule] = ()) -> PyTree[PartitionSpec]:
    """How every parameter is split.

    Args:
        mesh: as from `make_mesh`.
        params: a tree of arrays, or of their shapes.
        rules: that go before `DEFAULT_RULES`.

    Raises:
        UserError: an expression that is none, or that decides nothing (no path matches it, or earlier rules do); an
            axis that the mesh does not have, that stands twice in a rule, or that does not divide the parameter's; a
            rule with more axes than the parameter; a parameter that no rule covers.
    """
    every, used = (*rules, *DEFAULT_RULES), set()
    for rule in rules:
        _check(rule)

    def one(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = path_name(path)
        for i, rule in enumerate(every):
            if re.fullmatch(f"(?:.*/)?(?:{rule.pattern})", name):
                used.add(i)
                return _spec(mesh, name, leaf.shape, rule)
        raise UserError(
            f"parameter {name} of shape {leaf.shape}: no rule of sharding covers it; add one, such as "
            f"({name.rpartition('/')[2]!r}, ()), which keeps it whole"
        )

    found = jax.tree_util.tree_map_with_path(one, params)
    for i, rule in enumerate(every):
        if i not in used and not rule.optional:
            names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
            matches = any(re.fullmatch(f"(?:.*/)?(?:{rule.pattern})", name) for name in names)
            why = "earlier rules cover all that it matches" if matches else "it is the path of no parameter"
            raise UserError(f"sharding has {rule.pattern!r}: {why}; the paths are {', '.join(names[:8])}, ...")
    return found


def _check(rule: Rule) -> None:
    try:
        re.compile(rule.pattern)
    except re.error as error:
        raise UserError(f"sharding has {rule.pattern!r}, not a regular expression: {error}") from None
    named = [name for axis in rule.axes for name in _names(axis)]
    for name in named:
        if name not in AXES or named.count(name) > 1:
            raise UserError(f"sharding of {rule.pattern!r} is {rule.axes}: must name each of {', '.join(AXES)} once")


def _names(axis: Axis) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...], rule: Rule) -> PartitionSpec:
    if len(rule.axes) > len(shape):
        raise UserError(f"parameter {name} of shape {shape}: has fewer axes than its rule, {rule.axes}")
    axes = (*[None] * (len(shape) - len(rule.axes)), *rule.axes)
    for size, axis in zip(shape, axes, strict=True):
        parts = math.prod(mesh.shape[each] for each in _names(axis))
        if size % parts:
            raise UserError(
                f"parameter {name} of shape {shape}: {size} does not divide over the {parts} devices of {axis!r}; "
                f"choose another mesh, or a rule of sharding that keeps this axis whole"
            )
    return PartitionSpec(*axes)


def shardings(mesh: Mesh, params: PyTree, rules: Sequence[Rule] = ()) -> PyTree[NamedSharding]:
    """`specs` on their mesh; where nothing but the batch is split, all is whole and the defaults need not cover it."""
    if not rules and mesh.shape["fsdp"] == mesh.shape["model"] == 1:
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(mesh, params, rules), is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def state_shardings(mesh: Mesh, state: Any, rules: Sequence[Rule] = ()) -> Any:
    """Where a `TrainState` goes: moments and averages as the parameters that they are of, all else everywhere.

    Raises:
        UserError: as `specs`.
    """
    named = jax.tree_util.tree_leaves_with_path(shardings(mesh, state.params, rules))
    where = {path_name(path): sharding for path, sharding in named}
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        while name:
            if shapes.get(name) == leaf.shape:
                return where[name]
            name = name.partition("/")[2]
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, state)


def of_model(mesh: Mesh, model: Any, rules: Sequence[Rule] = ()) -> PyTree[NamedSharding]:
    """Where the parameters of a model go.

    Args:
        mesh: as from `make_mesh`.
        model: an `api.Model` or `api.DualModel`.
        rules: as of `specs`.

    Raises:
        UserError: as `specs`, or heads that do not divide over `model`.
    """
    check_heads(mesh, model.config)
    return shardings(mesh, model.params, rules)


def check_heads(mesh: Mesh, config: Any) -> None:
    """Refuses heads of which a device would get a part.

    Raises:
        UserError: they do not divide over `model`.
    """
    parts = mesh.shape["model"]
    for tower in (config, *(getattr(config, name, None) for name in ("vision", "text"))):
        for name in ("heads", "kv_heads"):
            heads = getattr(tower, name, None)
            if isinstance(heads, int) and heads % parts:
                raise UserError(f"mesh has model={parts}: must divide the model's {name}={heads}")


def shard(model: Any, mesh: Mesh, rules: Sequence[Rule] = ()) -> Any:
    """The same model with its parameters split over a mesh; calls then run on all of it.

    Args:
        model: an `api.Model` or `api.DualModel`, with or without reducers.
        mesh: as from `make_mesh`.
        rules: that go before the defaults, see `Rule`.

    Returns:
        A model of the same kind. Give it inputs that `place` has split, or whole ones.

    Raises:
        UserError: as of `specs`, or heads that do not divide over `model`.
    """
    return model.with_params(put(model.params, of_model(mesh, model, rules)))


def placing(
    mesh: Mesh, rules: Sequence[Rule] = ()
) -> Callable[[tuple[str | int, ...], tuple[int, ...]], NamedSharding]:
    """Where a checkpoint's arrays go as they are read: `tokjax.load(source, sharding=placing(mesh))`.

    Args:
        mesh: as from `make_mesh`.
        rules: that go before the defaults. One that matches nothing is no error here.

    Raises:
        UserError: else as `specs`, when it is asked for an array.
    """
    optional = [dataclasses.replace(rule, optional=True) for rule in rules]

    def where(path: tuple[str | int, ...], shape: tuple[int, ...]) -> NamedSharding:
        tree: Any = jax.ShapeDtypeStruct(shape, np.float32)
        for key in reversed(path):
            tree = {key: tree}
        return jax.tree.leaves(shardings(mesh, tree, optional))[0]

    return where


def put(tree: PyTree, shardings: PyTree[NamedSharding]) -> PyTree:
    """Arrays that every process has whole, split; those that lie as they should stay."""

    def one(x: Any, where: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(where, x.ndim):
            return x
        if where.is_fully_addressable:
            return jax.device_put(x, where)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(one, tree, shardings)


def parse(rules: Sequence[Any]) -> tuple[Rule, ...]:
    """Rules as a config has them: pairs of an expression and axes, such as `("fc1/kernel", ("fsdp", None))`.

    Raises:
        UserError: something else.
    """
    found = []
    for rule in rules:
        if isinstance(rule, Rule):
            found.append(rule)
            continue
        match rule:
            case [str() as pattern, [*axes]]:
                found.append(Rule(pattern, tuple(tuple(x) if isinstance(x, list) else x for x in axes)))
            case _:
                raise UserError(f"sharding has {rule!r}: must be a pair of an expression and a tuple of axes")
    return tuple(found)
