"""DynamicViT: a small network scores the tokens, the lowest scores are pruned.

Paper:  Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021
        (arXiv 2106.02034).
Source: raoyongming/DynamicViT, `models/dyvit.py`; JoakimHaurum/TokenReduction, `models/dynamicvit.py`.
Kind:   prune, learned; static length when pruning, unchanged length when masking.
Needs:  features before the block.

Pruning (inference): before each location, the predictor's log-probability to keep orders the tokens; location j keeps
int(keep_rate**(j+1) * patches), from best to worst.

Masking (`masked=True`, for training): every token stays in the sequence; a hard Gumbel-softmax decides with a
straight-through gradient, and once dropped is dropped for good. From the first location on, attention is the policy
softmax (eq. 10): dropped tokens are keys to themselves only. `aux` has the log-probabilities and the decision of every
location, and its share of the ratio loss (section 3.4), `loss/ratio`. The last decision, which the distillation of
tokens asks for, stays in the carry. With `sampled=False` no noise is drawn: masking then keeps what pruning keeps.

Where we follow the code against the text:
- The epsilon of the global feature is added to the mean, not to its divisor.
- Counts are of the patches at the input. The official code has 196 of them hard-coded; the benchmark counts, as here.

Other published locations: LV-ViT-S 4, 8, 12 of 16 blocks, LV-ViT-M 5, 10, 15 of 20.
Cost: about 1.6 C^2 a token at each location, an eighth of a block.
"""

from collections.abc import Sequence
import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit.mergers import layer_norm, linear, locations, own_rngs
from tokjax.reducers.vit.staged import Tabled, drawn, noted, noting, ranked, select
from tokjax.signals import Signals
from tokjax.token_map import Plan
from tokjax.tokens import Tokens

DECISION = "dynamicvit.decision"


class Predictor(nnx.Module):
    """Log-probabilities to keep (channel 0) and to drop a token, from it and from the mean of those that are left."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = layer_norm(width, 1e-5, rngs)
        self.inner = linear(width, width, rngs)
        self.out = nnx.List(
            [linear(*sizes, rngs) for sizes in ((width, width // 2), (width // 2, width // 4), (width // 4, 2))]
        )

    def __call__(self, z: Float[Array, "B n C"], decision: Float[Array, "B n"]) -> Float[Array, "B n 2"]:
        u = nnx.gelu(self.inner(self.norm(z)), approximate=False)
        local, others = jnp.split(u, 2, -1)
        left = decision.sum(1)[:, None, None]
        mean = jnp.einsum("bnc,bn->bc", others, decision, precision="highest")[:, None]
        mean = mean / jnp.where(left == 0, 1, left) + 1e-6
        u = jnp.concatenate([local, jnp.broadcast_to(mean, others.shape)], -1)
        for layer in self.out[:-1]:
            u = nnx.gelu(layer(u), approximate=False)
        return nnx.log_softmax(self.out[-1](u), -1)


def keep_decision(
    logprob: Float[Array, "B n 2"], noise: Float[Array, "B n 2"], previous: Float[Array, "B n"]
) -> Float[Array, "B n"]:
    """1 kept, 0 dropped: a hard Gumbel-softmax at temperature 1, whose gradient is that of the soft one."""
    soft = nnx.softmax(logprob + noise, -1)[..., 0]
    hard = (logprob[..., 0] + noise[..., 0] >= logprob[..., 1] + noise[..., 1]).astype(jnp.float32)
    return (hard + soft - jax.lax.stop_gradient(soft)) * previous


def best_decision(
    logprob: Float[Array, "B n 2"], counts: Int[Array, "B"], previous: Float[Array, "B n"]
) -> Float[Array, "B n"]:
    """1 for the best of each row's tokens that were kept so far, 0 for the others; the same gradient."""
    score = jnp.where(previous > 0, jax.lax.stop_gradient(logprob[..., 0]), -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-score, axis=-1, stable=True), axis=-1, stable=True)
    soft = jnp.exp(logprob[..., 0])
    hard = (rank < counts[:, None]).astype(jnp.float32)
    return (hard + soft - jax.lax.stop_gradient(soft)) * previous


def decision(tokens: Tokens) -> Float[Array, "B n"]:
    """The last decision; what was put behind the tokens since then (caches) is kept."""
    told: Array = tokens.carry[DECISION]
    return jnp.pad(told, ((0, 0), (0, tokens.length - tokens.prefix - told.shape[1])), constant_values=1)


def gumbel_pairs(key: Array, shape: tuple[int, ...]) -> Float[Array, "N 2"]:
    """Standard Gumbel noise, for keeping and for dropping each token."""
    return jax.random.gumbel(key, (*shape, 2))


