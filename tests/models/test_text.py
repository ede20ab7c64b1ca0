"""Text encoders: pooling, causality, reduction with the pooled token in front, bad input."""

import dataclasses
import functools

from contract_setup import QUICK
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokjax
from tokjax.models.text import Text, TextConfig
from tokjax.reducers.vit.tome import ToMe

TINY = TextConfig(vocab_size=20, length=9, width=16, depth=3, heads=2, embed_dim=6, eos_id=19)
LAST = dataclasses.replace(TINY, causal=False, pooling="last", eos_id=None, embed_dim=16, head_bias=True)
ENDS = (8, 4, 6)


@functools.cache
def model(cfg=TINY):
    made = tokjax.build(cfg)
    rng = np.random.default_rng(0)
    return made.with_params(jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), made.params))


def ids(seed=0):
    """Texts that end at `ENDS`, with padding that is not zero."""
    out = np.random.default_rng(seed).integers(0, 18, (len(ENDS), TINY.length)).astype(np.int32)
    out[np.arange(len(ENDS)), ENDS] = 19
    return out


def test_the_feature_is_that_of_the_first_end():
    text = ids()
    out = jax.jit(model().forward)(model().params, text)
    pooled = np.asarray(out.features)[np.arange(len(ENDS)), ENDS]
    np.testing.assert_array_equal(out.pooled, pooled)
    np.testing.assert_allclose(out.logits, pooled @ model().params["model"]["head"]["kernel"], rtol=1e-5, atol=1e-5)
    largest = dataclasses.replace(TINY, eos_id=None)
    graph, _ = nnx.split(nnx.eval_shape(lambda: Text(largest, rngs=nnx.Rngs(0))))
    again = jax.jit(lambda params: nnx.merge(graph, params)(text).logits)(model().params["model"])
    np.testing.assert_array_equal(again, out.logits)


def test_nothing_behind_the_end_reaches_a_causal_text():
    text, changed = ids(), ids()
    for row, end in enumerate(ENDS):
        changed[row, end + 1 :] = 3
    np.testing.assert_array_equal(model()(text), model()(changed))
    assert not np.array_equal(model(LAST)(text), model(LAST)(changed))


def test_a_shorter_text_gives_the_same_without_its_padding():
    text = ids()[1:2]
    np.testing.assert_allclose(model()(text[:, : ENDS[1] + 1]), model()(text), atol=1e-5)


@pytest.mark.parametrize("cfg", [TINY, LAST], ids=["eos", "last"])
def test_the_pooled_token_in_front_changes_nothing(cfg):
    text = ids()
    traced, trace = model(cfg)(text, trace=True)
    np.testing.assert_allclose(traced, model(cfg)(text), atol=1e-5)
    counts = [end + 1 for end in ENDS] if cfg.causal else [TINY.length] * len(ENDS)
    np.testing.assert_array_equal(trace.tokens, [counts] * TINY.depth)
    with pytest.raises(ValueError, match="no picture"):
        trace.pictures(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("cfg", [TINY, LAST], ids=["eos", "last"])
@pytest.mark.parametrize("name", sorted({"tome", "topk", "evit", "random"}))
def test_reducers_leave_the_pooled_token(cfg, name):
    settings = {"r": 2} if name == "tome" else {"keep_rate": 0.6, "layers": (0, 1)}
    small = tokjax.reduce(model(cfg), name, **settings)
    out, trace = small(ids(), trace=True)
    assert np.isfinite(out).all()
    assert (np.asarray(trace.layers[-1].origin)[:, 0] == 0).all()
    assert trace.layers[-1].slots < TINY.length


def test_a_merged_text_is_still_causal():
    """What a token behind the end holds cannot reach the feature through a merge either."""
    small = tokjax.reduce(model(), "tome", r=3)
    text, changed = ids(), ids()
    for row, end in enumerate(ENDS):
        changed[row, end + 1 :] = 3
    np.testing.assert_array_equal(small(text), small(changed))


def test_a_token_does_not_see_later_ones_after_a_merge():
    """The gradient of the token at the first place, whatever merged, by tokens that stand behind it."""
    cfg = dataclasses.replace(TINY, pooling="last", eos_id=None)  # causal; the last token is in front
    graph, _ = nnx.split(nnx.eval_shape(lambda: Text(cfg, rngs=nnx.Rngs(0))))
    hooks = [hook for hook in ToMe(r=2).hooks(cfg.info) if hook.layer == 0]

    def state(table):
        params = {**model().params["model"], "pos_embed": table}
        out = nnx.merge(graph, params)(jnp.asarray(ids()), hooks)
        first = jnp.argmin(jnp.where(out.tokens.position < 0, 99, out.tokens.position), 1)
        return jnp.take_along_axis(out.tokens.x, first[:, None, None], 1)[0, 0].sum(), out.tokens.position

    slope = jax.jit(jax.grad(state, has_aux=True), compiler_options=QUICK)
    gradient, position = slope(model().params["model"]["pos_embed"])
    used = np.flatnonzero(np.abs(np.asarray(gradient)[0]).sum(-1) > 1e-6)
    merged_into_first = TINY.length - position.shape[1] + 1
    assert position.shape[1] < TINY.length
    assert len(used) <= merged_into_first


def test_stacked_blocks_give_the_same():
    cfg = dataclasses.replace(TINY, depth=5)
    one, scanned = tokjax.build(cfg), tokjax.build(dataclasses.replace(cfg, scan=True))
    np.testing.assert_allclose(one(ids()), scanned(ids()), atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (np.zeros((2, 10), np.int32), r"ids has shape \(2, 10\): must be \(batch, at most 9 tokens\)"),
        (np.zeros((2, 0), np.int32), "at most 9 tokens"),
        (np.zeros((2, 3), np.float32), "must be an integer type"),
        (np.full((2, 3), 20, np.int32), r"ids lie in 20\.\.20: must be in \[0, 20\)"),
        (np.full((2, 3), -1, np.int32), r"must be in \[0, 20\)"),
    ],
)
def test_bad_ids(text, message):
    with pytest.raises(ValueError, match=message):
        model()(text)


def test_ids_outside_of_the_vocabulary_are_not_nan_under_jit():
    assert np.isfinite(model()(jnp.full((1, 4), 99))).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0: must be at least 1"),
        ({"length": 0}, "length=0: must be at least 1"),
        ({"heads": 3}, "heads=3: must divide width=16"),
        ({"eos_id": 20}, r"eos_id=20: must be in \[0, 20\)"),
        ({"pooling": "mean"}, "pooling='mean': must be one of eos, last"),
        ({"gelu": "relu"}, "gelu='relu'"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
