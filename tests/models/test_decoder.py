"""Decoders: padding, order, windows, caps, scanning, hooks, steps through the cache, bad input."""

import dataclasses
import functools
from typing import Any

from contract_setup import QUICK
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import GEMMA2, LENGTHS, TINY, Drops, batch, call, model

from tokjax import hooks as hk
from tokjax import token_map
from tokjax.models.decoder import Decoder, Prompts, preset
from tokjax.signals import last_slot
from tokjax.token_map import Plan
from tokjax.tokens import Tokens

OPT = dataclasses.replace(
    TINY, position="learned", norm="layer", norm_order="post", feed="relu", qkv_bias=True, embed_width=8
)
KINDS = {"llama": TINY, "gemma2": GEMMA2, "opt": OPT}

plain = functools.cache(lambda cfg=TINY: call(lambda m: m(batch()), cfg))


@pytest.mark.parametrize("kind", KINDS)
def test_the_side_of_the_padding_does_not_matter(kind):
    right, left = plain(KINDS[kind]), call(lambda m: m(batch("left")), KINDS[kind])
    for row, end in enumerate(LENGTHS):
        np.testing.assert_allclose(left.logits[row, 12 - end :], right.logits[row, :end], atol=2e-5)
    alone = call(lambda m: m(batch().ids[1:2, :7]), KINDS[kind])
    np.testing.assert_allclose(alone.logits[0], right.logits[1, :7], atol=2e-5)


def test_no_place_sees_a_later_one():
    inputs = batch()
    ids = inputs.ids.copy()
    ids[:, 6:] = 7
    out = call(lambda m: m(inputs.replace(ids=ids)))
    np.testing.assert_array_equal(out.logits[:, :6], plain().logits[:, :6])
    assert np.abs(out.logits[0, 6:] - plain().logits[0, 6:]).max() > 1e-2