class Pruner(nnx.Module):
    """One location."""

    def __init__(
        self, width: int, layer: int, schedule: Tabled, weight: float = 0.0, sampled: bool = True, *, rngs: nnx.Rngs
    ):
        self.layer, self.schedule, self.weight, self.sampled = layer, schedule, weight, sampled
        self.predictor = Predictor(width, rngs=rngs)

    def _patches(self, tokens: Tokens) -> tuple[Float[Array, "B n C"], Float[Array, "B n"]]:
        z = tokens.x[:, tokens.prefix :].astype(jnp.float32)
        inside = jnp.ones(z.shape[:2]) if tokens.valid is None else tokens.valid[:, tokens.prefix :].astype(jnp.float32)
        return z, inside

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        n, p, k = tokens.length - tokens.prefix, tokens.prefix, self.schedule.most(tokens)
        if k >= n:
            return None
        score = jax.lax.stop_gradient(self.predictor(*self._patches(tokens))[..., 0])
        counts = None if tokens.valid is None else self.schedule.row_counts(tokens)
        order = ranked(tokens, jnp.pad(score, ((0, 0), (p, 0))), counts)
        return Plan(select(tokens, order[:, :k], counts), how="keep", carry=noted(tokens))

    def decide(self, tokens: Tokens, signals: Signals, noise: Float[Array, "B n 2"] | None = None) -> Plan:
        """The masking form; `noise`: standard Gumbel, where it is not given that of a row's own tokens (`drawn`)."""
        z, inside = self._patches(tokens)
        previous = decision(tokens) if DECISION in tokens.carry else inside
        logprob = self.predictor(z, previous)
        if self.sampled:
            if noise is None:
                noise = drawn(tokens, signals, self.layer, 0, gumbel_pairs)[:, tokens.prefix :]
            kept = keep_decision(logprob, noise, previous)
        else:
            kept = best_decision(logprob, self.schedule.row_counts(tokens), previous)
        own = inside.sum(1)
        share = (kept * inside).sum(1) / jnp.maximum(own, 1)
        loss = self.weight * jnp.where(own == 0, 0, (share - self.target(tokens)) ** 2)
        return Plan(carry={DECISION: kept}, aux={"logprob": logprob, "decision": kept, "loss/ratio": loss})

    def target(self, tokens: Tokens) -> float | Float[Array, "B"]:
        """The share that shall be kept: a power of the rate, not rounded to whole tokens; or what `kept` comes to."""
        if self.schedule.kept is None:
            return self.schedule.keep_rate ** (self.schedule.location + 1)
        return self.schedule.row_counts(tokens) / jnp.maximum(tokens.count() - tokens.prefix, 1)

    def attend(self, tokens: Tokens, signals: Signals) -> Signals:
        """The policy softmax of the last decision."""
        policy = jnp.pad(decision(tokens), ((0, 0), (tokens.prefix, 0)), constant_values=1)
        return signals.replace(policy=policy, rule=dataclasses.replace(signals.rule, normaliser="policy"))


class DynamicViT(nnx.Module):
    """Learned pruning before some blocks.

    Args:
        info: of the model.
        keep_rate: location j keeps int(keep_rate**(j+1) * patches) tokens; the paper's 0.7.
        layers: blocks before which it prunes; None: three evenly spread ones, 3, 6, 9 of 12.
        kept: tokens that a location keeps, in place of keep_rate.
        masked: whether to mask instead of to prune, for training.
        sampled: whether masking decides by a draw; else it keeps as many of the best as pruning does.
        ratio_weight: of the ratio loss, `loss/ratio` [B]: the mean over the locations of the squared difference between
            the share of a row's tokens that is kept and the target; the published 2, and 5 for DeiT-B.
        seed: of the initial parameters.

    Raises:
        ValueError: a negative weight, or settings that `Tabled` refuses.
    """

    def __init__(
        self,
        info: ModelInfo,
        keep_rate: float = 0.7,
        layers: Sequence[int] | None = None,
        kept: int | Sequence[int] | None = None,
        masked: bool = False,
        sampled: bool = True,
        ratio_weight: float = 2.0,
        seed: int = 0,
    ):
        if not 0 <= ratio_weight < math.inf:
            raise ValueError(f"ratio_weight={ratio_weight}: must be at least 0 and finite")
        hooks = locations(info, keep_rate, layers, kept)
        rngs = own_rngs(seed)
        self.width, self.masked = info.width, masked
        each = ratio_weight / max(len(hooks), 1)
        stages = [Pruner(info.width, hook.layer, hook.reducer, each, sampled, rngs=rngs) for hook in hooks]
        self.stages = nnx.List(stages)

    def hooks(self, info: ModelInfo) -> list[Hook]:
        if info.width != self.width:
            raise ValueError(f"width={info.width}: these parameters were made for width={self.width}")
        if not self.masked:
            return noting([Hook("before_block", stage.layer, stage) for stage in self.stages])
        hooks = [Hook("before_block", stage.layer, stage, "decide") for stage in self.stages]
        if hooks:
            first = self.stages[0]
            hooks += [Hook("attend", layer, first, "attend") for layer in range(first.layer, info.depth)]
        return noting(hooks)
