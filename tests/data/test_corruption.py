"""Span corruption: what is cut out, what stays, and that nothing is lost."""

import numpy as np
import pytest

from tokjax.data.bytes import encode, to_ids
from tokjax.data.corruption import corrupt, counts, lengths, noise_mask, shift_right


def restored(inputs, target):
    """The text: each sentinel of the input replaced by what the target has behind the sentinel of the same place."""
    inputs, target = [row[: np.flatnonzero(row)[-1]].tolist() for row in (inputs, target)]  # without EOS
    spans, number = [], -1
    for token in target:
        if token == 258 - len(spans):
            spans.append([])
        else:
            spans[-1].append(token)
    text = []
    for token in inputs:
        if token == 258 - number - 1:
            number += 1
            text += spans[number]
        else:
            text.append(token)
    return text


@pytest.mark.parametrize(("tokens", "density", "mean"), [(200, 0.15, 20), (64, 0.5, 4), (31, 0.15, 3), (2, 0.15, 20)])
def test_nothing_is_lost(tokens, density, mean):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 240, (6, tokens))
    noise = np.stack([noise_mask(tokens, rng, density, mean) for _ in ids])
    inputs, target = corrupt(ids, noise)
    for row in range(6):
        assert restored(inputs[row], target[row]) == ids[row].tolist()
    cut, spans = counts(tokens, density, mean)
    assert inputs.shape == (6, tokens - cut + spans + 1) and target.shape == (6, cut + spans + 1)
    assert (inputs[:, -1] == 1).all() and (target[:, -1] == 1).all() and (target[:, 0] == 258).all()
    assert not noise[:, 0].any() and noise[:, -1].all() and (noise.sum(1) == cut).all()


@pytest.mark.parametrize(("length", "density", "mean"), [(1024, 0.15, 20), (97, 0.15, 3), (64, 0.5, 4), (301, 0.3, 8)])
def test_lengths_are_those_of_what_comes_out(length, density, mean):
    tokens, target = lengths(length, density, mean)
    ids = np.full((1, tokens), 50)
    inputs, targets = corrupt(ids, noise_mask(tokens, np.random.default_rng(1), density, mean)[None])
    assert inputs.shape[1] <= length and targets.shape == (1, target)
    if density != 0.5:
        assert inputs.shape[1] == length


def test_the_published_lengths():
    assert lengths(1024) == (1193, 189)
    assert counts(1193) == (179, 9)


def test_less_than_half_a_span_is_one_span():
    tokens, target = lengths(33)
    inputs, targets = corrupt(np.full((1, tokens), 9), noise_mask(tokens, np.random.default_rng(0))[None])
    assert (inputs.shape[1], targets.shape[1]) == (33 + 1, target + 1)
    assert counts(3, 0.9, 0.1) == (2, 1)  # no more spans than text between them


def test_spans_have_every_length():
    rng = np.random.default_rng(0)
    masks = np.stack([noise_mask(30, rng, 0.3, 3) for _ in range(400)])
    first = masks.argmax(1)
    assert set(range(1, 15)) <= set(first.tolist())
    assert abs(masks[:, :-1].mean(0)[1:].mean() - 8 / 28) < 0.02


def test_rows_of_different_numbers_are_padded():
    ids = to_ids("abcdefgh").reshape(2, 4)
    noise = np.array([[0, 1, 0, 1], [0, 0, 0, 1]], bool)
    inputs, target = corrupt(ids, noise)
    assert inputs.tolist() == [[100, 258, 102, 257, 1], [104, 105, 106, 258, 1]]
    assert target.tolist() == [[258, 101, 257, 103, 1], [258, 107, 1, 0, 0]]


def test_documents_keep_their_end():
    ids = encode(["ab"], 3)
    inputs, target = corrupt(ids, np.array([[False, True, True]]))
    assert inputs.tolist() == [[100, 258, 1]] and target.tolist() == [[258, 101, 1, 1]]


def test_shift_right():
    assert shift_right([[258, 7, 1, -100]]).tolist() == [[0, 258, 7, 1]]
    assert shift_right([[258, -100, -100]]).tolist() == [[0, 258, 0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lengths(2), "length must be at least 3, got 2"),
        (lambda: lengths(64, 0.0), "density must be above 0 and below 1, got 0.0"),
        (lambda: lengths(64, float("nan")), "density must be above 0 and below 1, got nan"),
        (lambda: lengths(64, 0.15, 0), "mean_span must be above 0, got 0"),
        (lambda: counts(1), "tokens must be at least 2, one to cut out and one to keep, got 1"),
        (lambda: corrupt(np.zeros((1, 3), int), np.zeros((1, 4), bool)), r"ids are \[1, 3\] and noise \[1, 4\]"),
        (lambda: corrupt(np.full((1, 600), 9), np.arange(600)[None] % 2 == 1), "300 spans in a row"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
