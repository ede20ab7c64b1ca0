"""The cache of a decoder: what of it a step may depend on, eviction and compaction, rotation, size, sharding."""

import dataclasses
import functools

from contract_setup import QUICK
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest
from tiny_decoder import GEMMA2, LENGTHS, TINY, Drops, batch, model

import tokjax
from tokjax import cache as kv
from tokjax import hooks as hk
from tokjax.signals import last_row
from tokjax.token_map import HardMap, Plan

G = 3
INDEX = st.integers(0, 2**31 - 1)
quickly = settings(max_examples=8, deadline=None)


@functools.cache
def program(cfg):
    """A prompt that has lost tokens behind block 0, and two steps: their logits and the cache behind them."""
    graph, params = model(cfg)
    hooks = Drops().hooks(cfg.info)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def read():
        return nnx.merge(graph, params).prefill(batch(), hooks, capacity=G).cache

    @functools.partial(jax.jit, compiler_options=QUICK)
    def go_on(cache):
        step = nnx.merge(graph, params).steps()
        one, cache = step(cache, jnp.array([3, 4, 5]))
        two, cache = step(cache, jnp.array([6, 7, 8]))
        return jnp.stack([one, two]), cache

    return jax.tree.map(np.asarray, read()), go_on


@functools.cache
def plain(cfg=TINY):
    cache, go_on = program(cfg)
    return np.asarray(go_on(cache)[0])


def each(cache, change):
    return cache.replace(groups=tuple(change(group) for group in cache.groups))


def taken(group, slots):
    """The same tokens in other slots [B, P'] of the prompt; -1 is an empty one, with rubbish in it."""
    old = group.prompt
    there = slots >= 0

    def move(x, axis, empty):
        x = np.asarray(x)
        index = np.where(there, slots, 0)
        index = index[:, None, :, None] if x.ndim == 4 else index
        new = np.take_along_axis(np.take(x, range(old), axis), np.broadcast_to(index, index.shape), axis)
        new = np.where(there[:, None, :, None] if x.ndim == 4 else there, new, empty)
        return np.concatenate([new, np.take(x, range(old, x.shape[axis]), axis)], axis).astype(x.dtype)

    told = {"position": 3, "order": 1, "kind": 1, "valid": False, "bias": 0.0}
    fields = {n: move(getattr(group, n), 1, e) for n, e in told.items() if getattr(group, n) is not None}
    keys, values = (tuple(move(x, 2, 7.0) for x in buffers) for buffers in (group.keys, group.values))
    return group.replace(keys=keys, values=values, prompt=slots.shape[1], **fields)


@quickly
@given(seed=INDEX)
def test_the_order_of_slots_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    cache, go_on = program(TINY)
    shuffled = each(cache, lambda g: taken(g, np.stack([rng.permutation(g.prompt) for _ in LENGTHS])))
    np.testing.assert_allclose(go_on(shuffled)[0], plain(), atol=2e-5)


@quickly
@given(seed=INDEX)
def test_empty_slots_change_nothing(seed):
    rng = np.random.default_rng(seed)
    cache, go_on = program(GEMMA2)

    def wider(group):
        slots = np.full((3, group.prompt + 2), -1)
        for row in slots:
            row[np.sort(rng.permutation(group.prompt + 2)[: group.prompt])] = range(group.prompt)
        return taken(group, slots)

    np.testing.assert_allclose(go_on(each(cache, wider))[0], plain(GEMMA2), atol=2e-5)


@quickly
@given(row=st.integers(0, 2), seed=INDEX)
def test_rows_do_not_meet(row, seed):
    """What the other rows hold, and whether they hold anything."""
    rng = np.random.default_rng(seed)
    cache, go_on = program(TINY)
    others = np.arange(3) != row

    def strange(group):
        def noise(x):
            return np.where(others[:, None, None, None], rng.normal(size=x.shape), x).astype(x.dtype)

        valid = group.valid & ~(others[:, None] & (rng.random(group.valid.shape) < 0.7))
        return group.replace(keys=tuple(map(noise, group.keys)), values=tuple(map(noise, group.values)), valid=valid)

    out = go_on(each(cache, strange))[0]
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:, row], plain()[:, row], atol=2e-5)


