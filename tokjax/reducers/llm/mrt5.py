"""MrT5: a gate of one neuron deletes the bytes of a text after a few layers of the encoder.

Paper:  Kallini et al., "MrT5: Dynamic Token Merging for Efficient Byte-level Language Models", ICLR 2025
        (arXiv 2410.20771).
Source: jkallini/mrt5, `models/modeling_mrt5.py`, `training/trainer.py`.
Kind:   prune, learned; unchanged length while it learns, then a length that depends on the data: static capacity, valid
        mask, counts in `aux`. Nothing is averaged: tokens that stay have attended to those that go.
Needs:  features before the block; for the score regulariser queries and keys of all later attention.

Steps:
1. z = w . RMSNorm(x) + b, for every token.
2. Its gate is scale * sigmoid(-z), between -30 (gone) and 0 (stays); padding has -30.
3. Soft (`hard=False`, for training): the gate is added to the logits of this key in all later self-attention of the
   encoder, this block's included, and in all cross-attention of a decoder.
4. Hard: tokens with a gate above the threshold stay, in order and at their places; the others are gone for all that
   follows. Survivors no longer carry their gates, a small difference to the soft form.

Terms of the loss, in the soft form only:
- `loss/gate` []: `loss_weight` times the mean gate. Gates are negative, so that a larger weight deletes more. The mean
  is over all tokens of the batch that are no padding, as published: a row counts as much as it has tokens. Where a step
  accumulates its gradients each part has a mean of its own, and the parts count alike, as they do in the released code;
  parts on several devices count by their tokens (`tokjax.tasks.byte_lm`), where the released code counts them alike. A
  controller (`tokjax.train.controllers`) multiplies the term by the weight that it has
  found.
- `loss/scores` []: `scores` times the mean over all elements of max(score, 5) - 5, averaged over the attention layers
  whose logits have the gate; scores with positional biases and padding, but without gates. Kept small, they leave the
  gates their effect. Recommended when training from scratch (0.5).
`aux` also has every token's `logits` and `gate` and, of every row, the numbers of its `tokens` and of those `deleted`,
whose sums give the rate that a controller steers. A token at the threshold itself is dropped but not counted.

Where we follow the code against the text, and where we decide:
- The released code stops if a whole batch is below the threshold. Under jit nothing stops: `aux` has the rows that keep
  their first token because all would go (`starved`).
- Before the first layer (`layer=0`) the released code has no positional bias yet and so numbers the survivors anew;
  `compat="reference"` does the same, and fills empty slots with copies of token 0. Otherwise they stay at their places.
- `entropy`, `gate_var` and `log_sigmoid` are unused in the paper's runs, partly broken, and left out.

Cost: one product of width C a token.
"""

import math
from typing import Literal, get_args

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.llm.gates import (
    SCALE,
    Compat,
    Overflow,
    check_capacity,
    counted,
    default_layer,
    harden,
    inside,
    mean_inside,
    soften,
)
from tokjax.reducers.vit.mergers import own_rngs
from tokjax.reducers.vit.staged import drawn
from tokjax.signals import Signals, logits
from tokjax.token_map import Plan
from tokjax.tokens import MASKED, Tokens

Loss = Literal["gate_mean", "clamped_logits_mean", "logits_mean"]
LIMIT = 5.0  # scores below it are free


def gate_loss(
    z: Float[Array, "B n"],
    gate: Float[Array, "B n"],
    valid: Bool[Array, "B n"],
    kind: Loss = "gate_mean",
    threshold: float = SCALE / 2,
) -> Float[Array, ""]:
    """What rewards deletion, a mean over the batch: of gates, of logits, or of logits not below 2 threshold."""
    clamped = jnp.maximum(z, 2 * threshold)
    return mean_inside({"gate_mean": gate, "clamped_logits_mean": clamped, "logits_mean": z}[kind], valid)


def excess(signals: Signals, block: int = 128) -> Float[Array, ""]:
    """Mean of max(logit, 5) - 5 over all queries, keys and heads; `block` rows at a time, in the gradient too."""
    query, key = signals.need("query"), signals.need("key")
    rows, count = query.shape[1], query.shape[0] * query.shape[1] * query.shape[2] * key.shape[1]

    @jax.checkpoint
    def over(take: Array) -> Array:
        return jnp.maximum(logits(signals, take) - LIMIT, 0).sum()

    whole = rows // block * block
    total = over(jnp.arange(whole, rows)) if whole < rows else jnp.float32(0)
    if whole:
        total += jax.lax.map(lambda start: over(start + jnp.arange(block)), jnp.arange(0, whole, block)).sum()
    return total / count


