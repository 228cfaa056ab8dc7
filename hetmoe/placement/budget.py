"""Which modules stay digital under one budget for the whole model."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from hetmoe.models.config import ModelConfig
from hetmoe.placement.knapsack import knapsack
from hetmoe.placement.module_scores import ModuleScores
from hetmoe.placement.plan import Plan, plan_shapes


def place_within(scores: ModuleScores, costs: ModuleScores, budget: float, config: ModelConfig) -> Plan:
    """The plan whose digital modules have the largest total score at a total cost of at most `budget`.

    Modules that `scores` leaves None are digital by structure, outside the budget; experts always compete.

    Args:
        scores: what keeping a module digital gains; comparable between layers and modules (expected or measured loss,
            not neuron norms).
        costs: what keeping it digital costs, in the unit of the budget.
        budget: for all modules that compete, together.
        config: the model's.

    Raises:
        InputError: for scores that are not finite, or a budget that is not a number of at least 0.
    """
    shapes = plan_shapes(config)
    names = [f.name for f in dataclasses.fields(scores) if getattr(scores, f.name) is not None]
    values, prices = (
        np.concatenate([np.broadcast_to(np.asarray(getattr(part, n), np.float64), shapes[n]).ravel() for n in names])
        for part in (scores, costs)
    )
    digital = knapsack(values, prices, budget)
    parts = np.split(digital, np.cumsum([int(np.prod(shapes[n])) for n in names])[:-1])
    flags: dict[str, Any] = {n: jnp.asarray(~part.reshape(shapes[n])) for n, part in zip(names, parts, strict=True)}
    return Plan(**flags)


def digital_cost(plan: Plan, costs: ModuleScores) -> float:
    """What the digital modules of a plan cost together; modules digital by structure are not counted."""
    total = 0.0
    for field in dataclasses.fields(plan):
        if (analog := getattr(plan, field.name)) is not None:
            total += float(np.sum(np.where(np.asarray(analog), 0.0, np.asarray(getattr(costs, field.name)))))
    return total
