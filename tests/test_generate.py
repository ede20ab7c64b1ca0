"""Going on with texts: the cache against whole forward passes, sampling, beam search against a full one, bad input."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokjax
from tokjax import generate
from tokjax.data.bytes import ByteTokenizer
from tokjax.generate import Decoding
from tokjax.models.t5 import Seq2Seq, T5Config
from tokjax.models.transformer import skeleton
from tokjax.models.vit import ViT, ViTConfig

TINY: dict[str, Any] = {"width": 16, "hidden": 24, "heads": 2, "head_width": 6, "depth": 1, "decoder_depth": 1}
ENDS = (10, 4, 7)


@functools.cache
def model(**changes):
    made = tokjax.build(T5Config(**{"vocab_size": 20, **TINY, **changes}))
    rng = np.random.default_rng(0)
    return made.with_params(jax.tree.map(lambda x: x + rng.normal(0, 0.4, x.shape).astype(np.float32), made.params))


def texts():
    ids = np.random.default_rng(1).integers(2, 20, (3, 10))
    return np.where(np.arange(10) < np.array(ENDS)[:, None], ids, 0).astype(np.int32)


def deleting(hard):
    """With a gate that deletes some tokens of every text."""
    made = tokjax.reduce(model(depth=2), "mrt5", layer=1, hard=hard)
    kernel = jax.random.normal(jax.random.key(5), (16, 1))
    gate = jax.tree.map(lambda leaf: kernel if leaf.ndim == 2 else leaf, made.params["reducers"])
    return made.with_params({**made.params, "reducers": gate})


MODELS = {
    "plain": model,
    "tome_softmax1": lambda: tokjax.reduce(model(normaliser="softmax1"), "tome", r=2),
    "soft": lambda: deleting(hard=False),
    "hard": lambda: deleting(hard=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_gives_what_whole_passes_give(name):
    made = MODELS[name]()
    out = made.generate(texts(), max_tokens=6)
    read = np.concatenate([np.zeros((3, 1), np.int32), np.asarray(out.ids)[:, :-1]], 1)
    log_p = np.asarray(jax.nn.log_softmax(made(Seq2Seq(texts(), read))))
    there = np.arange(6) < np.asarray(out.length)[:, None]
    np.testing.assert_array_equal(np.where(there, log_p.argmax(-1), 0), out.ids)
    np.testing.assert_allclose((log_p.max(-1) * there).sum(1), out.score, rtol=1e-4)


def test_what_a_row_draws_does_not_depend_on_the_others():
    settings = {"max_tokens": 5, "temperature": 1.0, "top_p": 0.9}
    keys = jax.random.split(jax.random.key(0), 3)
    one = model().generate(texts(), key=keys, **settings)
    alone = model().generate(texts()[1:2, : ENDS[1]], key=keys[1:2], **settings)
    np.testing.assert_array_equal(one.ids[1], alone.ids[0])
    np.testing.assert_allclose(one.score[1], alone.score[0], rtol=1e-4)


def test_strings(monkeypatch):
    made = tokjax.build(T5Config(**TINY), preprocess=ByteTokenizer(200))
    seen = []
    monkeypatch.setattr(made, "_generated", lambda params, ids, *a, **k: seen.append(ids))
    made.generate(["ab", "c" * 70])
    assert seen[0].shape == (2, 128)
    np.testing.assert_array_equal(seen[0][0, :4], [100, 101, 1, 0])


# ------------------------------------------------------------------------------------------- any model: a Markov chain

CHAIN = np.log(np.random.default_rng(3).dirichlet(np.full(4, 0.7), 4)).astype(np.float32)
START = np.log(np.random.default_rng(4).dirichlet(np.ones(4), 2)).astype(np.float32)


def go_on(how: Decoding, first=START, key=None):
    def step(state, ids):
        return jnp.asarray(CHAIN)[ids], {"steps": state["steps"] + 1, "rows": state["rows"]}

    @jax.jit
    def run(first, key):
        rows = jnp.repeat(first, how.beams, 0)
        return generate.run(step, {"steps": jnp.int32(0), "rows": jnp.arange(len(rows))}, rows, how, key)

    return run(jnp.asarray(first), key)


def all_texts(first, total):
    """Every text that ends with 1 or has `total` tokens, with its log-probability."""
    for length in range(1, total + 1):
        for text in itertools.product(range(4), repeat=length):
            if 1 not in text[:-1] and (text[-1] == 1 or length == total):
                yield text, first[text[0]] + sum(CHAIN[a, b] for a, b in itertools.pairwise(text))


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_many_beams_are_a_full_search(penalty):
    out = go_on(Decoding(max_tokens=3, beams=20, length_penalty=penalty))
    for row in range(2):
        every = sorted(((p / len(t) ** penalty, t) for t, p in all_texts(START[row], 3)), reverse=True)[:5]
        np.testing.assert_allclose(out.beam_scores[row, :5], [score for score, _ in every], rtol=1e-5)
        best = every[0][1]
        assert tuple(np.asarray(out.ids)[row, : len(best)]) == best
        assert out.length[row] == len(best)
        assert (np.asarray(out.ids)[row, len(best) :] == 0).all()


def test_an_early_stop_takes_the_first_that_end():
    greedy = np.array([[0.05, 0.5, 0.4, 0.05]], np.float32)  # the end is the likeliest first token
    out = go_on(Decoding(max_tokens=8, beams=2, length_penalty=5.0, early_stopping=True), np.log(greedy))
    late = go_on(Decoding(max_tokens=8, beams=2, length_penalty=5.0), np.log(greedy))
    lengths = [(np.asarray(o.beam_ids[0]) == 1).argmax(-1) + 1 for o in (out, late)]
    assert lengths[0].max() <= 3 < lengths[1].max() + 1
    assert late.score[0] >= out.score[0]


def test_without_an_end_all_texts_are_full():
    out = go_on(Decoding(max_tokens=5, eos_id=None))
    np.testing.assert_array_equal(out.length, [5, 5])
    text = np.asarray(out.ids[0])
    np.testing.assert_array_equal(text[1:], CHAIN.argmax(-1)[text[:-1]])


def test_drawn_tokens_follow_their_probabilities():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def frequencies(**settings):
        draw = jax.jit(generate.choose, static_argnums=1)
        ids = draw(
            jnp.tile(logits, (4000, 1)), Decoding(temperature=settings.pop("temperature", 1.0), **settings), keys
        )
        return np.bincount(ids, minlength=4) / 4000

    np.testing.assert_allclose(frequencies(), [0.1, 0.4, 0.2, 0.3], atol=0.03)
    np.testing.assert_allclose(frequencies(top_k=2), [0, 4 / 7, 0, 3 / 7], atol=0.03)
    np.testing.assert_allclose(frequencies(top_p=0.65), [0, 4 / 7, 0, 3 / 7], atol=0.03)
    np.testing.assert_allclose(frequencies(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9], atol=0.03)
    np.testing.assert_allclose(frequencies(top_p=0.01), [0, 1, 0, 0])
    np.testing.assert_allclose(frequencies(top_k=3, top_p=0.4), [0, 1, 0, 0])
    cold = np.array([0.1, 0.4, 0.2, 0.3]) ** 2
    np.testing.assert_allclose(frequencies(temperature=0.5), cold / cold.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0: must be at least 1"),
        ({"beams": 0}, "beams=0: must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0: must be at least 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0: must be in \(0, 1\]"),
        ({"top_k": 3}, "top_k=3, top_p=None: need a temperature above 0"),
        ({"beams": 2, "temperature": 1.0}, "beams=2: a beam search draws nothing"),
        ({"length_penalty": float("nan")}, "length_penalty=nan: must be finite"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**settings)


def test_bad_input():
    with pytest.raises(ValueError, match=r"key=None: temperature=1.0 draws"):
        model().generate(texts(), temperature=1.0)
    with pytest.raises(ValueError, match=r"texts lie in 99\.\.99"):
        model().generate(np.full((1, 3), 99))
    with pytest.raises(ValueError, match="made without a tokenizer"):
        model().generate(["a"])
    images = tokjax.Model(skeleton(ViT, ViTConfig(image_size=(8, 8), patch_size=4, width=8, depth=1, heads=2)))
    with pytest.raises(ValueError, match="gives no tokens"):
        images.generate(texts())
