"""Eviction: what stays, against NumPy; the decoder that goes on, against masks; bounded caches; bad input."""

import dataclasses
import functools

from contract_setup import QUICK
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import LENGTHS, TINY, batch, model

import tokjax
from tokjax import budget
from tokjax import cache as kv
from tokjax import hooks as hk
from tokjax.models.vit import ViTConfig
from tokjax.reducers import REGISTRY, create
from tokjax.reducers.llm.eviction import H2O, RandomCache, RecencyCache, SnapKV, StreamingLLM
from tokjax.signals import AttentionRule, Context, Signals
from tokjax.tokens import Tokens

NAMES = sorted(name for name, entry in REGISTRY.items() if entry.make.__module__.endswith("eviction"))
B, N, H, K, D = 3, 20, 4, 2, 3
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.normal(size=(B, N, heads, D)).astype(np.float32) for heads in (H, K, K))
VALID = np.arange(N) < np.array([[20], [20], [13]])  # a whole row, one with holes, a short one
VALID[1, [0, 4, 5, 11, 19]] = False
METHODS = {
    "snapkv": SnapKV(budget=0.6, window_rate=0.3),
    "snapkv, shared": SnapKV(kept=9, window=2, kernel=3, per_head=False),
    "h2o": H2O(budget=0.6, window_rate=0.3),
    "h2o, shared": H2O(kept=15, per_head=False),
    "streaming": StreamingLLM(budget=0.6),
    "streaming, source": StreamingLLM(kept=9, sinks=None, window_rate=0.3),
    "streaming, few": StreamingLLM(kept=3, sinks=2),
    "recency": RecencyCache(budget=0.3),
    "random": RandomCache(budget=0.6, window=3),
    "random, shared": RandomCache(kept=9, per_head=False),
}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def evicted(method, valid):
    """The cache of two layers with the same tokens, and of no eviction."""
    info = hk.ModelInfo(depth=2, width=12, heads=H, length=N)
    place = jnp.where(valid, jnp.cumsum(valid, 1) - 1, -1)
    tokens = Tokens(jnp.zeros((B, N, 1)), position=place, valid=valid)
    rule = AttentionRule(D**-0.5, causal=True)
    context = Context(key=jax.random.key(0))
    signals = Signals(QUERY, KEY, VALUE, tokens.attention_bias()[:, None, None], context=context, rule=rule)
    noted, hooks = tokens, method.hooks(info)
    for where, layer in (("input", 0), ("after_attention", 0), ("after_attention", 1)):
        noted, _ = hk.reduce(hooks, where, layer, noted, signals)
    cache = kv.fill([kv.Kept(tokens, KEY, VALUE)] * 2, place.max(1) + 1, N, 2, "write")
    (last,) = hk.at(hooks, "after_prefill")
    return last(cache, noted), cache


