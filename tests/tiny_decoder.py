"""A decoder that is quick to compile, texts of different lengths for it, and a reducer that drops tokens."""

import dataclasses
import functools

from contract_setup import QUICK
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from tokjax import hooks as hk
from tokjax import token_map
from tokjax.models.decoder import Decoder, DecoderConfig, Prompts
from tokjax.token_map import Plan

TINY = DecoderConfig(
    vocab_size=30,
    length=12,
    max_length=32,
    width=16,
    hidden=24,
    depth=3,
    heads=4,
    kv_heads=2,
    head_width=6,
    rope_base=100.0,
)
LENGTHS = (12, 7, 9)
GEMMA2 = dataclasses.replace(
    TINY,
    feed="geglu",
    norm="rms_offset",
    norm_order="both",
    embed_scaled=True,
    tied=True,
    soft_cap=1.0,
    logit_cap=2.0,
    window=4,
    window_layers=(0, 2),
)


@functools.cache
def model(cfg=TINY):
    """The module's graph, and parameters that are not the small initial ones."""
    graph, state = nnx.split(Decoder(cfg, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return graph, jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), nnx.to_pure_dict(state))


def call(function, cfg=TINY):
    """`function` of the module, compiled."""
    graph, params = model(cfg)
    return jax.jit(lambda params: function(nnx.merge(graph, params)), compiler_options=QUICK)(params)


def batch(side="right", seed=0):
    """Texts of different lengths, and which of their tokens count."""
    ids = np.random.default_rng(seed).integers(0, 30, (3, 12)).astype(np.int32)
    place, ends = np.arange(12), np.array(LENGTHS)[:, None]
    valid = place < ends
    if side == "left":
        ids, valid = (
            np.stack([np.roll(row, 12 - end) for row, end in zip(x, LENGTHS, strict=True)]) for x in (ids, valid)
        )
    return Prompts(ids, valid)


@dataclasses.dataclass(frozen=True)
class Drops:
    """Drops every second token but the last ones after block 0, or hides it from all later queries."""

    soft: bool = False

    def hooks(self, info):
        return [hk.Hook("after_block", 0, self)]

    def plan(self, tokens, signals):
        kept = (jnp.arange(tokens.length) % 2 == 0) | (jnp.arange(tokens.length) >= 6)
        if self.soft:
            return Plan(key_bias=jnp.broadcast_to(jnp.where(kept, 0.0, -1e9), tokens.x.shape[:2]))
        keep = jnp.broadcast_to(jnp.flatnonzero(kept, size=9), (tokens.batch, 9))
        nobody = jnp.zeros((tokens.batch, 0), jnp.int32)
        return Plan(token_map.HardMap(keep, nobody, nobody, num_in=tokens.length))
