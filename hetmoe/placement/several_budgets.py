"""One option per item at the smallest total loss within several budgets: the multiple-choice knapsack in d dimensions.

Prices (Lagrange multipliers) of the budgets give a bound; options that cost more beyond it than the best choice found
so far is above it are in no better choice, and leave; what is left, usually few items, is solved by branch and bound
(HiGHS).
"""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
from jaxtyping import Float64, Int
from scipy import optimize, sparse

from hetmoe.errors import InputError

NODES = 20_000  # of the search tree at most: a count, not a time, so that results repeat
_MOST_ROUNDINGS = 100_000
_LOSS_RANGE = 1e6  # units between the smallest and the largest loss that the solver sees
_ATTEMPTS = 5
_INFEASIBLE = 2  # of scipy's statuses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen, and how good it is.

    Attributes:
        option: of every item.
        loss: in total.
        costs: in total, of each budget.
        bound: no choice within the budgets has a smaller loss, up to the solver's rounding (1e-9 of the losses' range).
    """

    option: Int[np.ndarray, "items"]
    loss: float
    costs: Float64[np.ndarray, "budgets"]
    bound: float

    @property
    def gap(self) -> float:
        """By how much the loss may be above the smallest possible one; 0 = optimal."""
        return max(self.loss - self.bound, 0.0)


@dataclasses.dataclass(frozen=True)
class _Problem:
    losses: np.ndarray  # [items, options]
    costs: np.ndarray  # [items, options, budgets], as shares of the budgets
    room: float  # what the shares may sum up to, rounding included

    def total(self, option: np.ndarray) -> tuple[float, np.ndarray]:
        rows = np.arange(len(option))
        return math.fsum(self.losses[rows, option]), self.costs[rows, option].sum(axis=0)

    def fits(self, shares: np.ndarray) -> bool:
        return bool((shares <= self.room).all())


def choose_within(
    losses: np.ndarray,
    costs: np.ndarray,
    budgets: np.ndarray,
    *,
    nodes: int = NODES,
) -> Choice:
    """The option of every item that together lose least with total costs of at most `budgets`.

    Budgets are kept to 1e-12 of themselves, the rounding of float64 sums.

    Args:
        losses: of each option, any sign, `[items, options]`.
        costs: of each option, at least 0, `[items, options, budgets]`.
        budgets: at least 0; infinite = none.
        nodes: of the search tree at most; if they are used up, the gap says what is not proven.

    Raises:
        InputError: for values that are not finite, negative costs, budgets below 0, sizes that do not fit, or budgets
            that no choice keeps to.
    """
    losses, costs, budgets = (np.asarray(values, np.float64) for values in (losses, costs, budgets))
    _check(losses, costs, budgets)
    limited = np.flatnonzero(np.isfinite(budgets))
    # A budget of 0 allows what costs nothing: shares are of 1 then, and the room for them is 0.
    unit = np.where(budgets[limited] > 0, budgets[limited], 1.0)
    shares = costs[:, :, limited] / unit
    free = budgets[limited] > 0
    usable = (shares[:, :, ~free] == 0).all(axis=2)
    if not usable.any(axis=1).all():
        raise InputError("budgets of 0 leave some items without an option")
    problem = _Problem(np.where(usable, losses, np.inf), shares[:, :, free], 1 + 1e-12)
    option, bound = _solve(problem, nodes)
    rows = np.arange(len(option))
    loss = math.fsum(losses[rows, option])
    return Choice(option=option, loss=loss, costs=costs[rows, option].sum(axis=0), bound=min(loss, bound))


def _check(losses: np.ndarray, costs: np.ndarray, budgets: np.ndarray) -> None:
    if losses.ndim != 2 or costs.shape[:-1] != losses.shape or budgets.shape != costs.shape[-1:] or not losses.size:
        raise InputError(
            f"losses {list(losses.shape)}, costs {list(costs.shape)} and budgets {list(budgets.shape)} must be [items, "
            "options], [items, options, budgets] and [budgets]"
        )
    if not np.isfinite(losses).all() or not np.isfinite(costs).all() or (costs < 0).any():
        raise InputError("losses must be finite, and costs finite and at least 0")
    if np.isnan(budgets).any() or (budgets < 0).any():
        raise InputError(f"budgets={budgets.tolist()} must be at least 0 (infinite = no budget)")


def _solve(problem: _Problem, nodes: int) -> tuple[np.ndarray, float]:
    """(the best options found, a loss that no better ones could be below)."""
    option = np.argmin(problem.losses, axis=1)
    loss, shares = problem.total(option)
    if problem.fits(shares):
        return option, loss
    relaxed, prices = _relaxed(problem)
    priced = problem.losses + problem.costs @ prices
    least = priced.min(axis=1)
    bound = math.fsum(least) - float(prices.sum()) * problem.room  # valid at any prices of at least 0
    best = _rounded(problem, relaxed)
    gap = math.inf if best is None else problem.total(best)[0] - bound
    # Options dearer than the gap are in no better choice. (Without a choice so far all stay.)
    kept = priced - least[:, None] <= gap + 1e-12 * (abs(bound) + np.abs(least[:, None]))
    found, proven = _branch_and_bound(problem, kept & np.isfinite(problem.losses), nodes)
    choices = [choice for choice in (best, found) if choice is not None]
    if not choices:
        raise InputError("no choice keeps to all budgets together: widen one of them")
    return min(choices, key=lambda choice: problem.total(choice)[0]), max(bound, proven)


def _program(problem: _Problem, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any, Any]:
    """(item and option of every variable, items' sums, budgets' sums) of the options that are kept."""
    item, option = np.nonzero(kept)
    count = len(item)
    of_items = sparse.csr_array((np.ones(count), (item, np.arange(count))), shape=(len(problem.losses), count))
    return item, option, of_items, sparse.csr_array(problem.costs[item, option].T)


def _relaxed(problem: _Problem) -> tuple[np.ndarray, np.ndarray]:
    """(shares of the options, prices of the budgets) of the linear relaxation; prices of at least 0.

    Raises:
        InputError: if not even shares of options keep to all budgets.
    """
    item, option, of_items, of_budgets = _program(problem, np.isfinite(problem.losses))
    losses = problem.losses[item, option]
    unit = float(np.abs(losses).max()) or 1.0
    found = optimize.linprog(
        losses / unit, A_ub=of_budgets, b_ub=np.full(of_budgets.shape[0], problem.room), A_eq=of_items,
        b_eq=np.ones(of_items.shape[0]), bounds=(0, None), method="highs",
    )  # fmt: skip
    if not found.success:
        raise InputError("no choice keeps to all budgets together: widen one of them")
    shares = np.zeros(problem.losses.shape)
    shares[item, option] = found.x
    return shares, np.maximum(-found.ineqlin.marginals, 0.0) * unit


def _rounded(problem: _Problem, shares: np.ndarray) -> np.ndarray | None:
    """The best choice within the budgets that differs from the relaxation in its undecided items only, if any.

    A vertex has at most as many undecided items as there are budgets.
    """
    option = np.argmax(shares, axis=1)
    undecided = np.flatnonzero(shares.max(axis=1) < 1 - 1e-6)
    usable = [np.flatnonzero(np.isfinite(problem.losses[item])) for item in undecided]
    if math.prod(len(options) for options in usable) > _MOST_ROUNDINGS:
        return None
    best, least = None, math.inf
    for combination in itertools.product(*usable):
        option[undecided] = combination
        loss, costs = problem.total(option)
        if loss < least and problem.fits(costs):
            best, least = option.copy(), loss
    return best


def _branch_and_bound(problem: _Problem, kept: np.ndarray, nodes: int) -> tuple[np.ndarray | None, float]:
    """(the best choice among the options that are kept, if one was found, a bound of all of them).

    The solver keeps to budgets within a tolerance of its own: they are narrowed until the choice keeps to them.
    """
    item, option, of_items, of_budgets = _program(problem, kept)
    losses = problem.losses[item, option]
    first = np.full(len(problem.losses), math.inf)
    np.minimum.at(first, item, losses)
    more = losses - first[item]
    # The solver stops at an absolute gap of 1e-6: losses are put into units in which that is nothing.
    unit = float(more.max()) / _LOSS_RANGE or 1.0
    proven, room = -math.inf, problem.room
    for _ in range(_ATTEMPTS):
        found = optimize.milp(
            more / unit, integrality=np.ones(len(item)), bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(of_items, 1, 1), optimize.LinearConstraint(of_budgets, -np.inf, room),
            ],
            options={"mip_rel_gap": 0.0, "node_limit": nodes},
        )  # fmt: skip
        if found.status == _INFEASIBLE and not math.isfinite(proven):
            return None, math.inf  # nothing better than what is known
        if not math.isfinite(proven) and found.mip_dual_bound is not None:
            proven = math.fsum(first) + found.mip_dual_bound * unit  # with the widest budgets: of all choices
        if found.x is None:
            return None, proven
        choice = np.zeros(len(problem.losses), np.int64)
        chosen = found.x > 0.5
        choice[item[chosen]] = option[chosen]
        costs = problem.total(choice)[1]
        if problem.fits(costs):
            return choice, proven
        room -= 2 * float((costs - problem.room).max())
    return None, proven
