"""Numbers of tokens by layer, against counts worked out by hand and figures of the papers."""

import itertools
import math

import pytest

from tokjax import schedules


def test_constant():
    assert schedules.constant(13, 4) == (13, 13, 13, 13)


def test_sloped_falls_from_twice_r_to_zero():
    falling = schedules.sloped(8, -1, 12)
    assert falling == (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)
    assert sum(falling) == 91


@pytest.mark.parametrize("inflect", [-1, -0.3, 0, 0.25, 1])
def test_sloped_is_linear_and_mirrored(inflect):
    rows = schedules.sloped(10, inflect, 5)
    assert rows[0] == int(10 * (1 - inflect))
    assert rows[-1] == 20 - rows[0]
    assert all(abs((b - a) - (rows[-1] - rows[0]) / 4) < 1 for a, b in itertools.pairwise(rows))


def test_sloped_of_one_block_has_its_middle():
    assert schedules.sloped(6, -1, 1) == (6,)


@pytest.mark.parametrize("inflect", [-1.01, 2, math.nan])
def test_sloped_refuses_a_slope_outside_its_range(inflect):
    with pytest.raises(ValueError, match=r"inflect=.*\[-1, 1\]"):
        schedules.sloped(8, inflect, 12)


def test_truncated_pads_and_cuts():
    assert schedules.truncated([16, 16], 4) == (16, 16, 0, 0)
    assert schedules.truncated([1, 2, 3], 2) == (1, 2)


def test_per_block_takes_numbers_and_lists():
    assert schedules.per_block(3, 2) == (3, 3)
    assert schedules.per_block(3, 3, -1.0) == (6, 3, 0)
    assert schedules.per_block((5,), 3) == (5, 0, 0)


@pytest.mark.parametrize(
    ("depth", "expected"), [(12, (3, 6, 9)), (24, (6, 12, 18)), (4, (1, 2, 3)), (2, (0, 1)), (1, (0,))]
)
def test_stages(depth, expected):
    assert schedules.stages(depth) == expected


def test_at_layers():
    assert schedules.at_layers(None, 12) == (3, 6, 9)
    assert schedules.at_layers([0, 11], 12) == (0, 11)
    for wrong in (12, -1):
        with pytest.raises(ValueError, match=r"layers=\(3, .*0 to 11"):
            schedules.at_layers([3, wrong], 12)


def test_evits_counts_at_224_pixels():
    counts, tokens = [], 196
    for _ in range(3):
        counts.append(schedules.kept(0.7, tokens))
        tokens = counts[-1] + 1  # the fused token is one of those that are ranked next
    assert counts == [138, 98, 70]


@pytest.mark.parametrize(
    ("rate", "expected"), [(0.9, (176, 158, 142)), (0.7, (137, 96, 67)), (0.5, (98, 49, 24)), (0.25, (49, 12, 3))]
)
def test_benchmarks_counts(rate, expected):
    assert schedules.kept_table(rate, 196, 3) == expected


def test_keep_rate_ramp_goes_down_a_cosine():
    def rate(iteration):
        return schedules.keep_rate_ramp(iteration, 5, base=0.7, start_epoch=2, epochs=8)

    assert rate(0) == rate(9) == rate(10) == 1.0
    assert rate(10 + 20) == pytest.approx(0.85)  # half-way
    assert rate(10 + 40) == rate(10_000) == 0.7
    values = [rate(i) for i in range(60)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("kind", ["constant", "falling", "rising", "geometric", "staged"])
def test_courses_start_at_all_and_never_rise(kind):
    assert schedules.course(kind, 0, 64, 12) == (64,) * 12
    for strength in (0.3, 0.9, 5):
        left = schedules.course(kind, strength, 64, 12)
        assert all(a >= b >= 1 for a, b in itertools.pairwise((64, *left)))
        halved = schedules.course(kind, strength, 64, 12, halving=True)
        assert all(2 * b >= a for a, b in itertools.pairwise((64, *halved)))


def test_courses_by_hand():
    assert schedules.course("constant", 0.75, 64, 4) == (52, 40, 28, 16)
    assert schedules.course("falling", 0.75, 64, 4) == (40, 24, 16, 16)  # 24, 16, 8, 0 of 48
    assert schedules.course("rising", 0.75, 64, 4) == (64, 56, 40, 16)
    assert schedules.course("geometric", math.log(16), 64, 4) == (32, 16, 8, 4)
    assert schedules.course("staged", math.log(8), 64, 4) == (64, 32, 16, 8)
    assert schedules.course("constant", 4, 64, 4) == (1, 1, 1, 1)
    assert schedules.course("constant", 4, 64, 4, halving=True) == (32, 16, 8, 4)


def test_courses_refuse():
    with pytest.raises(ValueError, match="kind='steep'"):
        schedules.course("steep", 1, 64, 12)
    with pytest.raises(ValueError, match=r"strength=-0\.1"):
        schedules.course("constant", -0.1, 64, 12)
