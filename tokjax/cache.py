"""Keys and values of the tokens that a decoder has read and made: static shapes, a set of tokens of its own in every
layer, masks for every row.

Layers that hold the same tokens form a group. A group has P slots for the prompt, which shrink from group to group as
tokens leave, and G slots for what is made:

    slot     0 .. P-1                          P .. P+G-1
    holds    the prompt's tokens, holes too    the token of step t at P + t

The place that a step writes to is the same number in all rows and groups' decode parts, so that an update is a slice,
not a scatter, however many tokens each row has kept. What a slot holds is told by four arrays, which all layers of a
group share:

- `position`: where rotary embeddings have the token;
- `order`: what is visible to what: a query sees keys whose order is not above its own;
- `kind`: 0 empty, else what the tokens' own kinds say (`PROMPT` where they have none), `MADE` for new tokens;
- `valid`: whether the slot counts. Taking a token out of the cache is taking this from it.

They are [B, S], or [B, K, S] where every key head has tokens of its own. Keys and values are arrays [B, K, S, D], one
of each a layer, so that a step writes and reads them in place; layers that share theirs share a buffer.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, Literal

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from tokjax.signals import slot_order
from tokjax.tokens import MASKED, Tokens

Slot = Int[Array, "*BK"]  # one for all rows, or one a row, or one a row and key head
EMPTY, PREFIX, VISUAL, PROMPT, MADE = range(5)
Rotate = Literal["write", "read"]


class Group(struct.PyTreeNode):
    """The cache of layers that hold the same tokens."""

    keys: tuple[Float[Array, "B K S D"], ...]  # one a buffer
    values: tuple[Float[Array, "B K S D"], ...]
    position: Int[Array, "B *K S"]
    order: Int[Array, "B *K S"]
    kind: UInt8[Array, "B *K S"]
    valid: Bool[Array, "B *K S"]
    bias: Float[Array, "B *K S"] | None = None  # on logits: log sizes of merged tokens, gates
    score: Float[Array, "B *K S"] | None = None  # for whoever evicts
    prompt: int = struct.field(pytree_node=False, default=0)  # P
    recent: int | None = struct.field(pytree_node=False, default=None)  # slots are used again, see `bound`

    @property
    def slots(self) -> int:
        """S = P + G."""
        return self.keys[0].shape[2]

    @property
    def per_head(self) -> bool:
        return self.valid.ndim == 3

    def count(self) -> Int[Array, "B *K"]:
        """Tokens held, by row and perhaps head."""
        return self.valid.sum(-1, dtype=jnp.int32)

    def visible(self, order: Int[Array, ""], position: Int[Array, "B"], window: int | None) -> Float[Array, "B #K S"]:
        """The additive bias of the slots for a query of this order and position."""
        seen = self.valid & (self.order <= order)
        if window is not None:
            at = position.reshape(-1, *(1,) * (self.position.ndim - 1))
            seen &= at - self.position < window
        bias = jnp.where(seen, 0.0 if self.bias is None else self.bias, MASKED)
        return bias if self.per_head else bias[:, None]


class Cache(struct.PyTreeNode):
    """What a decoder remembers."""

    groups: tuple[Group, ...]
    at: Int[Array, ""]  # t, steps taken
    start: Int[Array, "B"]  # position of the token of step 0
    # Of every layer: its group, its buffer there; None: it has read no prompt, so that it takes no part.
    layers: tuple[tuple[int, int] | None, ...] = struct.field(pytree_node=False)
    length: int = struct.field(pytree_node=False)  # N, slots of the prompt as it was given: order of step 0
    capacity: int = struct.field(pytree_node=False)  # G
    rotate: Rotate = struct.field(pytree_node=False, default="write")

    @property
    def position(self) -> Int[Array, "B"]:
        """Of the next token."""
        return self.start + self.at

    @property
    def order(self) -> Int[Array, ""]:
        """Of the next token."""
        return self.length + self.at

    def lengths(self) -> tuple[int, ...]:
        """Prompt slots of every layer."""
        return tuple(0 if at is None else self.groups[at[0]].prompt for at in self.layers)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What one layer leaves behind at prefill: the tokens that its attention ran on, their keys and values.

    `shared`: keys and values are those of the layer before.
    """

    tokens: Tokens
    key: Float[Array, "B P K D"]
    value: Float[Array, "B P K D"]
    shared: bool = False

    def same(self, other: "Kept") -> bool:
        """Whether both hold the same tokens: told by the arrays' identity, without a look at them."""
        names = ("position", "order", "valid", "size", "key_bias")
        return all(getattr(self.tokens, name) is getattr(other.tokens, name) for name in names)


