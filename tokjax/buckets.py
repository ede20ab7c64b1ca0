"""Data-dependent lengths that save time, not only MACs: buckets of few capacities, and rows packed together.

Under jit a reducer whose count depends on the data fills a static capacity and masks the rest, which costs as much as
no reduction. Here the program is cut behind every block where such a reducer stands, or before it where the reducer
stands there, the true counts are read on the host, and the rows go on in groups:

* `Bucketed(model)`: every group has the smallest of a few capacities that holds its rows;
* `Bucketed(model, pack=True)`: behind the last such block rows of any length share rows of one length, told apart by
  `Tokens.segment`, so that hardly a slot is empty.

All give the outputs of the masked program. Groups have a fixed number of rows, so that there is one program for each
capacity and stretch of blocks. Of a T5 it is the encoder that is cut; its decoder runs in the program of the last
stretch and attends to as many slots as its group has.
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
from tokjax.hooks import CROSS, Hook, reduce
from tokjax.models.t5 import Seq2Seq, T5Config
from tokjax.models.vit import ViTConfig
from tokjax.signals import Context, Signals
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
        overflow: tokens of every row that a reducer dropped because its own capacity was full, at all cuts together.
    """

    counts: Int[np.ndarray, "cuts B"]
    slots: tuple[int, ...]
    used: tuple[int, ...]
    overflow: Int[np.ndarray, "B"]


