"""One option per item at the smallest total loss within a budget: the multiple-choice knapsack."""

import dataclasses
import math

import numpy as np

from hetmoe.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen, and how good it is.

    Attributes:
        option: of every item, `[items]`.
        loss: in total.
        cost: in total, exactly.
        bound: no choice within the budget has a smaller loss, up to the rounding of float64 sums.
    """

    option: np.ndarray
    loss: float
    cost: int
    bound: float

    @property
    def gap(self) -> float:
        """By how much the loss may be above the smallest possible one; 0 = optimal."""
        return self.loss - self.bound


def choose(losses: np.ndarray, costs: np.ndarray, budget: int, *, most_states: int = 20_000) -> Choice:
    """The option of every item that together lose least at a total cost of at most `budget`.

    The linear relaxation (each item on the lower convex hull of its options; the steepest steps first, until one does
    not fit) gives a start, a price per unit of cost and a bound. From there dynamic programming decides the items
    whose steps have a slope nearest to that price first, as in Pisinger's minimal algorithm (European Journal of
    Operational Research 83, 1995): of the states, those that another dominates (no dearer, no worse), or whose linear
    bound is not below the best choice found, are dropped. What is left at the end is optimal. If more than
    `most_states` are left on the way, those of the best bounds stay, and the smallest bound of the others limits what
    is proven.

    Args:
        losses: of each option, `[items, options]`; any sign.
        costs: whole numbers of at least 0, `[items, options]`.
        budget: whole.
        most_states: kept after an item; 0.3 MB per item at the most.

    Raises:
        InputError: for losses that are not finite, costs that are negative or not whole, costs that even the cheapest
            options exceed the budget with, or sizes that do not fit.
    """
    losses, costs = np.asarray(losses, np.float64), np.asarray(costs)
    _check(losses, costs, budget, most_states)
    costs = costs.astype(np.int64)
    useful = _undominated(losses, costs)
    cheapest = np.argmin(np.where(useful, costs, np.iinfo(np.int64).max), axis=1)
    items = np.arange(len(losses))
    least = int(costs[items, cheapest].sum())
    if least > budget:
        raise InputError(f"budget={budget} is too small: the cheapest options of all items together cost {least}")
    base, price = _relaxed(losses, costs, useful, cheapest, budget - least)
    loss, cost = math.fsum(losses[items, base]), int(costs[items, base].sum())
    if price is None:
        return Choice(option=base, loss=loss, cost=cost, bound=loss)
    option, proven = _improve(losses, costs, useful, base, price, budget, most_states)
    loss, cost = math.fsum(losses[items, option]), int(costs[items, option].sum())
    return Choice(option=option, loss=loss, cost=cost, bound=min(loss, proven))


def _check(losses: np.ndarray, costs: np.ndarray, budget: int, most_states: int) -> None:
    if losses.ndim != 2 or costs.shape != losses.shape or losses.shape[1] < 1:
        raise InputError(f"losses {list(losses.shape)} and costs {list(costs.shape)} must both be [items, options]")
    if not np.isfinite(losses).all():
        raise InputError("losses must be finite")
    if costs.dtype.kind not in "iu" or (costs.size and int(costs.min()) < 0):
        raise InputError("costs must be whole numbers (an integer array) of at least 0")
    if costs.size and int(costs.max()) * len(costs) >= 2**62:
        raise InputError(f"costs of up to {costs.max()} for {len(costs)} items are too large to be summed")
    if budget % 1 != 0:
        raise InputError(f"budget={budget!r} must be a whole number")
    if most_states < 1:
        raise InputError(f"most_states={most_states} must be at least 1")


def _undominated(losses: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Options that no other of the same item is at least as good as in both respects; of equal ones the first."""
    loss, cost = losses[:, :, None] - losses[:, None, :], costs[:, :, None] - costs[:, None, :]
    first = np.arange(losses.shape[1])
    beaten = (loss >= 0) & (cost >= 0) & ((loss > 0) | (cost > 0) | (first[:, None] > first[None, :])[None])
    return ~beaten.any(axis=2)


def _relaxed(
    losses: np.ndarray, costs: np.ndarray, useful: np.ndarray, cheapest: np.ndarray, room: int
) -> tuple[np.ndarray, float | None]:
    """The options after all steps of the linear relaxation that fit whole, and the slope of the one that does not."""
    steps = [(slope, i, to, extra) for i in range(len(losses)) for slope, to, extra in _hull(losses, costs, useful, i)]
    steps.sort(key=lambda step: -step[0])  # stable: those of one item keep their order
    option = cheapest.copy()
    for slope, item, to, extra in steps:
        if extra > room:
            return option, slope
        option[item], room = to, room - extra
    return option, None


