"""Decoders woven over devices: the numbers of one device, where the collectives stand, and what hides behind what."""

import dataclasses
import functools
import itertools
import math
import re

from contract_setup import QUICK
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest
from tiny_decoder import GEMMA2, TINY, Drops, batch, call, model

from tokjax import api
from tokjax.api import Model
from tokjax.models.vit import ViTConfig
from tokjax.models.weave import Piece, Weave, WovenDecoder, split
from tokjax.tokens import Tokens

PLAIN_OPT = dataclasses.replace(
    TINY,
    depth=2,
    feed="relu",
    norm="layer",
    norm_order="post",
    position="learned",
    qkv_bias=True,
    proj_bias=True,
    mlp_bias=True,
    scan=True,
)


def mesh(**axes):
    devices = jax.devices()[: math.prod(axes.values())]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=devices)


def made(cfg):
    graph, params = model(cfg)
    return nnx.merge(graph, params)


@functools.cache
def woven(cfg=TINY, **axes):
    """The graph and parameters of a decoder whose 36 slots go in two parts, the cut within the second text."""
    return nnx.split(WovenDecoder(made(cfg), Weave(mesh(**(axes or {"model": 2})), least=8, multiple=8, offset=-1)))


def run(function, cfg=TINY, **axes):
    graph, state = woven(cfg, **axes)
    program = jax.jit(lambda state: function(nnx.merge(graph, state)), compiler_options=QUICK)
    return program(state)


def read_and_go_on(module, prompts):
    read = module.prefill(prompts, capacity=2)
    step = module.steps()
    logits, cache = step(read.cache, jnp.argmax(read.logits, -1).astype(jnp.int32))
    return read.features, read.logits, logits, step(cache, jnp.argmax(logits, -1).astype(jnp.int32))[0], read.cache


@pytest.mark.parametrize(
    ("cfg", "axes", "side"),
    [
        (TINY, {"model": 2}, "left"),
        (dataclasses.replace(GEMMA2, kv_heads=4, rotate="read"), {"data": 3, "model": 2}, "right"),
        (PLAIN_OPT, {"model": 2}, "right"),
    ],
    ids=["llama", "gemma2", "opt"],
)
def test_the_numbers_of_one_device(cfg, axes, side):
    """Prompts of different lengths, two steps behind them, and the cache, whose heads lie on their devices."""
    prompts = batch(side)
    wants = call(lambda module: read_and_go_on(module, prompts), cfg)
    found = run(lambda module: read_and_go_on(module, prompts), cfg, **axes)
    for want, got in zip(wants[1:4], found[1:4], strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    there = np.asarray(prompts.valid)
    np.testing.assert_allclose(np.asarray(found[0])[there], np.asarray(wants[0])[there], atol=2e-5)
    want, got = wants[4].groups[0], found[4].groups[0]
    for ours, theirs in zip(got.keys + got.values, want.keys + want.values, strict=True):
        at = np.broadcast_to(np.asarray(want.valid)[:, None], theirs.shape[:3])
        np.testing.assert_allclose(np.asarray(ours)[at], np.asarray(theirs)[at], atol=2e-5)
        shape = len(there) // axes.get("data", 1), cfg.kv_heads // axes["model"]
        assert {shard.data.shape[:2] for shard in ours.addressable_shards} == {shape}


def test_one_text_and_merged_tokens():
    """A text that is cut, of tokens with sizes and positions of their own."""
    rng = np.random.default_rng(0)
    position = np.cumsum(rng.integers(1, 3, (1, 12)), 1).astype(np.int32)
    tokens = Tokens(jnp.asarray(rng.normal(size=(1, 12, 16)), jnp.float32), position=jnp.asarray(position))
    tokens = tokens.replace(size=jnp.asarray(rng.integers(1, 4, (1, 12)), jnp.float32))
    want = call(lambda module: module(tokens).logits)
    np.testing.assert_allclose(run(lambda module: module(tokens).logits), want, atol=2e-5)


def test_generate(tmp_path):
    """On four devices, a batch that is too small for two parts; only the model that it was made of is saved."""
    module = made(dataclasses.replace(TINY, kv_heads=4))
    plain, ids = Model(module), batch().ids
    fast = plain.woven(mesh(model=4))
    how = {"max_tokens": 5, "eos_id": None}
    want, got = plain.generate(ids, **how), fast.generate(ids, **how)
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_allclose(got.score, want.score, atol=2e-5)
    kernel = fast.params["model"]["blocks"][0]["mlp"]["fc1"]["kernel"]
    assert kernel.shape == (16, 2, 24)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(16, 2, 6)}
    assert fast.cost().model == plain.cost().model
    with pytest.raises(ValueError, match="do not fit the config"):
        api.save(fast, tmp_path)


