"""What travels through a model: features, and everything that must follow them when tokens are merged or dropped."""

from collections.abc import Mapping
from typing import Any

from flax import struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite: a row without a single valid key must not become NaN


class Tokens(struct.PyTreeNode):
    """A batch of token sequences with their bookkeeping.

    Fields that a model or method does not use stay None and cost nothing. B batch, N tokens now, N0 at the input.
    """

    x: Float[Array, "B N C"]
    size: Float[Array, "B N"] | None = None  # input tokens that each one stands for, float32; None: not tracked
    position: Int[Array, "B N *d"] | None = None  # true source position, read by rotary and relative biases
    valid: Bool[Array, "B N"] | None = None  # None: all
    key_bias: Float[Array, "B N"] | None = None  # added to every later logit of this key (soft deletion gates)
    gate: Float[Array, "B N"] | None = None  # 1 there, 0 masked, with a gradient, where masks learn; None: all there
    segment: Int[Array, "B N"] | None = None  # which sequence of its row a token belongs to; None: one a row
    kind: Int[Array, "B N"] | None = None  # special, text, visual, ... where a model mixes them
    order: Int[Array, "B N"] | None = None  # a causal query sees keys up to its own; None: as `position`
    origin: Int[Array, "B N0"] | None = None  # slot that now holds input token j, N if dropped; None: not traced
    carry: Mapping[str, Any] = struct.field(default_factory=dict)  # state between blocks, moved by its reducer
    aux: Mapping[str, Any] = struct.field(
        default_factory=dict
    )  # losses, counts, statistics, by the hook that made them
    prefix: int = struct.field(
        pytree_node=False, default=0
    )  # leading tokens that no reducer may touch (CLS, registers)
    proportional: bool = struct.field(pytree_node=False, default=True)  # whether attention counts a token size times

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def length(self) -> int:
        """N, capacity included."""
        return self.x.shape[1]

    def count(self) -> Int[Array, "B"]:
        """Valid tokens in every row, int32."""
        if self.valid is None:
            return jnp.full(self.batch, self.length, jnp.int32)
        return self.valid.sum(1, dtype=jnp.int32)

    def sizes(self) -> Float[Array, "B N"]:
        """Sizes, ones where they are not tracked."""
        return jnp.ones(self.x.shape[:2], jnp.float32) if self.size is None else self.size

    def traced(self) -> "Tokens":
        """The same tokens, with `origin` filled so that every later plan keeps track of it."""
        every = jnp.arange(self.length, dtype=jnp.int32)
        return self.replace(origin=jnp.broadcast_to(every, (self.batch, self.length)))

    def attention_bias(self) -> Float[Array, "B N"] | None:
        """The one place where size, gates and validity become an additive bias on keys, float32; None: no bias."""
        terms = []
        if self.proportional and self.size is not None:
            positive = self.size > 0  # empty slots have no mass; the inner where keeps the gradient finite
            terms.append(jnp.where(positive, jnp.log(jnp.where(positive, self.size, 1.0)), MASKED))
        if self.key_bias is not None:
            terms.append(self.key_bias)
        if self.valid is not None:
            terms.append(jnp.where(self.valid, jnp.float32(0), MASKED))
        return sum(terms[1:], terms[0]) if terms else None


def concat(a: Tokens, b: Tokens) -> Tokens:
    """Puts b behind a; a field that only one of them has gets its neutral value in the other."""

    def both(name: str, neutral):
        u, v = getattr(a, name), getattr(b, name)
        if u is None and v is None:
            return None
        u = u if u is not None else jnp.full(a.x.shape[:2] + v.shape[2:], neutral, v.dtype)
        v = v if v is not None else jnp.full(b.x.shape[:2] + u.shape[2:], neutral, u.dtype)
        return jnp.concatenate([u, v], 1)

    origin = a.origin
    if origin is not None:  # what a dropped may live on in b; dropped by both becomes the new N
        behind = a.length + (b.origin if b.origin is not None else jnp.full_like(origin, b.length))
        origin = jnp.where(origin == a.length, behind, origin)
    return a.replace(
        x=jnp.concatenate([a.x, b.x], 1),
        size=both("size", 1),
        position=both("position", -1),
        order=both("order", -1),
        valid=both("valid", True),
        key_bias=both("key_bias", 0),
        gate=both("gate", 1),
        segment=both("segment", 0),
        kind=both("kind", 0),
        origin=origin,
    )
