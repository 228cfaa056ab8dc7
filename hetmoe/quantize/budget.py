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
        stored: bytes of all digital expert matrices, overhead included.
    """

    bits: Int[np.ndarray, "layers experts matrices"]
    increase: float
    gap: float
    stored: int


def expert_bytes(
    config: ModelConfig, levels: Sequence[int], *, group: int, symmetric: bool
) -> Int[np.ndarray, "matrices levels"]:
    """Bytes of one expert's matrices at every level of bits.

    Raises:
        InputError: for bits or groups that do not exist, or a group that does not divide a matrix's rows.
    """
    inner, hidden = config.expert_intermediate_size, config.hidden_size
    shapes = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    grids = [Grid(bits=bits, group=group, symmetric=symmetric) for bits in levels]
    return np.array([[packed_bytes(*shapes[name], grid) for grid in grids] for name in EXPERT_MATRICES], np.int64)


def average_budget(config: ModelConfig, experts: int, average: float, *, group: int, symmetric: bool) -> int:
    """Bytes of the matrices of `experts` experts at an average of `average` bits per code, overhead included.

    Rounded down, so that what fits has at most that average. The average is the decimal number that it prints as.

    Raises:
        InputError: for an average that is not finite or not above 0, or a group that does not fit.
    """
    if not 0 < average < math.inf:
        raise InputError(f"bits={average!r} must be a finite number above 0")
    one_bit = Grid(bits=1, group=group, symmetric=symmetric)
    codes = 3 * config.expert_intermediate_size * config.hidden_size
    whole = int(expert_bytes(config, (one_bit.bits,), group=group, symmetric=symmetric).sum())
    return math.floor(experts * (whole - Fraction(codes, 8) + Fraction(str(average)) * codes / 8))


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
        sizes: bytes of a matrix at each level, `expert_bytes`.
        levels: bits, in the order of both.
        budget: bytes, overhead included, of all digital expert matrices.
        digital: which experts compete; None = all.

    Raises:
        InputError: for increases that are not finite, sizes that do not fit each other, or a budget below the bytes
            of the lowest level.
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
