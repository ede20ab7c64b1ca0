"""GTP: tokens leave, and pass what they hold to their neighbours in a graph.

Paper:  Xu et al., "GTP-ViT: Efficient Vision Transformers via Graph-based Token Propagation", WACV 2024
        (arXiv 2311.03035).
Source: Ackesnal/GTP-ViT, `models_v3.py`.
Kind:   propagation, training-free; static length N - P a block, N - P + 1 with `propagation="mean"`.
Needs:  all rows of the attention (some selections: the CLS row, or nothing), the patch embeddings, the patch grid.
Cost:   two T x T products for the graph, once; the attention map of each block is made explicitly (no fused kernel) and
        read two or three times; a sparse map adds 32 passes over it; P of T tokens are multiplied with T - P.

A graph of the patches is made once, from the grid (8 neighbours), from the similarity of the embeddings (the nearest
ones) or both, and normalised as in graph convolutions. In every block the P tokens with the lowest scores leave; times
alpha and the weight of their edge they are added to the tokens that stay. Scales of the tokens move the same way and
count in the attention like sizes (`Tokens.size`). Features are not divided by them: rows of the map sum to one or more.

The graph travels as `Tokens.carry["gtp"]`: the graph of all patches, and the row that each token has in it. It is never
cut down; the few weights that a block needs are read out. `graph` makes it (site "input"), `attend` makes the attention
map that the block and the scores share (site "attend"), `plan` propagates (between attention and MLP).

Where we follow the code against the text:
- Of the N * N entries of a head's map, N * N - K + 1 stay, K = int(N * N * (1 - sparsity)): the K-th smallest one too.
  They are not normalised again.
- The scores of a column sum over all queries, CLS and the token itself included.
- Without a class token every patch has one semantic neighbour more than asked for; `exact_neighbours` counts right.
- Semantic edges are directed, ties add edges, and degrees of rows normalise both sides.
- Tokens that stay are left in order of their scores (`place_order` sorts them: nothing else changes).

Where we decide:
- Selection names are those of the code in short: `MixedAttnMax` is "mixed_max", `IMGAttnMean` "column_mean".
- No tokens to propagate is no change; the published slice keeps nothing then.
- A token without any edge gets weights of zero; in the code it gets NaN.
- Grids need not be square, and the whole prefix is protected (the code takes a distillation token for a patch).
- Scores are compared to 16 bits, so that rounding does not break ties, which go to the lower index; sorts are stable.
- Tokens that others put behind the patches (CLCA's caches) have no edges.
- A block leaves at least one patch. Padded rows propagate P tokens of their own; padding has no edges.
- The code draws one score too few for random selection without a class token; here every token gets one, of its row.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from tokjax import schedules
from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit.staged import behind, drawn, ranked, select
from tokjax.reducers.vit.tome import similarity, unit
from tokjax.signals import Signals, attention_rows
from tokjax.token_map import HardMap, Plan, SpreadMap, rows
from tokjax.tokens import Tokens

Graph = Literal["spatial", "semantic", "mixed"]
Propagation = Literal["graph", "none", "mean"]
Selection = Literal[
    "cls_mean",
    "cls_max",
    "column_mean",
    "column_max",
    "diagonal_mean",
    "diagonal_max",
    "mixed_mean",
    "mixed_max",
    "sum_max",
    "cosine_mean",
    "cosine_max",
    "random",
]

# Released settings for DeiT-B (mixed graph, mixed_max, scales): P -> sparsity, alpha.
DEIT_B = {
    1: (0.8, 0.1),
    2: (0.7, 0.1),
    3: (0.9, 0.4),
    4: (1.0, 0.4),
    5: (0.6, 0.15),
    6: (0.6, 0.15),
    7: (0.6, 0.1),
    8: (0.6, 0.1),
    9: (0.7, 0.2),
    10: (0.5, 0.2),
    11: (0.8, 0.3),
    12: (0.8, 0.3),
    13: (0.7, 0.3),
    14: (0.8, 0.3),
}


def kth_smallest(x: Float[Array, "*b n"], k: int | Int[Array, "*b"]) -> Float[Array, "*b"]:
    """The k-th smallest number, from one on: by halving the range of bit patterns, which order as the numbers do.

    A sort of so many numbers takes many times as long on CPU, and `lax.top_k` needs a collective on a sharded batch.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    place = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bounds = place.min(-1), place.max(-1)
    # Counted in float32 (exact) and, where there are many, down columns: only so does XLA vectorise it on CPU.
    lanes = 256 if x.shape[-1] > 4096 else 1
    beyond = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % lanes)]
    place = jnp.pad(place, beyond, constant_values=jnp.iinfo(jnp.int32).max)
    place = place.reshape(*x.shape[:-1], -1, lanes)

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        count = (place <= middle[..., None, None]).astype(jnp.float32).sum(-2).astype(jnp.int32).sum(-1)
        return jnp.where(count >= k, low, middle + 1), jnp.where(count >= k, middle, high)

    low, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jax.lax.bitcast_convert_type(jnp.where(low < 0, low ^ 0x7FFFFFFF, low), jnp.float32)


