"""ToMe for Stable Diffusion: merge tokens right before a module and copy them back right after it.

Paper:  Bolya & Hoffman, "Token Merging for Fast Stable Diffusion", CVPR 2023 workshop (arXiv 2303.17604).
Source: dbolya/tomesd 0.1.3, `tomesd/merge.py`, `tomesd/patch.py`.
Kind:   hard merge with un-merge around single modules, training-free; static: N - min(sources, int(N * merge_rate))
        inside.
Needs:  the features that enter the block, and their grid.
Cost:   a similarity of N (1 - 1/(sx sy)) sources with N / (sx sy) destinations over C channels, once a block, and a
        sort of the sources; the plan is shared by all modules of the block.

The grid is cut into cells of sx by sy. In each, one token is a destination: a random one, the same for all rows of a
batch, or the top left one. Every other token is a source and proposes to its most similar destination; the strongest
proposals merge. Averages are plain, sizes are not tracked, attention is not proportional. The residual stream keeps its
length, so that any transformer block takes it: a ViT's, a DiT's, a U-Net's.

Where we follow the code against the text:
- The blocks that reduce are those whose side is at most `max_downsample` times smaller than the input's; 1 means full
  resolution.
- An edge that does not fill a cell has no destination.

Where we decide:
- Sources and destinations are in place order (the published lists come from a sort that is not stable; behind the
  un-merging this only shows in exact ties), sorts are stable, ties go to the lower index, zero vectors are guarded.
- The draw follows the key of the call, or `seed`, folded with the block: so the conditional and unconditional halves
  of guidance meet the same grids in separate calls too, and an odd batch need not fall back to the top left token (as
  published). A context with one key a row draws a grid for every row.
- Prefix tokens (a ViT's CLS) are protected. A grid without a whole cell does nothing (the published code fails).
- Padded rows are refused: a grid has none.
- Where another method changes the length of the sequence there is no grid to return to: refused.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from tokjax import schedules
from tokjax.hooks import Hook, ModelInfo, Where
from tokjax.reducers.vit.tome import proposals, similarity, unit
from tokjax.signals import Context, Signals
from tokjax.token_map import HardMap, Plan, behind_prefix, rows
from tokjax.tokens import Tokens

Grid = tuple[int, int]


def downsampled(latent: Grid, tokens: int) -> int:
    """How many times smaller than the input a block's side is."""
    return max(math.ceil(math.sqrt(latent[0] * latent[1] // tokens)), 1)


def gate(latent: Grid, tokens: int, max_downsample: int) -> Grid | None:
    """The grid of a block's tokens, rows and columns; None where it does not reduce."""
    factor = downsampled(latent, tokens)
    if factor > max_downsample:
        return None
    return math.ceil(latent[0] / factor), math.ceil(latent[1] / factor)


def removed(merge_rate: float, tokens: int) -> int:
    """Tokens that may merge, int(N * merge_rate) in double precision."""
    return int(tokens * merge_rate)


def cells(grid: Grid, stride: Grid) -> Grid:
    """Whole cells down and across; `stride`: sy, sx."""
    return grid[0] // stride[0], grid[1] // stride[1]


def destinations(choice: Int[Array, "*B down across"], grid: Grid, stride: Grid) -> Int[Array, "*B D"]:
    """Token of every cell, in place order, from a choice of 0 to sx * sy - 1 each, counted row by row in the cell."""
    (sy, sx), (down, across) = stride, cells(grid, stride)
    row = jnp.arange(down)[:, None] * sy + choice // sx
    column = jnp.arange(across) * sx + choice % sx
    return jnp.sort((row * grid[1] + column).reshape(*choice.shape[:-2], down * across), -1)


def partition(chosen: Int[Array, "B D"], tokens: int) -> Int[Array, "B S"]:
    """All other tokens, in place order."""
    taken = jax.vmap(lambda row: jnp.zeros(tokens, bool).at[row].set(True))(chosen)
    return jnp.argsort(taken, axis=-1, stable=True)[:, : tokens - chosen.shape[1]]


def match(metric: Float[Array, "B N C"], chosen: Int[Array, "#B D"], r: int) -> HardMap | None:
    """The r strongest proposals of sources to destinations merge; sources that stay, from most to least similar, are
    in front of the destinations. None if nothing can merge.
    """
    batch, n, _ = metric.shape
    sources = partition(chosen, n)
    r = min(r, sources.shape[1])
    if r <= 0 or chosen.shape[1] == 0:
        return None
    sources, chosen = (jnp.broadcast_to(i, (batch, i.shape[1])) for i in (sources, chosen))
    metric = unit(metric)
    best, partner = proposals(similarity(rows(metric, sources), rows(metric, chosen)))
    order = jnp.argsort(-best, axis=-1, stable=True)
    merged, stays = order[:, :r], order[:, r:]
    keep = jnp.concatenate([jnp.take_along_axis(sources, stays, 1), chosen], 1)
    into = jnp.take_along_axis(partner, merged, 1) + stays.shape[1]
    return HardMap(keep, jnp.take_along_axis(sources, merged, 1), into, num_in=n)


def rates(info: ModelInfo) -> list[float]:
    """Merge rates from cheapest to dearest, one for every number of tokens that may merge."""
    patches = info.length - info.prefix
    values = [(r, r / patches) for r in range(patches - 1, -1, -1)]
    return [rate if removed(rate, patches) == r else math.nextafter(rate, 1) for r, rate in values]


@dataclasses.dataclass(frozen=True)
class ToMeSD:
    """Merging around attention, cross-attention and MLP of the blocks at high resolution.

    Attributes:
        merge_rate: share of a block's tokens that merge, in [0, 1), the published `ratio`; at most all but the
            destinations, 1 - 1 / (sx sy).
        max_downsample: of the blocks that reduce; 1 touches 4 of the 15 blocks of Stable Diffusion 1.5, 8 all of them.
        sx: cell width, in tokens.
        sy: cell height.
        use_rand: whether the destination of a cell is drawn; otherwise it is the top left token.
        merge_attn: whether to merge around self-attention.
        merge_crossattn: around cross-attention, in blocks that have one.
        merge_mlp: around the MLP; published off, needed to save more than the attention's share.
        layers: blocks that reduce, if the gate lets them; None: all.
        seed: of the draw, where the call has no key.
        layer: set by `hooks`.
    """

    merge_rate: float = 0.5
    max_downsample: int = 1
    sx: int = 2
    sy: int = 2
    use_rand: bool = True
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    layers: tuple[int, ...] | None = None
    seed: int = 0
    layer: int = 0

    def __post_init__(self):
        if not 0 <= self.merge_rate < 1:
            raise ValueError(f"merge_rate={self.merge_rate}: must be in [0, 1)")
        for name in ("max_downsample", "sx", "sy"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not (self.merge_attn or self.merge_crossattn or self.merge_mlp):
            raise ValueError("merge_attn=False: one of merge_attn, merge_crossattn, merge_mlp must be True")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        """A plan before every block, used around its modules.

        Raises:
            ValueError: a model whose tokens do not stand on a grid.
        """
        if info.grid is None:
            raise ValueError("grid=None: tomesd needs a model whose tokens stand on one grid")
        if self.merge_rate == 0:
            return []
        sites: dict[Where, bool] = {
            "around_attention": self.merge_attn,
            "around_cross_attention": self.merge_crossattn,
            "around_mlp": self.merge_mlp,
        }
        layers = range(info.depth) if self.layers is None else schedules.at_layers(self.layers, info.depth)
        hooks = []
        for layer in layers:
            one = dataclasses.replace(self, layers=None, layer=layer)
            hooks += [
                Hook("before_block", layer, one, "match"),
                *(Hook(where, layer, one) for where in sites if sites[where]),
            ]
        return hooks

    def match(self, tokens: Tokens, signals: Signals) -> Plan:
        """The map of this block, from the features that enter it; it travels in the carry and moves nothing yet."""
        return Plan(carry={"tomesd": self.map(tokens, signals.context)})

    def map(self, tokens: Tokens, context: Context) -> HardMap | None:
        """The map that the modules of a block share; None where the block does not reduce.

        Raises:
            ValueError: padded rows, or tokens that are not a whole grid.
        """
        p, n = tokens.prefix, tokens.length - tokens.prefix
        if tokens.valid is not None:
            raise ValueError("tokens.valid: tomesd takes no padded rows, its tokens stand on a whole grid")
        if context.grid is None:
            raise ValueError("context.grid=None: tomesd needs tokens on a grid")
        grid, stride = gate(context.grid, n, self.max_downsample), (self.sy, self.sx)
        if grid is None or 0 in cells(grid, stride):
            return None
        if grid[0] * grid[1] != n:
            raise ValueError(f"{n} tokens: are no grid of {grid[0]} x {grid[1]}; no other method may add or drop any")
        chosen = destinations(self.choice(context, cells(grid, stride)), grid, stride)
        found = match(tokens.x[:, p:], chosen if chosen.ndim == 2 else chosen[None], removed(self.merge_rate, n))
        return None if found is None else behind_prefix(found, p)

    def choice(self, context: Context, shape: Grid) -> Int[Array, "*B down across"]:
        """Number of the destination in every cell: one grid for the batch, or one for each row's key."""
        if not self.use_rand:
            return jnp.asarray(np.zeros(shape, np.int32))
        key = jax.random.key(self.seed) if context.key is None else context.key

        def draw(key: Array) -> Array:
            return jax.random.randint(jax.random.fold_in(key, self.layer), shape, 0, self.sx * self.sy)

        return draw(key) if key.ndim == 0 else jax.vmap(draw)(key)

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        """Around a module: the block's map, with plain means."""
        found = tokens.carry.get("tomesd")
        if found is not None and found.num_in != tokens.length:
            raise ValueError(
                f"{tokens.length} tokens: tomesd planned for {found.num_in}; nothing may shorten them inside a block"
            )
        return None if found is None else Plan(found, how="mean")
