"""A-CLIP: while CLIP trains, each view of an image keeps the patches that a teacher's CLS token attends to.

Paper:  Yang et al., "Attentive Mask CLIP", ICCV 2023 (arXiv 2212.08653).
Source: microsoft/A-CLIP, `models.py`, `datasets.py`.
Kind:   prune at the input, in training only; static length, all patches of min(int(keep_rate * S) + 1, S) of the S
        super-patches.
Needs:  a relevance map of the image, the boxes of the view and of the map in the image, a patch grid.

The teacher, a moving average of the encoder, sees a crop that encloses the crops which the encoder trains on. Its CLS
attention, averaged over heads and blocks (`Watch`, `relevance`), comes in as `Context.relevance`, on the grid of the
teacher's view; `Context.boxes` tells where both views lie. The map is moved to the grid of the view, averaged over
super-patches of 2 x 2 patches, and the best of these stay, in place order. Without a map, as at inference, all do.

Moving is what the published code does with images of the attention: bilinear to the pixels of the teacher's box, cut to
the view's box (zeros where that lies outside), bilinear to the grid; half-pixel centres, no anti-aliasing. Both resizes
are linear and separable, so that here one matrix an axis does it and no map of pixels is made. Coarse grids from large
boxes therefore are samples, not averages. The teacher's grid may be another one (an encoder of smaller images).

Where we follow the code against the text: int(keep_rate * S) + 1 super-patches stay, 25 of 49 at 0.5.
Where we decide: ties go to the lower index (the published sort is not stable). Where 2 does not divide a side of the
grid, super-patches are one patch long there.

Cost: nothing in the encoder beside a sort of S numbers an image; the teacher's forward pass is the price.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit.staged import select
from tokjax.signals import Signals, cls_attention
from tokjax.token_map import Plan
from tokjax.tokens import Tokens

NOTE = "cls_attention"


def resampling(
    grid: int, start: Int[Array, ""], size: Int[Array, ""], other: int, at: Int[Array, ""], length: Int[Array, ""]
) -> Float[Array, "grid other"]:
    """Along one axis, the matrix from the cells of another box to those of a box.

    Args:
        grid: cells of the result.
        start: first pixel of the box.
        size: its pixels.
        other: cells of what is known.
        at: first pixel of the box that these cover.
        length: its pixels.
    """
    centre = jnp.maximum((jnp.arange(grid) + 0.5) * (size / grid) - 0.5, 0)
    low = jnp.floor(centre).astype(jnp.int32)
    pixels = jnp.stack([low, jnp.minimum(low + 1, size - 1)]) + start - at  # both neighbours, in the other box
    cell = jnp.maximum((pixels + 0.5) * (other / length) - 0.5, 0)
    first = jnp.minimum(jnp.floor(cell).astype(jnp.int32), other - 1)
    share, place = (cell - first)[..., None], jnp.arange(other)
    seen = (1 - share) * (place == first[..., None]) + share * (place == jnp.minimum(first + 1, other - 1)[..., None])
    seen = jnp.where(((pixels >= 0) & (pixels < length))[..., None], seen, 0)
    weight = (centre - low)[:, None]
    return (1 - weight) * seen[0] + weight * seen[1]


def moved(
    relevance: Float[Array, "B h w"], boxes: Int[Array, "B 2 4"], grid: tuple[int, int]
) -> Float[Array, "B down across"]:
    """A map on the grid of another box, float32; zeros where that box does not lie in the map's own.

    Args:
        relevance: of every patch of the second box.
        boxes: (top, left, height, width) in pixels of the image: of the result, and of the map.
        grid: patches of the result.
    """

    def one(map: Array, view: Array, whole: Array) -> Array:
        down, across = (
            resampling(grid[axis], view[axis], view[axis + 2], map.shape[axis], whole[axis], whole[axis + 2])
            for axis in (0, 1)
        )
        return jnp.einsum("ih,hw,jw->ij", down, map, across, precision="highest")

    return jax.vmap(one)(relevance.astype(jnp.float32), boxes[:, 0], boxes[:, 1])


def super_patch(grid: tuple[int, int], pool: int) -> tuple[int, int]:
    """Sides of a super-patch: the largest divisors of the grid's that are at most `pool`."""
    down, across = (max(side for side in range(1, pool + 1) if cells % side == 0) for cells in grid)
    return down, across


