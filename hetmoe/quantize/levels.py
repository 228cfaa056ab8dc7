"""How many experts of a layer get how many bits, so that they average to a given number."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
from jaxtyping import Int

from hetmoe.errors import InputError
from hetmoe.quantize.grid import BITS

Alternative = Literal["paper", "fewest_lowest"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Experts of one layer at each level.

    Attributes:
        levels: bits of a code, highest first.
        experts: how many experts get them.
        wanted: the average that was asked for, bits per weight without overhead.
    """

    levels: tuple[int, ...]
    experts: tuple[int, ...]
    wanted: float

    @property
    def average(self) -> Fraction:
        """The average reached, exactly."""
        return Fraction(sum(b * n for b, n in zip(self.levels, self.experts, strict=True)), sum(self.experts))

    @property
    def exact(self) -> bool:
        """Whether that is the wanted average, read as the decimal number that it prints as."""
        return self.average == _decimal(self.wanted)

    def statement(self) -> str:
        """One line for a report: the counts, and the average reached where it is not the wanted one."""
        parts = ", ".join(f"{n} at {b}" for b, n in zip(self.levels, self.experts, strict=True))
        if self.exact:
            return f"{self.wanted:g} bits: {parts}"
        near = f"{float(self.average):.6g} bits is the nearest to {self.wanted:g}"
        return f"{near} that {sum(self.experts)} experts can average at {_listed(self.levels)} bits: {parts}"


def uniform(experts: int, bits: int) -> Counts:
    """Every expert at the same bits.

    Raises:
        InputError: for no experts, or bits that do not exist.
    """
    _check(experts, bits, (bits,))
    return Counts(levels=(bits,), experts=(experts,), wanted=float(bits))


def two_levels(experts: int, average: float, low: int, high: int) -> Counts:
    """`round(experts * (average - low) / (high - low))` experts get the high bits (arXiv 2604.06515).

    Halves are rounded to the even number, as Python's `round` does in the published code. The average is taken as the
    decimal number that it prints as (2.3 is 23/10) and the arithmetic is exact, so that no half is missed. What is
    reached is the nearest average that exists.

    Raises:
        InputError: for levels that are not two ascending ones of those that exist, or an average outside them.
    """
    _check(experts, average, (low, high))
    first = _two(experts, _decimal(average), low, high)
    return Counts(levels=(high, low), experts=(first, experts - first), wanted=float(average))


def three_levels(experts: int, average: float, levels: Sequence[int], alternative: Alternative = "paper") -> Counts:
    """Experts at three levels; at one average there is a free choice, since two in the middle equal one of each end.

    `"paper"` (arXiv 2604.06515), for equally spaced levels h > m > l with D = h - l: the two levels around the average
    as in `two_levels` (h and m if it is at least m); then, one step at a time, two experts at m become one at h and one
    at l: while two are left if the average is above h - D/3; while those left at m would be at least as many as those
    that these steps have raised to h if it is in [h - 2D/3, h - D/3]; never if it is below.

    `"fewest_lowest"`: as few experts at l as that average allows, which for equally spaced levels is the paper's
    start. For others it is the nearest average that exists, ties to the lower, found exactly.

    Args:
        experts: of a layer.
        average: bits per weight, without overhead.
        levels: three, ascending.
        alternative: which of the two.

    Raises:
        InputError: for levels that are not three ascending ones of those that exist, an average outside them, an
            unknown alternative, or the paper's rule with levels that are not equally spaced.
    """
    if len(levels) != 3:
        raise InputError(f"three levels are needed, got {_listed(levels)}")
    if alternative not in ("paper", "fewest_lowest"):
        raise InputError(f"alternative={alternative!r} must be 'paper' or 'fewest_lowest'")
    _check(experts, average, levels)
    low, middle, high = levels
    wanted = _decimal(average)
    if high - middle != middle - low:
        if alternative == "paper":
            raise InputError(
                f"levels {_listed(levels)} are not equally spaced, which the paper's rule needs: "
                "use two levels, 1,2,3 or 2,3,4, or alternative='fewest_lowest'"
            )
        return Counts(
            levels=(high, middle, low), experts=_fewest_lowest(experts, wanted, levels), wanted=float(average)
        )
    if wanted >= middle:
        n_high, n_low = _two(experts, wanted, middle, high), 0
    else:
        n_high, n_low = 0, experts - _two(experts, wanted, low, middle)
    steps = 0
    if alternative == "paper":
        steps = _paper_steps(experts - n_high - n_low, wanted, high, high - low)
    n_high, n_low = n_high + steps, n_low + steps
    return Counts(levels=(high, middle, low), experts=(n_high, experts - n_high - n_low, n_low), wanted=float(average))


