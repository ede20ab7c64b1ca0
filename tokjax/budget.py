"""Turns a reducer's knob until a model costs what it should, so that any two methods compare at equal cost."""

import dataclasses
import math
from typing import Any

from flax import nnx
import jax
from jaxtyping import PyTree
import numpy as np

from tokjax import api, reducers


@dataclasses.dataclass(frozen=True)
class Solution:
    """What `solve` found.

    Attributes:
        model: the reduced model, of the kind that was given.
        settings: of the reducer, the knob included.
        macs: of one input, the model's and the reducer's own together; on a batch, of its mean input (`counted_macs`).
        relative: reached share of the unreduced model's MACs or mean tokens, whichever the target was.
        target: the share that was asked for.
        reachable: lowest and highest share within reach.
    """

    model: Any
    settings: dict[str, Any]
    macs: int
    relative: float
    target: float
    reachable: tuple[float, float]

    @property
    def reached(self) -> bool:
        """Whether the target lies within reach; if not, the model has the nearest end of the range."""
        return self.reachable[0] <= self.target <= self.reachable[1]


def solve(
    name: str,
    model: api.Model | api.DualModel,
    *,
    macs: float | None = None,
    tokens: float | None = None,
    tower: api.Tower = "vision",
    inputs: PyTree | None = None,
    **settings: Any,
) -> Solution:
    """The registered reducer `name`, with its knob set so that the cost comes nearest to the target.

    Args:
        name: a registered reducer.
        model: unreduced, or with reducers that stay.
        tower: of a model with two, the one to reduce and to measure.
        macs: target share of this model's multiply-accumulates, in (0, 1].
        tokens: target share of its mean number of tokens entering the MLPs, in (0, 1]; give one of the two.
        inputs: a batch, as the model takes it, on which the cost of a reducer is counted whose lengths depend on the
            data; without one its capacity counts. Others do not read it.
        settings: of the reducer, all but the knob.

    Raises:
        ValueError: no or two targets, a target outside (0, 1], or settings that `reduce` refuses.
    """
    if (macs is None) == (tokens is None):
        raise ValueError(f"macs={macs}, tokens={tokens}: give one of the two")
    if isinstance(model, api.DualModel):
        solved = solve(name, model.towers[tower], macs=macs, tokens=tokens, inputs=inputs, **settings)
        return dataclasses.replace(solved, model=model.replace(**{tower: solved.model}))
    target = macs if macs is not None else tokens
    assert target is not None
    if not 0 < target <= 1:
        raise ValueError(f"{'macs' if macs is not None else 'tokens'}={target}: must be in (0, 1]")
    registered = reducers.entry(name)
    knob, batch = registered.knob, inputs if registered.length == "dynamic" else None
    if knob.field in settings:
        raise ValueError(f"{knob.field}={settings[knob.field]!r}: is what solve turns; leave it out")

    def measure(reduced: api.Model) -> float:
        return mean_tokens(reduced, batch) if macs is None else cost(reduced)

    def cost(reduced: api.Model) -> int:
        return reduced.cost().total if batch is None else counted_macs(reduced, batch)

    values, whole = knob.values(model.info), measure(model)
    tried: dict[int, tuple[api.Model, float]] = {}

    def at(i: int) -> float:
        if i not in tried:
            found = {**settings, knob.field: values[i]}
            # What a reducer that learns would cost is told by the shapes of its parameters, which are quick to make.
            sketch = nnx.eval_shape(lambda: reducers.create(name, model.info, **found)) if registered.learned else None
            reduced = api.reduce(model, name, **found) if sketch is None else api.reduce(model, sketch)
            tried[i] = reduced, measure(reduced) / whole
        return tried[i][1]

    low, high = 0, len(values) - 1
    reachable = at(low), at(high)
    while high - low > 1:  # the cost rises along the values
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) <= target else (low, middle)
    best = min(tried, key=lambda i: (abs(tried[i][1] - target), i))
    reduced, relative = tried[best]
    found = {**settings, knob.field: values[best]}
    if registered.learned:
        reduced = api.reduce(model, name, **found)
    return Solution(reduced, found, cost(reduced), relative, target, reachable)


def mean_tokens(model: api.Model | api.DualModel, inputs: PyTree | None = None) -> float:
    """Tokens that enter the MLP, mean over the blocks: slots, or valid tokens where a batch of inputs is given."""
    if inputs is not None:
        assert isinstance(model, api.Model)
        return float(model(inputs, trace=True)[1].tokens.mean())
    counts = model.token_counts()
    return math.fsum(counts) / len(counts)


def counted_macs(model: api.Model, inputs: PyTree) -> int:
    """Multiply-accumulates of the mean input of a batch, where a block costs what its valid tokens would cost alone.

    That is the cost at capacity without the share of empty slots: the blocks' projections, MLPs and attention. What
    reducers add, and what lies outside the blocks, counts at capacity. Attention has the tokens that the block before
    left, or those of its own MLP where a reducer stands before the block.
    """
    layers = model(inputs, trace=True)[1].layers
    blocks = model.params["model"]["blocks"]
    of = {0: jax.tree.map(lambda leaf: leaf[0], blocks)} if model.config.scan else blocks

    def kernels(tree: PyTree) -> int:
        return sum(leaf.size for path, leaf in jax.tree.leaves_with_path(tree) if path[-1].key == "kernel")

    projections, mlp, width = kernels(of[0]["attn"]), kernels(of[0]["mlp"]), model.info.width

    def block(attended: Any, entered: Any) -> Any:
        return attended * projections + 2 * attended**2 * width + entered * mlp

    before = {hook.layer for hook in model.hooks if hook.where == "before_block"}
    whole = layers[0].length == model.info.length  # block 0 drops nothing: its MLP has all of the input
    slots: Any = model.info.length
    valid: Any = np.asarray(layers[0].tokens, np.float64) if whole else slots
    empty = 0.0
    for i, layer in enumerate(layers):
        entered = np.asarray(layer.tokens, np.float64)
        if i in before:
            slots, valid = layer.length, entered
        empty += float(np.mean(block(slots, layer.length) - block(valid, entered)))
        slots, valid = layer.slots, entered
    return round(model.cost().total - empty)
