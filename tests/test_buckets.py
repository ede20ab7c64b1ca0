"""Programs of the length that the data need: every way gives what the mask alone gives, for less."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokjax
from tokjax import buckets, reducers
from tokjax.hooks import Hook
from tokjax.models.t5 import Seq2Seq, T5Config
from tokjax.models.vit import ViTConfig
from tokjax.reducers import KEEP_RATE, Entry
from tokjax.signals import mean_key
from tokjax.token_map import Plan, identity
from tokjax.tokens import Tokens

CFG = ViTConfig(image_size=(16, 16), patch_size=2, width=16, depth=4, heads=2, num_classes=5)
N = CFG.info.length


@dataclasses.dataclass(frozen=True)
class Bright:
    """Keeps the patches whose key points up in the first channel: as many as there are."""

    layers: tuple[int, ...] = (0,)
    draws: bool = False

    def hooks(self, info):
        return [Hook("after_attention", layer, self) for layer in self.layers]

    def plan(self, tokens, signals):
        up = mean_key(signals)[..., 0] > 0
        if self.draws:
            keys = signals.context.row_keys(tokens.batch, 7)
            up &= jax.vmap(lambda key: jax.random.bernoulli(key, 0.7, (tokens.length,)))(keys)
        up |= jnp.arange(tokens.length) < max(tokens.prefix, 1)  # never none
        if tokens.valid is not None:
            up &= tokens.valid
        return Plan(identity(tokens.batch, tokens.length), how="keep", valid=up)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    entry = Entry(Bright, "prune", "a test", ("keys",), KEEP_RATE, {}, length="dynamic")
    monkeypatch.setitem(reducers.REGISTRY, "bright", entry)


def model(cfg=CFG, **settings):
    made = tokjax.build(cfg)
    rng = np.random.default_rng(0)
    made = made.with_params(jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), made.params))
    return tokjax.reduce(made, "bright", **settings)


def images(batch=11):
    """Some are nearly constant, some are busy: their counts differ."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batch, 16, 16, 3)) * rng.uniform(0, 3, (batch, 1, 1, 1)) + rng.normal(size=(batch, 1, 1, 3))
    return x.astype(np.float32)


@pytest.mark.parametrize(
    ("changes", "layers", "pack"),
    [
        pytest.param({}, (0,), False, id="buckets"),
        pytest.param({}, (0,), True, id="packed"),
        pytest.param({}, (0, 2), False, id="two-buckets"),
        pytest.param({"pooling": "mean"}, (0,), True, id="mean-packed"),
        pytest.param({"pooling": "map", "class_token": False}, (0,), False, id="map-buckets"),
        pytest.param({"pooling": "map", "class_token": False}, (0,), True, id="map-packed"),
        pytest.param({"position": "rope", "registers": 2}, (0, 2), True, id="rope-two-packed"),
    ],
)
def test_it_gives_what_the_mask_gives(changes, layers, pack):
    masked, x = model(dataclasses.replace(CFG, **changes), layers=layers), images()
    run = buckets.Bucketed(masked, rows=4, pack=pack)
    logits, usage = run.run(x)
    np.testing.assert_allclose(logits, masked(x), atol=2e-5)
    assert usage.counts.shape == (len(layers), len(x))
    assert len(set(usage.counts[0])) > 3
    assert all(slots >= used for slots, used in zip(usage.slots, usage.used, strict=True))
    assert usage.slots[-1] < usage.slots[0]
    np.testing.assert_array_equal(usage.used[1:], usage.counts.sum(1) if len(x) % 4 == 0 else usage.used[1:])


def test_packing_leaves_fewer_slots_empty():
    masked, x = model(), images(64)
    _, apart = buckets.Bucketed(masked, rows=16).run(x)
    _, shared = buckets.Bucketed(masked, rows=16, pack=True).run(x)
    assert shared.slots[-1] < apart.slots[-1]
    assert shared.used[-1] == shared.counts[-1].sum()


def test_counts_of_the_input_go_along_with_their_rows():
    cfg = dataclasses.replace(CFG, depth=6)
    made, rng = tokjax.build(cfg), np.random.default_rng(0)
    made = made.with_params(jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), made.params))
    masked, x = tokjax.reduce(made, "ats", keep_rate=0.7, layers=(1, 3)), images(6)
    logits, usage = buckets.Bucketed(masked, rows=3).run(x)
    np.testing.assert_allclose(logits, masked(x), atol=2e-5)
    assert len(usage.counts) == 2 and usage.slots[-1] < usage.slots[0]


def test_state_of_tokens_cannot_be_regrouped():
    with pytest.raises(ValueError, match=r"carry='gtp': state of tokens between blocks"):
        buckets.Bucketed(tokjax.reduce(model(), "gtp", propagated=2), rows=4)(images(4))


def test_rows_draw_the_same_in_every_group():
    masked, x = model(draws=True), images()
    for key in (None, jax.random.key(3)):
        logits = buckets.Bucketed(masked, rows=4)(x, key=key)
        np.testing.assert_allclose(logits, masked(x, key=key), atol=2e-5)


