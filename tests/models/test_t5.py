"""T5: relative positions, padding, reduction of the encoder, cross-attention's hooks, dropout, bad input."""

import dataclasses
import functools
import math
from typing import Any

from contract_setup import QUICK
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import hooks as hk
from tokjax import reducers, token_map
from tokjax import signals as sg
from tokjax.models import t5
from tokjax.models.t5 import T5, Seq2Seq, T5Config
from tokjax.reducers.vit.tome import ToMe
from tokjax.token_map import Plan

TINY = T5Config(
    vocab_size=30, length=12, decoder_length=5, width=16, hidden=24, heads=2, head_width=6, depth=3, decoder_depth=2
)
ENDS = (12, 7, 9)


@functools.cache
def model(cfg=TINY):
    """The module's graph, and parameters that are not the small initial ones."""
    graph, state = nnx.split(T5(cfg, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return graph, jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), nnx.to_pure_dict(state))


def run(inputs, cfg=TINY, hooks=(), **options):
    graph, params = model(cfg)
    program = jax.jit(lambda params, inputs: nnx.merge(graph, params)(inputs, hooks, **options), compiler_options=QUICK)
    return program(params, inputs)


def batch(seed=0):
    """Texts of different lengths behind which ids are 0."""
    rng = np.random.default_rng(seed)
    ids = np.where(np.arange(12) < np.array(ENDS)[:, None], rng.integers(1, 30, (3, 12)), 0)
    target = np.concatenate([np.zeros((3, 1), int), rng.integers(1, 30, (3, 4))], 1)
    return Seq2Seq(ids.astype(np.int32), target.astype(np.int32))


plain = functools.cache(lambda cfg=TINY: run(batch(), cfg))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20)])
def test_buckets_follow_the_formula(causal, buckets, max_distance):
    distance = np.arange(-300, 301)
    side = buckets if causal else buckets // 2

    def bucket(d):
        far = max(-d, 0) if causal else abs(d)
        exact = side // 2
        wide = exact + math.floor(
            math.log(max(far, 1) / exact) / math.log(max_distance / exact) * (side - exact) + 1e-9
        )
        return (far if far < exact else min(wide, side - 1)) + (side if d > 0 and not causal else 0)

    got = t5.relative_buckets(distance, causal=causal, buckets=buckets, max_distance=max_distance)
    np.testing.assert_array_equal(got, [bucket(int(d)) for d in distance])


def test_a_stack_in_order_needs_no_gather():
    bias = jax.random.normal(jax.random.key(0), (9, 2))
    place = jnp.arange(7)[None]
    np.testing.assert_array_equal(t5._in_order(bias, 7), t5.pair_bias(bias, place, place))


def test_a_padded_row_equals_the_row_alone():
    out, inputs = plain(), batch()
    row, end = 1, ENDS[1]
    alone = run(Seq2Seq(inputs.ids[row : row + 1, :end], inputs.decoder_ids[row : row + 1]))
    np.testing.assert_allclose(out.encoder.x[row, :end], alone.encoder.x[0], atol=2e-5)
    np.testing.assert_allclose(out.logits[row], alone.logits[0], atol=2e-5)


def test_no_place_sees_a_later_one():
    inputs = batch()
    changed = inputs.decoder_ids.copy()
    changed[:, 3:] = 7
    out = run(inputs.replace(decoder_ids=changed))
    np.testing.assert_array_equal(out.logits[:, :3], plain().logits[:, :3])
    assert not np.array_equal(out.logits[:, 3:], plain().logits[:, 3:])


def test_only_distances_matter():
    """The same text with two tokens of padding in front."""
    inputs = batch()
    ids = np.concatenate([np.zeros((3, 2), np.int32), inputs.ids], 1)
    out = run(inputs.replace(ids=ids))
    np.testing.assert_allclose(out.logits, plain().logits, atol=2e-5)


