"""Data-dependent lengths that save time, not only MACs: buckets of few capacities, and rows packed together.

Under jit a reducer whose count depends on the image fills a static capacity and masks the rest, which costs as much as
no reduction. Here the program is cut behind every block where such a reducer stands, the true counts are read on the
host, and the rows go on in groups:

* `Bucketed(model)`: every group has the smallest of a few capacities that holds its rows;
* `Bucketed(model, pack=True)`: behind the last such block rows of any length share rows of one length, told apart by
  `Tokens.segment`, so that hardly a slot is empty.

All give the outputs of the masked program. Groups have a fixed number of rows, so that there is one program for each
capacity and stretch of blocks.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from tokjax import reducers, token_map
from tokjax.api import Model
from tokjax.hooks import reducing
from tokjax.models.transformer import Ran
from tokjax.models.vit import ViTConfig
from tokjax.signals import Context
from tokjax.token_map import HardMap, Plan
from tokjax.tokens import Tokens


def compact(tokens: Tokens, capacity: int) -> Tokens:
    """The valid tokens of every row at its front, in order, in `capacity` slots.

    Rows with more lose their last ones: choose the capacity from the counts (`choose`).
    """
    n = tokens.length
    valid = jnp.ones(tokens.x.shape[:2], bool) if tokens.valid is None else tokens.valid
    order = jnp.argsort(~valid, axis=1, stable=True)[:, :capacity].astype(jnp.int32)
    order = jnp.pad(order, ((0, 0), (0, capacity - order.shape[1])))
    filled = jnp.arange(capacity) < valid.sum(1, keepdims=True)
    nobody = jnp.zeros((tokens.batch, 0), jnp.int32)
    kept = HardMap(jnp.where(filled, order, n), nobody, nobody, n)
    return token_map.apply(Plan(kept, how="keep", valid=filled), tokens)


def choose(count: int, capacities: Sequence[int]) -> int:
    """The smallest capacity that holds `count` tokens.

    Raises:
        ValueError: none does.
    """
    fitting = [capacity for capacity in capacities if capacity >= count]
    if not fitting:
        raise ValueError(f"count={count}: is more than the largest of capacities={tuple(capacities)}")
    return min(fitting)


def first_fit(counts: Sequence[int], length: int) -> list[list[int]]:
    """Sequences packed into rows of `length` slots, longest first, each into the first row that has room.

    Returns:
        Of every packed row the indices of its sequences.

    Raises:
        ValueError: a sequence that is longer than a row.
    """
    if max(counts, default=0) > length:
        raise ValueError(f"length={length}: must hold the longest sequence, of {max(counts)} tokens")
    packed: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(counts)), key=lambda i: -counts[i]):
        at = next((row for row, free in enumerate(room) if free >= counts[i]), len(room))
        if at == len(room):
            packed.append([])
            room.append(length)
        packed[at].append(i)
        room[at] -= counts[i]
    return packed


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one call paid for.

    Attributes:
        counts: tokens of every row behind each cut, [cuts, B].
        slots: token slots that were computed in each stretch of blocks, the first one included.
        used: valid tokens among them.
    """

    counts: Int[np.ndarray, "cuts B"]
    slots: tuple[int, ...]
    used: tuple[int, ...]


@dataclasses.dataclass
class Group:
    """Rows that go on together.

    Attributes:
        tokens: of which `at` are the rows' own.
        count: valid tokens of every row.
        rows: their numbers in the batch.
        at: their places in `tokens`.
    """

    tokens: Tokens
    count: Int[np.ndarray, "R"]
    rows: Int[np.ndarray, "R"]
    at: Int[np.ndarray, "R"]


def _scattered(parts: Sequence[tuple[np.ndarray, np.ndarray]], batch: int) -> np.ndarray:
    """(rows, their values) in the order of the batch."""
    out = np.empty((batch, *parts[0][1].shape[1:]), parts[0][1].dtype)
    for rows, values in parts:
        out[rows] = values
    return out


