"""The exact knapsack against enumeration, dynamic programming over whole costs, and its own promises."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.errors import InputError
from hetmoe.placement.knapsack import knapsack


def best_by_enumeration(values: np.ndarray, costs: np.ndarray, budget: float) -> Fraction:
    subsets = itertools.product([0, 1], repeat=len(values))
    exact = [(Fraction(float(v)), Fraction(float(c))) for v, c in zip(values, costs, strict=True)]
    best = Fraction(0)
    for taken in subsets:
        cost = sum((c for (_, c), t in zip(exact, taken, strict=True) if t), Fraction(0))
        if cost <= Fraction(budget):
            best = max(best, sum((v for (v, _), t in zip(exact, taken, strict=True) if t), Fraction(0)))
    return best


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(-5, 60), st.integers(0, 40)), min_size=1, max_size=10),
    st.floats(0, 1),
    st.sampled_from([1.0, 1e6, 2.0**-30]),
)
def test_no_subset_is_better(items: list[tuple[int, int]], share: float, unit: float) -> None:
    values, costs = np.array([v for v, _ in items], float), np.array([c for _, c in items]) * unit
    budget = float(np.floor(costs.sum() / unit * share)) * unit
    taken = knapsack(values, costs, budget)
    assert costs[taken].sum() <= budget
    assert Fraction(float(values[taken].sum())) == best_by_enumeration(values, costs, budget)


def test_costs_without_a_common_unit() -> None:
    """No choice within the budget is worth more, and the budget is passed by the stated rounding at most."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        values, costs = rng.lognormal(size=9), rng.lognormal(size=9)
        budget = float(costs.sum() * rng.random())
        taken = knapsack(values, costs, budget)
        assert sum(map(Fraction, costs[taken])) <= Fraction(budget) * (1 + Fraction(9 + 2, 2**40))
        least = best_by_enumeration(values, costs, budget) * (1 - Fraction(1, 2**50))
        assert Fraction(float(values[taken].sum())) >= least


@pytest.mark.parametrize("count", [1, 4, 64, 1000])
def test_items_that_fill_the_budget_exactly_fit(count: int) -> None:
    rng = np.random.default_rng(count)
    costs, values = rng.lognormal(size=count) * 1e-7, rng.lognormal(size=count)
    assert knapsack(values, costs, float(costs.sum())).all()
    alike = np.full(count, 0.1)
    for some in {1, count // 4, count // 2, count} - {0}:
        assert knapsack(values, alike, 0.1 * some).sum() == some


def test_hundreds_of_items_against_dynamic_programming() -> None:
    rng = np.random.default_rng(1)
    for correlated in (False, True):
        costs = rng.integers(1, 60, 300)
        values = (costs + 5 if correlated else rng.integers(1, 1000, 300)).astype(float)  # the hard case: all alike
        budget = int(costs.sum() // 3)
        table = np.zeros(budget + 1)
        for value, cost in zip(values, costs, strict=True):
            table[cost:] = np.maximum(table[cost:], table[: budget + 1 - cost] + value)
        taken = knapsack(values, costs.astype(float), budget)
        assert costs[taken].sum() <= budget
        assert values[taken].sum() == table[-1]


def test_items_of_equal_cost_are_taken_by_value() -> None:
    values = np.random.default_rng(2).permutation(15_000).astype(float)
    taken = knapsack(values, np.full(15_000, 6e6), 6e6 * 1234 + 1)
    np.testing.assert_array_equal(np.flatnonzero(taken), np.flatnonzero(values >= 15_000 - 1234))


def test_worthless_items_stay_and_free_ones_are_taken() -> None:
    values, costs = np.array([0.0, -1.0, 2.0, 3.0, -1.0]), np.array([1.0, 1.0, 0.0, 5.0, 0.0])
    np.testing.assert_array_equal(knapsack(values, costs, 4.0), [False, False, True, False, False])
    np.testing.assert_array_equal(knapsack(values, costs, 0.0), [False, False, True, False, False])
    np.testing.assert_array_equal(knapsack(values, costs, 9.0), [False, False, True, True, False])


@pytest.mark.parametrize(
    ("values", "costs", "budget", "message"),
    [
        ([1.0, np.nan], [1.0, 1.0], 1.0, "values must be finite"),
        ([1.0, 1.0], [1.0, -1.0], 1.0, "at least 0"),
        ([1.0, 1.0], [1.0, np.inf], 1.0, "costs finite"),
        ([1.0], [1.0, 1.0], 1.0, "one length"),
        ([1.0], [1.0], -1.0, "budget=-1.0"),
        ([1.0], [1.0], np.inf, "budget=inf"),
        ([1.0], [1.0], np.nan, "budget=nan"),
    ],
)
def test_bad_input_is_refused(values: list[float], costs: list[float], budget: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        knapsack(np.array(values), np.array(costs), budget)