class MrT5(nnx.Module):
    """A learned delete gate before one block.

    Args:
        info: of the model.
        layer: block before which tokens go, after so many; None: the paper's 3, or a quarter of fewer than 12 blocks.
        hard: whether to delete; else to bias, for training.
        scale: of the gate, below 0.
        threshold: gates at or below it are deleted; None: half of the scale. Below the scale nothing is.
        capacity: slots behind the prefix in the hard form; None: as many as tokens.
        overflow: who goes where more stay than there are slots, see `gates.harden`.
        target: share of tokens to delete that a controller shall steer to; None: that which fills the capacity in a
            full row, and none without a capacity. It does nothing here.
        loss_weight: of `loss/gate`: alpha where it is fixed, 1 where a controller finds it.
        loss: what `loss/gate` is the mean of.
        scores: weight beta of `loss/scores`; 0: there is no such term.
        gumbel: whether noise is added to the logits in the soft form, where the call has a key.
        compat: "positions" or "reference", see the module.
        seed: of the initial parameters.

    Raises:
        ValueError: a value out of range, or a layer that the model does not have.
    """

    def __init__(
        self,
        info: ModelInfo,
        layer: int | None = None,
        hard: bool = True,
        scale: float = SCALE,
        threshold: float | None = None,
        capacity: int | None = None,
        overflow: Overflow = "gate",
        target: float | None = None,
        loss_weight: float = 1.0,
        loss: Loss = "gate_mean",
        scores: float = 0.0,
        gumbel: bool = False,
        compat: Compat = "positions",
        seed: int = 0,
    ):
        layer = default_layer(info) if layer is None else layer
        if not 0 <= layer < info.depth:
            raise ValueError(f"layer={layer}: must be in 0 to {info.depth - 1}, the blocks of this model")
        if not -math.inf < scale < 0:
            raise ValueError(f"scale={scale}: must be below 0 and finite")
        check_capacity(capacity)
        if target is not None and not 0 < target < 1:
            raise ValueError(f"target={target}: must be in (0, 1)")
        for name, weight in (("loss_weight", loss_weight), ("scores", scores)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}={weight}: must be at least 0 and finite")
        for name, value, kind in (("loss", loss, Loss), ("overflow", overflow, Overflow), ("compat", compat, Compat)):
            if value not in get_args(kind):
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(get_args(kind))}")
        n = info.length - info.prefix
        if target is None and capacity is not None and capacity < n:
            target = 1 - capacity / n
        self.width, self.layer, self.hard, self.scale = info.width, layer, hard, scale
        self.threshold = scale / 2 if threshold is None else threshold
        self.capacity, self.overflow, self.target, self.compat = capacity, overflow, target, compat
        self.loss_weight, self.loss, self.scores, self.gumbel = loss_weight, loss, scores, gumbel
        self.depth, self.decoder_depth = info.depth, info.decoder_depth
        rngs = own_rngs(seed)
        self.norm = nnx.RMSNorm(info.width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.out = nnx.Linear(
            info.width,
            1,
            kernel_init=nnx.initializers.xavier_uniform(),
            bias_init=nnx.initializers.ones,
            precision="highest",
            rngs=rngs,
        )

    def hooks(self, info: ModelInfo) -> list[Hook]:
        if info.width != self.width:
            raise ValueError(f"width={info.width}: these parameters were made for width={self.width}")
        if self.hard:
            return [Hook("before_block", self.layer, self)]
        return [Hook("before_block", self.layer, self, "soften"), *(self.regularisers() if self.scores else ())]

    def regularisers(self) -> list[Hook]:
        """The hooks that note `loss/scores`."""
        own = [Hook("after_attention", layer, self, "regularise") for layer in range(self.layer, self.depth)]
        cross = [Hook("after_cross_attention", layer, self, "regularise") for layer in range(self.decoder_depth)]
        return [*own, *cross]

    def gate(
        self, tokens: Tokens, noise: Float[Array, "B n"] | None = None
    ) -> tuple[Float[Array, "B n"], Float[Array, "B n"]]:
        """Logits and gates of the tokens behind the prefix, float32."""
        x = tokens.x[:, tokens.prefix :].astype(jnp.float32)
        z = self.out(self.norm(x))[..., 0]
        z = z if noise is None else z + noise
        return z, jnp.where(inside(tokens), self.scale * nnx.sigmoid(-z), self.scale)

    def plan(self, tokens: Tokens, signals: Signals) -> Plan:
        """The hard form."""
        z, gate = self.gate(tokens)
        noted = {"logits": z, "gate": gate, **counted(gate, inside(tokens), self.threshold)}
        if self.threshold < self.scale and (self.capacity is None or self.capacity >= gate.shape[1]):
            return Plan(aux=noted)
        plan = harden(
            tokens,
            gate,
            threshold=self.threshold,
            capacity=self.capacity,
            overflow=self.overflow,
            compat=self.compat,
            renumber=self.compat == "reference" and self.layer == 0,
        )
        return plan.replace(aux={**noted, **plan.aux})

    def soften(self, tokens: Tokens, signals: Signals, noise: Float[Array, "B n"] | None = None) -> Plan:
        """The soft form; `noise`: standard Gumbel, drawn where it is asked for and not given."""
        if self.gumbel and noise is None and signals.context.key is not None:
            noise = drawn(tokens, signals, self.layer, 0, jax.random.gumbel)[:, tokens.prefix :]
        z, gate = self.gate(tokens, noise)
        valid = inside(tokens)
        noted = {"logits": z, "gate": gate, **counted(gate, valid, self.threshold)}
        loss = self.loss_weight * gate_loss(z, gate, valid, self.loss, self.threshold)
        return soften(tokens, gate).replace(aux={**noted, "loss/gate": loss})

    def regularise(self, tokens: Tokens, signals: Signals) -> Plan:
        """This attention's part of `loss/scores`."""
        bias = signals.bias
        if self.hard and self.compat == "reference":  # where copies of token 0 in empty slots are seen
            bias = None
        elif bias is not None:  # padding, but no gates
            bias = jnp.where(bias <= MASKED / 2, MASKED, 0.0)
        layers = self.depth - self.layer + self.decoder_depth
        return Plan(aux={"loss/scores": self.scores / layers * excess(signals.replace(bias=bias))})
