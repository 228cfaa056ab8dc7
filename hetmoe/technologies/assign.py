"""The options of all experts that together are expected to lose least within budgets."""

import math

import numpy as np
from jaxtyping import Int

from hetmoe.errors import InputError
from hetmoe.placement.several_budgets import choose_within
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.technologies.choices import Assignment, Choices

UNITS = {"max_bytes": " B", "max_energy": " J", "max_tiles": ""}


def assign(
    choices: Choices,
    *,
    max_bytes: float | None = None,
    max_energy: float | None = None,
    max_tiles: float | None = None,
    exclude: tuple[str, ...] = (),
) -> Assignment:
    """The assignment of the smallest expected increase of the loss within all budgets, exactly.

    Increases of different experts are added up, as if they did not depend on each other.

    Args:
        choices: options of every expert.
        max_bytes: of the digital weights of all experts; None = no budget.
        max_energy: joules per token of all experts' matmuls.
        max_tiles: of the analog experts.
        exclude: names of options that no expert may take.

    Raises:
        InputError: for budgets that are not numbers of at least 0, or that no assignment keeps to; it says what the
            least of each is.
    """
    layers, experts, _ = choices.losses.shape
    names = choices.names
    if unknown := [name for name in exclude if name not in names]:
        raise InputError(f"option {unknown[0]!r} does not exist: the options are {', '.join(names)}")
    allowed = np.array([number for number, name in enumerate(names) if name not in exclude], np.int64)
    if not len(allowed):
        raise InputError("all options are excluded")
    costs = np.stack([choices.stored, choices.energy, choices.tiles], axis=-1)[:, :, allowed].reshape(
        -1, len(allowed), 3
    )
    given = {"max_bytes": max_bytes, "max_energy": max_energy, "max_tiles": max_tiles}
    for name, budget in given.items():
        if budget is not None and not budget >= 0:
            raise InputError(f"{name}={budget!r} must be a number of at least 0")
    budgets = np.array([math.inf if budget is None else budget for budget in given.values()])
    least = costs.min(axis=1).sum(axis=0)
    for (name, budget), floor in zip(given.items(), least, strict=True):
        if budget is not None and floor > budget * (1 + 1e-12):
            unit = UNITS[name]
            raise InputError(f"{name}={budget:g}{unit} is too small: the options that need least take {floor:g}{unit}")
    try:
        found = choose_within(choices.losses[:, :, allowed].reshape(-1, len(allowed)), costs, budgets)
    except InputError as error:
        said = ", ".join(f"{name}={budget:g}" for name, budget in given.items() if budget is not None)
        raise InputError(f"{said}: {error}") from None
    option = allowed[found.option].reshape(layers, experts)
    return describe(choices, option, gap=found.gap)


def describe(choices: Choices, option: Int[np.ndarray, "layers experts"], gap: float = 0.0) -> Assignment:
    """What an assignment takes and is expected to lose."""
    level = np.array([0, *choices.levels, 0])[option]

    def total(values: np.ndarray) -> float:
        return math.fsum(np.take_along_axis(values, option[..., None], axis=-1).ravel())

    return Assignment(
        option=option, analog=option == 0, bits=np.repeat(level[..., None], len(EXPERT_MATRICES), axis=-1),
        expected=total(choices.losses), gap=gap, stored=total(choices.stored), energy=total(choices.energy),
        tiles=total(choices.tiles),
    )  # fmt: skip