@quickly
@given(seed=INDEX, heads=st.booleans(), protect=st.booleans())
def test_evicting_and_compacting_are_one(seed, heads, protect):
    """Five slots of each group, with a set for every row or every head."""
    rng = np.random.default_rng(seed)
    cache, go_on = program(TINY)

    def both(group):
        shape = (3, 2, group.slots) if heads else (3, group.slots)
        score = rng.permuted(np.tile(np.arange(shape[-1], dtype=np.float32), (*shape[:-1], 1)), axis=-1)
        prompt = np.arange(group.slots) < group.prompt
        protected = prompt & (group.order == group.order.max(-1, keepdims=True)) if protect else None
        valid = np.broadcast_to(group.valid[:, None], shape) if heads else group.valid
        first = np.where(valid & prompt, score, -1)
        if protect:
            first = np.where((protected[:, None] if heads else protected) & valid, np.inf, first)
        gone = prompt & (np.argsort(np.argsort(-first, -1), -1) >= 5)
        evicted = kv.evict(group, gone)
        part = None if protected is None else protected[..., : group.prompt]
        return evicted, kv.compact(group, 5, score[..., : group.prompt], part)

    masked, small = (cache.replace(groups=groups) for groups in zip(*map(both, cache.groups), strict=True))
    assert [group.prompt for group in small.groups] == [5] * len(small.groups)
    one, other = go_on(masked)[0], go_on(small)[0]
    np.testing.assert_allclose(one, other, atol=2e-5)
    assert np.abs(one - plain()).max() > 1e-3
    for group in small.groups:  # in the order of the text
        order = np.where(group.valid, group.order, 99)[..., :5]
        assert (np.diff(order, axis=-1) >= 0).all()


def test_as_many_slots_as_before_is_the_same():
    cache, go_on = program(TINY)
    np.testing.assert_allclose(go_on(each(cache, lambda g: kv.compact(g, g.prompt)))[0], plain(), atol=1e-6)
    np.testing.assert_allclose(go_on(kv.split(cache))[0], plain(), atol=1e-6)
    assert kv.split(cache).lengths() == cache.lengths() == (12, 9, 9)
    for wrong in (0, 13):
        with pytest.raises(ValueError, match=f"prompt={wrong}: must be at least 1 and at most the 12 slots"):
            kv.compact(cache.groups[0], wrong)


@pytest.mark.parametrize("cfg", [TINY, GEMMA2], ids=["llama", "gemma2"])
def test_rotating_when_read_is_rotating_when_written(cfg):

    read = dataclasses.replace(cfg, rotate="read")
    np.testing.assert_allclose(plain(read), plain(cfg), atol=3e-5)
    keys, rotated = (program(c)[0].groups[0].keys[0] for c in (read, cfg))
    assert np.abs(keys - rotated)[:, :, 1:].max() > 0.1
    np.testing.assert_allclose(keys[:, :, 0], rotated[:, :, 0], atol=1e-6)  # at position 0


def test_nothing_visible_gives_zeros():
    query, buffer = jnp.ones((2, 1, 4, 3)), jnp.ones((2, 2, 5, 3))
    bias = jnp.stack([jnp.zeros((1, 5)), jnp.full((1, 5), kv.MASKED)])

    def total(query, buffer):
        out, weights = kv.attend(query, buffer, buffer, bias, 1.0)
        return out.sum(), (out, weights)

    gradients, (out, weights) = jax.grad(total, (0, 1), has_aux=True)(query, buffer)
    np.testing.assert_allclose(out[0], 1, rtol=1e-6)
    np.testing.assert_array_equal(out[1], 0)
    np.testing.assert_array_equal(weights[1], 0)
    assert all(np.isfinite(g).all() for g in gradients)


def test_steps_fill_their_own_slots():
    cache, go_on = program(TINY)
    after = go_on(cache)[1]
    assert int(after.at) == 2
    for group in after.groups:
        made = np.s_[:, group.prompt : group.prompt + 2]
        np.testing.assert_array_equal(group.position[made], np.array(LENGTHS)[:, None] + [0, 1])
        np.testing.assert_array_equal(group.order[made], [[12, 13]] * 3)
        assert (np.asarray(group.kind[made]) == kv.MADE).all()
        assert group.valid[made].all()
        assert not group.valid[:, group.prompt + 2 :].any()
    np.testing.assert_array_equal(cache.groups[0].count(), LENGTHS)


