"""Turns a reducer's knob until a model costs what it should, so that any two methods compare at equal cost."""

import dataclasses
import math
from typing import Any

from tokjax import api, reducers


@dataclasses.dataclass(frozen=True)
class Solution:
    """What `solve` found.

    Attributes:
        model: the reduced model, of the kind that was given.
        settings: of the reducer, the knob included.
        macs: of one input, the model's and the reducer's own together.
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
    **settings: Any,
) -> Solution:
    """The registered reducer `name`, with its knob set so that the cost comes nearest to the target.

    Args:
        name: a registered reducer.
        model: unreduced, or with reducers that stay.
        tower: of a model with two, the one to reduce and to measure.
        macs: target share of this model's multiply-accumulates, in (0, 1].
        tokens: target share of its mean number of tokens entering the MLPs, in (0, 1]; give one of the two.
        settings: of the reducer, all but the knob.

    Raises:
        ValueError: no or two targets, a target outside (0, 1], or settings that `reduce` refuses.
    """
    if (macs is None) == (tokens is None):
        raise ValueError(f"macs={macs}, tokens={tokens}: give one of the two")
    if isinstance(model, api.DualModel):
        solved = solve(name, model.towers[tower], macs=macs, tokens=tokens, **settings)
        return dataclasses.replace(solved, model=model.replace(**{tower: solved.model}))
    target = macs if macs is not None else tokens
    assert target is not None
    if not 0 < target <= 1:
        raise ValueError(f"{'macs' if macs is not None else 'tokens'}={target}: must be in (0, 1]")
    knob = reducers.entry(name).knob
    if knob.field in settings:
        raise ValueError(f"{knob.field}={settings[knob.field]!r}: is what solve turns; leave it out")

    def measure(reduced: api.Model) -> float:
        return mean_tokens(reduced) if macs is None else reduced.cost().total

    values, whole = knob.values(model.info), measure(model)
    tried: dict[int, tuple[api.Model, float]] = {}

    def at(i: int) -> float:
        if i not in tried:
            reduced = api.reduce(model, name, **settings, **{knob.field: values[i]})
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
    return Solution(reduced, found, reduced.cost().total, relative, target, reachable)


def mean_tokens(model: api.Model | api.DualModel) -> float:
    """Tokens that enter the MLP, mean over the blocks."""
    counts = model.token_counts()
    return math.fsum(counts) / len(counts)