def level_counts(experts: int, average: float, levels: Sequence[int], alternative: Alternative = "paper") -> Counts:
    """Experts at one, two or three ascending levels; with one, the average must be that level.

    Raises:
        InputError: as `two_levels` and `three_levels`; for more than three levels or none.
    """
    if len(levels) == 3:
        return three_levels(experts, average, levels, alternative)
    if len(levels) == 2:
        return two_levels(experts, average, levels[0], levels[1])
    if len(levels) != 1:
        raise InputError(f"levels={_listed(levels)} must be one to three levels, for example 1,2,3")
    _check(experts, average, levels)
    return uniform(experts, levels[0])


def assign(order: Int[np.ndarray, "*layers experts"], counts: Counts) -> Int[np.ndarray, "*layers experts"]:
    """Bits by expert index: the first experts of the order get the highest level, and so on.

    Raises:
        InputError: if the counts are not of that many experts.
    """
    if order.shape[-1] != sum(counts.experts):
        raise InputError(f"the order has {order.shape[-1]} experts, the counts are of {sum(counts.experts)}")
    bits = np.empty(order.shape, np.int64)
    ranked = np.repeat(np.array(counts.levels, np.int64), counts.experts)
    np.put_along_axis(bits, order, np.broadcast_to(ranked, order.shape), axis=-1)
    return bits


def used_levels(bits: Int[np.ndarray, "..."]) -> list[int]:
    """Bits that occur, ascending, without 0."""
    return sorted({int(b) for b in bits.flat} - {0})


def _two(experts: int, average: Fraction, low: int, high: int) -> int:
    return round(experts * (average - low) / (high - low))


def _paper_steps(at_middle: int, average: Fraction, high: int, width: int) -> int:
    """How often two of `at_middle` experts become one at the highest and one at the lowest level."""
    below = 3 * (high - average)  # in [0, width] above h - D/3
    if below < width:
        return at_middle // 2
    # After t steps at_middle - 2 t are left, at least the t raised: t <= at_middle / 3.
    return at_middle // 3 if below <= 2 * width else 0


def _fewest_lowest(experts: int, average: Fraction, levels: Sequence[int]) -> tuple[int, int, int]:
    low, middle, high = levels

    def candidates() -> list[tuple[Fraction, int, int, int]]:  # distance, bits of all experts, at l, at h
        found: list[tuple[Fraction, int, int, int]] = []
        for n_low in range(experts + 1):
            least = n_low * low + (experts - n_low) * middle
            exact = (experts * average - least) / (high - middle)
            for n_high in {min(max(n, 0), experts - n_low) for n in (math.floor(exact), math.ceil(exact))}:
                total = least + n_high * (high - middle)
                found.append((abs(total - experts * average), total, n_low, n_high))
        return found

    _, _, n_low, n_high = min(candidates())
    return n_high, experts - n_low - n_high, n_low


def _decimal(average: float) -> Fraction:
    return Fraction(str(average))


def _check(experts: int, average: float, levels: Sequence[int]) -> None:
    if experts < 1:
        raise InputError(f"experts={experts} must be at least 1")
    if any(level not in BITS for level in levels):
        raise InputError(f"levels {_listed(levels)} must be among {_listed(BITS)} bits")
    if any(a >= b for a, b in itertools.pairwise(levels)):
        raise InputError(f"levels {_listed(levels)} must be ascending and different")
    if not math.isfinite(average):
        raise InputError(f"bits={average!r} must be a finite number")
    if not levels[0] <= average <= levels[-1]:
        raise InputError(
            f"an average of {average:g} bits cannot be met with levels {_listed(levels)}: "
            f"ask for {levels[0]} to {levels[-1]} bits, or change the levels"
        )


def _listed(levels: Sequence[int]) -> str:
    return ",".join(map(str, levels))