def _hull(losses: np.ndarray, costs: np.ndarray, useful: np.ndarray, item: int) -> list[tuple[float, int, int]]:
    """Steps along the lower convex hull: loss saved per cost, strictly falling; the option reached; its extra cost."""
    loss, cost = losses[item].tolist(), costs[item].tolist()
    options = sorted(np.flatnonzero(useful[item]).tolist(), key=lambda option: cost[option])
    corners, steps = [options[0]], []

    def slope(to: int) -> float:
        return (loss[corners[-1]] - loss[to]) / (cost[to] - cost[corners[-1]])

    for to in options[1:]:
        while steps and steps[-1][0] <= slope(to):
            steps.pop()
            corners.pop()
        steps.append((slope(to), to, cost[to] - cost[corners[-1]]))
        corners.append(to)
    return steps


def _improve(
    losses: np.ndarray,
    costs: np.ndarray,
    useful: np.ndarray,
    base: np.ndarray,
    price: float,
    budget: int,
    most_states: int,
) -> tuple[np.ndarray, float]:
    """The best options, starting from those of the relaxation, and a loss that no better ones could be below."""
    items = np.arange(len(losses))
    more_loss = losses - losses[items, base][:, None]
    more_cost = costs - costs[items, base][:, None]
    other = useful & (more_cost != 0)
    density = -more_loss / np.where(other, more_cost, 1)
    gain = np.where(other & (more_cost > 0), density, 0.0).max(axis=1)  # most saved per cost added, at most the price
    pain = np.where(other & (more_cost < 0), density, np.inf).min(axis=1)  # least lost per cost saved, at least that
    with np.errstate(divide="ignore"):
        order = np.argsort(np.minimum(price / gain, pain / price), kind="stable")
    order = order[other[order].any(axis=1)]
    gains = np.append(np.maximum.accumulate(gain[order][::-1])[::-1], 0.0)  # of those not yet decided
    pains = np.append(np.minimum.accumulate(pain[order][::-1])[::-1], np.inf)

    cost, loss = np.array([costs[items, base].sum()]), np.array([losses[items, base].sum()])
    best, where, proven = float(loss[0]), (-1, 0), math.inf  # the best loss, and the step and row of its state
    history: list[tuple[int, np.ndarray, np.ndarray]] = []  # per step: the item, the state before and the option
    for step, item in enumerate(order):
        if not len(cost):
            break
        options = np.append(base[item], np.flatnonzero(other[item]))
        parent, option = np.tile(np.arange(len(cost)), len(options)), np.repeat(options, len(cost))
        cost = (cost[None, :] + more_cost[item, options][:, None]).ravel()
        loss = (loss[None, :] + more_loss[item, options][:, None]).ravel()
        rows = np.lexsort((loss, cost))
        rows = rows[_better_than_all_before(loss[rows])]
        room = budget - cost[rows]
        with np.errstate(invalid="ignore"):
            bound = loss[rows] - np.where(room >= 0, room * gains[step + 1], room * pains[step + 1])
        fitting = np.flatnonzero(room >= 0)
        if len(fitting) and loss[rows[fitting[-1]]] < best:  # losses fall with the cost
            best, where = float(loss[rows[fitting[-1]]]), (step, -1)
            bound[fitting[-1]] = -np.inf  # stays, so that its history can be followed
        left = np.flatnonzero(bound < best)
        if len(left) > most_states:
            ranked = left[np.argsort(bound[left], kind="stable")]
            proven = min(proven, float(bound[ranked[most_states]]))
            left = np.sort(ranked[:most_states])
        if where == (step, -1):
            where = (step, int(np.flatnonzero(left == fitting[-1])[0]))
        rows = rows[left]
        history.append((int(item), parent[rows], option[rows]))
        cost, loss = cost[rows], loss[rows]
    return _followed(base, history, where), proven


def _followed(
    base: np.ndarray, history: list[tuple[int, np.ndarray, np.ndarray]], where: tuple[int, int]
) -> np.ndarray:
    """The options of the state `where` (step and row); items not decided by then keep their first ones."""
    found, (step, row) = base.copy(), where
    while step >= 0:
        item, parents, options = history[step]
        found[item] = options[row]
        step, row = step - 1, int(parents[row])
    return found


def _better_than_all_before(loss: np.ndarray) -> np.ndarray:
    """Of states by rising cost, the positions of those that lose less than all cheaper ones."""
    before = np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
    return np.flatnonzero(loss < before)
