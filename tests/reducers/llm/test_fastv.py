"""FastV: which tokens may go, per row, capacities, its masked form, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokjax
from tokjax.models.decoder import DecoderConfig, Prompts
from tokjax.reducers.llm.fastv import FastV
from tokjax.signals import Signals
from tokjax.token_map import apply
from tokjax.tokens import MASKED, Tokens

CONFIG = DecoderConfig(
    vocab_size=20, length=12, width=16, hidden=24, depth=3, heads=4, kv_heads=2, head_width=4, max_length=32
)


def tokens(n=10, **fields):
    """Token i is attended to more than token i + 1, by one head."""
    x = jnp.arange(n, 0, -1.0)[None, :, None] * jnp.ones((2, 1, 4))
    place = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (2, n))
    query = jnp.ones((2, n, 1, 4))
    return Tokens(x, position=place, **fields), Signals(query, x[:, :, None], x[:, :, None])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_rate": 0.25}, [0, 1, 9]),  # round(9 / 4)
        ({"kept": 0}, [9]),
        ({"span": (2, 8), "kept": 2}, [0, 1, 2, 3, 8, 9]),
        ({"span": (2, -1), "keep_rate": 0.5}, [0, 1, 2, 3, 4, 5, 9]),  # round(3.5), to the even one
        ({"span": (-4, 0), "kept": 1}, [0, 1, 2, 3, 4, 5, 6, 9]),  # the last one always stays
        ({"kind": 2, "kept": 1, "others": 6}, [0, 1, 2, 3, 7, 8, 9]),
    ],
)
def test_what_stays(settings, kept):
    given, signals = tokens(kind=jnp.where((jnp.arange(10) > 2) & (jnp.arange(10) < 7), 2, 1)[None].repeat(2, 0))
    out = apply(FastV(**settings).plan(given, signals), given)
    np.testing.assert_array_equal(out.position, [kept, kept])
    assert out.valid is None or out.valid.all()
    hidden = apply(FastV(**settings, masked=True).plan(given, signals), given)
    np.testing.assert_array_equal(np.flatnonzero(hidden.key_bias[0] > MASKED / 2), kept)


def test_rows_of_their_own():
    """A short row keeps its own share; a number for every row."""
    valid = jnp.arange(10) < jnp.array([[10], [5]])
    given, signals = tokens(valid=valid)
    out = apply(FastV(keep_rate=0.5).plan(given, signals), given)
    np.testing.assert_array_equal(out.position, [[0, 1, 2, 3, 9], [0, 1, 4, -1, -1]])
    np.testing.assert_array_equal(out.valid, [[True] * 5, [True] * 3 + [False] * 2])
    out = apply(FastV(kept=(3, 1)).plan(given, signals), given)
    np.testing.assert_array_equal(out.position, [[0, 1, 2, 9], [0, 4, -1, -1]])


def test_more_others_than_slots():
    """Candidates give way; what finds no slot at all is told."""
    given, signals = tokens(kind=jnp.stack([jnp.where(jnp.arange(10) < few, 2, 1) for few in (8, 4)]))
    plan = FastV(kind=2, kept=3, others=2).plan(given, signals)
    out = apply(plan, given)
    np.testing.assert_array_equal(out.position, [[0, 1, 2, 8, 9], [4, 5, 6, 7, 8]])
    np.testing.assert_array_equal(plan.aux["overflow"], [0, 1])


def test_nothing_to_do():
    given, signals = tokens()
    assert FastV(keep_rate=1.0).hooks(CONFIG.info) == []
    assert FastV(kept=20).plan(given, signals) is None


def test_in_a_decoder_dropping_is_masking():
    """The same logits while reading and while going on, with a window too."""
    config = DecoderConfig(**{**vars(CONFIG), "window": 4, "window_layers": (1,)})
    model = tokjax.build(config)
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + noise.normal(0, 0.3, x.shape).astype(np.float32), model.params)
    ids = noise.integers(0, 20, (2, 12)).astype(np.int32)
    valid = np.arange(12) < np.array([[12], [7]])
    settings = {"layer": 1, "span": (1, -2), "keep_rate": 0.4}
    outs = []
    for masked in (False, True):
        fast = tokjax.reduce(model.with_params(params), "fastv", **settings, masked=masked)
        going = fast.begin(ids, valid=valid, max_tokens=5, eos_id=None)
        outs.append((going.state.lengths(), fast.go_on(going).result))
        assert np.isfinite(fast.forward(fast.params, Prompts(ids, valid)).logits).all()
    assert [lengths for lengths, _ in outs] == [(12, 7, 7), (12, 12, 12)]
    np.testing.assert_array_equal(outs[0][1].ids, outs[1][1].ids)
    np.testing.assert_allclose(outs[0][1].score, outs[1][1].score, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 0}, "layer=0: must be at least 1"),
        ({"keep_rate": 1.5}, r"keep_rate=1.5: must be in \[0, 1\]"),
        ({"kept": -1}, "kept=-1: must be at least 0"),
        ({"span": (3, 3)}, r"span=\(3, 3\): must be"),
        ({"span": (1, 3), "kind": 2}, r"span=\(1, 3\), kind=2: give one of both"),
        ({"kind": 2}, "others=None: must be at least 1 where"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FastV(**settings)
    with pytest.raises(ValueError, match="layer=4: must be at most the 3 blocks"):
        FastV(layer=4).hooks(CONFIG.info)
    with pytest.raises(ValueError, match="the tokens of this model have no kinds"):
        given, signals = tokens()
        FastV(kind=2, others=3).plan(given, signals)
