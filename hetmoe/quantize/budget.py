"""Bits for every expert matrix under one byte budget for the whole model."""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Float, Int

from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.quantize.grid import Grid
from hetmoe.quantize.multiple_choice import choose
from hetmoe.quantize.packed import packed_bytes

EXPERT_MATRICES = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitPlan:
    """Bits of every matrix of `EXPERT_MATRICES` of every expert, 0 for experts that are not digital.

    Attributes:
        bits: of a code.
        increase: the expected increase of the loss in total, nats per token.
        gap: the smallest possible increase within the budget is at most this much lower; 0 = none is.
        stored: the sizes of all digital expert matrices, in the unit of the budget.
    """

    bits: Int[np.ndarray, "layers experts matrices"]
    increase: float
    gap: float
    stored: int


def expert_bytes(config: ModelConfig, grids: Sequence[Grid]) -> Int[np.ndarray, "matrices levels"]:
    """Bytes of one expert's matrices on every grid, steps and zeros included.

    Raises:
        InputError: for a group that does not divide a matrix's rows.
    """
    inner, hidden = config.expert_intermediate_size, config.hidden_size
    shapes = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    return np.array([[packed_bytes(*shapes[name], grid) for grid in grids] for name in EXPERT_MATRICES], np.int64)


def code_bits(config: ModelConfig, levels: Sequence[int]) -> Int[np.ndarray, "matrices levels"]:
    """Bits of the codes alone of one expert's matrices, the currency of averages."""
    weights = config.hidden_size * config.expert_intermediate_size
    return np.tile(weights * np.array(levels, np.int64), (len(EXPERT_MATRICES), 1))


def average_budget(config: ModelConfig, experts: int, average: float) -> int:
    """Bits of the codes of `experts` experts at an average of `average` bits per weight, without overhead.

    Rounded down, so that what fits has at most that average. The average is the decimal number that it prints as.

    Raises:
        InputError: for an average that is not finite or not above 0.
    """
    if not 0 < average < math.inf:
        raise InputError(f"bits={average!r} must be a finite number above 0")
    weights = len(EXPERT_MATRICES) * config.expert_intermediate_size * config.hidden_size
    return math.floor(experts * weights * Fraction(str(average)))


def bits_within(
    increase: Float[np.ndarray, "layers experts matrices levels"],
    sizes: Int[np.ndarray, "matrices levels"],
    levels: Sequence[int],
    budget: int,
    *,
    digital: Bool[np.ndarray, "layers experts"] | None = None,
) -> BitPlan:
    """The bits of all digital expert matrices that together have the smallest expected increase of the loss.

    Increases of different matrices are added up, as if they did not depend on each other.

    Args:
        increase: expected increase at each level (`hetmoe.quantize.expected_loss`), nats per token.
        sizes: what a matrix takes at each level: bytes (`expert_bytes`), or bits of its codes (`code_bits`).
        levels: bits, in the order of both.
        budget: of all digital expert matrices, in the same unit.
        digital: which experts compete; None = all.

    Raises:
        InputError: for increases that are not finite, sizes that do not fit each other, or a budget below the
            sizes of the lowest level.
    """
    layers, experts, matrices, options = increase.shape
    if sizes.shape != (matrices, options) or len(levels) != options:
        raise InputError(
            f"increase {list(increase.shape)}, sizes {list(sizes.shape)} and {len(levels)} levels do not fit each other"
        )
    wanted = np.ones((layers, experts), bool) if digital is None else digital
    losses = np.asarray(increase, np.float64)[wanted].reshape(-1, options)
    found = choose(losses, np.tile(sizes, (int(wanted.sum()), 1)), budget)
    bits = np.zeros((layers, experts, matrices), np.int64)
    bits[wanted] = np.array(levels, np.int64)[found.option].reshape(-1, matrices)
    return BitPlan(bits=bits, increase=found.loss, gap=found.gap, stored=found.cost)
