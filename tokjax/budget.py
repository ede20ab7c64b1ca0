"""Turns a reducer's knob until a model costs what it should, so that any two methods compare at equal cost."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any, Literal, overload

from flax import nnx
import jax
from jaxtyping import PyTree
import numpy as np

from tokjax import api, reducers
from tokjax.hooks import reducing
from tokjax.reducers import Phase

Unit = Literal["macs", "tokens", "cached"]
_NAMES: dict[Unit, str] = {"macs": "MACs", "tokens": "tokens", "cached": "cache"}
CLOSE = 0.005  # of the unreduced model's cost: nearer to a target than this, finer settings are not looked for


@dataclasses.dataclass(frozen=True)
class Solution:
    """What `solve` found.

    Attributes:
        model: the reduced model, of the kind that was given.
        settings: of the reducer, the knob included.
        macs: of one input, the model's and the reducer's own together; on a batch, of its mean input (`counted_macs`).
            Of the phase that was asked for, the reducer's own by default.
        relative: reached share of the unreduced model's MACs, mean tokens or cache, whichever the target was.
        target: the share that was asked for.
        reachable: lowest and highest share within reach.
        unit: of the target.
    """

    model: Any
    settings: dict[str, Any]
    macs: int
    relative: float
    target: float
    reachable: tuple[float, float]
    unit: Unit = "macs"

    @property
    def reached(self) -> bool:
        """Whether the target lies within reach; if not, the model has the nearest end of the range."""
        return self.reachable[0] <= self.target <= self.reachable[1]

    @property
    def unreachable(self) -> str | None:
        """Why a table has no numbers at this target; None: it is within reach."""
        low, high = self.reachable
        return None if self.reached else f"reaches {low:.2f} to {high:.2f} of the {_NAMES[self.unit]}"


@overload
def solve(
    name: str,
    model: api.Model | api.DualModel,
    *,
    macs: float | None = None,
    tokens: float | None = None,
    cached: float | None = None,
    phase: Phase | None = None,
    tower: api.Tower = "vision",
    inputs: PyTree | None = None,
    **settings: Any,
) -> Solution: ...
@overload
def solve(
    name: str,
    model: api.Model | api.DualModel,
    *,
    macs: Sequence[float],
    phase: Phase | None = None,
    tower: api.Tower = "vision",
    inputs: PyTree | None = None,
    **settings: Any,
) -> list[Solution]: ...
def solve(name, model, *, macs=None, tokens=None, cached=None, phase=None, tower="vision", inputs=None, **settings):
    """The registered reducer `name`, with its knob set so that the cost comes nearest to the target.

    Args:
        name: a registered reducer.
        model: unreduced, or with reducers that stay.
        tower: of a model with two, the one to reduce and to measure.
        macs: target share of this model's multiply-accumulates, in (0, 1]; or several of them, which gives a list.
        tokens: target share of its mean number of tokens entering the MLPs, in (0, 1].
        cached: target share of the bytes of a decoder's cache behind a prompt, in (0, 1]; give one of the three.
        phase: of what MACs are counted: a call, or a decoder's reading or 64 steps of its going on; None: of what the
            reducer makes cheaper.
        inputs: a batch, as the model takes it, on which the cost of a reducer is counted whose lengths depend on the
            data; without one its capacity counts. Others do not read it.
        settings: of the reducer, all but the knob.

    Raises:
        ValueError: no or several targets, a target outside (0, 1], settings that `reduce` refuses, a reducer whose cost
            comes by training, or a cache of a model without one.
    """
    targets: dict[Unit, Any] = {"macs": macs, "tokens": tokens, "cached": cached}
    chosen = {unit: target for unit, target in targets.items() if target is not None}
    if len(chosen) != 1:
        raise ValueError(f"{', '.join(f'{k}={v}' for k, v in targets.items())}: give one of them")
    if isinstance(model, api.DualModel):
        solved = solve(name, model.towers[tower], **chosen, phase=phase, inputs=inputs, **settings)
        if isinstance(solved, list):
            return [dataclasses.replace(each, model=model.replace(**{tower: each.model})) for each in solved]
        return dataclasses.replace(solved, model=model.replace(**{tower: solved.model}))
    ((unit, given),) = chosen.items()
    several = isinstance(given, Sequence)
    for target in given if several else (given,):
        if not 0 < target <= 1:
            raise ValueError(f"{unit}={target}: must be in (0, 1]")
    knob = reducers.entry(name).knob
    if knob.learned:
        raise ValueError(f"name={name!r}: reaches a cost by training alone; give it {knob.field}={given} as a setting")
    if tokens is not None and reducers.entry(name).decoder:
        raise ValueError(f"tokens={tokens}: {name} leaves all tokens in a call; give macs")
    if knob.field in settings:
        raise ValueError(f"{knob.field}={settings[knob.field]!r}: is what solve turns; leave it out")
    search = _Search(name, model, unit, phase, inputs, settings)
    return [search.solve(target) for target in given] if several else search.solve(given)


class _Search:
    """One reducer on one model: what each value of the knob costs, measured once."""

    def __init__(
        self,
        name: str,
        model: api.Model,
        unit: Unit,
        phase: Phase | None,
        inputs: PyTree | None,
        settings: dict[str, Any],
    ):
        self.name, self.model, self.unit, self.settings = name, model, unit, settings
        self.registered = reducers.entry(name)
        self.phase = phase or self.registered.phase
        self.batch = inputs if self.registered.length == "dynamic" else None
        self.values = self.registered.knob.values(model.info)
        self.tried: dict[Any, tuple[api.Model, float]] = {}
        self.whole = self.measure(model)

    def measure(self, reduced: api.Model) -> float:
        if self.unit == "cached":
            return reduced.cache_bytes()
        return mean_tokens(reduced, self.batch) if self.unit == "tokens" else self.cost(reduced)

    def cost(self, reduced: api.Model) -> int:
        if self.batch is not None:
            return counted_macs(reduced, self.batch)
        return reduced.cost(phase=self.phase).total

    def at(self, value: Any) -> float:
        """Share of the unreduced model's cost that a value of the knob leaves."""
        if value not in self.tried:
            found = {**self.settings, self.registered.knob.field: value}
            reduced = api.reduce(self.model, self.name, **found) if not self.registered.learned else self.sketch(found)
            self.tried[value] = reduced, self.measure(reduced) / self.whole
        return self.tried[value][1]

    def sketch(self, found: dict[str, Any]) -> api.Model:
        """What a reducer that learns would cost is told by the shapes of its parameters, which are quick to make."""
        shapes = nnx.eval_shape(lambda: reducers.create(self.name, self.model.info, **found))
        return api.reduce(self.model, shapes)

    def solve(self, target: float) -> Solution:
        reachable = self.at(self.values[0]), self.at(self.values[-1])
        cheap, dear = self.around(self.values, target)
        if abs(self.at(self.nearest(target)) - target) > CLOSE:
            locations = len(reducing(self.tried[cheap][0].hooks[len(self.model.hooks) :]))
            self.around([cheap, *self.registered.knob.between(cheap, dear, locations), dear], target)
        best = self.nearest(target)
        reduced, relative = self.tried[best]
        found = {**self.settings, self.registered.knob.field: best}
        if self.registered.learned:
            reduced = api.reduce(self.model, self.name, **found)
        return Solution(reduced, found, self.cost(reduced), relative, target, reachable, self.unit)

    def around(self, values: Sequence[Any], target: float) -> tuple[Any, Any]:
        """The two neighbours between which the target lies; the cost rises along the values."""
        low, high = 0, len(values) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.at(values[middle]) <= target else (low, middle)
        return values[low], values[high]

    def nearest(self, target: float) -> Any:
        """Of what was tried, the cheaper of equals."""
        return min(self.tried, key=lambda value: (abs(self.tried[value][1] - target), self.tried[value][1]))


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
    reducers add, and what lies outside the blocks, counts at capacity; of a T5 that is also its decoder. Attention has
    the tokens that the block before left, or those of its own MLP where a reducer stands before the block. A T5's texts
    are as long as those that its cost is counted for.
    """
    layers, module = model(inputs, trace=True)[1].layers, model.params["model"]
    blocks = module.get("encoder", module)["blocks"]
    of = {0: jax.tree.map(lambda leaf: leaf[0], blocks)} if model.config.scan else blocks

    def kernels(tree: PyTree) -> int:
        return sum(leaf.size for path, leaf in jax.tree.leaves_with_path(tree) if path[-1].key == "kernel")

    projections, mlp = kernels(of[0]["attn"]), kernels(of[0]["mlp"])
    width = of[0]["attn"]["proj"]["kernel"].shape[0]  # of all heads together

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