def test_size_is_the_formula():
    cache, _ = program(TINY)
    told = kv.nbytes((1, 2), (12, 9), G, batch=3, heads=2, width=6, itemsize=4)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache.groups)) == told
    graph, params = model(TINY)
    read = jax.jit(lambda p: nnx.merge(graph, p).prefill(batch(), Drops().hooks(TINY.info), capacity=G).cache)
    compiled = read.lower(params).compile(QUICK).memory_analysis().output_size_in_bytes
    assert abs(compiled / told - 1) < 0.03  # of which the addresses of so few bytes are most


def test_what_layers_hold():
    """Of every token of the prompt, whichever slot it is in; made ones do not count."""
    cache, go_on = program(TINY)
    for made in (cache, go_on(cache)[1]):
        share = np.asarray(kv.held(jax.tree.map(jnp.asarray, made)))
        assert share.shape == (3, 3, 12)
        for layer, (g, _) in enumerate(made.layers):
            there = [
                set(np.asarray(cache.groups[g].order)[row][cache.groups[g].valid[row]].tolist()) for row in range(3)
            ]
            assert [set(np.flatnonzero(row).tolist()) for row in share[layer]] == there
    group = kv.per_head(jax.tree.map(jnp.asarray, cache.groups[0]))
    one = group.replace(valid=group.valid.at[:, 0].set(False))
    half = np.asarray(kv.held(cache.replace(groups=(one, *cache.groups[1:]), layers=((0, 0), None, (1, 0)))))
    assert set(half[0].ravel().tolist()) == {0.0, 0.5} and not half[1].any() and half[2].any()


@pytest.mark.parametrize(("recent", "per_head"), [(2, True)])
def test_slots_that_are_used_again(recent, per_head):
    """Nine slots for a prompt of five and six new tokens: what is taken over is what eviction by mask takes out."""
    cache, _ = program(TINY)
    graph, params = model()
    rng = np.random.default_rng(0)
    new = rng.integers(0, 30, (6, 3)).astype(np.int32)

    def small(group):
        score = rng.permutation(group.prompt).astype(np.float32) + 1
        group = group.replace(score=jnp.asarray(np.broadcast_to(np.pad(score, (0, G)), group.valid.shape)))
        group = kv.compact(group, 5)
        return kv.per_head(group) if per_head else group

    def wider(group):  # of six new tokens
        told = {name: getattr(group, name) for name in ("position", "order", "kind", "valid", "score")}
        extra = {name: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 3)]) for name, x in told.items()}
        pairs = {name: getattr(group, name) for name in ("keys", "values")}
        more = {n: tuple(jnp.pad(x, [(0, 0)] * 2 + [(0, 3), (0, 0)]) for x in pair) for n, pair in pairs.items()}
        return group.replace(**extra, **more)

    start = each(cache, lambda group: wider(small(group)))
    bounded = each(start, lambda group: kv.bound(group, 9, recent))
    assert {group.slots for group in bounded.groups} == {9}

    def without(position, group):
        """Makes room for a token where nine are there."""
        last = group.position > position.reshape(-1, *(1,) * (group.position.ndim - 1)) - recent
        worth = jnp.where(group.valid & ~last, group.score * 100 + group.order, jnp.inf)  # the oldest of equal ones
        full = group.count()[..., None] == 9
        return kv.evict(group, full & (jnp.arange(group.slots) == jnp.argmin(worth, -1)[..., None]))

    @functools.partial(jax.jit, compiler_options=QUICK, static_argnums=1)
    def steps(cache, by_mask):
        step, outs = nnx.merge(graph, params).steps(), []
        for t in range(6):
            cache = each(cache, functools.partial(without, cache.position)) if by_mask else cache
            logits, cache = step(cache, new[t])
            outs.append(logits)
        return jnp.stack(outs), cache

    got, after = steps(bounded, False)
    want, _ = steps(start, True)
    np.testing.assert_allclose(got, want, atol=2e-5)
    for group in after.groups:
        assert group.slots == 9
        assert group.valid.all()
        made = np.asarray((group.kind == kv.MADE).sum(-1))
        assert (made >= max(recent, 1)).all()


def test_bounds():
    group = program(TINY)[0].groups[0]
    with pytest.raises(ValueError, match="slots=11: must be at least the 12 of the prompt"):
        kv.bound(group, 11)
    with pytest.raises(ValueError, match="recent=12: must be at least 0 and below slots=12"):
        kv.bound(group, 12, 12)