class Bucketed:
    """A model with data-dependent reducers whose programs have the length that the data need.

    The rows of a batch are sorted by their count behind the first cut and go on in groups of neighbours.

    Args:
        model: a ViT with at least one reducer of dynamic length.
        capacities: token slots to choose from, prefix included; None: eighths of the input's length.
        rows: of a group.
        pack: whether rows share rows behind the last cut.

    Raises:
        ValueError: no dynamic reducer, capacities that do not hold the input, or a readout over several blocks.
    """

    def __init__(self, model: Model, capacities: Sequence[int] | None = None, rows: int = 8, pack: bool = False):
        if not isinstance(model.config, ViTConfig):
            raise ValueError(f"model is of a {type(model.config).__name__}: must be of a ViTConfig")
        names = [m.name for m in model.methods if m.name in reducers.REGISTRY]
        dynamic = {name for name in names if reducers.entry(name).length == "dynamic"}
        found = [hook for m in model.methods if m.name in dynamic for hook in m.reducer.hooks(model.info)]
        cuts = [layer + 1 for layer in reducing(found) if layer + 1 < model.info.depth]
        if not cuts:
            raise ValueError(f"model={model!r}: has no reducer of dynamic length before its last block")
        if any(hook.where == "readout" for hook in model.hooks):
            raise ValueError(f"model={model!r}: has a readout over blocks of several lengths")
        length = model.info.length
        capacities = [-(-length * k // 8) for k in range(1, 9)] if capacities is None else capacities
        if rows < 1 or not capacities or min(capacities) < 1 or max(capacities) < length:
            raise ValueError(f"capacities={tuple(capacities)}, rows={rows}: must hold the input's {length} tokens")
        if pack and any(hook.layer >= cuts[-1] for hook in model.hooks):
            raise ValueError(f"pack=True: model={model!r} has reducers behind its last one of dynamic length")
        self.model, self.capacities, self.rows, self.pack = model, tuple(sorted(set(capacities))), rows, pack
        ends = [*cuts, model.info.depth]
        self._spans = list(zip([0, *cuts], ends, strict=True))
        self._first = jax.jit(self._embedded)
        self._next = jax.jit(self._stretch, static_argnames=("capacity", "span"))
        self._shared = jax.jit(self._stretch_packed)
        self._joined = jax.jit(lambda groups: jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *groups))

    def __call__(self, images: PyTree, *, key: Array | None = None) -> Float[np.ndarray, "B K"]:
        """Logits, as `model` gives them."""
        return self.run(images, key=key)[0]

    def run(self, images: PyTree, *, key: Array | None = None) -> tuple[Float[np.ndarray, "B K"], Usage]:
        """Logits, and what they took.

        Raises:
            ValueError: inputs of another shape, or reducers that keep state of tokens between blocks: it cannot
                be regrouped.
        """
        self.model.config.check(images)
        params, batch = self.model.params, jax.tree.leaves(images)[0].shape[0]
        tokens, count = self._first(params, images, key)
        counts = [np.asarray(count)]
        usage = [(batch * self.model.info.length,) * 2]
        order = np.argsort(-counts[0], kind="stable")
        order = np.concatenate([order, np.repeat(order[-1:], -batch % self.rows)])  # whole groups
        groups = [Group(tokens, counts[0][rows], rows, rows) for rows in order.reshape(-1, self.rows)]
        for span in self._spans[1:-1]:
            usage.append(self._paid(groups))
            groups = [self._advance(params, group, key, span) for group in groups]
            counts.append(_scattered([(group.rows, group.count) for group in groups], batch))
        span = self._spans[-1]
        if self.pack:
            logits, paid = self._run_packed(params, groups, span)
            usage.append(paid)
        else:
            usage.append(self._paid(groups))
            ended = [self._advance(params, group, key, span) for group in groups]
            logits = _scattered([(group.rows, np.asarray(group.tokens)) for group in ended], batch)
        return logits, Usage(np.stack(counts), *(tuple(map(int, column)) for column in zip(*usage, strict=True)))

    def _paid(self, groups: "Sequence[Group]") -> tuple[int, int]:
        capacity = [choose(int(group.count.max()), self.capacities) for group in groups]
        return sum(capacity) * self.rows, sum(int(group.count.sum()) for group in groups)

    def _advance(self, params, group: "Group", key, span) -> "Group":
        capacity = choose(int(group.count.max()), self.capacities)
        out, count = self._next(params, group.tokens, group.at, group.rows, key, capacity=capacity, span=span)
        return Group(out, np.asarray(count), group.rows, np.arange(self.rows))

    def _run_packed(self, params, groups: "Sequence[Group]", span):
        """The last stretch, with all rows of the batch packed into as few as hold them."""
        length = max(self.capacities)
        whole = [self._next(params, g.tokens, g.at, g.rows, None, capacity=length, span=None)[0] for g in groups]
        tokens, counts = self._joined(whole), np.concatenate([group.count for group in groups])
        rows = np.concatenate([group.rows for group in groups])
        fresh = np.unique(rows, return_index=True)[1]  # repeated rows, which fill groups, are not packed
        packed = first_fit([int(counts[i]) for i in fresh], length)
        step = max(1, len(fresh) // 8)  # one program for so many numbers of packed rows
        shape = -(-len(packed) // step) * step, length
        source = np.full(shape, tokens.length * len(counts), np.int32)  # slot in the flat batch; beyond it: empty
        segment = np.full(shape, -1, np.int32)
        back = np.full((len(counts), tokens.length), shape[0] * shape[1], np.int32)
        for row, members in enumerate(packed):
            at = 0
            for number, member in enumerate(members):
                i = fresh[member]
                place = np.arange(counts[i])
                source[row, at : at + counts[i]] = i * tokens.length + place
                segment[row, at : at + counts[i]] = number
                back[i, place] = row * length + at + place
                at += counts[i]
        logits = self._shared(params, tokens, source, segment, back)
        return _scattered([(rows[fresh], np.asarray(logits)[fresh])], len(fresh)), (shape[0] * length, counts.sum())

    # Programs

    def _parts(self, params: Mapping[str, Any]) -> tuple[Any, Any]:
        parts: Any = nnx.merge(self.model._graph, params)
        return parts["model"], self.model._hooks(parts["reducers"])

    def _embedded(self, params, images, key):
        with token_map.apply_form(self.model.form):
            vit, hooks = self._parts(params)
            context = Context(grid=self.model.info.grid, key=key)
            tokens = vit.stretch(vit.embed(images), hooks, context, self._spans[0])
        return _settled(tokens), tokens.count()

    def _stretch(self, params, tokens: Tokens, at, rows, key, *, capacity: int, span: tuple[int, int] | None):
        """The rows `at` of the tokens through the blocks of `span`; through none: only cut to the capacity."""
        with token_map.apply_form(self.model.form):
            vit, hooks = self._parts(params)
            tokens = compact(jax.tree.map(lambda leaf: leaf[at], tokens), capacity)
            if span is None:
                return tokens, tokens.count()
            context = Context(grid=self.model.info.grid, key=key, rows=rows)
            tokens = vit.stretch(tokens, hooks, context, span)
            if span[1] == self.model.info.depth:
                return vit.readout(Ran(tokens, None, None, None)).logits, tokens.count()
        return _settled(tokens), tokens.count()

    def _stretch_packed(self, params, tokens: Tokens, source, segment, back) -> Float[Array, "B K"]:
        vit, hooks = self._parts(params)

        def take(leaf, index):
            flat = leaf.reshape(-1, *leaf.shape[2:])
            return flat.at[index].get(mode="fill", fill_value=0)

        fields = {name: getattr(tokens, name) for name in ("x", "size", "position", "key_bias", "kind")}
        shared = {name: None if leaf is None else take(leaf, source) for name, leaf in fields.items()}
        packed = tokens.replace(**shared, valid=segment >= 0, segment=segment, origin=None, carry={})
        context = Context(grid=self.model.info.grid)
        out = vit.stretch(packed, hooks, context, self._spans[-1])
        apart = tokens.replace(x=take(out.x, back))
        return vit.readout(Ran(apart, None, None, None)).logits


def _settled(tokens: Tokens) -> Tokens:
    """Without what was reported; a number for every row (such as its input patches) goes with the row."""
    tied = [name for name, state in tokens.carry.items() if any(jnp.ndim(leaf) != 1 for leaf in jax.tree.leaves(state))]
    if tied:
        raise ValueError(f"carry={sorted(tied)}: state of tokens between blocks cannot be regrouped")
    return tokens.replace(aux={})
