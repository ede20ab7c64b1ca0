"""Heuristic: a fixed radial pattern; patches far from the middle of the image are dropped.

Source: JoakimHaurum/TokenReduction, `models/heuristic.py` (Haurum et al., "Which Tokens to Use?", ICCVW 2023).
Kind:   prune by place, a control; static length.
Needs:  a grid of patches that no other reducer has changed.

Every patch has a distance (l1, l2 or linf) from the middle; block i keeps those within threshold i.
- "subset": at each location the radius whose number of patches is nearest to the benchmark's count, the smaller one on
  ties.
- "contiguous": the radius falls linearly from the corner to `min_radius` between the first and the last location.

Where we decide: the published code masks attention from and to the patches outside and keeps them in the sequence.
Radii never grow, so that no later token sees them again: here they leave, which gives the same CLS token. A mean over
patches is one over those inside.
Tokens that others put behind the patches (CLCA's caches) have no distance and stay.
Where we follow the code: coordinates run from (-n) // 2 to n // 2, which is off the middle for an odd n.
"""

from collections.abc import Sequence
import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from tokjax import schedules
from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit.staged import Tabled, select
from tokjax.signals import Signals
from tokjax.token_map import Plan
from tokjax.tokens import Tokens

Metric = Literal["l1", "l2", "linf"]
Mode = Literal["subset", "contiguous"]


def radial_distance(grid: tuple[int, int], metric: Metric = "l2") -> Float[np.ndarray, "h w"]:
    """Distance of every patch from the middle, float32, in patches."""

    def axis(n: int) -> np.ndarray:
        low, high, place = float((-n) // 2), float(n // 2), np.arange(n)
        # As torch's linspace: from both ends, a float32 step, one rounding. The last bit decides which patches of a
        # ring are equally far.
        step = float(np.float32(high - low) / np.float32(max(n - 1, 1)))
        return np.where(place < n // 2, low + step * place, high - step * (n - 1 - place)).astype(np.float32)

    rows, columns = np.abs(np.meshgrid(axis(grid[0]), axis(grid[1]), indexing="ij"))
    if metric == "l1":
        return rows + columns
    return np.sqrt(rows**2 + columns**2) if metric == "l2" else np.maximum(rows, columns)


def contiguous_radii(
    distance: Float[np.ndarray, "h w"], start: int, end: int, depth: int, min_radius: float = 1.0
) -> Float[np.ndarray, "radii"]:
    """Radius of every block (and one more, which is not used): from the corner at `start` - 1 down to min_radius."""
    fall = np.linspace(distance[0, 0], min_radius, end - start + 3, dtype=np.float32)
    before, behind = np.full(max(start - 1, 0), fall[0]), np.full(max(depth - end - 1, 0), fall[-1])
    return np.concatenate([before, fall, behind]).astype(np.float32)


def subset_radii(distance: Float[np.ndarray, "h w"], targets: Sequence[int]) -> list[float]:
    """For each target, the radius with the nearest number of patches inside."""
    radii = np.unique(distance)
    inside = np.array([(distance <= radius).sum() for radius in radii])
    return [float(radii[np.abs(inside - target).argmin()]) for target in targets]


@dataclasses.dataclass(frozen=True)
class Heuristic(Tabled):
    """Radial pruning before some blocks; settings as of `Tabled`.

    Attributes:
        metric: of the distance.
        mode: "subset" or "contiguous", see above; the second reads no counts.
        min_radius: of "contiguous".
        radius: that stays inside, set by `hooks`.
        inside: radius of what is still there, set by `hooks`.
    """

    metric: Metric = "l2"
    mode: Mode = "subset"
    min_radius: float = 1.0
    radius: float = float("inf")
    inside: float = float("inf")

    def __post_init__(self):
        super().__post_init__()
        for name, kind in (("metric", Metric), ("mode", Mode)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(get_args(kind))}")
        if not self.min_radius > 0:
            raise ValueError(f"min_radius={self.min_radius}: must be above 0")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        hooks, inside = [], float("inf")
        for layer, radius in self.radii(info):
            one = dataclasses.replace(self, layers=None, kept=None, radius=radius, inside=inside)
            hooks.append(Hook("before_block", layer, one))
            inside = radius
        return hooks

    def radii(self, info: ModelInfo) -> tuple[tuple[int, float], ...]:
        """The blocks before which patches leave, and the radius that stays.

        Raises:
            ValueError: a model without a grid, or no location.
        """
        if info.grid is None:
            raise ValueError("grid=None: a radial pattern needs a model with a grid of patches")
        distance = radial_distance(info.grid, self.metric)
        layers = schedules.at_layers(self.layers, info.depth)
        if not layers:
            return ()
        if self.mode == "contiguous":
            fall = contiguous_radii(distance, min(layers), max(layers), info.depth, self.min_radius)
            floor = float(distance.min())  # somebody stays
            wanted = [(layer, max(float(fall[layer]), floor)) for layer in range(info.depth)]
        else:
            located = self.located(info)
            targets = [hook.reducer.count(distance.size) for hook in located]
            wanted = list(zip([hook.layer for hook in located], subset_radii(distance, targets), strict=True))
        shrinks, left = [], distance.size
        for layer, radius in wanted:
            inside = int((distance <= radius).sum())
            if inside < left:
                shrinks.append((layer, radius))
                left = inside
        return tuple(shrinks)

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        grid, n = signals.context.grid, tokens.length - tokens.prefix
        distance = np.zeros(0) if grid is None else radial_distance(grid, self.metric).reshape(-1)
        there = distance[distance <= self.inside]
        if tokens.valid is not None or grid is None or len(there) > n:
            raise ValueError(
                f"tokens: a radial pattern needs the {len(there)} patches of grid {grid} that it left, without a valid "
                f"mask; here are {n}"
            )
        chosen = np.flatnonzero(there <= self.radius)
        if len(chosen) == len(there):
            return None
        chosen = np.concatenate([chosen, np.arange(len(there), n)])
        return Plan(select(tokens, jnp.broadcast_to(chosen + tokens.prefix, (tokens.batch, len(chosen)))), how="keep")