def fill(kept: Sequence[Kept | None], start: Int[Array, "B"], length: int, capacity: int, rotate: Rotate) -> Cache:
    """The cache after prefill, from what every layer has left behind.

    Args:
        kept: of all layers, None of one that did not run.
        start: position of the first new token.
        length: N, slots of the prompt.
        capacity: G, new tokens that there is room for; their first is not written yet.
        rotate: whether keys are kept rotated ("write"), or rotated wherever they are read.
    """
    groups: list[list[Kept]] = []
    layers: list[tuple[int, int] | None] = []
    before: Kept | None = None
    for one in kept:
        if one is None:
            layers.append(None)
            continue
        if before is None or not one.same(before):
            groups.append([])
        elif one.shared:
            layers.append((len(groups) - 1, len(groups[-1]) - 1))
            continue
        before = one
        groups[-1].append(one)
        layers.append((len(groups) - 1, len(groups[-1]) - 1))
    made = tuple(_group(group, capacity) for group in groups)
    return Cache(made, jnp.int32(0), start, tuple(layers), length, capacity, rotate)


def _group(kept: Sequence[Kept], capacity: int) -> Group:
    tokens, prompt = kept[0].tokens, kept[0].key.shape[1]
    assert tokens.position is not None

    def room(x: Array, empty: Any = 0) -> Array:
        return jnp.pad(x, ((0, 0), (0, capacity)), constant_values=empty)

    def buffer(x: Array) -> Array:
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, capacity), (0, 0)))

    there = jnp.ones(tokens.x.shape[:2], bool) if tokens.valid is None else tokens.valid
    kind = jnp.full(there.shape, PROMPT) if tokens.kind is None else tokens.kind
    bias = tokens.replace(valid=None).attention_bias()
    return Group(
        tuple(buffer(one.key) for one in kept),
        tuple(buffer(one.value) for one in kept),
        room(tokens.position if tokens.position.ndim == 2 else tokens.position[..., 0]),
        room(slot_order(tokens)),
        room(jnp.where(there, kind, EMPTY).astype(jnp.uint8)),
        room(there),
        None if bias is None else room(bias),
        prompt=prompt,
    )


def admit(cache: Cache) -> tuple[Cache, tuple[Slot, ...]]:
    """Gives the next token a slot in every group, and tells which; keys and values are written by `write`."""

    def group(one: Group) -> tuple[Group, Slot]:
        slot = one.prompt + cache.at if one.recent is None else _least(one, cache.position)

        def put(field: Array, value: Any) -> Array:
            value = jnp.broadcast_to(jnp.asarray(value, field.dtype), field.shape[:-1])
            return _put(field, value[..., None], slot, field.ndim - 1)

        position = cache.position.reshape(-1, *(1,) * (one.position.ndim - 2))
        new = {"position": position, "order": cache.order, "kind": MADE, "valid": True, "bias": 0, "score": 0}
        there = {name: put(getattr(one, name), x) for name, x in new.items() if getattr(one, name) is not None}
        return one.replace(**there), slot

    groups, slots = zip(*map(group, cache.groups), strict=True)
    return cache.replace(groups=groups), slots


def _least(group: Group, position: Int[Array, "B"]) -> Int[Array, "B *K"]:
    """The slot that the next token takes over: an empty one, else that of the least score, the oldest of equal ones."""
    assert group.recent is not None
    worth = (group.order if group.score is None else group.score).astype(jnp.float32)
    recent = group.position > position.reshape(-1, *(1,) * (group.position.ndim - 1)) - group.recent
    worth = jnp.where(group.valid, jnp.where(recent, jnp.inf, worth), -jnp.inf)
    least = worth == worth.min(-1, keepdims=True)
    return jnp.argmin(jnp.where(least, group.order, jnp.iinfo(jnp.int32).max), -1).astype(jnp.int32)


def _put(x: Array, new: Array, slot: Slot, axis: int) -> Array:
    """`new` at a slot, which is one for all, or one a row, or one a row and head."""
    if slot.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(x, new, slot, axis)
    return jax.vmap(lambda x, new, slot: _put(x, new, slot, axis - 1))(x, new, slot)


