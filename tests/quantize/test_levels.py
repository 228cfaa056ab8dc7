"""Counts of experts at two and three levels against counts worked out by hand, the rule in words, and enumeration."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetmoe.errors import InputError
from hetmoe.quantize.levels import assign, level_counts, three_levels, two_levels, uniform

BITS = [1, 2, 3, 4, 8]
EQUAL = [(1, 2, 3), (2, 3, 4)]  # the only equally spaced ones of those that exist
UNEQUAL = [(1, 2, 4), (2, 4, 8), (1, 3, 4), (1, 2, 8), (3, 4, 8), (1, 4, 8)]


@pytest.mark.parametrize(
    ("experts", "average", "low", "high", "first", "reached"),
    [
        (8, 2.5, 2, 3, 4, 2.5),
        (8, 2.0, 2, 3, 0, 2.0),
        (8, 3.0, 2, 3, 8, 3.0),
        (8, 2.3, 2, 3, 2, 2.25),  # 2.4
        (8, 2.3125, 2, 3, 2, 2.25),  # 2.5, a half: to the even 2
        (8, 2.4375, 2, 3, 4, 2.5),  # 3.5, a half: to the even 4
        (8, 2.0, 1, 4, 3, 17 / 8),  # 8/3 = 2.67; 3*4 + 5*1 = 17
        (10, 2.45, 2, 3, 4, 2.4),  # 4.5 exactly, to the even 4; float64 arithmetic would find 4.500000000000002
        (10, 2.55, 2, 3, 6, 2.6),  # 5.5, to the even 6; float64 arithmetic would find 5.499999999999998
        (16, 2.25, 2, 8, 1, 38 / 16),  # 2/3; 8 + 15*2 = 38
        (1, 2.5, 2, 3, 0, 2.0),
    ],
)
def test_two_levels_by_hand(experts, average, low, high, first, reached) -> None:
    counts = two_levels(experts, average, low, high)
    assert (counts.levels, counts.experts) == ((high, low), (first, experts - first))
    assert float(counts.average) == reached
    assert counts.exact == (reached == average)


# Levels 1, 2, 3: D = 2, h - D/3 = 2.333, h - 2D/3 = 1.667. Columns: experts at 3, 2, 1.
BY_HAND = [
    (8, 3.0, (8, 0, 0)),  # starts at 8 0 0: nothing to turn
    (8, 2.5, (6, 0, 2)),  # starts at 4 4 0; above 2.333: 5 2 1, 6 0 2
    (8, 2.375, (5, 1, 2)),  # starts at 3 5 0: 4 3 1, 5 1 2, one is left
    (8, 2.25, (4, 2, 2)),  # starts at 2 6 0; between: 3 4 1 (4 >= 1), 4 2 2 (2 >= 2), 5 0 3 would be 0 >= 3
    (8, 2.0, (2, 4, 2)),  # starts at 0 8 0: 1 6 1, 2 4 2, 3 2 3 would be 2 >= 3
    (8, 1.75, (2, 2, 4)),  # starts at 0 6 2: 1 4 3, 2 2 4 (2 >= 2)
    (8, 1.5, (0, 4, 4)),  # below 1.667: never
    (8, 1.0, (0, 0, 8)),
    (7, 2.0, (2, 3, 2)),  # starts at 0 7 0: 1 5 1, 2 3 2 (3 >= 2), 3 1 3 would be 1 >= 3
    (9, 2.0, (3, 3, 3)),  # starts at 0 9 0: 3 3 3 (3 >= 3)
    (8, 2.4375, (6, 0, 2)),  # starts at round(3.5) = 4, so 4 4 0; the average reached is 2.5
    (8, 2.3125, (4, 2, 2)),  # starts at round(2.5) = 2, so 2 6 0; below 2.333; the average reached is 2.25
    (8, 2.34, (5, 1, 2)),  # starts at round(2.72) = 3, so 3 5 0; above 2.333
]


@pytest.mark.parametrize(("experts", "average", "expected"), BY_HAND)
def test_three_levels_by_hand(experts, average, expected) -> None:
    assert three_levels(experts, average, (1, 2, 3)).experts == expected
    assert three_levels(experts, average + 1, (2, 3, 4)).experts == expected  # one bit higher throughout


def in_words(experts, average, levels):
    """The published procedure step by step, in float64."""
    low, middle, high = levels
    if average >= middle:
        n_high = round(experts * (average - middle) / (high - middle))
        n_low = 0
    else:
        n_high = 0
        n_low = experts - round(experts * (average - low) / (middle - low))
    n_middle = experts - n_high - n_low
    raised, width = 0, high - low
    while n_middle >= 2:
        if average < high - 2 * width / 3 or (average <= high - width / 3 and n_middle - 2 < raised + 1):
            break
        n_middle, n_high, n_low, raised = n_middle - 2, n_high + 1, n_low + 1, raised + 1
    return n_high, n_middle, n_low


# Averages in 64ths are float64 numbers, of which float64 arithmetic is exact; none is within 1e-3 of a third.
SIXTY_FOURTHS = st.integers(0, 128).map(lambda n: n / 64)


@given(st.integers(1, 130), SIXTY_FOURTHS, st.sampled_from(EQUAL))
def test_three_levels_follow_the_rule_in_words(experts, above, levels) -> None:
    average = levels[0] + above
    assert three_levels(experts, average, levels).experts == in_words(experts, average, levels)


@given(st.integers(1, 12), st.floats(0, 1), st.sampled_from(EQUAL + UNEQUAL))
def test_fewest_lowest_by_enumeration(experts, share, levels) -> None:
    low, middle, high = levels
    average = low + share * (high - low)
    counts = three_levels(experts, average, levels, "fewest_lowest")
    every = [(h, experts - h - n, n) for n in range(experts + 1) for h in range(experts + 1 - n)]
    total = {c: c[0] * high + c[1] * middle + c[2] * low for c in every}
    wanted = experts * Fraction(str(average))
    nearest = min(abs(t - wanted) for t in total.values())
    reached = total[counts.experts]
    assert abs(reached - wanted) == nearest
    if levels in EQUAL:
        assert counts.average == three_levels(experts, average, levels).average
    else:
        assert reached == min(t for t in total.values() if abs(t - wanted) == nearest)
    assert counts.experts[2] == min(c[2] for c, t in total.items() if t == reached)


def test_fewest_lowest_by_hand() -> None:
    # 8 experts at 1, 2, 4 and 2.5 bits are 20 bits: 2*4 + 6*2 without any at 1.
    assert three_levels(8, 2.5, (1, 2, 4), "fewest_lowest").experts == (2, 6, 0)
    # 1.5 bits are 12: with n at 1, 8 - n others give at least 16 - n: n = 4 and none at 4.
    assert three_levels(8, 1.5, (1, 2, 4), "fewest_lowest").experts == (0, 4, 4)
    # 21 bits: n = 0 gives even sums only; n = 1: 1 + 7*2 = 15, three of them at 4 give 21.
    assert three_levels(8, 2.625, (1, 2, 4), "fewest_lowest").experts == (3, 4, 1)
    # 2, 4, 8 give even sums: 25 is as near to 24 as to 26; the lower one: 4 at 4, 4 at 2.
    assert three_levels(8, 3.125, (2, 4, 8), "fewest_lowest").experts == (0, 4, 4)


@given(st.integers(1, 130), st.floats(0, 1), st.sampled_from(EQUAL), st.sampled_from(["paper", "fewest_lowest"]))
def test_three_levels_reach_the_nearest_average(experts, share, levels, alternative) -> None:
    average = levels[0] + share * 2
    counts = three_levels(experts, average, levels, alternative)
    assert sum(counts.experts) == experts and min(counts.experts) >= 0
    # All whole sums of bits exist, so the average is at most half a bit of one expert away.
    assert abs(counts.average - Fraction(str(average))) <= Fraction(1, 2 * experts)
    assert counts.exact or (experts * Fraction(str(average))).denominator != 1
    fewest = three_levels(experts, average, levels, "fewest_lowest")
    assert fewest.average == counts.average and fewest.experts[2] <= counts.experts[2]


@given(st.integers(1, 130), st.integers(0, 10**6), st.sampled_from([(a, b) for a in BITS for b in BITS if a < b]))
def test_two_levels_rise_with_the_average_and_reach_the_nearest(experts, millionths, levels) -> None:
    low, high = levels
    average = low + (high - low) * millionths / 10**6
    counts = two_levels(experts, average, low, high)
    assert abs(counts.average - Fraction(str(average))) <= Fraction(high - low, 2 * experts)
    more = two_levels(experts, min(average + 0.1, high), low, high)
    assert more.experts[0] >= counts.experts[0]


def test_bits_follow_the_order() -> None:
    counts = three_levels(8, 2.25, (1, 2, 3))  # 4, 2, 2
    order = np.array([[3, 1, 7, 0, 2, 6, 5, 4], [0, 1, 2, 3, 4, 5, 6, 7]])
    np.testing.assert_array_equal(assign(order, counts), [[3, 3, 2, 3, 1, 1, 2, 3], [3, 3, 3, 3, 2, 2, 1, 1]])
    np.testing.assert_array_equal(assign(order[0], uniform(8, 4)), [4] * 8)
    np.testing.assert_array_equal(assign(order[0], two_levels(8, 2.25, 2, 3)), [2, 3, 2, 3, 2, 2, 2, 2])


def test_level_counts_takes_one_to_three_levels() -> None:
    assert level_counts(8, 3, [3]) == uniform(8, 3)
    assert level_counts(8, 2.5, [2, 3]) == two_levels(8, 2.5, 2, 3)
    assert level_counts(8, 2.5, [1, 2, 3]) == three_levels(8, 2.5, [1, 2, 3], "paper")
    assert level_counts(8, 2.5, [1, 2, 4], "fewest_lowest").experts == (2, 6, 0)


def test_the_average_reached_is_stated() -> None:
    assert two_levels(8, 2.5, 2, 3).statement() == "2.5 bits: 4 at 3, 4 at 2"
    found = two_levels(8, 2.3, 2, 3).statement()
    assert found == "2.25 bits is the nearest to 2.3 that 8 experts can average at 3,2 bits: 2 at 3, 6 at 2"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: two_levels(8, 3.5, 2, 3), "average of 3.5 bits cannot be met with levels 2,3: ask for 2 to 3 bits"),
        (lambda: two_levels(8, 1.99, 2, 3), "1.99 bits cannot be met"),
        (lambda: two_levels(8, 2.5, 3, 2), "ascending"),
        (lambda: two_levels(8, 2.0, 2, 2), "ascending and different"),
        (lambda: two_levels(8, 5.5, 5, 6), "levels 5,6 must be among 1,2,3,4,8"),
        (lambda: two_levels(8, float("nan"), 2, 3), "bits=nan"),
        (lambda: two_levels(8, float("inf"), 2, 3), "bits=inf"),
        (lambda: two_levels(0, 2.5, 2, 3), "experts=0"),
        (lambda: uniform(8, 5), "levels 5"),
        (lambda: three_levels(8, 2.5, (2, 3)), "three levels are needed, got 2,3"),
        (lambda: three_levels(8, 2.5, (1, 2, 4)), "1,2,4 are not equally spaced.*alternative='fewest_lowest'"),
        (lambda: three_levels(8, 2.5, (1, 3, 2)), "ascending"),
        (lambda: three_levels(8, 2.5, (1, 2, 3), "fewest"), "alternative='fewest'"),
        (lambda: level_counts(8, 2.5, [3]), "2.5 bits cannot be met with levels 3"),
        (lambda: level_counts(8, 2.5, []), "one to three levels"),
        (lambda: level_counts(8, 2.5, [1, 2, 3, 4]), "one to three levels"),
        (lambda: assign(np.arange(7), uniform(8, 2)), "order has 7 experts, the counts are of 8"),
    ],
)
def test_bad_input_is_refused(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()
