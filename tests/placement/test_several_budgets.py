"""The multiple-choice knapsack with several budgets: against enumeration, and against the solver of one budget."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.errors import InputError
from hetmoe.placement.several_budgets import choose_within
from hetmoe.quantize.multiple_choice import choose


def enumerated(losses: np.ndarray, costs: np.ndarray, budgets: np.ndarray) -> float:
    """The smallest loss of all choices; infinite if none keeps to the budgets."""
    best = math.inf
    rows = np.arange(len(losses))
    for option in itertools.product(range(losses.shape[1]), repeat=len(losses)):
        if (costs[rows, list(option)].sum(axis=0) <= budgets * (1 + 1e-12)).all():
            best = min(best, float(losses[rows, list(option)].sum()))
    return best


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31), items=st.integers(1, 6), options=st.integers(1, 4), budgets=st.integers(1, 3),
    share=st.floats(0.0, 1.0), whole=st.booleans(),
)  # fmt: skip
def test_no_choice_is_better(seed: int, items: int, options: int, budgets: int, share: float, whole: bool) -> None:
    rng = np.random.default_rng(seed)
    losses = rng.normal(size=(items, options))
    costs = rng.integers(0, 10, (items, options, budgets)).astype(float) * (1.0 if whole else rng.uniform(0.1, 1e6))
    limit = np.round(share * costs.max(axis=1).sum(axis=0), 0 if whole else 6)
    best = enumerated(losses, costs, limit)
    if not math.isfinite(best):
        with pytest.raises(InputError, match=r"no choice keeps to all budgets|leave some items without an option"):
            choose_within(losses, costs, limit)
        return
    found = choose_within(losses, costs, limit)
    rows = np.arange(items)
    assert (found.costs <= limit * (1 + 1e-9)).all()
    np.testing.assert_allclose(costs[rows, found.option].sum(axis=0), found.costs, rtol=1e-12, atol=1e-12)
    assert found.loss == pytest.approx(float(losses[rows, found.option].sum()), abs=1e-12)
    assert found.loss == pytest.approx(best, abs=1e-9) and found.gap <= 1e-9 and found.bound <= best + 1e-9


def test_with_one_budget_it_is_the_solver_of_one() -> None:
    """300 experts of four precisions: far beyond enumeration."""
    rng = np.random.default_rng(0)
    sensitivity = np.exp(rng.normal(size=(300, 1)))
    losses = sensitivity * 4.0 ** -np.array([2.0, 3.0, 4.0, 8.0]) * np.exp(0.2 * rng.normal(size=(300, 4)))
    costs = np.tile(np.array([22, 30, 38, 70]), (300, 1))
    for budget in (7000, 9001, 15000):
        one = choose(losses, costs, budget)
        found = choose_within(losses, costs[:, :, None].astype(float), np.array([float(budget)]))
        assert one.gap == 0 and found.gap <= 1e-9 * one.loss
        assert found.loss == pytest.approx(one.loss, rel=1e-9)


def test_three_budgets_of_a_large_model_are_solved_exactly() -> None:
    """1,024 experts (OLMoE's) of six options: proven, and every budget matters."""
    rng = np.random.default_rng(1)
    share = np.minimum(rng.dirichlet(np.ones(64) * 2, size=16) * 8, 1).reshape(-1, 1)
    sensitivity = np.exp(rng.normal(size=(1024, 1))) * share
    bits = np.array([2.0, 3.0, 4.0, 8.0, 16.0])
    digital = np.concatenate([sensitivity * 10 * 4.0 ** -bits[:-1], np.zeros((1024, 1))], axis=1)
    losses = np.concatenate([0.02 * sensitivity * np.exp(0.5 * rng.normal(size=(1024, 1))), digital], axis=1)
    stored = np.tile(np.array([0.0, *bits]), (1024, 1))
    energy = np.concatenate([0.02 * share, (1 - (1 - share) ** 32) * bits], axis=1)
    tiles = np.tile(np.array([24.0, 0, 0, 0, 0, 0]), (1024, 1))
    costs = np.stack([stored, energy, tiles], axis=-1)
    free = choose_within(losses, costs, np.array([2000.0, math.inf, math.inf]))
    two = choose_within(losses, costs, np.array([2000.0, math.inf, 0.9 * free.costs[2]]))
    limit = np.array([2000.0, 0.99 * two.costs[1], 0.9 * free.costs[2]])
    found = choose_within(losses, costs, limit)
    assert found.gap <= 1e-9 * found.loss and (found.costs <= limit * (1 + 1e-9)).all()
    assert free.loss < two.loss < found.loss  # every further budget costs something
    # Nothing that changes a single expert, or swaps the options of two, is better.
    rows = np.arange(1024)
    for item in range(1024):
        changed = found.costs - costs[item, found.option[item]] + costs[item]
        fits = (changed <= limit).all(axis=1)
        assert losses[item, fits].min(initial=math.inf) >= losses[item, found.option[item]] - 1e-12
    assert found.loss == pytest.approx(losses[rows, found.option].sum(), rel=1e-12)


def test_a_search_that_is_cut_short_says_what_is_not_proven() -> None:
    rng = np.random.default_rng(3)
    losses, costs = rng.random((60, 5)), rng.random((60, 5, 3))
    limit = costs.mean(axis=1).sum(axis=0) * 0.8
    whole, cut = choose_within(losses, costs, limit), choose_within(losses, costs, limit, nodes=1)
    assert whole.gap <= 1e-9 * whole.loss
    assert cut.bound <= whole.loss + 1e-9 and cut.loss >= whole.loss - 1e-9
    assert (cut.costs <= limit * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": np.array([[np.nan, 1.0]])}, "losses must be finite"),
        ({"costs": np.array([[[1.0], [-1.0]]])}, "at least 0"),
        ({"budgets": np.array([np.nan])}, "must be at least 0"),
        ({"budgets": np.array([-1.0])}, "must be at least 0"),
        ({"budgets": np.array([1.0, 2.0])}, r"budgets \[2\]"),
        ({"losses": np.zeros((0, 2))}, r"losses \[0, 2\]"),
        ({"budgets": np.array([0.5])}, "no choice keeps to all budgets"),
        ({"budgets": np.array([0.0])}, "leave some items without an option"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, np.ndarray], message: str) -> None:
    good = {"losses": np.array([[1.0, 2.0]]), "costs": np.array([[[2.0], [1.0]]]), "budgets": np.array([3.0])}
    with pytest.raises(InputError, match=message):
        choose_within(**(good | changes))