def pooled(map: Float[Array, "B h w"], sides: tuple[int, int]) -> Float[Array, "B S"]:
    """Means over super-patches, row by row."""
    (b, h, w), (down, across) = map.shape, sides
    return map.reshape(b, h // down, down, w // across, across).mean((2, 4)).reshape(b, -1)


def best(
    scores: Float[Array, "B S"], grid: tuple[int, int], sides: tuple[int, int], count: int
) -> Int[Array, "B count*sides"]:
    """The patches of the `count` best super-patches, ascending; ties go to the lower super-patch."""
    row, column = jnp.divmod(jnp.argsort(-scores, axis=-1, stable=True)[:, :count], grid[1] // sides[1])
    down, across = (at[..., None] * side + jnp.arange(side) for at, side in zip((row, column), sides, strict=True))
    every = down[..., :, None] * grid[1] + across[..., None, :]
    return jnp.sort(every.reshape(every.shape[0], count * sides[0] * sides[1]), -1)


@dataclasses.dataclass(frozen=True)
class AClip:
    """Pruning by a given relevance map, directly behind patch and position embedding.

    Attributes:
        keep_rate: int(keep_rate * S) + 1 of the S super-patches stay, at most S; the paper's 0.5.
        pool: side of a super-patch, in patches; see `super_patch` for grids that it does not divide.

    Raises:
        ValueError: a value out of range, a model without a grid, padded rows, or a map or boxes of another shape.
    """

    keep_rate: float = 0.5
    pool: int = 2

    def __post_init__(self):
        if not 0 <= self.keep_rate <= 1:
            raise ValueError(f"keep_rate={self.keep_rate}: must be in [0, 1]")
        if self.pool < 1:
            raise ValueError(f"pool={self.pool}: must be at least 1")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        if info.grid is None:
            raise ValueError("grid=None: a_clip needs a patch grid")
        return [Hook("input", 0, self)]

    def count(self, super_patches: int) -> int:
        """Super-patches that stay."""
        return min(int(super_patches * self.keep_rate) + 1, super_patches)

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        context = signals.context
        grid, relevance = context.grid, context.relevance
        if relevance is None:
            return None
        if grid is None:
            raise ValueError("grid=None: a_clip needs a patch grid")
        if tokens.valid is not None:
            raise ValueError("tokens.valid: a_clip takes no padded rows")
        if tokens.length - tokens.prefix != grid[0] * grid[1]:
            raise ValueError(f"tokens.x has {tokens.length} tokens: a_clip needs all patches of the grid {grid}")
        sides = super_patch(grid, self.pool)
        total = grid[0] * grid[1] // (sides[0] * sides[1])
        if self.count(total) == total:
            return None
        # 1. The map on the patches of this view.
        map = jax.lax.stop_gradient(self._here(relevance, context.boxes, grid, tokens.batch))
        # 2. The best super-patches, as patches in place order.
        chosen = best(pooled(map, sides), grid, sides, self.count(total))
        return Plan(select(tokens, chosen + tokens.prefix), how="keep")

    def _here(self, relevance: Array, boxes: Array | None, grid: tuple[int, int], batch: int) -> Array:
        if relevance.ndim != 3 or relevance.shape[0] != batch:
            raise ValueError(f"context.relevance has shape {relevance.shape}: must be ({batch}, down, across)")
        if boxes is None:
            if relevance.shape[1:] != grid:
                raise ValueError(
                    f"context.relevance has shape {relevance.shape}: without context.boxes it must have the grid {grid}"
                )
            return relevance.astype(jnp.float32)
        if boxes.shape != (batch, 2, 4):
            raise ValueError(f"context.boxes has shape {boxes.shape}: must be ({batch}, 2, 4)")
        return moved(relevance, boxes, grid)


@dataclasses.dataclass(frozen=True)
class Watch:
    """Removes nothing and notes in `aux` how much CLS attends to every patch, in every block; for `relevance`.

    Raises:
        ValueError: a model without CLS or without a patch grid.
    """

    def hooks(self, info: ModelInfo) -> list[Hook]:
        if not info.prefix or info.grid is None:
            raise ValueError(f"prefix={info.prefix}, grid={info.grid}: needs a CLS token and a patch grid")
        return [Hook("after_attention", layer, self, "note") for layer in range(info.depth)]

    def note(self, tokens: Tokens, signals: Signals) -> Plan:
        return Plan(aux={NOTE: jax.lax.stop_gradient(cls_attention(signals))[:, tokens.prefix :]})


def relevance(aux: Mapping[str, Mapping[str, Any]], grid: tuple[int, int]) -> Float[Array, "B h w"]:
    """The mean over blocks of what `Watch` noted, as a map.

    Args:
        aux: of the tokens that a watched model gives.
        grid: its patches down and across.

    Raises:
        ValueError: nothing was noted.
    """
    rows = [notes[NOTE] for notes in aux.values() if NOTE in notes]
    if not rows:
        raise ValueError(f"aux={sorted(aux)}: has no attention of CLS; the model needs the reducer Watch")
    return jnp.stack(rows).mean(0).reshape(-1, *grid)
