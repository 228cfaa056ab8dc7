"""Claims: a statement, a criterion, findings, and what follows."""

import dataclasses
from collections.abc import Sequence

from theory.statistics import Estimate

HOLDS, CONDITIONS, FAILS = "holds", "holds with conditions", "does not hold here"
UNDECIDED = "undecided: intervals too wide"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criterion:
    """When an interval bears a claim out: within limits, or only reaching into them.

    Attributes:
        low: the interval's lower end must be above it.
        reach: its upper end must not be below it.
        high: its upper end must be below it.
        refuted_below: an upper end below it refutes the claim.
        words: for readers.
    """

    low: float
    reach: float
    high: float
    refuted_below: float
    words: str

    def met(self, found: Estimate) -> bool:
        """Whether an interval bears the claim out."""
        return found.low > self.low and self.reach <= found.high < self.high

    def refuted(self, found: Estimate) -> bool:
        """Whether an interval excludes it."""
        return found.high < self.refuted_below or found.low >= self.high


INFINITE = float("inf")


def above(threshold: float) -> Criterion:
    """The whole interval lies above a threshold."""
    return Criterion(
        low=threshold, reach=-INFINITE, high=INFINITE, refuted_below=threshold, words=f"interval above {threshold:g}"
    )


def within(low: float, high: float) -> Criterion:
    """The whole interval lies within limits."""
    return Criterion(
        low=low, reach=-INFINITE, high=high, refuted_below=low, words=f"interval within {low:g} and {high:g}"
    )


def at_least(value: float) -> Criterion:
    """The interval lies above 0 and reaches up to a value, or lies beyond it."""
    return Criterion(
        low=0.0,
        reach=value,
        high=INFINITE,
        refuted_below=value,
        words=f"interval above 0, and up to {value:g} or beyond",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One measurement of a claim, in a table.

    Attributes:
        row: condition, such as a device.
        column: condition, such as a stopping rule.
        estimate: None where too few runs have a value.
        excluded: runs that have none.
    """

    row: str
    column: str
    estimate: Estimate | None
    excluded: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim with its measurements.

    Attributes:
        name: short.
        statement: what is claimed.
        measured: what the values are.
        criterion: that decides.
        findings: in order.
    """

    name: str
    statement: str
    measured: str
    criterion: Criterion
    findings: Sequence[Finding]

    def met(self, finding: Finding) -> bool:
        """Whether a finding bears the claim out; one without a value does not."""
        return finding.estimate is not None and self.criterion.met(finding.estimate)

    def refuted(self, finding: Finding) -> bool:
        """Whether a finding excludes the claim."""
        return finding.estimate is not None and self.criterion.refuted(finding.estimate)

    @property
    def verdict(self) -> str:
        """One of `HOLDS` (everywhere), `CONDITIONS` (somewhere), `FAILS` (nowhere) and `UNDECIDED`."""
        met = [self.met(finding) for finding in self.findings]
        if met and all(met):
            return HOLDS
        if any(met):
            return CONDITIONS
        return FAILS if any(self.refuted(finding) for finding in self.findings) else UNDECIDED

    @property
    def conditions(self) -> list[str]:
        """Under which it holds, where not under all: whole columns, and single cells or exceptions."""
        if self.verdict != CONDITIONS:
            return []
        found = list[str]()
        for column in dict.fromkeys(f.column for f in self.findings):
            of_column = [f for f in self.findings if f.column == column]
            good = [f for f in of_column if self.met(f)]
            bad = [f for f in of_column if not self.met(f)]
            if not bad:
                found.append(column)
            elif len(bad) < len(good):
                found.append(f"{column} (not {', '.join(f.row for f in bad)})")
            elif good:
                found.append(f"{column} ({', '.join(f.row for f in good)})")
        return found
