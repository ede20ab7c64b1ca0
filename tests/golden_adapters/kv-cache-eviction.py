"""Caches of one layer after eviction: which tokens, of every head, in the order in which they were chosen."""

import dataclasses
import functools

from contract_setup import QUICK
import jax
import jax.numpy as jnp
import numpy as np

from tokjax import cache as kv
from tokjax import hooks as hk
from tokjax.hooks import ModelInfo
from tokjax.reducers.llm.eviction import H2O, SnapKV, StreamingLLM, ranked
from tokjax.signals import AttentionRule, Signals
from tokjax.tokens import Tokens

INPUTS = ("q", "k", "v", "budget", "window_frac", "head_adaptive")


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def evicted(reducer, query, key, value):
    """Keys, values and slots [B, K, M], chosen ones first, then the window."""
    batch, n, heads, width = query.shape
    info = ModelInfo(depth=1, width=heads * width, heads=heads, length=n)
    tokens = Tokens(jnp.zeros((batch, n, 1)), position=jnp.broadcast_to(jnp.arange(n), (batch, n)))
    signals = Signals(query, key, value, rule=AttentionRule(scale=width**-0.5, causal=True))
    tokens, _ = hk.reduce(reducer.watching(info), "after_attention", 0, tokens, signals)
    cache = kv.fill([kv.Kept(tokens, key, value)], jnp.full(batch, n), n, 1, "write")
    small = kv.per_head(reducer.evict(cache, tokens).groups[0])
    best = ranked(cache.groups[0], reducer.score(cache, 0, tokens), reducer.recent)
    slots = jnp.roll(best[..., : reducer.count(n)], -reducer.recent(n), -1)
    slots = jnp.broadcast_to(slots if slots.ndim == 3 else slots[:, None], small.position[..., : small.prompt].shape)
    found = jax.vmap(jax.vmap(jnp.searchsorted))(small.position[..., : small.prompt], slots)
    return *(jnp.take_along_axis(x[0], found[..., None], 2) for x in (small.keys, small.values)), slots


def run(case, arrays):
    settings = {"budget": float(arrays["budget"]), "window_rate": float(arrays["window_frac"])}
    per_head = bool(arrays["head_adaptive"])
    methods = {
        "snapkv": SnapKV(**settings, per_head=per_head),
        "h2o": H2O(**settings, per_head=per_head),
        "streaming": StreamingLLM(**settings, sinks=None),
    }
    sides = [jnp.swapaxes(arrays[name], 1, 2) for name in ("q", "k", "v")]
    n = sides[0].shape[1]
    results = {"capacity": methods["h2o"].count(n), "window": methods["h2o"].recent(n)}
    for name, method in methods.items():
        results[f"{name}_k"], results[f"{name}_v"], _ = evicted(method, *sides)
    _, _, slots = evicted(dataclasses.replace(methods["h2o"], per_head=True), *sides)
    results["keep_index"] = np.asarray(slots)[..., : -results["window"]]
    return results