def spatial_edges(place: Int[Array, "*B T 2"]) -> Bool[Array, "*B T T"]:
    """The eight neighbours of every patch, by row and column."""
    apart = abs(place[..., :, None, :] - place[..., None, :, :]).max(-1)
    return apart == 1


def semantic_edges(
    x: Float[Array, "B T C"], neighbours: int, *, valid: Bool[Array, "B T"] | None = None
) -> Bool[Array, "B T T"]:
    """Edges from every patch to the `neighbours` others of highest cosine similarity, and to all that tie with them."""
    x = unit(x)
    scores = similarity(x, x)
    if valid is None:
        least = kth_smallest(scores, max(x.shape[1] - neighbours, 1))
    else:  # padding lies beyond any similarity
        scores = jnp.where(valid[:, None], scores, jnp.inf)
        least = kth_smallest(scores, jnp.maximum(valid.sum(-1, keepdims=True) - neighbours, 1))
    return (scores >= least[..., None]) & ~jnp.eye(x.shape[1], dtype=bool)


def normalised(edges: Bool[Array, "B T T"]) -> Float[Array, "B T T"]:
    """D^-1/2 A D^-1/2 with the degrees of the rows; zeros where a token has no edge."""
    degree = edges.sum(-1)
    half = jnp.where(degree > 0, 1 / jnp.sqrt(jnp.maximum(degree, 1)), 0)
    return edges * half[..., :, None] * half[..., None, :]


def least_rank(n: int, sparsity: float) -> int:
    """The rank, from one on, of the smallest entry of an N x N map that stays; 0 keeps all."""
    return int(n * n * (1 - sparsity))


def sparse(
    weights: Float[Array, "B H N N"], sparsity: float, valid: Bool[Array, "B N"] | None = None
) -> Float[Array, "B H N N"]:
    """Zeros in place of the smallest entries of the map of every head; padded rows count their own entries."""
    b, h, n, _ = weights.shape
    rank = least_rank(n, sparsity)
    if rank < 1:
        return weights
    entries = jax.lax.stop_gradient(weights)
    if valid is None:
        least = kth_smallest(entries.reshape(b, h, n * n), rank)
    else:
        table = np.array([least_rank(count, sparsity) for count in range(n + 1)], np.int32)
        ranks = jnp.asarray(table)[valid.sum(-1)][:, None]
        entries = jnp.where(valid[:, None, :, None] & valid[:, None, None], entries, jnp.inf)
        least = jnp.where(ranks < 1, 0, kth_smallest(entries.reshape(b, h, n * n), ranks))
    return jnp.where(entries < least[..., None, None], 0, weights)


def scores(
    weights: Float[Array, "B H N N"],
    selection: Selection,
    *,
    prefix: int = 0,
    valid: Bool[Array, "B N"] | None = None,
) -> Float[Array, "B N"]:
    """How much every token is worth keeping, from the attention map; no gradient.

    Raises:
        ValueError: a random selection, which has no scores.
    """
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    kind, _, over = selection.partition("_")

    def heads(x):
        return x.mean(1) if over == "mean" else x.max(1)

    def columns():
        inside = weights if valid is None else jnp.where(valid[:, None, :, None], weights, 0)
        return heads(inside.sum(2))

    def diagonal():
        return heads(jnp.diagonal(weights, axis1=2, axis2=3))

    match kind:
        case "cls":
            return heads(weights[:, :, 0])
        case "column":
            return columns()
        case "diagonal":
            return diagonal()
        case "mixed":
            return diagonal() * columns()
        case "sum":
            return diagonal() + columns()
        case "cosine":  # similarity of its row to those of all patches
            row = unit(heads(weights))
            patches = row[:, prefix:] if valid is None else jnp.where(valid[:, prefix:, None], row[:, prefix:], 0)
            return -jnp.einsum("bnk,bk->bn", row, patches.sum(1), precision="highest")
        case _:
            raise ValueError(f"selection={selection!r}: has no scores")