def instructions(text):
    """Of the entry of an HLO program, in the order of their run: name -> operation, operands, bytes of the result.

    What calls a matrix product is a "dot".
    """
    found = {}
    products = {part.split()[0] for part in text.split("\n\n") if " dot(" in part}
    for line in text[text.index("\nENTRY ") :].split("\n}")[0].splitlines():
        match = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*?)\)", line)
        if match:
            name, shape, operation, operands = match.groups()
            dims = re.match(r"f32\[([\d,]*)\]", shape)
            size = 4 * math.prod(int(d) for d in dims[1].split(",") if d) if dims else 0
            called = re.search(r"calls=(%[\w.-]+)", line)
            operation = "dot" if called and called[1] in products else operation
            found[name] = operation, re.findall(r"%([\w.-]+)", operands), size
    return found


@pytest.mark.parametrize("parts", [2, 1])
def test_collectives(parts):
    """Two reduce-scatters and two all-gathers a block and part, of as many bytes as two all-reduces of all tokens.

    Each but the last has a product beside it: neither needs the other, so that one may be sent while the other is
    computed. With one part there is nothing to hide behind.
    """
    how = Weave(mesh(model=2), least=8 if parts == 2 else 1000, multiple=8)
    graph, state = nnx.split(WovenDecoder(made(TINY), how))
    ids = batch().ids
    program = jax.jit(lambda state: nnx.merge(graph, state).prefill(ids, capacity=2).features)
    found = instructions(program.lower(state).compile().as_text())
    kinds = ("reduce-scatter", "all-gather", "all-reduce", "all-to-all", "collective-permute")
    sent = {kind: [name for name, one in found.items() if one[0].removesuffix("-start") == kind] for kind in kinds}
    sums, gathers = sent["reduce-scatter"], sent["all-gather"]
    assert [len(names) for names in sent.values()] == [2 * parts * TINY.depth] * 2 + [0, 0, 0]
    whole = 2 * TINY.depth * ids.size * TINY.width * 4
    assert sum(found[name][2] for name in gathers) == 2 * sum(found[name][2] for name in sums) == whole

    needs: dict[str, set[str]] = {}
    for name, (_, operands, _) in found.items():
        needs[name] = set(operands).union(*(needs.get(one, set()) for one in operands))
    products = [name for name, one in found.items() if one[0] == "dot"]
    for names in (sums, gathers):
        beside = [name for name in names if any(name not in needs[p] and p not in needs[name] for p in products)]
        assert beside == (names[:-1] if parts == 2 else [])
        assert all(a in needs[b] for a, b in itertools.pairwise(names))  # one message after the other


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"least": 37}, [[Piece(0, 3, 0, 12)]]),
        ({"multiple": 12}, [[Piece(0, 1, 0, 12), Piece(1, 2, 0, 6)], [Piece(1, 2, 6, 12), Piece(2, 3, 0, 12)]]),
        ({"multiple": 24}, [[Piece(0, 2, 0, 12)], [Piece(2, 3, 0, 12)]]),
        ({"multiple": 12, "offset": -16}, [[Piece(0, 1, 0, 2)], [Piece(0, 1, 2, 12), Piece(1, 3, 0, 12)]]),
        ({"multiple": 256}, [[Piece(0, 3, 0, 12)]]),  # a tile holds them all
    ],
)
def test_parts(settings, parts):
    assert Weave(mesh(model=2), **{"least": 8, **settings}).parts(3, 12) == parts


def test_bad_input():
    two, module, ids = mesh(model=2), made(TINY), batch().ids
    for settings, message in (
        ({"axis": "heads"}, "axis='heads': must be one of the mesh's, model"),
        ({"least": 0}, "least=0: must be at least 1"),
        ({"multiple": 0}, "multiple=0: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Weave(two, **settings)
    for call_, message in (
        (lambda: split([3, 0]), r"new=\[3 0\], computed=\[0 0\]: must be as many numbers"),
        (lambda: split([3], multiple=2, offset=-2), "offset=-2: must leave at least one of 2 tokens"),
        (lambda: WovenDecoder(module, Weave(mesh(model=4))), "kv_heads=2: must be a multiple of the 4 devices"),
        (lambda: api.build(ViTConfig(depth=1, width=8, heads=1)).woven(two), "a ViT: woven needs a Decoder"),
    ):
        with pytest.raises(ValueError, match=message):
            call_()
    other = nnx.merge(*woven(TINY))
    for call_, message in (
        (lambda: other(ids, Drops().hooks(TINY.info)), "hooks at after_block: a woven decoder takes those at"),
        (lambda: other(ids, trace=True), "a woven decoder has none"),
        (lambda: other(Tokens(jnp.zeros((1, 4, 16)), order=jnp.zeros((1, 4), int))), "inputs.order: must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(call_)
