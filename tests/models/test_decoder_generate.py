"""Going on with texts by a decoder: against whole passes, streaming, ends, beams, strings, bad input."""

import functools

import jax
import numpy as np
import pytest

import tokjax
from tokjax.data.bytes import ByteTokenizer
from tokjax.generate import Console
from tokjax.models.decoder import DecoderConfig, Prompts
from tokjax.models.vit import ViTConfig

SIZES = {"width": 16, "hidden": 24, "depth": 1, "heads": 4, "kv_heads": 2, "head_width": 4, "max_length": 40}
LENGTHS = (10, 4, 7)


@functools.cache
def model(**changes):
    made = tokjax.build(DecoderConfig(**{"vocab_size": 20, "length": 12, "eos_ids": (2, 5), **SIZES, **changes}))
    rng = np.random.default_rng(0)
    return made.with_params(jax.tree.map(lambda x: x + rng.normal(0, 0.4, x.shape).astype(np.float32), made.params))


def texts():
    ids = np.random.default_rng(1).integers(6, 20, (3, 10)).astype(np.int32)
    return ids, np.arange(10) < np.array(LENGTHS)[:, None]


def test_the_cache_gives_what_whole_passes_give():
    ids, valid = texts()
    made = model()
    out = made.generate(ids, valid=valid, max_tokens=6)
    # Behind its own text, so that the row has no padding between.
    for row, end in enumerate(LENGTHS):
        length = int(out.length[row])
        whole = np.concatenate([ids[row, :end], np.asarray(out.ids[row, :length])])
        padded = np.full((1, 16), 7, np.int32)
        padded[0, : len(whole)] = whole
        log_p = np.asarray(jax.nn.log_softmax(made(padded)))[0, end - 1 : end - 1 + length]
        chosen = log_p[np.arange(length), whole[end:]]
        np.testing.assert_allclose(chosen, log_p.max(-1), atol=1e-4)
        np.testing.assert_allclose(chosen.sum(), out.score[row], atol=1e-3)
        ended = length < 6 or int(out.ids[row, -1]) in (2, 5)
        assert ended == bool(np.isin(out.ids[row], (2, 5)).any())
        assert (out.ids[row, length:] == 2).all()


def test_given_tokens_are_followed():
    """What generating would have seen: a prompt's logits, then those behind every token that it chose."""
    ids, valid = texts()
    made = model()
    out = made.generate(ids, valid=valid, max_tokens=6)
    assert (np.asarray(out.length) > 2).any()

    @jax.jit
    def read(params, ids, valid, new):
        first = made.prefill(params, Prompts(ids, valid), capacity=6)
        later, cache = made.follow(params, first.cache, new)
        return first.logits, later, cache.at

    first, later, at = read(made.params, ids, valid, out.ids[:, :5])
    assert at == 5 and later.shape == (3, 5, 20)
    for row, length in enumerate(out.length.tolist()):
        chosen = [int(first[row].argmax()), *later[row].argmax(-1).tolist()]
        assert chosen[:length] == out.ids[row, :length].tolist()
    vit = tokjax.build(ViTConfig((8, 8), 4, width=8, depth=1, heads=1))
    with pytest.raises(ValueError, match="This model is a ViT: prefill needs a Decoder"):
        vit.prefill(vit.params, ids, capacity=6)


def test_pieces_give_the_same_and_are_seen():
    ids, valid = texts()
    settings = {"max_tokens": 6, "temperature": 1.0, "top_k": 5, "key": jax.random.key(0), "eos_id": None}
    whole = model().generate(ids, valid=valid, **settings)
    seen = []
    pieces = model().generate(ids, valid=valid, stream=lambda ids, done: seen.append((ids, done)), every=2, **settings)
    np.testing.assert_array_equal(pieces.ids, whole.ids)
    np.testing.assert_allclose(pieces.score, whole.score, rtol=1e-5)
    assert [(new.shape[1], done) for new, done in seen] == [(1, False), (3, False), (5, False), (6, True)]
    np.testing.assert_array_equal(seen[1][0], whole.ids[:, :3])
    alone = model().generate(ids[:1], valid=valid[:1], **settings)  # whose key is of row 0 too
    np.testing.assert_array_equal(alone.ids[0], whole.ids[0])


def test_a_beam_search_finds_what_its_scores_say():
    ids, valid = texts()
    out = model().generate(ids, valid=valid, max_tokens=4, beams=3, eos_id=None)
    assert (np.diff(out.beam_scores, axis=1) <= 0).all()
    for row, end in enumerate(LENGTHS):
        whole = np.concatenate([ids[row, :end], np.asarray(out.ids[row])])[None]
        there = np.ones_like(whole, bool)
        log_p = np.asarray(jax.nn.log_softmax(model()(Prompts(whole, there))))[0, end - 1 : -1]
        np.testing.assert_allclose(log_p[np.arange(4), whole[0, end:]].mean(), out.score[row], atol=1e-4)


def test_strings_and_the_console():
    made = tokjax.build(
        DecoderConfig(**{**SIZES, "max_length": 200}, vocab_size=384, eos_ids=(1,), pad_id=0),
        preprocess=ByteTokenizer(200),
    )
    printed = []
    stream = Console(made.preprocess.decode, row=1, write=printed.append)
    out = made.generate(["ab", "c" * 70], max_tokens=5, stream=stream, every=2)
    assert out.ids.shape == (2, 5)
    assert "".join(printed) == made.preprocess.decode(np.asarray(out.ids[1])) + "\n"
    assert made.begin(["ab"], max_tokens=5).state.lengths() == (64,)
    alone = made.generate(["ab"], max_tokens=5)
    np.testing.assert_array_equal(alone.ids[0], out.ids[0])
    with pytest.raises(ValueError, match=r"texts\[1\] has no token"):
        made.generate(["a", ""])
    with pytest.raises(ValueError, match=r"texts\[0\] has 201 tokens: must have at most 200"):
        made.generate(["a" * 201])
    with pytest.raises(ValueError, match="must be a list of strings"):
        made.generate("a")
    with pytest.raises(ValueError, match="texts is empty"):
        made.generate([])
    with pytest.raises(ValueError, match="valid: goes with ids"):
        made.generate(["a"], valid=np.ones((1, 1), bool))


def test_the_console_holds_back_half_a_character():
    printed = []
    console = Console(ByteTokenizer(9).decode, write=printed.append)
    ids = np.array([[ord("a") + 3, 0xC3 + 3, 0xA9 + 3]])
    console(ids[:, :2], False)
    console(ids, True)
    assert printed == ["a", "é", "\n"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 31}, "max_tokens=31: with a text of 10 tokens goes beyond the 40 positions"),
        ({"valid": np.ones((3, 9), bool)}, r"valid has shape \(3, 9\): must be that of texts"),
        ({"valid": np.arange(3)[:, None] < np.full((3, 10), 2)}, r"texts\[2\] has no token"),
        ({"temperature": 1.0}, "key=None"),
        ({"stream": print, "beams": 2}, "stream: needs a decoder and beams=1"),
        ({"every": 0}, "every=0: must be at least 1"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        model().generate(texts()[0], **{"max_tokens": 4, **changes})
    with pytest.raises(ValueError, match="texts are strings: this model was made without a tokenizer"):
        model().generate(["a"])
    with pytest.raises(ValueError, match=r"texts has shape \(3, 41\)"):
        model().generate(np.zeros((3, 41), np.int32))