@pytest.mark.parametrize("per_head", [False, True])
def test_sharding(per_head):
    """Rows and key heads over a mesh: the same logits, and the cache stays where it is."""
    cache, go_on = program(TINY)
    cache = each(cache, kv.per_head) if per_head else cache
    specs = kv.specs(cache)
    assert specs.groups[0].keys[0] == PartitionSpec("data", "model", None, None)
    assert specs.groups[0].valid == (PartitionSpec("data", "model", None) if per_head else PartitionSpec("data", None))
    mesh = jax.make_mesh((3, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:6])
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), cache, specs)
    logits, after = go_on(placed)
    np.testing.assert_allclose(logits, plain(), atol=2e-5)
    assert {shard.data.shape for shard in after.groups[0].keys[0].addressable_shards} == {(1, 1, 12 + G, 6)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.replace(layers=c.layers[:2]), "cache has 2 layers: must have 3"),
        (lambda c: jax.tree.map(lambda x: x[:2] if x.ndim else x, c), r"\(2, 2, 6\): must have \(3, 2, 6\)"),
        (lambda c: c.replace(rotate="read"), "cache has rotate='read': must have 'write'"),
    ],
)
def test_caches_of_others(change, message):
    cache, go_on = program(TINY)
    with pytest.raises(ValueError, match=message):
        go_on(change(cache))


@dataclasses.dataclass(frozen=True)
class PerHead:
    """Notes how much the last token attends to every token; after the prompt every head keeps its own four of them."""

    def hooks(self, info):
        noted = [hk.Hook("after_attention", layer, self, "note") for layer in range(info.depth)]
        return [*noted, hk.Hook("after_prefill", 0, self, "shrink"), hk.Hook("decode_step", 0, self, "count")]

    def note(self, tokens, signals):
        seen = last_row(tokens, signals)
        return Plan(aux={"score": seen.reshape(len(seen), signals.key.shape[2], -1, seen.shape[-1]).sum(2)})

    def shrink(self, cache, tokens):
        cache, groups = kv.split(cache), []
        for layer, group in enumerate(cache.groups):
            score = tokens.aux[f"{layer:02d}.after_attention.PerHead"]["score"]
            small = kv.compact(group, 4, score)
            groups.append(small.replace(score=jnp.zeros(small.valid.shape, jnp.float32)))
        return cache.replace(groups=tuple(groups))

    def count(self, cache, weights):
        def add(group, seen):
            by_head = seen.reshape(len(seen), group.keys[0].shape[1], -1, seen.shape[-1]).sum(2)
            return group.replace(score=group.score + by_head)

        return cache.replace(groups=tuple(map(add, cache.groups, weights)))


def test_hooks_on_the_cache():
    """What a reducer does to a cache holds while the texts are gone on with, and beams go along."""
    made = tokjax.reduce(tokjax.build(dataclasses.replace(TINY, eos_ids=())), PerHead())
    ids, valid = batch().ids, batch().valid
    going = made.begin(ids, valid=valid, max_tokens=G)
    assert [(group.prompt, group.per_head) for group in going.state.groups] == [(4, True)] * 3
    np.testing.assert_array_equal(going.state.groups[0].count(), [[4, 4]] * 3)
    kept = np.asarray(going.state.groups[2].position)[..., :4]
    assert (np.diff(kept, axis=-1) > 0).all()
    assert (kept[:, 0] != kept[:, 1]).any()
    last = made.go_on(going)
    score = np.asarray(last.state.groups[1].score)
    np.testing.assert_allclose(score.sum((1, 2)), 2 * TINY.heads, rtol=1e-5)  # of two steps
    assert (score[..., :6] > 0).all()
    beams = made.generate(ids, valid=valid, max_tokens=G, beams=2)
    assert beams.beam_ids.shape == (3, 2, G)
    assert (np.asarray(beams.score) * G >= np.asarray(last.score) - 1e-4).all()


