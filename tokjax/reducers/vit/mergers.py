"""What learned soft mergers share: a module for each location, counts, protected prefix, padded rows.

A merger makes `count` tokens before a block, each a weighted sum of all patch tokens; its parameters belong to that
number of outputs. A row with no more valid tokens than outputs keeps them all as they are.
"""

from collections.abc import Callable, Sequence

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit.staged import Tabled
from tokjax.signals import Signals
from tokjax.token_map import Plan, SoftMap, behind_prefix
from tokjax.tokens import MASKED, Tokens

_REDUCER = 0x72656475  # any number that no stream of a model counts to


def own_rngs(seed: int) -> nnx.Rngs:
    """For the initial parameters of a reducer: other keys than a model's with the same seed.

    Arrays that are drawn from one key are alike, so that a gate would start along a direction of the network it reads.
    """
    return nnx.Rngs(jax.random.fold_in(jax.random.key(seed), _REDUCER))


def layer_norm(width: int, eps: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Runs in float32, with the exact, two-pass variance."""
    return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


class Merger(nnx.Module):
    """Merges the tokens behind the prefix at one location."""

    count: int

    def weights(
        self, z: Float[Array, "B n C"], valid: Bool[Array, "B n"] | None
    ) -> tuple[Float[Array, "B k n"], Float[Array, "B n C"]]:
        """The matrix, zero at invalid tokens, and the features that it mixes, both float32."""
        raise NotImplementedError

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        p, n = tokens.prefix, tokens.length - tokens.prefix
        if self.count >= n:
            return None
        z = tokens.x[:, p:].astype(jnp.float32)
        valid = None if tokens.valid is None else tokens.valid[:, p:]
        weights, moved = self.weights(z, valid)
        anchor = weights.argmax(-1)
        if valid is not None:
            own = valid.sum(1)[:, None]
            short = (own <= self.count)[..., None]
            rank = jnp.where(valid, jnp.cumsum(valid, -1) - 1, self.count)
            every = (rank[:, None] == jnp.arange(self.count)[:, None]).astype(jnp.float32)
            weights, moved = jnp.where(short, every, weights), jnp.where(short, z, moved)
            anchor = jnp.where(jnp.arange(self.count) < own, weights.argmax(-1), n)  # n: an empty slot
        features = jnp.concatenate([tokens.x[:, :p].astype(jnp.float32), moved], 1)
        return Plan(behind_prefix(SoftMap(weights, anchor), p), how="sum", x=features)


def locations(
    info: ModelInfo, keep_rate: float, layers: Sequence[int] | None, kept: int | Sequence[int] | None
) -> list[Hook]:
    """Where tokens leave, and how many (`Tabled`), from settings that may be lists."""
    layers = None if layers is None else tuple(layers)
    return Tabled(keep_rate, layers, tuple(kept) if isinstance(kept, Sequence) else kept).located(info)


class Mergers(nnx.Module):
    """A merger for each location, before its block; counts as of `Tabled`."""

    def __init__(
        self,
        info: ModelInfo,
        make: Callable[[int], Merger],
        keep_rate: float,
        layers: Sequence[int] | None,
        kept: int | Sequence[int] | None,
    ):
        hooks = locations(info, keep_rate, layers, kept)
        self.width = info.width
        self.layers = tuple(hook.layer for hook in hooks)
        self.stages = nnx.List([make(hook.reducer.count(info.length - info.prefix)) for hook in hooks])

    def hooks(self, info: ModelInfo) -> list[Hook]:
        if info.width != self.width:
            raise ValueError(f"width={info.width}: these parameters were made for width={self.width}")
        return [Hook("before_block", layer, stage) for layer, stage in zip(self.layers, self.stages, strict=True)]


def softmax_over_tokens(logits: Float[Array, "B n k"], valid: Bool[Array, "B n"] | None) -> Float[Array, "B k n"]:
    """Weights of every output over the valid tokens."""
    logits = logits.swapaxes(1, 2)
    if valid is None:
        return nnx.softmax(logits, -1)
    return jnp.where(valid[:, None], nnx.softmax(jnp.where(valid[:, None], logits, MASKED), -1), 0)


def linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """Exact products, so that a padded row gives what the row alone gives."""
    return nnx.Linear(inputs, outputs, precision="highest", rngs=rngs)
