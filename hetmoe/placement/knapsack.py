"""An exact 0/1 knapsack for many items: dynamic programming over a core that grows around the break item."""

import math

import numpy as np

from hetmoe.errors import InputError


def knapsack(values: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """The subset (boolean) of largest total value whose total cost is at most `budget`.

    Pisinger's minimal-algorithm (Operations Research 45, 1997): items are sorted by value per cost; from the greedy
    solution, items nearest to the first that does not fit are decided first, alternately left and right. States that
    another state dominates (no dearer, no less valuable), or whose linear bound cannot beat the best found, are
    dropped. Items of no value are never taken, free ones of positive value always.

    Whole costs are summed exactly. Others are rounded to multiples of a unit of at most 2**-40 of the budget, and the
    budget is widened by half a unit per item, so that items that fill it exactly still fit: it may be passed by that
    much (1e-9 of itself for 2,000 items), and no choice within it is worth more than the one found.

    Args:
        values: what taking an item gains, `[items]`.
        costs: what it costs, `[items]`, at least 0.
        budget: at least 0.

    Raises:
        InputError: for values or costs that are not finite, or a negative cost or budget.
    """
    values, costs = np.asarray(values, np.float64), np.asarray(costs, np.float64)
    if values.shape != costs.shape or values.ndim != 1:
        raise InputError(f"values {list(values.shape)} and costs {list(costs.shape)} must be two lists of one length")
    if not np.isfinite(values).all() or not np.isfinite(costs).all() or (costs < 0).any():
        raise InputError("values must be finite, and costs finite and at least 0")
    if not 0 <= budget < math.inf:
        raise InputError(f"budget={budget!r} must be finite and at least 0")
    taken = (values > 0) & (costs == 0)
    worth = np.flatnonzero((values > 0) & (costs > 0) & (costs <= budget))
    if worth.size:
        price, room = _exact(costs[worth], budget)
        order = np.argsort(-values[worth] / price, kind="stable")
        worth, price = worth[order], price[order]
        taken[worth[_solve(values[worth], price, room)]] = True
    return taken


def _exact(costs: np.ndarray, budget: float) -> tuple[np.ndarray, float]:
    """Costs whose sums float64 holds exactly, and the budget to compare them with."""
    if np.all(costs == np.floor(costs)) and costs.sum() < 2.0**53:
        return costs, budget
    unit = 2.0 ** (math.floor(math.log2(budget)) - 40)
    rounded = np.maximum(np.rint(costs / unit), 1) * unit  # none becomes free
    return rounded, (math.floor(budget / unit) + 1 + len(costs) // 2) * unit


def _solve(values: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """Items by falling value per cost."""
    count, density = len(values), values / costs
    first = int(np.searchsorted(np.cumsum(costs), budget, side="right"))  # the break item
    taken = np.zeros(count, bool)
    taken[:first] = True
    if first == count:
        return taken
    cost, value = np.array([costs[:first].sum()]), np.array([values[:first].sum()])
    best, where = float(value[0]), (-1, 0)  # the best value, and the step and row of its state
    history: list[tuple[int, np.ndarray]] = []  # per step: the item decided, the state before and whether it flipped
    left, right = first, first  # items left .. right - 1 are decided
    while len(cost) and (left > 0 or right < count):
        if (right < count and right - first <= first - left) or left == 0:
            item, sign, right = right, 1.0, right + 1
        else:
            left -= 1
            item, sign = left, -1.0
        parent = np.tile(np.arange(len(cost)), 2)
        flipped = np.repeat([False, True], len(cost))
        cost = np.concatenate([cost, cost + sign * costs[item]])
        value = np.concatenate([value, value + sign * values[item]])
        order = np.lexsort((-value, cost))
        keep = order[_undominated(value[order])]
        up = density[right] if right < count else 0.0
        down = density[left - 1] if left > 0 else math.inf
        room = budget - cost[keep]
        with np.errstate(invalid="ignore"):
            bound = value[keep] + np.where(room >= 0, room * up, room * down)
        feasible = room >= 0
        if feasible.any() and value[keep][feasible].max() > best:
            winner = keep[feasible][int(np.argmax(value[keep][feasible]))]
            best = float(value[winner])
        else:
            winner = None
        # The winner itself stays, so that its history can be followed.
        kept = keep[bound > best] if winner is None else keep[(bound > best) | (keep == winner)]
        history.append((item, np.stack([parent[kept], flipped[kept]])))
        if winner is not None:
            where = (len(history) - 1, int(np.flatnonzero(kept == winner)[0]))
        cost, value = cost[kept], value[kept]
    step, row = where
    while step >= 0:
        item, (parents, flips) = history[step]
        if flips[row]:
            taken[item] = ~taken[item]
        step, row = step - 1, int(parents[row])
    return taken


def _undominated(value: np.ndarray) -> np.ndarray:
    """Of states by rising cost, those more valuable than all cheaper ones."""
    before = np.concatenate([[-np.inf], np.maximum.accumulate(value)[:-1]])
    return np.flatnonzero(value > before)