def write(buffer: Float[Array, "B K S D"], new: Float[Array, "B 1 K D"], slot: Slot) -> Float[Array, "B K S D"]:
    """The buffer with a token in the slot that `admit` told."""
    return _put(buffer, jnp.swapaxes(new, 1, 2).astype(buffer.dtype), slot, 2)


def bound(group: Group, slots: int, recent: int = 0) -> Group:
    """A group that stays at so many slots however much is made: new tokens take over those of the least `score`.

    Without a score the oldest go, which is a window; a score of infinity keeps a token for ever, as the first ones of a
    text (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024). New tokens start at 0;
    who scores is a `decode_step` hook.

    Args:
        group: right after the prompt, with at most `slots` for it: see `compact`.
        slots: S from here on.
        recent: the last tokens by their position, the next one included, stay whatever their score.

    Raises:
        ValueError: fewer slots than the prompt has, or none that a new token could take.
    """
    if slots < group.prompt:
        raise ValueError(f"slots={slots}: must be at least the {group.prompt} of the prompt")
    if not 0 <= recent < slots:
        raise ValueError(f"recent={recent}: must be at least 0 and below slots={slots}")

    def cut(x: Array, axis: int) -> Array:
        more = max(0, slots - x.shape[axis])
        x = jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])
        return jax.lax.slice_in_dim(x, 0, slots, axis=axis)

    told = {name: getattr(group, name) for name in ("position", "order", "kind", "valid", "bias", "score")}
    return group.replace(
        keys=tuple(cut(x, 2) for x in group.keys),
        values=tuple(cut(x, 2) for x in group.values),
        recent=recent,
        **{name: cut(x, x.ndim - 1) for name, x in told.items() if x is not None},
    )


