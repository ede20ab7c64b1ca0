"""Token reductions as linear maps over the token axis, in a hard and a soft form that answer the same questions.

A map takes N tokens to M. With membership `Mem [B,M,N]` (who went where) and sizes s, the reduced features of a merge
are `diag(1/s') Mem diag(s) x` with `s' = Mem s`; a prune has rows of `Mem` with a single one; a propagation is any
matrix. `unmerge` is always `Mem` transposed (ToMe, Bolya et al. 2023: every input position gets a copy of the token
that took it in); it is not the pseudo-inverse, which differs as soon as sizes do.
"""

from collections.abc import Iterator, Mapping
import contextlib
import contextvars
from typing import Any, Literal, TypeVar, get_args

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.tokens import Tokens, concat

Form = Literal["auto", "scatter", "matmul"]
_form: contextvars.ContextVar[Form] = contextvars.ContextVar("form", default="auto")


@contextlib.contextmanager
def apply_form(form: Form) -> Iterator[None]:
    """Chooses how hard maps add moved tokens, for everything that is traced inside.

    Args:
        form: "scatter" adds rows in place; "matmul" multiplies by a one-hot matrix of the moved rows (deterministic on
            GPU in bf16, no scatter on TPU); "auto" is scatter on CPU, where it is the faster one, and matmul elsewhere.

    Raises:
        ValueError: an unknown form.
    """
    if form not in get_args(Form):
        raise ValueError(f"form={form!r}: must be one of {', '.join(get_args(Form))}")
    token = _form.set(form)
    try:
        yield
    finally:
        _form.reset(token)


def _scatters() -> bool:
    form = _form.get()
    return jax.default_backend() == "cpu" if form == "auto" else form == "scatter"


