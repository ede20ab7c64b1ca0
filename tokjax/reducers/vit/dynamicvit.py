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
location, for the losses on the rate and on the distilled tokens.

Where we follow the code against the text:
- The epsilon of the global feature is added to the mean, not to its divisor.
- Counts are of the patches at the input. The official code has 196 of them hard-coded; the benchmark counts, as here.

Other published locations: LV-ViT-S 4, 8, 12 of 16 blocks, LV-ViT-M 5, 10, 15 of 20.
Cost: about 1.6 C^2 a token at each location, an eighth of a block.
"""

from collections.abc import Sequence
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit.mergers import layer_norm, linear, locations
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


def decision(tokens: Tokens) -> Float[Array, "B n"]:
    """The last decision; what was put behind the tokens since then (caches) is kept."""
    told: Array = tokens.carry[DECISION]
    return jnp.pad(told, ((0, 0), (0, tokens.length - tokens.prefix - told.shape[1])), constant_values=1)


def gumbel_pairs(key: Array, shape: tuple[int, ...]) -> Float[Array, "N 2"]:
    """Standard Gumbel noise, for keeping and for dropping each token."""
    return jax.random.gumbel(key, (*shape, 2))


class Pruner(nnx.Module):
    """One location."""

    def __init__(self, width: int, layer: int, schedule: Tabled, *, rngs: nnx.Rngs):
        self.layer, self.schedule = layer, schedule
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
        if noise is None:
            noise = drawn(tokens, signals, self.layer, 0, gumbel_pairs)[:, tokens.prefix :]
        logprob = self.predictor(z, previous)
        kept = keep_decision(logprob, noise, previous)
        return Plan(carry={DECISION: kept}, aux={"logprob": logprob, "decision": kept})

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
        seed: of the initial parameters.
    """

    def __init__(
        self,
        info: ModelInfo,
        keep_rate: float = 0.7,
        layers: Sequence[int] | None = None,
        kept: int | Sequence[int] | None = None,
        masked: bool = False,
        seed: int = 0,
    ):
        hooks = locations(info, keep_rate, layers, kept)
        rngs = nnx.Rngs(seed)
        self.width, self.masked = info.width, masked
        self.stages = nnx.List([Pruner(info.width, hook.layer, hook.reducer, rngs=rngs) for hook in hooks])

    def hooks(self, info: ModelInfo) -> list[Hook]:
        if info.width != self.width:
            raise ValueError(f"width={info.width}: these parameters were made for width={self.width}")
        if not self.masked:
            return noting([Hook("before_block", stage.layer, stage) for stage in self.stages])
        hooks = [Hook("before_block", stage.layer, stage, "decide") for stage in self.stages]
        if hooks:
            first = self.stages[0]
            hooks += [Hook("attend", layer, first, "attend") for layer in range(first.layer, info.depth)]
        return hooks