def test_eager_and_scanned_give_the_same():
    flat = dataclasses.replace(TINY, depth=1, decoder_depth=1)
    graph, params = model(flat)
    np.testing.assert_allclose(nnx.merge(graph, params)(batch()).logits, plain(flat).logits, atol=2e-5)
    deep = dataclasses.replace(TINY, depth=5)
    scanned = dataclasses.replace(deep, scan=True)
    _, params = model(deep)
    stacked: dict[str, Any] = {**params, **{side: dict(params[side]) for side in ("encoder", "decoder")}}
    for side in ("encoder", "decoder"):
        blocks = [params[side]["blocks"][i] for i in range(len(params[side]["blocks"]))]
        stacked[side]["blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    graph, _ = nnx.split(nnx.eval_shape(lambda: T5(scanned, rngs=nnx.Rngs(0))))
    out = jax.jit(lambda p: nnx.merge(graph, p)(batch()).logits, compiler_options=QUICK)(stacked)
    np.testing.assert_allclose(out, plain(deep).logits, atol=2e-5)


def test_bfloat16_is_close():
    out = run(batch(), dataclasses.replace(TINY, dtype="bfloat16"))
    assert out.logits.dtype == jnp.float32
    error = np.abs(out.logits - plain().logits).mean() / np.abs(plain().logits).mean()
    assert 0 < error < 0.05


@pytest.mark.parametrize("normaliser", ["softmax", "softmax1"])
def test_rows_of_padding_alone_are_finite(normaliser):
    cfg = dataclasses.replace(TINY, normaliser=normaliser)
    inputs = batch()
    ids = inputs.ids.copy()
    ids[1] = 0
    graph, params = model(cfg)

    def loss(params):
        return nnx.merge(graph, params)(inputs.replace(ids=ids)).logits.sum()

    value, gradient = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@dataclasses.dataclass(frozen=True)
class Drops:
    """Drops every second token before a block, or gives it a bias that hides it."""

    soft: bool = False

    def hooks(self, info):
        return [hk.Hook("before_block", 1, self)]

    def plan(self, tokens, signals):
        kept = jnp.arange(tokens.length) % 2 == 0
        if self.soft:
            return Plan(key_bias=jnp.broadcast_to(jnp.where(kept, 0.0, -1e9), tokens.x.shape[:2]))
        keep = jnp.broadcast_to(jnp.arange(0, tokens.length, 2), (tokens.batch, (tokens.length + 1) // 2))
        nobody = jnp.zeros((tokens.batch, 0), jnp.int32)
        return Plan(token_map.HardMap(keep, nobody, nobody, num_in=tokens.length))


def test_deleted_tokens_leave_what_hidden_ones_do():
    """Positions and biases survive a deletion: the logits are those of tokens that nobody attends to."""
    soft, hard = (run(batch(), hooks=Drops(soft).hooks(TINY.info)) for soft in (True, False))
    assert hard.encoder.length == 6
    np.testing.assert_array_equal(hard.encoder.position, [range(0, 12, 2)] * 3)
    np.testing.assert_allclose(hard.logits, soft.logits, atol=2e-5)
    assert np.abs(hard.logits - plain().logits).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "settings"),
    [("tome", {"r": 2}), ("pitome", {"keep_rate": 0.6}), ("random", {"keep_rate": 0.6}), ("avgpool", {})],
)
def test_a_padded_row_is_reduced_as_alone(name, settings):
    cfg = dataclasses.replace(TINY, depth=2, decoder_depth=1)
    hooks = reducers.create(name, cfg.info, **settings).hooks(cfg.info)
    keys = jax.random.split(jax.random.key(2), 3)
    inputs, row, end = batch(), 1, ENDS[1]
    out = run(inputs, cfg, hooks, key=keys)
    one = Seq2Seq(inputs.ids[row : row + 1, :end], inputs.decoder_ids[row : row + 1])
    alone = run(one, cfg, hooks, key=keys[row : row + 1])
    assert out.encoder.length < 12
    assert alone.encoder.count() == out.encoder.count()[row] < end
    np.testing.assert_allclose(out.logits[row], alone.logits[0], atol=5e-5)


def test_merged_tokens_are_fewer_in_the_cross_attention():
    out = run(batch(), hooks=ToMe(r=2).hooks(TINY.info), trace=True)
    assert [layer.slots for layer in out.trace] == [10, 8, 6]
    assert out.encoder.length == 6
    assert np.isfinite(out.logits).all()


@dataclasses.dataclass(frozen=True)
class Watches:
    """Notes attention to the encoder."""

    def hooks(self, info):
        return [hk.Hook("after_cross_attention", layer, self) for layer in range(info.decoder_depth)]

    def plan(self, tokens, signals):
        weights = sg.attention_rows(signals)
        return Plan(aux={"loss/seen": weights[..., -3:].sum(), "weights": weights})


def test_hooks_watch_the_cross_attention():
    out = run(batch(), hooks=Watches().hooks(TINY.info))
    np.testing.assert_allclose(out.logits, plain().logits, atol=1e-6)
    assert {noted["weights"].shape for noted in out.tokens.aux.values()} == {(3, 2, 5, 12)}
    assert len(out.tokens.aux) == 2
    assert hk.losses(out.tokens.aux)["seen"] > 0  # of the one row that is that long
    far = hk.Hook("after_cross_attention", 2, Watches())
    with pytest.raises(ValueError, match="layer 2; this model has layers 0 to 1"):
        hk.check([far], TINY.info)


def test_dropout_is_of_training_and_of_each_row():
    cfg = dataclasses.replace(TINY, dropout=0.3)
    keys = jax.random.split(jax.random.key(1), 3)
    one, other = (run(batch(), cfg, key=keys, train=True), run(batch(), cfg, key=keys, train=False))
    np.testing.assert_array_equal(other.logits, plain(cfg).logits)
    assert np.abs(one.logits - other.logits).max() > 1e-2
    inputs = jax.tree.map(lambda leaf: leaf[1:2], batch())
    alone = run(inputs, cfg, key=keys[1:2], train=True)
    np.testing.assert_allclose(alone.logits, one.logits[1:2], atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": np.full((3, 4), 30)}, r"ids lie in 30\.\.30: must be in \[0, 30\)"),
        ({"ids": np.zeros((3, 0), int)}, r"ids has shape \(3, 0\): must be \(batch, at least 1 token\)"),
        ({"decoder_ids": np.zeros((3, 0), int)}, "decoder_ids has shape"),
        ({"decoder_ids": np.zeros((2, 5), int)}, "decoder_ids has 2 rows: must have 3"),
        ({"decoder_ids": np.zeros((3, 5))}, "decoder_ids has type float64"),
        ({"valid": np.ones((3, 5), bool)}, r"valid has shape \(3, 5\): must be that of ids"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.check(batch().replace(**changes))
    with pytest.raises(ValueError, match="inputs is a ndarray"):
        TINY.check(np.zeros((2, 3), int))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 0}, "heads=0: must be at least 1"),
        ({"feed": "swiglu"}, "feed='swiglu': must be one of relu, geglu"),
        ({"normaliser": "policy"}, "normaliser='policy'"),
        ({"buckets": 6}, "buckets=6: must be a multiple of 4"),
        ({"max_distance": 16}, "max_distance=16: must be above"),
        ({"pad_id": 30}, r"pad_id=30: must be in \[0, 30\)"),
        ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_presets():
    small = nnx.eval_shape(lambda: T5(t5.preset("byt5-small"), rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(small)))
    assert round(count / 1e6) == 300  # as published
    with pytest.raises(ValueError, match="name='byt5-tiny': must be one of byt5-small"):
        t5.preset("byt5-tiny")