class Bucketed:
    """A model with data-dependent reducers whose programs have the length that the data need.

    At every cut the rows of a batch are sorted by their count and go on in groups of neighbours.

    Args:
        model: a ViT or a T5 with at least one reducer of dynamic length.
        capacities: token slots to choose from, prefix included; an integer: so many equal steps up to the input's
            length. Each that occurs has a program of its own: more of them waste less and compile for longer.
        rows: of a group.
        pack: whether rows share rows behind the last cut.

    Raises:
        ValueError: no dynamic reducer, capacities that do not hold the input, or a readout over several blocks.
    """

    def __init__(self, model: Model, capacities: Sequence[int] | int = 8, rows: int = 8, pack: bool = False):
        if not isinstance(model.config, ViTConfig | T5Config):
            raise ValueError(f"model is of a {type(model.config).__name__}: must be of a ViTConfig or a T5Config")
        names = [m.name for m in model.methods if m.name in reducers.REGISTRY]
        dynamic = {name for name in names if reducers.entry(name).length == "dynamic"}
        found = [hook for m in model.methods if m.name in dynamic for hook in m.reducer.hooks(model.info)]
        found = [hook for hook in found if hook.call == "plan" and hook.where != "input"]
        self._early = {hook.layer for hook in found if hook.where == "before_block"}
        cuts = sorted({hook.layer + (hook.where != "before_block") for hook in found})
        cuts = [cut for cut in cuts if cut < model.info.depth]
        if not cuts:
            raise ValueError(f"model={model!r}: has no reducer of dynamic length before its last block")
        if any(hook.where == "readout" for hook in model.hooks):
            raise ValueError(f"model={model!r}: has a readout over blocks of several lengths")
        self.model, self.capacities, self.rows, self.pack = model, capacities, rows, pack
        if rows < 1:
            raise ValueError(f"rows={rows}: must be at least 1")
        self._slots(model.info.length)
        if pack and any(self._behind(hook, cuts[-1]) for hook in model.hooks):
            raise ValueError(f"pack=True: model={model!r} has reducers behind its last one of dynamic length")
        ends = [*cuts, model.info.depth]
        self._spans = list(zip([0, *cuts], ends, strict=True))
        self._first = jax.jit(self._started)
        self._next = jax.jit(self._stretch, static_argnames=("capacity", "length", "span"))
        self._shared = jax.jit(self._stretch_packed)
        self._joined = jax.jit(lambda groups: jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *groups))

    def _slots(self, length: int) -> tuple[int, ...]:
        """The capacities for inputs of so many tokens."""
        capacities = self.capacities
        if isinstance(capacities, int):
            capacities = [-(-length * k // capacities) for k in range(1, capacities + 1)]
        if not capacities or min(capacities) < 1 or max(capacities) < length:
            raise ValueError(
                f"capacities={tuple(capacities)}: must be at least 1, and one must hold the input's {length} tokens"
            )
        return tuple(sorted(set(capacities)))

    def _behind(self, hook: Hook, cut: int) -> bool:
        """Whether a hook acts on the tokens behind a cut."""
        before = hook.where == "before_block" and hook.layer == cut and cut in self._early
        return hook.layer >= cut and not before and hook.where != "input" and hook.where not in CROSS

    def __call__(self, inputs: PyTree, *, key: Array | None = None) -> Float[np.ndarray, "B *K"]:
        """Logits, as `model` gives them."""
        return self.run(inputs, key=key)[0]

    def run(self, inputs: PyTree, *, key: Array | None = None) -> tuple[Float[np.ndarray, "B *K"], Usage]:
        """Logits, and what they took.

        Raises:
            ValueError: inputs of another shape or of more tokens than the largest capacity, or reducers that keep state
                of tokens between blocks: it cannot be regrouped.
        """
        self.model.config.check(inputs)
        length = inputs.ids.shape[1] if isinstance(inputs, Seq2Seq) else self.model.info.length
        params, capacities = self.model.params, self._slots(length)
        tokens, count, overflow = self._first(params, inputs, key)
        counts, lost = [np.asarray(count)], np.array(overflow)
        place = np.arange(len(counts[0]))  # of every row of the batch in `tokens`
        paid = [(len(place) * length,) * 2]
        for span in self._spans[1:]:
            count, last = counts[-1], span is self._spans[-1]
            if last and self.pack:
                logits, slots = self._run_packed(params, tokens, inputs, key, place, count, capacities)
                paid.append((slots, count.sum()))
                break
            order = np.argsort(-count, kind="stable")
            order = np.concatenate([order, np.repeat(order[-1:], -len(order) % self.rows)])  # whole groups
            groups = order.reshape(-1, self.rows)
            capacity = [choose(int(count[rows[0]]), capacities) for rows in groups]
            paid.append((sum(capacity) * self.rows, count[order].sum()))
            outs = [
                self._next(params, tokens, inputs, place[rows], rows, key, capacity=slots, length=length, span=span)
                for rows, slots in zip(groups, capacity, strict=True)
            ]
            joined = self._joined(outs)
            place[order] = np.arange(len(order))
            if last:
                logits = np.asarray(joined)[place]
            else:
                tokens, *counted = joined
                counted, overflow = (np.asarray(each)[place] for each in counted)
                counts.append(counted)
                lost += overflow
        slots, used = (tuple(map(int, column)) for column in zip(*paid, strict=True))
        return logits, Usage(np.stack(counts), slots, used, lost)

    def _run_packed(self, params, tokens: Tokens, inputs: PyTree, key, place, counts, capacities):
        """The last stretch, with all rows of the batch packed into as few as hold them; and the slots of these."""
        length = tokens.length
        packed = first_fit(counts.tolist(), length)
        step = max(1, len(counts) // 8)  # one program for so many numbers of packed rows
        shape = -(-len(packed) // step) * step, length
        source = np.full(shape, tokens.batch * length, np.int32)  # slot in the flat batch; beyond it: empty
        segment = np.full(shape, -1, np.int32)
        apart = len(counts), min(choose(int(counts.max()), capacities), length)
        back = np.full(apart, shape[0] * shape[1], np.int32)
        for row, members in enumerate(packed):
            at = 0
            for number, i in enumerate(members):
                slot = np.arange(counts[i])
                source[row, at : at + counts[i]] = place[i] * length + slot
                segment[row, at : at + counts[i]] = number
                back[i, slot] = row * length + at + slot
                at += counts[i]
        logits = self._shared(params, tokens, inputs, key, place, source, segment, back)
        return np.asarray(logits), shape[0] * length

    # Programs

    def _parts(self, params: Mapping[str, Any]) -> tuple[Any, Any]:
        parts: Any = nnx.merge(self.model._graph, params)
        return parts["model"], self.model._hooks(parts["reducers"])

    def _context(self, inputs: PyTree, key: Array | None, rows: Array | None = None) -> Context:
        ids = inputs.ids if isinstance(inputs, Seq2Seq) else None
        return Context(grid=self.model.info.grid, key=key, rows=rows, ids=ids)

    def _blocks(self, module, hooks, tokens: Tokens, context: Context, span: tuple[int, int], opening: bool) -> Tokens:
        """The blocks of a span, and the reducers that stand right before the next one."""
        first, last = span
        mine = hooks
        if not opening:
            done = {"before_block", "input"} if first in self._early else {"input"}
            mine = [hook for hook in hooks if not (hook.layer == first and hook.where in done)]
        tokens = module.stretch(tokens, mine, context, span, opening)
        if last in self._early:
            tokens, _ = reduce(hooks, "before_block", last, tokens, Signals(context=context))
        return tokens

    def _started(self, params, inputs: PyTree, key):
        with token_map.apply_form(self.model.form):
            module, hooks = self._parts(params)
            tokens = module.start(inputs)
            left = self._blocks(module, hooks, tokens, self._context(inputs, key), self._spans[0], opening=True)
        return self._settled(left, tokens.length)

    def _stretch(self, params, tokens: Tokens, inputs, place, rows, key, *, capacity: int, length: int, span):
        """The rows at `place`, which are `rows` of the batch, through the blocks of `span` in `capacity` slots."""
        with token_map.apply_form(self.model.form):
            module, hooks = self._parts(params)
            tokens = jax.tree.map(lambda leaf: leaf[place][:, :capacity] if leaf.ndim > 1 else leaf[place], tokens)
            inputs = jax.tree.map(lambda leaf: leaf[rows], inputs)
            context = self._context(inputs, key, rows)
            tokens = self._blocks(module, hooks, tokens, context, span, opening=False)
            if span[1] == self.model.info.depth:
                return module.finish(tokens, inputs, hooks, context)
        return self._settled(tokens, length)

    def _stretch_packed(
        self, params, tokens: Tokens, inputs, key, place, source, segment, back
    ) -> Float[Array, "B *K"]:
        module, hooks = self._parts(params)

        def take(leaf, index):
            flat = leaf.reshape(-1, *leaf.shape[2:])
            return flat.at[index].get(mode="fill", fill_value=0)

        fields = {name: getattr(tokens, name) for name in ("x", "size", "position", "key_bias", "kind")}
        shared = {name: None if leaf is None else take(leaf, source) for name, leaf in fields.items()}
        packed = tokens.replace(**shared, valid=segment >= 0, segment=segment, origin=None, carry={})
        context = self._context(inputs, key)
        out = self._blocks(module, hooks, packed, context, self._spans[-1], opening=False)
        slots = back.shape[1]
        apart = jax.tree.map(lambda leaf: leaf[place][:, :slots] if leaf.ndim > 1 else leaf[place], tokens)
        return module.finish(apart.replace(x=take(out.x, back)), inputs, hooks, context)

    def _settled(self, tokens: Tokens, length: int) -> tuple[Tokens, Int[Array, " B"], Int[Array, " B"]]:
        """The valid tokens at the front of so many slots, without what was noted; their counts, and those of overflow.

        A number for every row (such as its input patches) goes with the row.
        """
        for name, state in tokens.carry.items():
            if any(jnp.ndim(leaf) != 1 for leaf in jax.tree.leaves(state)):
                raise ValueError(f"carry={name!r}: state of tokens between blocks cannot be regrouped")
        overflow = sum((noted["overflow"] for noted in tokens.aux.values() if "overflow" in noted), jnp.int32(0))
        overflow = jnp.broadcast_to(overflow, (tokens.batch,))
        return compact(tokens.replace(aux={}), length), tokens.count(), overflow