def simulated(params, ids, valid, leave):
    """All layers on all slots, nothing compact: in layer l a key is seen iff it is no later and l < leave.

    Written from the equations, without the library: TINY's logits [B, N, V].
    """
    d, eps = TINY.head_width, TINY.norm_eps
    position = jnp.cumsum(valid, 1) - 1
    angle = position[..., None] * TINY.rope_base ** (-jnp.arange(0, d, 2) / d)

    def norm(x, scale):
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale["scale"]

    def turned(x):
        a, b = x[..., : d // 2], x[..., d // 2 :]
        cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = params["embedding"][ids]
    for layer in range(TINY.depth):
        block, heads = params["blocks"][layer], (*ids.shape, -1, d)
        y = norm(x, block["norm1"])
        query = turned((y @ block["attn"]["q"]["kernel"]).reshape(heads))
        key, value = jnp.split((y @ block["attn"]["kv"]["kernel"]).reshape(heads), 2, 2)
        key, value = (jnp.repeat(each, 2, 2) for each in (turned(key), value))
        alive = valid & (layer < leave)
        seen = alive[:, None] & (position[:, None] <= position[:, :, None])
        logits = jnp.where(seen[:, None], jnp.einsum("bqhd,bkhd->bhqk", query, key) * d**-0.5, -1e9)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value).reshape(*ids.shape, -1)
        x = x + out @ block["attn"]["proj"]["kernel"]
        gate, up = jnp.split(norm(x, block["norm2"]) @ block["mlp"]["fc1"]["kernel"], 2, -1)
        x = x + (jax.nn.silu(gate) * up) @ block["mlp"]["fc2"]["kernel"]
    return norm(x, params["norm"]) @ params["head"]["kernel"]


@dataclasses.dataclass(eq=False)
class Leaves:
    """Drops a token before the layer that it leaves at; `slots` of each layer."""

    leave: jax.Array
    slots: tuple[int, ...]

    def hooks(self):
        return [
            hk.Hook("before_block", layer, functools.partial(Leaves.at, self, layer), "__call__") for layer in (1, 2)
        ]

    def at(self, layer, tokens, signals):
        leave = jnp.take_along_axis(self.leave, jnp.maximum(tokens.position, 0), 1)
        stays = tokens.valid & (leave > layer)
        n, slots = tokens.length, self.slots[layer - 1]
        keep = jnp.argsort(~stays, axis=1, stable=True)[:, :slots]
        filled = jnp.arange(slots) < stays.sum(1, keepdims=True)
        nobody = jnp.zeros((tokens.batch, 0), jnp.int32)
        return Plan(HardMap(jnp.where(filled, keep, n), nobody, nobody, n), how="keep", valid=filled)


@functools.cache
def compact_and_simulated():
    graph, params = model()
    more = np.array([[3, 6], [4, 7], [5, 8]], np.int32)
    ids = np.concatenate([batch().ids, more], 1)
    valid = np.concatenate([batch().valid, np.ones((3, 2), bool)], 1)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(params, leave):
        made = nnx.merge(graph, params)
        read = made.prefill(batch(), Leaves(leave, (9, 6)).hooks(), capacity=2)
        step = made.steps()
        one, cache = step(read.cache, more[:, 0])
        compact = jnp.stack([read.logits, one, step(cache, more[:, 1])[0]])
        forever = jnp.full((3, 2), TINY.depth)
        by_slot = jnp.take_along_axis(leave, jnp.maximum(jnp.cumsum(valid[:, :12], 1) - 1, 0), 1)
        whole = simulated(params, ids, valid, jnp.concatenate([by_slot, forever], 1))
        last = jnp.array(LENGTHS) - 1
        masked = jnp.stack([whole[jnp.arange(3), last], whole[:, 12], whole[:, 13]])
        return compact, masked, [group.count() for group in read.cache.groups]

    return lambda leave: both(params, leave)


@quickly
@given(seed=INDEX)
def test_compact_caches_are_the_masked_simulation(seed):
    """Tokens that leave at any layer, a number of its own in every row."""
    rng = np.random.default_rng(seed)
    leave = np.full((3, 12), TINY.depth)
    for row, length in enumerate(LENGTHS):
        first = rng.integers(1, min(9, length) + 1)  # of these many in layer 1, the last among them
        second = rng.integers(1, min(6, first) + 1)
        order = [length - 1, *rng.permutation(length - 1)]
        leave[row, order[second:]], leave[row, order[first:]] = 2, 1
    compact, masked, counts = compact_and_simulated()(leave)
    np.testing.assert_allclose(compact, masked, atol=2e-5)
    for layer, count in enumerate(counts):
        np.testing.assert_array_equal(count, [(leave[b, :n] > layer).sum() for b, n in enumerate(LENGTHS)])
