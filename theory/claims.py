"""Claims: a statement, a criterion, findings, and what follows."""

import dataclasses
from collections.abc import Sequence

from theory.statistics import Estimate

HOLDS, CONDITIONS, FAILS = "holds", "holds with conditions", "does not hold here"
UNDECIDED, NOT_DERIVED = "undecided: intervals too wide, or none", "not derived for this setting"
BY_CHANCE = 0.05  # share of cells that may meet a criterion by chance, at intervals of 95 %


@dataclasses.dataclass(frozen=True)
class Criterion:
    """Limits that an interval must lie within.

    Attributes:
        low: the interval's lower end must be above it.
        high: its upper end must be below it.
    """

    low: float
    high: float = float("inf")

    @property
    def words(self) -> str:
        """For readers."""
        return f"interval above {self.low:g}" + (f" and below {self.high:g}" if self.high < float("inf") else "")

    def met(self, found: Estimate) -> bool:
        """Whether an interval bears the claim out."""
        return self.low < found.low and found.high < self.high

    def refuted(self, found: Estimate) -> bool:
        """Whether an interval excludes it."""
        return found.high <= self.low or self.high <= found.low


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
        """What the findings say.

        `HOLDS`: all bear it out. `CONDITIONS`: some do, more than chance would let. `FAILS`: at least half exclude it.
        `NOT_DERIVED`: there are none. `UNDECIDED`: anything else.
        """
        met, refuted = (sum(map(judge, self.findings)) for judge in (self.met, self.refuted))
        count = len(self.findings)
        if not count:
            return NOT_DERIVED
        if met == count:
            return HOLDS
        if met > BY_CHANCE * count:
            return CONDITIONS
        return FAILS if refuted >= count / 2 else UNDECIDED

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