def rows(x: Array, index: Int[Array, "B M"], fill=0) -> Array:
    """`x[b, index[b]]`; an index of N gives `fill`. Vmapped, so that a sharded batch needs no collective."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=fill))(x, index)


def first_true(hits: Bool[Array, "*n"], axis: int = -1) -> Int[Array, "*m"]:
    """Index of the first hit along an axis, the last index without any.

    Of `x == x.max()` that is argmax, as two plain reductions: XLA's own, over pairs, is not vectorised on CPU and takes
    five times as long.
    """
    place = jnp.arange(hits.shape[axis], dtype=jnp.float32)
    place = jnp.expand_dims(place, tuple(range(1, -axis if axis < 0 else hits.ndim - axis)))
    return jnp.where(hits, place, hits.shape[axis] - 1).min(axis).astype(jnp.int32)


class HardMap(struct.PyTreeNode):
    """Keep some tokens, in this order, and add others into their slots; what is in neither list is dropped.

    Three sentinels: `keep == N` is an empty slot (filled by moved tokens only, or invalid), `moved == N` is nobody,
    `into == M` is nowhere. They are the whole of fused tokens, of capacities, and of rows that move fewer than R.
    """

    keep: Int[Array, "B M"]
    moved: Int[Array, "B R"]
    into: Int[Array, "B R"]
    num_in: int = struct.field(pytree_node=False)
    weight: Float[Array, "B R"] | None = None  # of the moved tokens; None: one each

    @property
    def num_out(self) -> int:
        return self.keep.shape[1]

    @property
    def anchor(self) -> Int[Array, "B M"]:
        """Whose position, gate and kind a slot takes."""
        return self.keep

    def sum(self, x: Float[Array, "B N *c"]) -> Float[Array, "B M *c"]:
        """Adds the moved tokens to the kept ones."""
        kept = rows(x, self.keep)
        if self.moved.shape[1] == 0:
            return kept
        moved = rows(x, self.moved)
        if self.weight is not None:
            moved *= self.weight.reshape(self.weight.shape + (1,) * (x.ndim - 2)).astype(x.dtype)
        if _scatters():
            return jax.vmap(lambda y, i, v: y.at[i].add(v, mode="drop"))(kept, self.into, moved)
        put = jax.nn.one_hot(self.into, self.num_out, axis=1, dtype=x.dtype)
        added = jnp.einsum("bmr,br...->bm...", put, moved, precision="highest", preferred_element_type=jnp.float32)
        return kept + added.astype(x.dtype)

    def max(self, x: Float[Array, "B N *c"]) -> Float[Array, "B M *c"]:
        """Element-wise maximum of what each slot takes in; weights are ignored."""
        return jax.vmap(lambda y, i, v: y.at[i].max(v, mode="drop"))(
            rows(x, self.keep, fill=-jnp.inf), self.into, rows(x, self.moved, fill=-jnp.inf)
        )

    def min(self, x: Float[Array, "B N *c"]) -> Float[Array, "B M *c"]:
        """Element-wise minimum of what each slot takes in; weights are ignored."""
        return -self.max(-x)

    def dest(self) -> Int[Array, "B N"]:
        """Slot of every input token; M for dropped ones."""
        m = self.num_out

        def row(keep, moved, into):
            slots = jnp.full(self.num_in, m, jnp.int32)
            slots = slots.at[moved].set(into, mode="drop")
            return slots.at[keep].min(jnp.arange(m, dtype=jnp.int32), mode="drop")  # the first of equal ones

        return jax.vmap(row)(self.keep, self.moved, self.into.astype(jnp.int32))

    def unmerge(self, y: Float[Array, "B M *c"]) -> Float[Array, "B N *c"]:
        """Membership transposed: every input position gets a copy of the token that took it in, zeros if dropped."""
        return rows(y, self.dest())

    def membership(self) -> Float[Array, "B M N"]:
        """Who went where, zeros and ones, float32; moved tokens count fully whatever their weight."""
        return jax.nn.one_hot(self.dest(), self.num_out, axis=1)

    def matrix(self) -> Float[Array, "B M N"]:
        """The linear map that `sum` applies, float32: membership, with the weights of moved tokens."""
        return self.sum(jnp.broadcast_to(jnp.eye(self.num_in), (self.keep.shape[0], self.num_in, self.num_in)))


class SoftMap(struct.PyTreeNode):
    """A matrix, with an anchor token for what cannot be averaged."""

    weights: Float[Array, "B M N"]
    anchor: Int[Array, "B M"]

    @property
    def num_in(self) -> int:
        return self.weights.shape[2]

    @property
    def num_out(self) -> int:
        return self.weights.shape[1]

    def sum(self, x: Float[Array, "B N *c"]) -> Float[Array, "B M *c"]:
        return jnp.einsum("bmn,bn...->bm...", self.weights.astype(x.dtype), x, precision="highest")

    def dest(self) -> Int[Array, "B N"]:
        """Slot with the largest share of every input token, the lower one on ties; M where it has none."""
        share = jnp.abs(self.weights)
        return jnp.where(share.sum(1) > 0, share.argmax(1), self.num_out).astype(jnp.int32)

    def unmerge(self, y: Float[Array, "B M *c"]) -> Float[Array, "B N *c"]:
        return jnp.einsum("bmn,bm...->bn...", self.weights.astype(y.dtype), y, precision="highest")

    def membership(self) -> Float[Array, "B M N"]:
        return self.weights

    def matrix(self) -> Float[Array, "B M N"]:
        return self.weights


class SpreadMap(struct.PyTreeNode):
    """Keep some tokens, in this order, and spread each of some others over the slots; the rest is dropped.

    The soft map that leaves most tokens whole: its sum takes M R products a channel where a full matrix takes M N.
    `keep == N` is an empty slot, `moved == N` nobody.
    """

    keep: Int[Array, "B M"]
    moved: Int[Array, "B R"]
    share: Float[Array, "B M R"]
    num_in: int = struct.field(pytree_node=False)

    @property
    def num_out(self) -> int:
        return self.keep.shape[1]

    @property
    def anchor(self) -> Int[Array, "B M"]:
        return self.keep

    def sum(self, x: Float[Array, "B N *c"]) -> Float[Array, "B M *c"]:
        share, moved = self.share.astype(x.dtype), rows(x, self.moved)
        return rows(x, self.keep) + jnp.einsum("bmr,br...->bm...", share, moved, precision="highest")

    def _scattered(self, kept: Array, moved: Array, fill) -> Array:
        """Values of kept and of moved tokens at the places of the tokens, `fill` at dropped ones."""
        every = jnp.full((kept.shape[0], self.num_in, *kept.shape[2:]), fill, kept.dtype)
        put = jax.vmap(lambda out, i, v: out.at[i].set(v, mode="drop"))
        return put(put(every, self.moved, moved), self.keep, kept)

    def dest(self) -> Int[Array, "B N"]:
        """Slot with the largest share of every input token, the lower one on ties; M where it has none."""
        m, share = self.num_out, jnp.abs(self.share)
        slots = jnp.broadcast_to(jnp.arange(m, dtype=jnp.int32), self.keep.shape)
        return self._scattered(slots, jnp.where(share.sum(1) > 0, share.argmax(1), m).astype(jnp.int32), m)

    def unmerge(self, y: Float[Array, "B M *c"]) -> Float[Array, "B N *c"]:
        """Membership transposed, as of every map."""
        mixed = jnp.einsum("bmr,bm...->br...", self.share.astype(y.dtype), y, precision="highest")
        return self._scattered(y, mixed, 0)

    def membership(self) -> Float[Array, "B M N"]:
        return self.sum(jnp.broadcast_to(jnp.eye(self.num_in), (self.keep.shape[0], self.num_in, self.num_in)))

    def matrix(self) -> Float[Array, "B M N"]:
        return self.membership()


TokenMap = HardMap | SoftMap | SpreadMap
Map = TypeVar("Map", HardMap, SoftMap)


def identity(batch: int, length: int) -> HardMap:
    """Keeps every token in its place."""
    nobody = jnp.zeros((batch, 0), jnp.int32)
    every = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return HardMap(every, nobody, nobody, length)


def behind_prefix(map: Map, prefix: int) -> Map:
    """The same map for tokens that stand behind `prefix` protected ones, which stay where they are."""
    if not prefix:
        return map
    if isinstance(map, SoftMap):
        first = jnp.broadcast_to(jnp.arange(prefix), (map.anchor.shape[0], prefix))
        weights = jnp.pad(map.weights, ((0, 0), (prefix, 0), (prefix, 0)))
        length_out, length_in = weights.shape[1:]
        stay = jnp.eye(length_out, length_in, dtype=weights.dtype).at[prefix:].set(0)
        return SoftMap(weights + stay, jnp.concatenate([first, map.anchor + prefix], 1))
    first = jnp.broadcast_to(jnp.arange(prefix), (map.keep.shape[0], prefix))
    return HardMap(
        jnp.concatenate([first, map.keep + prefix], 1),
        map.moved + prefix,
        map.into + prefix,
        map.num_in + prefix,
        map.weight,
    )


def compose(second: TokenMap, first: TokenMap) -> TokenMap:
    """The map that does `first`, then `second`.

    Two hard maps give a hard one (index gathers only); anything else gives a soft one. Sums compose exactly, so
    size-weighted averages do too: their size factors cancel between the steps.

    Raises:
        ValueError: the maps do not meet.
    """
    if first.num_out != second.num_in:
        raise ValueError(f"second takes {second.num_in} tokens, first gives {first.num_out}: they must be equal")
    if not (isinstance(first, HardMap) and isinstance(second, HardMap)):
        matrix = jnp.einsum("bmk,bkn->bmn", second.matrix(), first.matrix(), precision="highest")
        return SoftMap(matrix, rows(first.anchor, second.anchor, fill=first.num_in))
    n, m, slot = first.num_in, second.num_out, second.dest()

    # A token moves in the composition if it moved in either step: all that ends in a slot without being its anchor.
    keep = rows(first.keep, second.keep, fill=n)
    moved = jnp.concatenate([first.moved, rows(first.keep, second.moved, fill=n)], 1)
    into = jnp.concatenate([rows(slot, first.into, fill=m), second.into], 1)
    if first.weight is None and second.weight is None:
        return HardMap(keep, moved, into, n)

    def weight(map: HardMap) -> Array:
        return jnp.ones(map.moved.shape) if map.weight is None else map.weight

    # A token that moved into a token that moves later is weighted twice.
    later = jax.vmap(lambda to, w: jnp.ones(first.num_out).at[to].set(w, mode="drop"))(second.moved, weight(second))
    return HardMap(
        keep, moved, into, n, jnp.concatenate([weight(first) * rows(later, first.into, fill=1.0), weight(second)], 1)
    )


def source(origin: Int[Array, "B N0"], length: int) -> Float[Array, "B N N0"]:
    """The source map as a matrix: 1 where input token j now lives in slot i, a zero column where it was dropped."""
    return jax.nn.one_hot(origin, length, axis=1)


Fill = Literal["nearest", "zeros"]


def restore(
    x: Float[Array, "B N *c"],
    origin: Int[Array, "B N0"],
    grid: tuple[int, int],
    *,
    prefix: int = 0,
    fill: Fill = "nearest",
) -> Float[Array, "B P *c"]:
    """Features at every input patch again, P in all: a copy of the token that it lives on.

    That is `unmerge` through all the maps at once where they are hard. Of a soft map a patch takes the slot with its
    largest share alone (as `SoftMap.dest`), not the mixture that its matrix transposed would give. A patch that was
    fused with many others into a token of no place (EViT) lives on that token, and has its features, not a survivor's.

    Args:
        x: features of the tokens that are left.
        origin: slot of every input token, N if dropped, as `Tokens.origin` has it.
        grid: patches down and across.
        prefix: leading input tokens that are no patches.
        fill: what a dropped patch gets. "nearest": the features at the surviving patch (one that lives on any token,
            merged or not) with the smallest Euclidean distance on the grid, the first in row-major order among equals;
            zeros in an image of which no patch survives. "zeros": zeros.

    Raises:
        ValueError: an unknown fill, or a grid of another number of patches.
    """
    if fill not in get_args(Fill):
        raise ValueError(f"fill={fill!r}: must be one of {', '.join(get_args(Fill))}")
    down, across = grid
    if origin.shape[1] != prefix + down * across:
        raise ValueError(f"grid={grid}: with prefix={prefix} does not hold the {origin.shape[1]} tokens of origin")
    slot = origin[:, prefix:]
    if fill == "nearest":
        slot = jnp.take_along_axis(slot, _nearest((slot < x.shape[1]).reshape(-1, down, across)), axis=1)
    return rows(x, slot)


def _nearest(alive: Bool[Array, "B h w"]) -> Int[Array, "B P"]:
    """Index of the nearest patch that is alive, along rows and then along columns: squares of distances add up."""
    _, h, w = alive.shape
    far = h * h + w * w  # beyond any distance
    rows_apart, columns_apart = ((jnp.arange(n)[:, None] - jnp.arange(n)) ** 2 for n in (h, w))
    along = jnp.where(alive[:, :, None, :], columns_apart, far)  # [B, row, column, other column]
    column, distance = along.argmin(-1), along.min(-1)
    row = (rows_apart[:, :, None] + distance[:, None]).argmin(2)  # of [B, row, other row, column]
    column = jnp.take_along_axis(column, row, axis=1)
    return (row * w + column).reshape(-1, h * w)


How = Literal["size", "mean", "sum", "keep"]


class Plan(struct.PyTreeNode):
    """What a reducer decides. With everything None, nothing happens.

    `how` features move: "size" averages weighted by size, "mean" averages each token once, "sum" applies the map as it
    is, "keep" takes the anchor's features and ignores the moved ones. A map that leaves slots empty in tokens without a
    mask needs `valid`.
    """

    map: TokenMap | None = None
    size: TokenMap | None = None  # how sizes move; None: a slot has its anchor's, and untracked stays untracked
    how: How = struct.field(pytree_node=False, default="size")
    least: float | None = struct.field(pytree_node=False, default=None)  # sizes become at least this; None: no bound
    valid: Bool[Array, "B M"] | None = None  # of the output; None: where anything valid went in
    proportional: bool | None = struct.field(pytree_node=False, default=None)  # from here on; None: as it was
    key_bias: Float[Array, "B M"] | None = None  # of the output tokens, replaces theirs
    gate: Float[Array, "B M"] | None = None  # the same for their gates
    position: Int[Array, "B M *d"] | None = None  # and for their positions
    x: Float[Array, "B N C"] | None = None  # moved in place of the tokens' own features (normalised, gated)
    append: Tokens | None = None  # put behind the output: caches, restored tokens
    carry: Mapping[str, Any] | None = None  # merged into tokens.carry
    aux: Mapping[str, Any] = struct.field(default_factory=dict)  # losses and counts, collected by the model


def apply(plan: Plan, tokens: Tokens) -> Tokens:
    """Carries out a plan on the tokens and on all that travels with them.

    Raises:
        ValueError: the plan's map takes another number of tokens.
    """
    if plan.x is not None and plan.map is None:
        tokens = tokens.replace(x=plan.x.astype(tokens.x.dtype))
    if plan.map is not None:
        if plan.map.num_in != tokens.length:
            raise ValueError(f"plan.map takes {plan.map.num_in} tokens, tokens.x has {tokens.length}")
        tokens = _move(plan, tokens)
    if plan.valid is not None:
        tokens = tokens.replace(valid=plan.valid)
    if plan.proportional is not None:
        tokens = tokens.replace(proportional=plan.proportional)
    if plan.append is not None:
        tokens = concat(tokens, plan.append)
    if plan.key_bias is not None:
        tokens = tokens.replace(key_bias=plan.key_bias)
    if plan.gate is not None:
        tokens = tokens.replace(gate=plan.gate)
    if plan.position is not None:
        tokens = tokens.replace(position=plan.position)
    if plan.carry is not None:
        tokens = tokens.replace(carry={**tokens.carry, **plan.carry})
    return tokens


def move(
    plan: Plan, x: Float[Array, "B N *c"], size: Float[Array, "B N"] | None
) -> tuple[Float[Array, "B M *c"], Float[Array, "B M"] | None]:
    """Moves features as the plan says, sums and averages in float32; also what averages were divided by.

    An empty slot gives zeros.
    """
    m = plan.map
    assert m is not None
    if plan.how == "keep":
        return rows(x, m.anchor), None
    x32 = x.astype(jnp.float32)
    if plan.how == "sum":
        return m.sum(x32).astype(x.dtype), None

    def along(weight):  # beside features of any rank
        return weight.reshape(weight.shape + (1,) * (x.ndim - 2))

    if plan.how == "mean" or size is None:
        mass, total = m.sum(jnp.ones(x.shape[:2], jnp.float32)), m.sum(x32)
    else:
        mass, total = m.sum(size), m.sum(x32 * along(size))
    return (total / along(jnp.where(mass == 0, 1, mass))).astype(x.dtype), mass


def _move(plan: Plan, tokens: Tokens) -> Tokens:
    m = plan.map
    assert m is not None
    x, mass = move(plan, tokens.x if plan.x is None else plan.x, tokens.size)

    def follow(field, fill=0):
        return None if field is None else rows(field, m.anchor, fill)

    if plan.size is None:
        size = follow(tokens.size, fill=1)
    elif plan.size is m and plan.how == "size":  # sizes add up just as they weigh
        size = mass
    else:
        size = plan.size.sum(tokens.sizes())
    if size is not None and plan.least is not None:
        size = jnp.maximum(size, plan.least)
    valid = tokens.valid
    if valid is not None:
        valid = m.replace(weight=None).sum(valid.astype(jnp.float32)) > 0 if isinstance(m, HardMap) else follow(valid)
    return tokens.replace(
        x=x.astype(tokens.x.dtype),
        size=size,
        valid=valid,
        position=follow(tokens.position, fill=-1),
        order=follow(tokens.order, fill=-1),
        key_bias=follow(tokens.key_bias),
        gate=follow(tokens.gate),
        segment=follow(tokens.segment, fill=-1),
        kind=follow(tokens.kind),
        origin=None if tokens.origin is None else rows(m.dest(), tokens.origin, fill=m.num_out),
    )