def test_a_window_ends_what_is_seen():
    """A single layer with a window of 3: the first token is seen by the first three."""
    cfg = dataclasses.replace(TINY, depth=1, window=3)
    ids = batch().ids[:1].copy()
    one = call(lambda m: m(ids), cfg).logits
    ids[0, 0] += 1
    changed = np.abs(call(lambda m: m(ids), cfg).logits - one).max(-1)[0] > 1e-6
    np.testing.assert_array_equal(changed, np.arange(12) < 3)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_scanned_blocks_give_the_same(kind):
    cfg = dataclasses.replace(KINDS[kind], depth=5)
    _, params = model(cfg)
    stacked: dict[str, Any] = dict(params)
    stacked["blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params["blocks"][i] for i in range(5)))
    graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(dataclasses.replace(cfg, scan=True), rngs=nnx.Rngs(0))))

    def outputs(m):
        step, cache, logits = m.begin(batch().ids, valid=batch().valid, length=2)
        return m(batch()).logits, logits, step(cache, jnp.array([3, 4, 5]))[0]

    scanned = jax.jit(lambda p: outputs(nnx.merge(graph, p)), compiler_options=QUICK)(stacked)
    for got, want in zip(scanned, call(outputs, cfg), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_longer_prompt(kind, side):
    """Reading n tokens and stepping through two more gives the logits of reading n + 2."""
    cfg, inputs = KINDS[kind], batch(side)

    def outputs(m):
        step, cache, first = m.begin(inputs.ids, valid=inputs.valid, length=2)
        second, cache = step(cache, jnp.array([3, 4, 5]))
        return first, second, step(cache, jnp.array([6, 7, 8]))[0]

    logits = call(outputs, cfg)
    more = np.array([[3, 6], [4, 7], [5, 8]], np.int32)
    longer = np.concatenate([inputs.ids, more], 1), np.concatenate([inputs.valid, np.ones((3, 2), bool)], 1)
    whole = call(lambda m: m(Prompts(*longer)), cfg).logits
    for row, end in enumerate(LENGTHS):
        last = 11 if side == "left" else end - 1
        np.testing.assert_allclose(logits[0][row], whole[row, last], atol=3e-5)
        for t in (1, 2):
            np.testing.assert_allclose(logits[t][row], whole[row, 11 + t], atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_tokens_leave_what_hidden_ones_do(kind):
    """At prefill and while stepping; caches have the lengths that each layer's attention saw."""
    cfg = KINDS[kind]

    def outputs(m, soft):
        inputs = batch()
        read = m.prefill(inputs, Drops(soft).hooks(cfg.info), capacity=2)
        step = m.steps()
        second, cache = step(read.cache, jnp.array([3, 4, 5]))
        return read.logits, second, step(cache, jnp.array([6, 7, 8]))[0], read.cache

    (*hard, cache), (*soft, whole) = (call(lambda m, soft=soft: outputs(m, soft), cfg) for soft in (False, True))
    assert cache.lengths() == (12, 9, 9)
    assert whole.lengths() == (12, 12, 12)
    for got, want in zip(hard, soft, strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5)
    assert np.abs(hard[0] - call(lambda m: m.prefill(batch(), capacity=1).logits, cfg)).max() > 1e-3


SWIFT = dataclasses.replace(TINY, depth=5, kv_layers=2)


@dataclasses.dataclass(frozen=True)
class LastOnly:
    """Only the last token passes the blocks from `layer` on."""

    layer: int

    def plan(self, tokens, signals):
        nobody = jnp.zeros((tokens.batch, 0), jnp.int32)
        return Plan(token_map.HardMap(last_slot(tokens)[:, None], nobody, nobody, num_in=tokens.length))


@pytest.mark.parametrize("group", [1, 2])
def test_keys_and_values_of_an_earlier_block(group):
    """Steps equal the longer prompt; tokens that leave before the first later block have left their keys behind."""
    cfg, inputs = dataclasses.replace(SWIFT, kv_group=group), batch()
    assert cfg.kv_source == ((0, 1, 2, 3, 4) if group == 1 else (0, 1, 2, 2, 4))

    def outputs(m, hooks):
        read = m.prefill(inputs, hooks, capacity=1)
        return read.logits, m.steps()(read.cache, jnp.array([3, 4, 5]))[0], read.cache

    one, early = (call(lambda m, h=h: outputs(m, h), cfg) for h in ((), (hk.Hook("before_block", 2, LastOnly(2)),)))
    ids = np.concatenate([inputs.ids, [[3], [4], [5]]], 1).astype(np.int32)
    whole = call(lambda m: m(Prompts(ids, np.concatenate([inputs.valid, np.ones((3, 1), bool)], 1))), cfg).logits
    np.testing.assert_allclose(one[1], whole[:, -1], atol=3e-5)
    for got, want in zip(early[:2], one[:2], strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5)
    assert early[2].lengths() == (12,) * 5
    assert [len(g.keys) for g in early[2].groups] == [5 if group == 1 else 4]


@dataclasses.dataclass(frozen=True)
class Skips:
    """All five blocks but the middle one for the prompt; from the second new token on the first and the last."""

    prompt: int

    def active(self, column, prompt, end):
        xp = np if isinstance(column, np.ndarray) else jnp
        early = column < (self.prompt if prompt is None else prompt) + 1
        always = xp.ones_like(early)
        return xp.stack([always, early, ~always, early, always])


@pytest.mark.parametrize("kind", KINDS)
def test_a_depth_schedule(kind):
    """Through the cache, in which skipped blocks have no part, as in whole texts."""
    cfg, inputs = dataclasses.replace(KINDS[kind], depth=5), batch("left")
    hooks = [hk.Hook("depth", 0, Skips(12), "active")]
    more = np.array([[3, 6], [4, 7], [5, 8]], np.int32)
    ids, valid = np.concatenate([inputs.ids, more], 1), np.concatenate([inputs.valid, np.ones((3, 2), bool)], 1)

    def outputs(m):
        step, cache, first = m.begin(inputs.ids, hooks, valid=inputs.valid, length=2)
        second, after = step(cache, more[:, 0])
        return m(Prompts(ids, valid), hooks).logits, (first, second, step(after, more[:, 1])[0]), cache

    whole, steps, cache = call(outputs, cfg)
    for t, logits in enumerate(steps):
        np.testing.assert_allclose(logits, whole[:, 11 + t], atol=3e-5)
    assert cache.lengths() == (12, 12, 0, 12, 12)
    assert np.abs(whole - call(lambda m: m(Prompts(ids, valid)), cfg).logits).max() > 1e-2


def test_positions_of_three_axes():
    """Three equal ones are one; different ones count, in steps too, whose tokens follow the largest."""
    cfg = dataclasses.replace(TINY, rope_sections=(1, 1, 1))
    place = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (3, 12))
    ids = batch().ids

    def outputs(m, position):
        x = m.embed(ids).x
        read = m.prefill(Tokens(x, position=position), capacity=1)
        return read.logits, m.steps()(read.cache, jnp.array([3, 4, 5]))[0], read.cache.start

    plain = call(lambda m: outputs(m, place))
    for got, want in zip(call(lambda m: outputs(m, jnp.stack([place] * 3, -1)), cfg), plain, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    other = call(lambda m: outputs(m, jnp.stack([place, place // 2, place + 20], -1)), cfg)
    assert np.abs(other[1] - plain[1]).max() > 1e-2
    np.testing.assert_array_equal(other[2], [32] * 3)


def test_an_order_of_its_own():
    """Tokens in other slots, whose order and positions are told, are the same text."""
    shuffle = np.random.default_rng(0).permutation(12)
    ids, place = batch().ids, jnp.broadcast_to(jnp.asarray(shuffle, jnp.int32), (3, 12))

    def outputs(m):
        x = m.embed(ids).x[:, shuffle]
        read = m.prefill(Tokens(x, position=place, order=place), capacity=1)
        return read.logits, m.steps()(read.cache, jnp.array([3, 4, 5]))[0]

    def plain(m):
        step, cache, logits = m.begin(ids, length=1)
        return logits, step(cache, jnp.array([3, 4, 5]))[0]

    for got, want in zip(call(outputs), call(plain), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_rows_without_a_token_are_finite_and_attend_to_nothing():
    inputs = batch()
    valid = inputs.valid.copy()
    valid[1] = False
    graph, params = model()

    def loss(params):
        out = nnx.merge(graph, params)(inputs.replace(valid=valid))
        return out.logits.sum(), out.tokens

    (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_bfloat16_is_close():
    out = call(lambda m: m(batch()), dataclasses.replace(TINY, dtype="bfloat16"))
    assert out.logits.dtype == jnp.float32
    error = np.abs(out.logits - plain().logits).mean() / np.abs(plain().logits).mean()
    assert 0 < error < 0.1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.full((3, 4), 30), r"ids lie in 30\.\.30: must be in \[0, 30\)"),
        (np.zeros((3, 0), int), r"ids has shape \(3, 0\): must be \(batch, 1 to 32 tokens\)"),
        (np.zeros((3, 33), int), r"ids has shape \(3, 33\)"),
        (np.zeros((3, 5)), "ids has type float64"),
        (Prompts(np.zeros((3, 5), int), np.ones((3, 4), bool)), r"valid has shape \(3, 4\): must be that of ids"),
    ],
)
def test_bad_input(inputs, message):
    with pytest.raises(ValueError, match=message):
        TINY.check(inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 0}, "heads=0: must be at least 1"),
        ({"kv_heads": 3}, "kv_heads=3: must divide heads=4"),
        ({"head_width": 5}, "head_width=5: must be even"),
        ({"feed": "quick"}, "feed='quick': must be one of swiglu, geglu"),
        ({"window": 0}, "window=0: must be at least 1"),
        ({"window_layers": (3,)}, r"window_layers=\(3,\): must be in \[0, 3\)"),
        ({"kv_layers": 3}, r"kv_layers=3: must be in \[0, 3\)"),
        ({"rope_sections": (1, 1)}, r"rope_sections=\(1, 1\): must be three numbers with the sum 3"),
        ({"soft_cap": 0.0}, "soft_cap=0.0: must be above 0"),
        ({"rope_scaling": "llama3", "rope_high": 1.0}, "rope_high=1.0: must be above rope_low=1.0"),
        ({"pad_id": 30}, r"pad_id=30: must be in \[0, 30\)"),
        ({"eos_ids": (2, 31)}, r"eos_ids=\(2, 31\)"),
        ({"position": "learned", "rotate": "read"}, "rotate='read': needs position='rope'"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_presets():
    count = {}
    for name in ("llama-3.2-1b", "opt-125m", "qwen2.5-0.5b"):
        shapes = nnx.eval_shape(lambda name=name: Decoder(preset(name), rngs=nnx.Rngs(0)))
        count[name] = round(sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes))) / 1e6)
    assert count == {"llama-3.2-1b": 1236, "opt-125m": 125, "qwen2.5-0.5b": 494}  # as published
    with pytest.raises(ValueError, match="name='gpt2': must be one of llama-2-7b"):
        preset("gpt2")
