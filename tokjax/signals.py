"""What a block hands to a reducer, and the scores derived from it. Under jit, what nobody reads is never computed.

Scores obey the same rule as the attention itself, and are computed for the rows that are asked for: no `[B,H,N,N]` map.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.relax import policy_softmax
from tokjax.tokens import Tokens

Queries = slice | Int[Array, "Q"] | Int[Array, "B Q"]  # of all rows of the batch, or of each its own


@dataclasses.dataclass(frozen=True)
class AttentionRule:
    """How logits become attention, static; shared by the attention of a block and the scores of reducers.

    Attributes:
        scale: of the query-key products; D**-0.5 in most models, 1 in T5.
        normaliser: "softmax"; "softmax1", with one phantom key of logit 0 and value 0 (MrT5, Kallini et al. 2024);
            "policy", the masked softmax of DynamicViT (Rao et al. 2021, eq. 10), which needs `Signals.policy`.
        soft_cap: logits become `cap * tanh(logits / cap)` before any bias (Gemma 2); None: not capped.
        causal: a query sees no later key.
        chord: the policy softmax has a bounded gradient, see `tokjax.relax.policy_softmax`.
    """

    scale: float = 1.0
    normaliser: Literal["softmax", "softmax1", "policy"] = "softmax"
    soft_cap: float | None = None
    causal: bool = False
    chord: bool = False


class Context(struct.PyTreeNode):
    """What lies outside of the tokens; None where a model has no such thing."""

    grid: tuple[int, int] | None = struct.field(pytree_node=False, default=None)  # patches down and across
    key: Array | None = None  # PRNG key of this call, one or one a row
    rows: Int[Array, "B"] | None = None  # number of every row, where a batch was regrouped; None: 0, 1, ...
    text: Float[Array, "B T C"] | None = None
    text_valid: Bool[Array, "B T"] | None = None
    frames: Int[Array, "B N"] | None = None  # frame of every token
    ids: Int[Array, "B N"] | None = None  # of the tokens at the input, in a vocabulary; found again by their position
    image_sizes: Int[Array, "B 2"] | None = None  # height, width in pixels before padding
    relevance: Float[Array, "B h w"] | None = None  # of the patches of an image, told by another model
    boxes: Int[Array, "B 2 4"] | None = None  # top, left, height, width in pixels: of the input; of `relevance`
    memory: Tokens | None = None  # the encoder's tokens, which a decoder attends to
    relative: Any = None  # what the blocks of a stack share of their relative bias
    # Whether a decoder reads a prompt, to go on with it: of what its blocks give only the last token counts.
    reading: bool = struct.field(pytree_node=False, default=False)

    def row_keys(self, batch: int, salt: int, seed: int = 0) -> Array:
        """One key a row, which does not depend on the batch around it; `seed` serves where the call has no key."""
        key = jax.random.key(seed) if self.key is None else self.key
        if key.ndim == 0:
            rows = jnp.arange(batch) if self.rows is None else self.rows
            key = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
        return jax.vmap(jax.random.fold_in, (0, None))(key, salt)


class Signals(struct.PyTreeNode):
    """The attention inputs of a block; a site that lies before the attention has only the context.

    `bias` holds everything additive that this attention uses. `pair_bias(queries)` gives a further bias `[1|B,H,Q,N]`
    for the chosen query rows, where a full map would be wasted (relative positions). `weights`, when given, win.
    """

    query: Float[Array, "B N H D"] | None = None
    key: Float[Array, "B N K D"] | None = None  # K divides H: grouped queries
    value: Float[Array, "B N K D"] | None = None
    bias: Float[Array, "#B #H #N N"] | None = None
    policy: Float[Array, "B N"] | None = None  # 1 kept, 0 dropped: keys of the policy softmax
    lse: Float[Array, "B N H"] | None = None  # log-sum-exp of every row's logits, where the kernel gave it
    weights: Float[Array, "B H N N"] | None = None
    context: Context = struct.field(default_factory=Context)
    rule: AttentionRule = struct.field(pytree_node=False, default=AttentionRule())
    pair_bias: Callable[[Queries], Array] | None = struct.field(pytree_node=False, default=None)

    def need(self, name: str) -> Array:
        """The field `name`.

        Raises:
            ValueError: this site has no such signal.
        """
        field = getattr(self, name)
        if field is None:
            raise ValueError(
                f"signals.{name}=None: this reducer needs it; hook it in after or around an attention that has it"
            )
        return field


def select(x: Array, queries: Queries, axis: int) -> Array:
    """What an array [B, ...] has for these queries along one of its axes."""
    if isinstance(queries, slice) or queries.ndim == 1:
        return x[(slice(None),) * axis + (queries,)]
    batch, count = queries.shape
    at = queries.reshape(batch, *(1,) * (axis - 1), count, *(1,) * (x.ndim - axis - 1))
    return jnp.take_along_axis(x, at, axis)


def logits(signals: Signals, queries: Queries = slice(None)) -> Float[Array, "B H Q N"]:
    """Attention logits of the chosen query rows, float32, with scale, soft-cap, biases and causal mask."""
    rule = signals.rule
    q, k = select(signals.need("query"), queries, 1).astype(jnp.float32), signals.need("key").astype(jnp.float32)
    b, rows, heads, width = q.shape
    groups = k.shape[2]
    out = jnp.einsum("bqkgd,bnkd->bkgqn", q.reshape(b, rows, groups, heads // groups, width), k, precision="highest")
    out = out.reshape(b, heads, rows, -1) * rule.scale
    if rule.soft_cap is not None:
        out = rule.soft_cap * jnp.tanh(out / rule.soft_cap)
    if signals.bias is not None:
        out += signals.bias if signals.bias.shape[2] == 1 else select(signals.bias, queries, 2)
    if signals.pair_bias is not None:
        out += signals.pair_bias(queries)
    if rule.causal:
        place = jnp.arange(k.shape[1])
        own = place[queries] if isinstance(queries, slice) else queries
        out = jnp.where(own[..., None, :, None] >= place, out, -1e30)
    return out


def attention_rows(signals: Signals, queries: Queries = slice(None)) -> Float[Array, "B H Q N"]:
    """Attention probabilities of the chosen query rows, float32, without the others.

    With `signals.lse`, from the kernel's log-sum-exp: `exp(logits - lse)`.
    """
    if signals.weights is not None:
        return select(signals.weights, queries, 2).astype(jnp.float32)
    l, rule = logits(signals, queries), signals.rule
    if rule.normaliser == "policy":
        own = queries if isinstance(queries, slice) or queries.ndim == 1 else queries[:, None]
        return policy_softmax(l, signals.need("policy")[:, None], own, chord=rule.chord)
    if signals.lse is not None:
        return jnp.exp(l - jnp.moveaxis(select(signals.lse, queries, 1), 1, 2)[..., None])
    if rule.normaliser == "softmax1":
        top = jax.lax.stop_gradient(jnp.maximum(l.max(-1, keepdims=True), 0))
        e = jnp.exp(l - top)
        return e / (jnp.exp(-top) + e.sum(-1, keepdims=True))
    return jax.nn.softmax(l, -1)


def slot_order(tokens: Tokens) -> Int[Array, "B N"]:
    """The causal order of tokens, that of their slots where they have none."""
    if tokens.order is not None:
        return tokens.order
    if tokens.position is not None and tokens.position.ndim == 2:
        return tokens.position
    return jnp.broadcast_to(jnp.arange(tokens.length, dtype=jnp.int32), tokens.x.shape[:2])


def in_text(tokens: Tokens, there: Bool[Array, "B N"]) -> Int[Array, "B N"]:
    """The slots of the tokens that are there in causal order, behind them the others."""
    last = jnp.iinfo(jnp.int32).max
    return jnp.argsort(jnp.where(there, slot_order(tokens), last), axis=-1, stable=True).astype(jnp.int32)


def last_slot(tokens: Tokens) -> Int[Array, "B"]:
    """The slot of the last token of every row in causal order; of a row without any, the first slot."""
    order = slot_order(tokens)
    return jnp.argmax(order if tokens.valid is None else jnp.where(tokens.valid, order, -1), 1).astype(jnp.int32)


def last_slots(tokens: Tokens, count: int) -> Int[Array, "B Q"]:
    """The slots of the last `count` tokens of every row, in causal order; of a row with fewer, empty ones before."""
    order = slot_order(tokens)
    order = order if tokens.valid is None else jnp.where(tokens.valid, order, -1)
    return jnp.argsort(order, axis=-1, stable=True)[:, -count:].astype(jnp.int32)


def last_row(tokens: Tokens, signals: Signals) -> Float[Array, "B H N"]:
    """How much the last token of every row attends to every token, float32."""
    return attention_rows(signals, last_slot(tokens)[:, None])[:, :, 0]


def cls_attention(signals: Signals) -> Float[Array, "B N"]:
    """How much token 0 (CLS) attends to every token, mean over heads."""
    return attention_rows(signals, slice(0, 1)).mean(1)[:, 0]


def column_sum(signals: Signals, valid: Bool[Array, "B Q"] | None = None, block: int = 128) -> Float[Array, "B H N"]:
    """How much attention every token receives from all (valid) queries, by head, float32.

    Rows are made `block` at a time, so that memory stays at `B H block N`.
    """
    batch, heads, queries, n = _shape(signals)
    counted = jnp.ones((1, queries)) if valid is None else valid.astype(jnp.float32)

    def received(start, size):
        take = start + jnp.arange(size) if size < queries else slice(None)
        return jnp.einsum("bhqn,bq->bhn", attention_rows(signals, take), counted[:, take])

    if signals.weights is not None or queries <= block:
        return received(0, queries)
    whole = queries // block * block
    zeros = jnp.zeros((batch, heads, n))
    total = jax.lax.fori_loop(0, whole // block, lambda i, t: t + received(i * block, block), zeros)
    return total + received(whole, queries - whole) if whole < queries else total


def _shape(signals: Signals) -> tuple[int, ...]:
    """[B, H, Q, N] of the map."""
    if signals.weights is not None:
        return signals.weights.shape
    batch, queries, heads, _ = signals.need("query").shape
    return batch, heads, queries, signals.need("key").shape[1]


def column_mean(signals: Signals, valid: Bool[Array, "B N"] | None = None, block: int = 128) -> Float[Array, "B N"]:
    """How much attention every token receives: `column_sum`, mean over heads and over (valid) queries."""
    total = column_sum(signals, valid, block).mean(1)
    counted = _shape(signals)[2] if valid is None else jnp.maximum(valid.sum(1, keepdims=True), 1)
    return total / counted


def importance(tokens: Tokens, signals: Signals) -> Float[Array, "B N"]:
    """Attention that the CLS token pays; without prefix tokens, attention that a token receives. No gradient."""
    score = cls_attention(signals) if tokens.prefix else column_mean(signals, tokens.valid)
    return jax.lax.stop_gradient(score)


def mean_key(signals: Signals) -> Float[Array, "B N D"]:
    """Attention keys averaged over heads, float32, no gradient: the metric of ToMe (Bolya et al. 2023, sec. 3)."""
    key = jax.lax.stop_gradient(signals.need("key")).astype(jnp.float32)
    # Slices add up as whole rows; a reduction over the middle axis takes three times as long on CPU.
    return sum((key[:, :, head] for head in range(1, key.shape[2])), key[:, :, 0]) / key.shape[2]
