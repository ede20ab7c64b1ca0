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


class Bucketed:
    """A model with data-dependent reducers whose programs have the length that the data need.

    At every cut the rows of a batch are sorted by their count and go on in groups of neighbours.

    Args:
        model: a ViT with at least one reducer of dynamic length.
        capacities: token slots to choose from, prefix included; an integer: so many equal steps up to the input's
            length. Each that occurs has a program of its own: more of them waste less and compile for longer.
        rows: of a group.
        pack: whether rows share rows behind the last cut.

    Raises:
        ValueError: no dynamic reducer, capacities that do not hold the input, or a readout over several blocks.
    """

    def __init__(self, model: Model, capacities: Sequence[int] | int = 8, rows: int = 8, pack: bool = False):
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
        if isinstance(capacities, int):
            capacities = [-(-length * k // capacities) for k in range(1, capacities + 1)]
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
        params, length = self.model.params, self.model.info.length
        tokens, count = self._first(params, images, key)
        counts = [np.asarray(count)]
        place = np.arange(len(counts[0]))  # of every row of the batch in `tokens`
        paid = [(len(place) * length,) * 2]
        for span in self._spans[1:]:
            count, last = counts[-1], span is self._spans[-1]
            if last and self.pack:
                logits, slots = self._run_packed(params, tokens, place, count)
                paid.append((slots, count.sum()))
                break
            order = np.argsort(-count, kind="stable")
            order = np.concatenate([order, np.repeat(order[-1:], -len(order) % self.rows)])  # whole groups
            groups = order.reshape(-1, self.rows)
            capacity = [choose(int(count[rows[0]]), self.capacities) for rows in groups]
            paid.append((sum(capacity) * self.rows, count[order].sum()))
            outs = [
                self._next(params, tokens, place[rows], rows, key, capacity=slots, span=span)
                for rows, slots in zip(groups, capacity, strict=True)
            ]
            joined = self._joined(outs)
            place[order] = np.arange(len(order))
            if last:
                logits = np.asarray(joined)[place]
            else:
                tokens, counted = joined
                counts.append(np.asarray(counted)[place])
        return logits, Usage(np.stack(counts), *(tuple(map(int, column)) for column in zip(*paid, strict=True)))

    def _run_packed(self, params, tokens: Tokens, place, counts):
        """The last stretch, with all rows of the batch packed into as few as hold them; and the slots of these."""
        length = tokens.length
        packed = first_fit(counts.tolist(), length)
        step = max(1, len(counts) // 8)  # one program for so many numbers of packed rows
        shape = -(-len(packed) // step) * step, length
        source = np.full(shape, tokens.batch * length, np.int32)  # slot in the flat batch; beyond it: empty
        segment = np.full(shape, -1, np.int32)
        back = np.full((len(counts), length), shape[0] * shape[1], np.int32)
        for row, members in enumerate(packed):
            at = 0
            for number, i in enumerate(members):
                slot = np.arange(counts[i])
                source[row, at : at + counts[i]] = place[i] * length + slot
                segment[row, at : at + counts[i]] = number
                back[i, slot] = row * length + at + slot
                at += counts[i]
        return np.asarray(self._shared(params, tokens, place, source, segment, back)), shape[0] * length

    # Programs

    def _parts(self, params: Mapping[str, Any]) -> tuple[Any, Any]:
        parts: Any = nnx.merge(self.model._graph, params)
        return parts["model"], self.model._hooks(parts["reducers"])

    def _embedded(self, params, images, key):
        with token_map.apply_form(self.model.form):
            vit, hooks = self._parts(params)
            context = Context(grid=self.model.info.grid, key=key)
            tokens = vit.stretch(vit.embed(images), hooks, context, self._spans[0])
        return self._settled(tokens)

    def _stretch(self, params, tokens: Tokens, place, rows, key, *, capacity: int, span: tuple[int, int]):
        """The rows at `place`, which are `rows` of the batch, through the blocks of `span` in `capacity` slots."""
        with token_map.apply_form(self.model.form):
            vit, hooks = self._parts(params)
            tokens = jax.tree.map(lambda leaf: leaf[place][:, :capacity] if leaf.ndim > 1 else leaf[place], tokens)
            context = Context(grid=self.model.info.grid, key=key, rows=rows)
            tokens = vit.stretch(tokens, hooks, context, span)
            if span[1] == self.model.info.depth:
                return vit.readout(Ran(tokens, None, None, None)).logits
        return self._settled(tokens)

    def _stretch_packed(self, params, tokens: Tokens, place, source, segment, back) -> Float[Array, "B K"]:
        vit, hooks = self._parts(params)

        def take(leaf, index):
            flat = leaf.reshape(-1, *leaf.shape[2:])
            return flat.at[index].get(mode="fill", fill_value=0)

        fields = {name: getattr(tokens, name) for name in ("x", "size", "position", "key_bias", "kind")}
        shared = {name: None if leaf is None else take(leaf, source) for name, leaf in fields.items()}
        packed = tokens.replace(**shared, valid=segment >= 0, segment=segment, origin=None, carry={})
        context = Context(grid=self.model.info.grid)
        out = vit.stretch(packed, hooks, context, self._spans[-1])
        apart = jax.tree.map(lambda leaf: leaf[place], tokens).replace(x=take(out.x, back))
        return vit.readout(Ran(apart, None, None, None)).logits

    def _settled(self, tokens: Tokens) -> tuple[Tokens, Int[Array, " B"]]:
        """The valid tokens at the front of as many slots as the input has, without what was reported; their counts.

        A number for every row (such as its input patches) goes with the row.
        """
        for name, state in tokens.carry.items():
            if any(jnp.ndim(leaf) != 1 for leaf in jax.tree.leaves(state)):
                raise ValueError(f"carry={name!r}: state of tokens between blocks cannot be regrouped")
        return compact(tokens.replace(aux={}), self.model.info.length), tokens.count()
