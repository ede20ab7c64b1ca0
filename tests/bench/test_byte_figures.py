"""Figures of byte-level models, on cases that are counted by hand."""

import math

import numpy as np
import pytest

from tokjax.bench import bytes as measure
from tokjax.data.bytes import CLASSES, encode

IDS = encode(["ab 1", "é!"], 6)
KEPT = np.array([[1, 0, 0, 1, 1, 0], [1, 0, 1, 0, 0, 0]], bool)


def test_bits_per_byte():
    assert measure.bits_per_byte(10 * math.log(384), 10) == pytest.approx(math.log2(384))
    assert measure.bits_per_byte(0.0, 3) == 0
    for nats, count in ((1.0, 0), (math.nan, 3), (-1.0, 3)):
        with pytest.raises(ValueError, match="nats must not be negative and count must be positive"):
            measure.bits_per_byte(nats, count)


def test_sequence_correct():
    labels = np.array([[5, 6, 1], [5, 1, -100], [5, 1, -100], [-100] * 3])
    predicted = np.array([[5, 6, 1], [5, 1, 77], [4, 1, -100], [1, 2, 3]])
    assert measure.sequence_correct(predicted, labels).tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="must be the same"):
        measure.sequence_correct(predicted, labels[:, :2])


def test_deletions_by_class_and_group():
    counts = measure.deletion_counts(IDS, KEPT, np.array([1, 0]), groups=3)
    assert counts.shape == (3, len(CLASSES), 2) and counts[..., 0].sum() == 9  # with two EOS
    assert measure.deletion_rate(counts) == 4 / 9
    assert measure.deletion_by_group(counts, ["german", "english", "thai"]) == {"german": 2 / 4, "english": 2 / 5}
    assert measure.deletion_by_class(counts) == {
        "letter": 0.5,
        "space": 1.0,
        "digit": 0.0,
        "punctuation": 0.0,
        "latin first": 0.0,
        "latin later": 1.0,
        "special": 0.5,
    }


def test_batches_add_up():
    whole = measure.deletion_counts(IDS, KEPT)
    parts = [measure.deletion_counts(IDS[i : i + 1], KEPT[i : i + 1]) for i in range(2)]
    np.testing.assert_array_equal(sum(parts), whole)
    nothing = measure.deletion_counts(np.zeros((2, 4), int), np.zeros((2, 4), bool))
    assert not nothing.any() and measure.deletion_rate(nothing) == 0.0
    assert measure.deletion_by_class(nothing) == {} == measure.deletion_by_group(nothing, ["a"])


def test_mean_over_groups():
    assert measure.mean_over_groups({"a": 1.0, "b": 4.0}, {"a": 2, "b": 1}) == 2.0
    with pytest.raises(ValueError, match="must have the same groups"):
        measure.mean_over_groups({"a": 1.0}, {"b": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": KEPT.astype(int)}, r"kept int64 \[2, 6\]"),
        ({"kept": KEPT[:, :3]}, r"kept bool \[2, 3\]"),
        ({"group": np.array([0])}, r"group \[1\]"),
        ({"group": np.array([0, 2]), "groups": 2}, r"group must be in 0\.\.1, got 0\.\.2"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        measure.deletion_counts(**{"ids": IDS, "kept": KEPT} | change)
    with pytest.raises(ValueError, match="one for each of 1 groups, got 2"):
        measure.deletion_by_group(measure.deletion_counts(IDS, KEPT), ["a", "b"])
