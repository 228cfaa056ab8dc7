"""The multiple-choice knapsack against enumeration, dynamic programming over whole costs, and its own promises."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.errors import InputError
from hetmoe.quantize.multiple_choice import choose


def enumerated(losses, costs, budget):
    """The smallest loss of all choices within the budget."""
    every = itertools.product(range(losses.shape[1]), repeat=len(losses))
    rows = range(len(losses))
    return min(losses[rows, pick].sum() for pick in every if costs[rows, pick].sum() <= budget)


def check(found, losses, costs, budget) -> None:
    rows = np.arange(len(losses))
    assert found.cost == costs[rows, found.option].sum() <= budget
    assert found.loss == losses[rows, found.option].sum()  # whole numbers are summed exactly
    assert found.bound <= found.loss


@settings(max_examples=200)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([1, 262_144]),
    st.floats(0, 1),
    st.data(),
)
def test_no_choice_is_better(items, options, unit, share, data) -> None:
    """Losses of either sign, options of equal cost or loss, options that cost nothing or that no one would take."""
    size = items * options
    values = data.draw(st.lists(st.integers(-9, 40), min_size=size, max_size=size))
    prices = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
    losses, costs = np.array(values, float).reshape(items, options), np.array(prices).reshape(items, options) * unit
    low, high = int(costs.min(axis=1).sum()), int(costs.max(axis=1).sum())
    budget = low + int((high - low) * share)
    found = choose(losses, costs, budget)
    check(found, losses, costs, budget)
    assert found.loss == enumerated(losses, costs, budget)
    assert found.gap == 0


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_bound_holds_when_states_are_dropped(seed, most_states) -> None:
    rng = np.random.default_rng(seed)
    losses, costs = rng.integers(0, 100, (6, 3)).astype(float), rng.integers(0, 50, (6, 3))
    budget = int((costs.min(axis=1).sum() + costs.max(axis=1).sum()) // 2)
    found = choose(losses, costs, budget, most_states=most_states)
    check(found, losses, costs, budget)
    # The bound goes through a slope: a quotient that is rounded, times a cost of up to 300.
    assert found.bound <= enumerated(losses, costs, budget) * (1 + 1e-12)


def test_dropping_states_can_leave_a_gap() -> None:
    """Else the test above would say nothing."""
    gaps = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        costs = rng.integers(1, 1000, (20, 4)).cumsum(axis=1)
        losses = -(costs + 10.0 * rng.random((20, 4)))  # hard: every byte is worth the same
        gaps.append(choose(losses, costs, 20_000, most_states=1).gap)
    assert max(gaps) > 0 and min(gaps) >= 0


def test_hundreds_of_items_against_dynamic_programming() -> None:
    rng = np.random.default_rng(1)
    for correlated in (False, True):
        costs = rng.integers(1, 8, (300, 4)).cumsum(axis=1)
        losses = -costs - 5.0 * rng.integers(0, 3, (300, 4)) if correlated else rng.integers(0, 1000, (300, 4)) * 1.0
        budget = int(costs.min(axis=1).sum() + 1500)
        table = np.zeros(budget + 1)  # the smallest loss at exactly that cost or less
        for loss, cost in zip(losses, costs, strict=True):
            shifted = [np.concatenate([np.full(c, np.inf), table[: budget + 1 - c]]) for c in cost]
            table = np.min(np.array(shifted) + loss[:, None], axis=0)
        found = choose(losses, costs, budget)
        check(found, losses, costs, budget)
        assert found.loss == table[-1]
        assert found.gap == 0


def test_a_model_of_olmoe_size_is_solved_to_the_end() -> None:
    """16 layers, 64 experts, 3 matrices, 4 levels whose savings fall, all steps of one cost: the largest ones win."""
    rng = np.random.default_rng(0)
    savings = np.sort(rng.lognormal(0, 2, (3072, 3)), axis=1)[:, ::-1]
    losses = -np.concatenate([np.zeros((3072, 1)), savings.cumsum(axis=1)], axis=1)
    costs = np.tile(np.array([1, 2, 3, 4]) * 262_144 + 32_768, (3072, 1))
    found = choose(losses, costs, int(costs[:, 0].sum()) + 262_144 * 4000 + 262_143)
    greedy = -np.sort(savings.ravel())[::-1][:4000].sum()
    np.testing.assert_allclose(found.loss, greedy, rtol=1e-12)  # sums of 3,072 float64
    assert found.gap == 0


def test_a_budget_that_all_fits_in_takes_the_smallest_losses() -> None:
    losses, costs = np.array([[3.0, 1.0, 2.0], [0.0, 0.0, -1.0]]), np.array([[1, 2, 9], [4, 3, 3]])
    np.testing.assert_array_equal(choose(losses, costs, 100).option, [1, 2])
    np.testing.assert_array_equal(choose(losses, costs, 4).option, [0, 2])
    assert choose(losses[:0], costs[:0], 0).cost == 0


@pytest.mark.parametrize(
    ("losses", "costs", "budget", "message"),
    [
        ([[1.0, np.nan]], [[1, 2]], 5, "losses must be finite"),
        ([[1.0, 2.0]], [[1, -2]], 5, "at least 0"),
        ([[1.0, 2.0]], [[1.0, 2.0]], 5, "whole numbers"),
        ([[1.0, 2.0]], [[2**61, 2**62]], 5, "too large"),
        ([[1.0, 2.0]], [[1]], 5, r"\[items, options\]"),
        ([1.0, 2.0], [1, 2], 5, r"\[items, options\]"),
        ([[1.0, 2.0], [1.0, 2.0]], [[3, 4], [3, 9]], 5, "budget=5 is too small.* together cost 6"),
        ([[1.0, 2.0]], [[1, 2]], 1.5, "budget=1.5 must be a whole number"),
        ([[1.0, 2.0]], [[1, 2]], np.nan, "budget=nan must be a whole number"),
        ([[1.0, 2.0]], [[1, 2]], np.inf, "budget=inf must be a whole number"),
    ],
)
def test_bad_input_is_refused(losses, costs, budget, message) -> None:
    with pytest.raises(InputError, match=message):
        choose(np.array(losses), np.array(costs), budget)
    with pytest.raises(InputError, match="most_states=0"):
        choose(np.ones((1, 1)), np.ones((1, 1), int), 5, most_states=0)