def attention(row):
    """[H, n, n] of a row's own tokens, in float64."""
    query, key = (np.asarray(x[row, VALID[row]], np.float64) for x in (QUERY, np.repeat(KEY, H // K, 2)))
    logits = np.einsum("qhd,nhd->hqn", query, key) * D**-0.5
    e = np.exp(np.where(np.tri(len(query), dtype=bool), logits, -np.inf))
    return e / e.sum(-1, keepdims=True)


def expected(method, row):
    """Places of what stays, by key head, as the papers have it."""
    n = VALID[row].sum()
    kept = min(n, method.kept or max(1, int(n * method.budget)))
    if isinstance(method, RecencyCache):
        return [range(n - kept, n)] * K
    window = min(kept, method.window or max(1, int(kept * method.window_rate)))
    if isinstance(method, StreamingLLM):
        window = window if method.sinks is None else kept - method.sinks
        return [[*range(kept - window), *range(n - window, n)]] * K
    seen = attention(row)
    seen = (seen[:, n - window :] if isinstance(method, SnapKV) else seen).sum(1)[:, : n - window]
    seen = seen.reshape(K, H // K, -1).sum(1)
    if not method.per_head:
        seen = np.repeat(seen.sum(0, keepdims=True), K, 0)
    if isinstance(method, SnapKV):
        seen = np.stack([np.convolve(head, np.ones(method.kernel), "same") for head in seen])
    return [[*np.sort(np.argsort(-head, kind="stable")[: kept - window]), *range(n - window, n)] for head in seen]


@pytest.mark.parametrize("name", METHODS)
def test_what_stays(name):
    """In every row and head; keys and values go along, and slots are those that the whole row needs."""
    method = METHODS[name]
    cache, whole = evicted(method, VALID)
    assert cache.lengths() == (method.count(N),) * 2
    assert all(group.slots == method.count(N) + 2 for group in cache.groups)
    for at in cache.layers:
        group = kv.per_head(cache.groups[at[0]])
        for row in range(B):
            for head in range(K):
                there = np.asarray(group.valid[row, head])
                slots = np.flatnonzero(VALID[row])[np.asarray(group.position[row, head])[there]]
                if not isinstance(method, RandomCache):
                    assert np.searchsorted(np.flatnonzero(VALID[row]), slots).tolist() == list(
                        expected(method, row)[head]
                    )
                for got, want in ((group.keys, KEY), (group.values, VALUE)):
                    np.testing.assert_array_equal(got[at[1]][row, head][there], want[row, slots, head])
    assert whole.lengths() == (N, N)


def test_random_ones():
    """Of every row, head and layer; the last ones always, whatever their place; the same for the same key."""
    cache, _ = evicted(METHODS["random"], VALID)
    kept = [[np.asarray(group.position[0, head])[:12].tolist() for head in range(K)] for group in cache.groups]
    assert all(places[-3:] == [17, 18, 19] for layer in kept for places in layer)
    assert len({str(places) for layer in kept for places in layer}) == 4
    padded = jnp.asarray(np.roll(VALID, -1, 1))  # row 0 is whole in both, row 2 one slot further left
    again, _ = evicted(METHODS["random"], padded.at[2].set(VALID[2]))
    np.testing.assert_array_equal(again.groups[1].position[0], cache.groups[1].position[0])
    shared, _ = evicted(METHODS["random, shared"], VALID)
    assert not any(group.per_head for group in shared.groups)


@functools.cache
def outputs(method, side="right", steps=2):
    """A program, and what it gives: logits [steps, 3, V], caches before and behind the steps, logits of the prompt."""
    graph, params = model()
    hooks = method.hooks(TINY.info) if method else ()
    new = np.random.default_rng(3).integers(0, 30, (steps, 3)).astype(np.int32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, given=None):
        made = nnx.merge(graph, params)
        read = made.prefill(batch(side), hooks, capacity=steps, key=jax.random.key(1))
        first = given or read.cache
        step = made.steps(hooks)
        last, logits = jax.lax.scan(lambda cache, ids: step(cache, ids)[::-1], first, new)
        return logits, first, last, read.logits

    return functools.partial(run, params), run(params)


def hidden(whole, small):
    """The whole cache, by layer, without what the small one has not."""
    whole, groups = kv.split(whole), []
    for at, group in zip(small.layers, whole.groups, strict=True):
        left, group = kv.per_head(small.groups[at[0]]), kv.per_head(group)
        there = np.zeros(group.valid.shape, bool)
        for row, head in np.ndindex(*there.shape[:2]):
            stays = np.asarray(left.position[row, head])[np.asarray(left.valid[row, head])]
            there[row, head] = np.isin(group.position[row, head], stays)
        groups.append(kv.evict(group, jnp.asarray(~there & (np.arange(group.slots) < group.prompt))))
    return whole.replace(groups=tuple(groups))


@pytest.mark.parametrize(("name", "side"), [(name, ("left", "right")[i % 2]) for i, name in enumerate(NAMES)])
def test_going_on_is_masked_decoding(name, side):
    """The same logits with the whole cache, what was evicted hidden in it; reading is what it was."""
    got, small, _, read = outputs(create(name), side)[1]
    run, (plain, whole, _, untouched) = outputs(None, side)
    np.testing.assert_array_equal(read, untouched)
    assert small.lengths() == (6, 6, 6) and whole.lengths() == (12, 12, 12)
    for group in small.groups:
        np.testing.assert_array_equal(kv.per_head(group).count(), [[n // 2] * 2 for n in LENGTHS])
    np.testing.assert_allclose(got, run(hidden(whole, small))[0], atol=2e-5)
    assert np.abs(got - plain).max() > 1e-3


@dataclasses.dataclass(frozen=True)
class Forgets:
    """By masks, as H2O's and StreamingLLM's codes do: after every step a token goes where there are more than `kept`.

    Written for rows in which places of prompts and of new tokens follow each other.
    """

    kept: int
    window: int
    sinks: int | None = None

    def hooks(self, info):
        return [hk.Hook("after_prefill", 0, self, "begin"), hk.Hook("decode_step", 0, self, "forget")]

    def begin(self, cache, tokens):
        groups = map(kv.per_head, kv.split(cache).groups)
        return kv.split(cache).replace(groups=tuple(g.replace(score=jnp.zeros(g.valid.shape)) for g in groups))

    def forget(self, cache, weights):
        groups = []
        for group, seen in zip(cache.groups, weights, strict=True):
            heads = group.keys[0].shape[1]
            score = group.score + seen.reshape(seen.shape[0], heads, -1, seen.shape[-1]).sum(2)
            place = group.position
            if self.sinks is not None:
                worth = jnp.where(place < self.sinks, jnp.inf, place)
            else:
                worth = jnp.where(place >= cache.position[:, None, None] - self.window, jnp.inf, score)
            worst = jnp.argmin(jnp.where(group.valid, worth, jnp.inf), -1)
            gone = (jnp.arange(group.slots) == worst[..., None]) & (group.count() > self.kept)[..., None]
            groups.append(kv.evict(group.replace(score=score), gone))
        return cache.replace(groups=tuple(groups))


@pytest.mark.parametrize(
    ("method", "forgets"),
    [
        (H2O(kept=8, window=3, bounded=True), Forgets(8, 3)),
        (StreamingLLM(kept=8, sinks=2, bounded=True), Forgets(8, 6, 2)),
    ],
    ids=["h2o", "streaming"],
)
def test_bounded_caches_are_masked_ones(method, forgets):
    """Six steps behind rows that are longer, shorter and a little longer than what is kept."""
    got, small, after, _ = outputs(method, steps=6)[1]
    assert {group.slots for group in small.groups} == {group.slots for group in after.groups} == {9}
    run, (_, whole, _, _) = outputs(forgets, steps=6)
    start, groups = hidden(whole, small), []
    for group, left in zip(start.groups, kv.split(small).groups, strict=True):
        score = np.zeros(group.valid.shape, np.float32)
        if isinstance(method, H2O):  # what the prompt attended to, where it is
            for row, head in np.ndindex(*score.shape[:2]):
                places = np.asarray(left.position[row, head])[np.asarray(left.valid[row, head])]
                score[row, head, places] = 2 * np.asarray(left.score[row, head])[: len(places)]  # a mean of two heads
        groups.append(group.replace(score=jnp.asarray(score)))
    want = run(start.replace(groups=tuple(groups)))[0]
    np.testing.assert_allclose(got, want, atol=2e-5)
    last = np.sort(np.where(after.groups[0].valid, after.groups[0].position, 99), -1)
    assert (last[0] >= 0).all() and last[0].max() == 17  # of twelve and six


def test_in_a_model_that_is_gone_on_with():
    """Behind a reducer of tokens; not behind one that takes them out of a layer whose attention is noted."""
    made = tokjax.build(dataclasses.replace(TINY, eos_ids=()))
    ids, valid = batch().ids, batch().valid
    fast = tokjax.reduce(tokjax.reduce(made, "fastv", layer=1, keep_rate=0.5), "snapkv", budget=0.5)
    going = fast.begin(ids, valid=valid, max_tokens=3)
    assert going.state.lengths() == (6, 3, 3)
    np.testing.assert_array_equal(going.state.groups[2].count(), [[3] * 2, [2] * 2, [2] * 2])
    out = fast.go_on(going).result
    assert out.ids.shape == (3, 3) and np.isfinite(out.score).all()
    found = budget.solve("snapkv", made, macs=0.95)
    assert abs(found.relative - 0.95) < 0.01 and found.macs == found.model.cost(phase="decode").total
    assert fast.cost() == tokjax.reduce(made, "fastv", layer=1, keep_rate=0.5).cost()  # of a call, without a cache
    early = tokjax.reduce(tokjax.reduce(made, "tome", r=2), "h2o")
    with pytest.raises(ValueError, match=r"H2O: noted 10 tokens where the cache has 12; it must come before"):
        early.begin(ids, max_tokens=3)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (RecencyCache, {"budget": 0.0}, r"budget=0.0: must be in \(0, 1\]"),
        (RecencyCache, {"budget": 1.5}, r"budget=1.5: must be in \(0, 1\]"),
        (RecencyCache, {"kept": 0}, "kept=0: must be at least 1"),
        (SnapKV, {"window": 0}, "window=0: must be at least 1"),
        (SnapKV, {"window_rate": 1.1}, r"window_rate=1.1: must be in \[0, 1\]"),
        (SnapKV, {"kept": 8, "window": 9}, "window=9: must be at most kept=8"),
        (SnapKV, {"kernel": 4}, "kernel=4: must be an odd number"),
        (StreamingLLM, {"sinks": -1}, "sinks=-1: must be at least 0"),
        (StreamingLLM, {"kept": 4}, "sinks=4: must be below kept=4"),
        (StreamingLLM, {"bounded": True}, "bounded=True: needs kept"),
        (H2O, {"bounded": True}, "bounded=True: needs kept"),
    ],
)
def test_bad_settings(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_model_without_a_cache():
    info = ViTConfig((8, 8), 4, width=16, depth=1, heads=2, num_classes=3).info
    for name in NAMES:
        with pytest.raises(ValueError, match="needs a model with a KV cache, which only decoders have"):
            create(name).hooks(info)