@dataclasses.dataclass(frozen=True)
class GTP:
    """Token propagation between attention and MLP of every block.

    Attributes:
        propagated: tokens that leave each block; a tuple gives a number for each block, zeros behind its end. The paper
            searches 1 to 14; `DEIT_B` has the released settings.
        selection: of the tokens that stay, by the highest score: "mixed_max" (the paper's), or by CLS attention, column
            sum, diagonal, their product or sum, low redundancy ("cosine"), each as mean or maximum over heads; or
            "random".
        graph_type: "spatial", "semantic" or "mixed" (either).
        neighbours: of a patch in the semantic graph; the paper searches 1 to 10.
        exact_neighbours: not one more without a class token.
        alpha: weight of what is propagated, 0.1 to 0.5 in the paper.
        sparsity: share of the entries of an attention map that stays, in (0, 1]; it makes nothing faster here.
        propagation: "graph"; "none" only drops; "mean" appends the mean of what left as one token.
        token_scale: whether scales are tracked and count in the attention (the paper's results have it on).
        place_order: whether tokens that stay keep their places, in place of the order of scores.
        seed: of the random selection, where the call has no key.
        layer: set by `hooks`.
    """

    propagated: int | tuple[int, ...] = 8
    selection: Selection = "mixed_max"
    graph_type: Graph = "mixed"
    neighbours: int = 8
    exact_neighbours: bool = False
    alpha: float = 0.1
    sparsity: float = 1.0
    propagation: Propagation = "graph"
    token_scale: bool = True
    place_order: bool = False
    seed: int = 0
    layer: int = 0

    def __post_init__(self):
        counts = self.propagated if isinstance(self.propagated, tuple) else (self.propagated,)
        if any(count < 0 for count in counts):
            raise ValueError(f"propagated={self.propagated}: must be at least 0")
        for name, kind in (("selection", Selection), ("graph_type", Graph), ("propagation", Propagation)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(get_args(kind))}")
        if self.neighbours < 0:
            raise ValueError(f"neighbours={self.neighbours}: must be at least 0")
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha}: must be at least 0")
        if not 0 < self.sparsity <= 1:
            raise ValueError(f"sparsity={self.sparsity}: must be in (0, 1]")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        """The graph at the input; in every block the attention map, where it is needed, and the propagation."""
        counts = schedules.per_block(self.propagated, info.depth)
        if self.selection.startswith("cls") and not info.prefix:
            raise ValueError(f"selection={self.selection!r}: needs a class token, which this model has not")
        needs_map = self.sparsity < 1 or self.selection.partition("_")[0] not in ("cls", "random")
        hooks = []
        if self.propagation == "graph" and max(counts) > 0:
            hooks.append(Hook("input", 0, dataclasses.replace(self, propagated=0), "graph"))
        for layer, count in enumerate(counts):
            one = dataclasses.replace(self, propagated=count, layer=layer)
            if self.sparsity < 1 or (count and needs_map):
                hooks.append(Hook("attend", layer, one, "attend"))
            if count:
                hooks.append(Hook("after_attention", layer, one))
        return hooks

    def graph(self, tokens: Tokens, signals: Signals) -> Plan:
        """The graph of the patches, as carry; edges follow `tokens.position` where it is given."""
        p, t, batch = tokens.prefix, tokens.length - tokens.prefix, tokens.batch
        valid = None if tokens.valid is None else tokens.valid[:, p:]
        edges = jnp.zeros((batch, t, t), bool)
        if self.graph_type != "semantic":
            edges |= spatial_edges(self._places(tokens, signals.context.grid))
        if self.graph_type != "spatial":
            number = self.neighbours + (not p and not self.exact_neighbours)
            edges |= semantic_edges(tokens.x[:, p:], number, valid=valid)
        if valid is not None:
            edges &= valid[:, :, None] & valid[:, None]
        every = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (batch, t))
        return Plan(carry={"gtp": {"graph": normalised(edges), "row": every}})

    def _places(self, tokens: Tokens, grid: tuple[int, int] | None) -> Int[Array, "*B T 2"]:
        p, n, place = tokens.prefix, tokens.length, tokens.position
        if place is not None and place.ndim == 3:
            return place[:, p:]
        if grid is None:
            raise ValueError(f"graph_type={self.graph_type!r}: needs a patch grid; without one only 'semantic' goes")
        if place is not None:
            return jnp.stack(jnp.divmod(place[:, p:] - p, grid[1]), -1)
        if n - p != grid[0] * grid[1]:
            raise ValueError(f"grid={grid}: does not hold {n - p} patches; give tokens.position")
        return jnp.asarray(np.stack(np.divmod(np.arange(n - p), grid[1]), -1))

    def attend(self, tokens: Tokens, signals: Signals) -> Signals:
        """The attention map as the block and the scores use it."""
        return signals.replace(weights=sparse(attention_rows(signals), self.sparsity, tokens.valid))

    def _score(self, tokens: Tokens, signals: Signals) -> Float[Array, "B N"]:
        if self.selection == "random":
            return drawn(tokens, signals, self.layer, self.seed, jax.random.normal)
        if signals.weights is None and self.selection.startswith("cls") and self.sparsity == 1:
            score = scores(attention_rows(signals, slice(0, 1)), self.selection)
        else:
            seen = signals if signals.weights is not None else self.attend(tokens, signals)
            score = scores(seen.need("weights"), self.selection, prefix=tokens.prefix, valid=tokens.valid)
        return jax.lax.reduce_precision(jax.lax.stop_gradient(score), exponent_bits=8, mantissa_bits=16)

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        if not isinstance(self.propagated, int):
            raise ValueError(f"propagated={self.propagated}: a plan takes one number, `hooks` spreads a tuple out")
        n, p = tokens.length, tokens.prefix
        number = min(self.propagated, max(n - p - 1, 0))
        if number == 0:
            return None
        if self.selection.startswith("cls") and not p:
            raise ValueError(f"selection={self.selection!r}: needs a class token, tokens.prefix is 0")
        order = ranked(tokens, self._score(tokens, signals))  # 1: the best tokens stay
        stay = order[:, : n - p - number]
        left = order[:, n - p - number :]
        counts = leaving = None
        if tokens.valid is not None:
            patches = tokens.count() - p
            leaving = jnp.minimum(number, jnp.maximum(patches - 1, 0))
            counts = patches - leaving
            left = behind(tokens, order, counts, number)
            stay = jnp.where(jnp.arange(n - p - number) < counts[:, None], stay, n)
        if self.place_order:
            stay = jnp.sort(stay, -1)
        kept = select(tokens, stay, counts)
        if self.propagation == "none":
            return Plan(kept, how="keep")
        if self.propagation == "mean":
            return self._mean(kept, left, None if counts is None else (p + counts)[:, None], leaving)
        return self._spread(tokens, kept.keep, left)

    def _spread(self, tokens: Tokens, keep: Int[Array, "B M"], left: Int[Array, "B P"]) -> Plan:
        carry, p = tokens.carry.get("gtp"), tokens.prefix
        if carry is None or carry["row"].shape[1] > tokens.length - p:
            raise ValueError("tokens.carry['gtp'] does not fit: apply `graph` at the input; nothing else may reduce")
        graph, size = carry["graph"], carry["graph"].shape[-1]
        beside = tokens.length - p - carry["row"].shape[1]
        row = jnp.pad(carry["row"], ((0, 0), (0, beside)), constant_values=size)  # in no row of the graph: no edges
        receiver, sender = (rows(row, index, fill=size) for index in (keep[:, p:] - p, left - p))

        def between(graph, i, j):
            return graph.at[i[:, None], j].get(mode="fill", fill_value=0)

        share = self.alpha * jax.vmap(between)(graph, receiver, sender)  # 2: along the edges from those that leave
        spread = SpreadMap(keep, left, jnp.pad(share, ((0, 0), (p, 0), (0, 0))), tokens.length)
        scaled = self.token_scale
        return Plan(
            spread,
            size=spread if scaled else None,  # 3: scales move as features do
            how="sum",
            proportional=True if scaled else None,
            carry={"gtp": {"graph": graph, "row": receiver}},  # 4: the graph of those that stay
        )

    def _mean(self, kept: HardMap, left: Int[Array, "B P"], slot, leaving) -> Plan:
        """The mean of those that leave stands behind those that stay; scales are not touched."""
        keep = jnp.pad(kept.keep, ((0, 0), (0, 1)), constant_values=kept.num_in)
        number = left.shape[1] if leaving is None else jnp.maximum(leaving, 1)[:, None]
        weight = jnp.broadcast_to(1.0 / number, left.shape)
        nowhere = keep.shape[1]
        into = jnp.full_like(left, kept.num_out) if slot is None else jnp.where(left < kept.num_in, slot, nowhere)
        return Plan(HardMap(keep, left, into, kept.num_in, weight), how="sum")