def attend(
    query: Float[Array, "B 1 H D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S D"],
    bias: Float[Array, "B #K S"],
    scale: float,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "B 1 H D"], Float[Array, "B H S"]]:
    """Attention of one token to a cache, and its weights (float32).

    Where nothing is visible, output and weights are 0.
    """
    b, _, heads, width = query.shape
    grouped = query.reshape(b, key.shape[1], -1, width)
    logits = jnp.einsum("bkgd,bksd->bkgs", grouped, key, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits += bias[:, :, None]
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.where(logits > MASKED / 2, jnp.exp(logits - top), 0)
    weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    out = jnp.einsum("bkgs,bksd->bkgd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return out.astype(query.dtype).reshape(b, 1, heads, width), weights.reshape(b, heads, -1)


def split(cache: Cache) -> Cache:
    """The same with a group for every buffer, so that each may come to hold other tokens."""
    groups: list[Group] = []
    place: dict[tuple[int, int], int] = {}
    for g, group in enumerate(cache.groups):
        for i, (key, value) in enumerate(zip(group.keys, group.values, strict=True)):
            place[g, i] = len(groups)
            groups.append(group.replace(keys=(key,), values=(value,)))
    return cache.replace(
        groups=tuple(groups), layers=tuple(None if at is None else (place[at], 0) for at in cache.layers)
    )


def evict(group: Group, gone: Bool[Array, "B *K S"]) -> Group:
    """Takes tokens out of a group by mask: no time or memory is saved, see `compact`.

    `gone` may have a head axis where the group has none yet.
    """
    if gone.ndim > group.valid.ndim:
        group = per_head(group)
    return group.replace(valid=group.valid & ~gone)


def per_head(group: Group) -> Group:
    """The same with the tokens of every key head told apart."""
    if group.per_head:
        return group
    heads = group.keys[0].shape[1]

    def wide(field: Array | None) -> Array | None:
        return None if field is None else jnp.broadcast_to(field[:, None], (field.shape[0], heads, field.shape[-1]))

    names = ("position", "order", "kind", "valid", "bias", "score")
    return group.replace(**{name: wide(getattr(group, name)) for name in names})


def compact(
    group: Group,
    prompt: int,
    score: Float[Array, "B *K P"] | None = None,
    protected: Bool[Array, "B *K P"] | None = None,
) -> Group:
    """A group with fewer slots for the prompt: another shape, thus another program; call it at few, fixed moments.

    Args:
        group: what is made already stays.
        prompt: P' slots; those that are left are in the order of the text, behind them empty ones.
        score: which valid tokens stay, the largest (the first of equal ones); None: `group.score`, else the last ones.
            With a head axis every head keeps its own.
        protected: tokens that stay before any other.

    Raises:
        ValueError: more slots than there are, or none.
    """
    if not 1 <= prompt <= group.prompt:
        raise ValueError(f"prompt={prompt}: must be at least 1 and at most the {group.prompt} slots that there are")
    if score is None:
        score = group.order[..., : group.prompt] if group.score is None else group.score[..., : group.prompt]
    if score.ndim == 3 or (protected is not None and protected.ndim == 3):
        group = per_head(group)
    heads = group.per_head
    valid, order = group.valid[..., : group.prompt], group.order[..., : group.prompt]
    score = jnp.broadcast_to(score if score.ndim == valid.ndim else score[:, None], valid.shape).astype(jnp.float32)
    if protected is not None:
        score = jnp.where(protected if protected.ndim == valid.ndim else protected[:, None], jnp.inf, score)
    best = jnp.argsort(-jnp.where(valid, score, -jnp.inf), axis=-1, stable=True)[..., :prompt]
    there = jnp.take_along_axis(valid, best, -1)
    last = jnp.iinfo(jnp.int32).max
    in_text = jnp.argsort(jnp.where(there, jnp.take_along_axis(order, best, -1), last), axis=-1, stable=True)
    chosen = jnp.take_along_axis(best, in_text, -1)

    def shrink(field: Array | None) -> Array | None:
        if field is None:
            return None
        kept = jnp.take_along_axis(field[..., : group.prompt], chosen, -1)
        return jnp.concatenate([kept, field[..., group.prompt :]], -1)

    def gather(buffer: Array) -> Array:
        at = chosen if heads else jnp.broadcast_to(chosen[:, None], (*buffer.shape[:2], prompt))
        kept = jax.vmap(jax.vmap(lambda slots, i: slots[i]))(buffer[:, :, : group.prompt], at)
        return jnp.concatenate([kept, buffer[:, :, group.prompt :]], 2)

    names = ("position", "order", "kind", "valid", "bias", "score")
    return group.replace(
        keys=tuple(map(gather, group.keys)),
        values=tuple(map(gather, group.values)),
        prompt=prompt,
        **{name: shrink(getattr(group, name)) for name in names},
    )


def held(cache: Cache) -> Float[Array, "L B N"]:
    """Which tokens of the prompt every layer still holds: the share of its key heads that do, in 0..1.

    A merged token stands where its anchor stood. A layer that has read no prompt holds nothing.
    """

    def share(group: Group) -> Float[Array, "B N"]:
        order, there = (x if group.per_head else x[:, None] for x in (group.order, group.valid))
        slots = jnp.arange(cache.length)
        at = (order[..., None] == slots) & there[..., None]
        return at.any(2).astype(jnp.float32).mean(1)

    shares = [share(group) for group in cache.groups]
    nothing = jnp.zeros((len(cache.start), cache.length), jnp.float32)
    return jnp.stack([nothing if at is None else shares[at[0]] for at in cache.layers])


def specs(cache: Cache, data: str | None = "data", model: str | None = "model") -> Cache:
    """How a cache lies on a mesh, a `PartitionSpec` for every array: rows over `data`, key heads over `model`.

    Tokens of a row lie together, so that appending and choosing them needs no communication; with a set of tokens for
    every head, neither does eviction.
    """

    def group(one: Group) -> Group:
        told = PartitionSpec(data, model, None) if one.per_head else PartitionSpec(data, None)
        buffers = (PartitionSpec(data, model, None, None),) * len(one.keys)
        names = ("position", "order", "kind", "valid", "bias", "score")
        fields = {name: None if getattr(one, name) is None else told for name in names}
        return one.replace(keys=buffers, values=buffers, **fields)

    return cache.replace(groups=tuple(map(group, cache.groups)), at=PartitionSpec(), start=PartitionSpec(data))


def nbytes(
    layers: Sequence[int],
    prompts: Sequence[int],
    capacity: int,
    *,
    batch: int,
    heads: int,
    width: int,
    itemsize: int = 2,
    told: int = 0,
) -> int:
    """Bytes of a cache.

    Args:
        layers: buffers of every group.
        prompts: P of every group.
        capacity: G.
        batch: B.
        heads: K, of keys.
        width: D, of a head.
        itemsize: bytes of a number.
        told: bytes a slot of `bias` and `score`, 4 for each that there is.
    """
    slots = [prompt + capacity for prompt in prompts]
    kept = 2 * itemsize * batch * heads * width * sum(n * s for n, s in zip(layers, slots, strict=True))
    return kept + batch * sum(slots) * (4 + 4 + 1 + 1 + told)