def test_scanned_blocks():
    cfg = dataclasses.replace(CFG, depth=6)
    masked, x = model(cfg), images(8)
    params = masked.params
    scanned = model(dataclasses.replace(cfg, scan=True))
    blocks = params["model"]["blocks"]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(blocks[i] for i in range(6)))
    scanned = scanned.with_params({**params, "model": {**params["model"], "blocks": stacked}})
    np.testing.assert_allclose(buckets.Bucketed(scanned, rows=4)(x), masked(x), atol=2e-5)


def test_compact_moves_everything_that_travels():
    rng = np.random.default_rng(0)
    valid = np.array([[1, 0, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    x = rng.normal(size=(3, 5, 2)).astype(np.float32)
    place = np.tile(np.arange(5, dtype=np.int32), (3, 1))
    out = buckets.compact(Tokens(jnp.asarray(x), position=place, size=1.0 + place, valid=jnp.asarray(valid)), 4)
    np.testing.assert_array_equal(out.valid, [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    for row, kept in enumerate(([0, 2, 3], [0], [0, 1, 2, 3])):
        np.testing.assert_array_equal(out.x[row, : len(kept)], x[row, kept])
        np.testing.assert_array_equal(out.position[row, : len(kept)], kept)
        np.testing.assert_array_equal(out.size[row, : len(kept)], 1 + np.array(kept))


def test_first_fit_packs_everything_once_without_overflow():
    counts = np.random.default_rng(0).integers(1, 20, 50)
    rows = buckets.first_fit(counts, 20)
    assert sorted(i for row in rows for i in row) == list(range(50))
    assert all(counts[row].sum() <= 20 for row in rows)
    assert len(rows) <= 1.25 * -(-counts.sum() // 20)
    assert buckets.first_fit([], 5) == []
    with pytest.raises(ValueError, match="length=5: must hold the longest sequence, of 6 tokens"):
        buckets.first_fit([2, 6], 5)


def test_choose():
    assert [buckets.choose(n, (8, 4, 16)) for n in (1, 4, 5, 16)] == [4, 4, 8, 16]
    with pytest.raises(ValueError, match=r"count=17: is more than the largest of capacities=\(8, 4, 16\)"):
        buckets.choose(17, (8, 4, 16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: buckets.Bucketed(tokjax.build(CFG)), "has no reducer of dynamic length"),
        (lambda: buckets.Bucketed(model(layers=(3,))), "has no reducer of dynamic length before its last block"),
        (lambda: buckets.Bucketed(model(), capacities=(8, 16)), f"one must hold the input's {N} tokens"),
        (lambda: buckets.Bucketed(model(), rows=0), "rows=0"),
        (
            lambda: buckets.Bucketed(tokjax.reduce(model(), "tome", r=2), pack=True),
            "pack=True: .* has reducers behind its last one of dynamic length",
        ),
    ],
)
def test_what_cannot_be_regrouped_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Texts

T5_CFG = T5Config(
    vocab_size=384,
    length=24,
    decoder_length=7,
    width=16,
    hidden=24,
    heads=2,
    head_width=8,
    depth=4,
    decoder_depth=2,
    normaliser="softmax1",
)


@functools.cache
def gated(layer, **settings):
    """A T5 whose gate deletes about half of the bytes."""
    made = tokjax.reduce(tokjax.build(T5_CFG), "mrt5", layer=layer, **settings)
    params, rng = made.params, np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), params)
    params["reducers"][0]["out"] = jax.tree.map(lambda x: 3 * x, params["reducers"][0]["out"])
    params["reducers"][0]["out"]["bias"] *= 0
    return made.with_params(params)


def texts(batch=11, length=24):
    """Of different lengths."""
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 259, (batch, length)) * (np.arange(length) < rng.integers(1, length + 1, (batch, 1)))
    return Seq2Seq(ids.astype(np.int32), rng.integers(3, 259, (batch, 7)).astype(np.int32))


@pytest.mark.parametrize(("layer", "pack"), [(2, False), (2, True), (0, False)])
def test_an_encoder_runs_at_the_length_of_its_survivors(layer, pack):
    masked, x = gated(layer), texts()
    logits, usage = buckets.Bucketed(masked, rows=4, pack=pack).run(x)
    np.testing.assert_allclose(logits, masked(x), atol=3e-5)
    assert len(set(usage.counts[0])) > 3 and (usage.counts[0] <= (x.ids > 0).sum(1)).all()
    assert usage.slots[1] < 0.7 * usage.slots[0] and not usage.overflow.any()


def test_overflow_is_reported():
    x = texts()
    counts = buckets.Bucketed(gated(2), rows=4).run(x)[1].counts[0]
    capped = gated(2, capacity=4)
    logits, usage = buckets.Bucketed(capped, rows=4).run(x)
    np.testing.assert_array_equal(usage.overflow, np.maximum(counts - 4, 0))
    np.testing.assert_allclose(logits, capped(x), atol=3e-5)


def test_texts_may_be_longer_than_the_example():
    masked, x = gated(2), texts(4, length=32)
    run = buckets.Bucketed(masked, rows=4)
    np.testing.assert_allclose(run(x), masked(x), atol=3e-5)
    with pytest.raises(ValueError, match="one must hold the input's 32 tokens"):
        buckets.Bucketed(masked, capacities=(8, 24), rows=4)(x)
