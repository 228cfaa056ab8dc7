"""What is printed and recorded of claims."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from theory.cases import Case
from theory.claims import CONDITIONS, FAILS, HOLDS, NOT_DERIVED, UNDECIDED, Claim, Finding
from theory.experiment import PLACEMENTS, STOPS, Hardware, Measured

SIGNS = {HOLDS: "holds", CONDITIONS: "partly", FAILS: "no", UNDECIDED: "?", NOT_DERIVED: "-"}


def print_claim(console: Console, claim: Claim) -> None:
    """Statement, a table of the measurements with their intervals, and the verdict."""
    rows, columns = (list(dict.fromkeys(getattr(f, axis) for f in claim.findings)) for axis in ("row", "column"))
    table = Table(title=f"{claim.name}. {claim.statement}", title_justify="left", title_style="bold")
    table.add_column(claim.measured)
    for column in columns:
        table.add_column(column, justify="right")
    cells = {(f.row, f.column): _cell(claim, f) for f in claim.findings}
    for row in rows:
        table.add_row(row, *(cells.get((row, column), "") for column in columns))
    console.print(table)
    conditions = f": {'; '.join(claim.conditions)}" if claim.conditions else ""
    console.print(f"{claim.verdict}{conditions} (criterion: {claim.criterion.words})\n", highlight=False)


def _cell(claim: Claim, finding: Finding) -> str:
    found = finding.estimate
    if found is None:
        return "not known"
    sign = "+" if claim.met(finding) else "-" if claim.refuted(finding) else " "
    runs = f"{found.runs}/{found.runs + finding.excluded}" if finding.excluded else str(found.runs)
    return f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}] {runs} {sign}"


def print_tolerances(console: Console, measured: Measured) -> None:
    """Medians of c* over the mixtures that have learned, of every hardware, stopping rule and frequency."""
    for stop in STOPS:
        table = Table(
            title=f"tolerances c*, {stop}: medians over learned mixtures, {' / '.join(PLACEMENTS)}",
            title_justify="left", title_style="bold",
        )  # fmt: skip
        for heading in ("hardware", *(f"gamma {gamma:g}" for gamma in measured.plan.gammas)):
            table.add_column(heading, justify="left" if heading == "hardware" else "right")
        for hardware in measured.plan.hardware:
            rows = tolerance_rows(measured, stop, hardware)
            cells = [" / ".join(_scale(part["median"]) for part in row["placements"].values()) for row in rows]
            table.add_row(hardware.name, *cells)
        console.print(table)
    console.print("0: wrong without noise or at c = 0.01, -: at least half bear every scale\n", highlight=False)


def _scale(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def tolerance_rows(measured: Measured, stop: str, hardware: Hardware) -> list[dict[str, Any]]:
    """One row for each frequency, of plain values: tolerances of all placements.

    A mixture that bears every scale has the tolerance None, and so has a median of such.
    """
    found = list[dict[str, Any]]()
    for gamma, learned, scales in zip(
        measured.plan.gammas, measured.learned[stop], measured.tolerances[stop, hardware], strict=True
    ):
        placements = dict[str, Any]()
        for place, name in enumerate(PLACEMENTS):
            values = scales[learned, place]
            median = float(np.median(values)) if values.size else np.inf
            placements[name] = {
                "median": _rounded(median), "fail_at_the_first_scale": int((values == 0).sum()),
                "bear_every_scale": int(np.isinf(values).sum()), "seeds": [_rounded(v) for v in values],
            }  # fmt: skip
        found.append(
            {"gamma": gamma, "learned": np.flatnonzero(learned).tolist(), "placements": placements},
        )
    return found


def _rounded(value: float) -> float | None:
    """To four digits: c* is known to 1 %."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def tolerance_record(measured: Measured) -> list[dict[str, Any]]:
    """Of every hardware and stopping rule."""
    return [
        {"hardware": hardware.name, "stop": stop, "frequencies": tolerance_rows(measured, stop, hardware)}
        for hardware in measured.plan.hardware
        for stop in STOPS
    ]


def print_legend(console: Console) -> None:
    """Of the cells of `print_claim`."""
    console.print(
        "Cells: value [95 % interval] mixtures (of how many), + criterion met, - excluded. Where a value is on the "
        "limit 1 cell in 40 meets it by chance.\n",
        highlight=False,
    )  # fmt: skip


def print_settings(console: Console, found: Mapping[str, Sequence[Claim]]) -> None:
    """One line for each setting, one column for each claim."""
    names = [claim.name.split(" ")[0] for claim in next(iter(found.values()))]
    table = Table(title="every claim in other settings", title_justify="left", title_style="bold")
    for heading in ("setting", *names):
        table.add_column(heading)
    for setting, claims in found.items():
        table.add_row(setting, *(SIGNS[claim.verdict] for claim in claims))
    console.print(table)


def claim_record(claim: Claim) -> dict[str, Any]:
    """Plain values."""
    findings = [
        {
            "row": f.row, "column": f.column, "excluded": f.excluded, "met": claim.met(f), "refuted": claim.refuted(f),
            **({} if f.estimate is None else {
                "value": f.estimate.value, "low": f.estimate.low, "high": f.estimate.high, "runs": f.estimate.runs,
            }),
        }
        for f in claim.findings
    ]  # fmt: skip
    return {
        "claim": claim.name, "statement": claim.statement, "measured": claim.measured,
        "criterion": claim.criterion.words, "verdict": claim.verdict, "conditions": claim.conditions,
        "findings": findings,
    }  # fmt: skip


def bound_rows(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """One row for each bound: ratios of measured to bound, and violations."""
    found = list[dict[str, Any]]()
    for name in dict.fromkeys(case.bound for case in cases):
        these = [case for case in cases if case.bound == name]
        ratios = np.concatenate([case.ratios for case in these])
        found.append(
            {
                "bound": name, "cases": len(these), "median": float(np.median(ratios)), "largest": float(ratios.max()),
                "smallest": float(ratios.min()), "violations": sum(case.violated for case in these),
            }
        )  # fmt: skip
    return found


def print_bounds(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Tightness of every bound."""
    table = Table(
        title="bounds on random experts: measured / bound (what is exact: 1 within the standard error)",
        title_justify="left", title_style="bold",
    )  # fmt: skip
    for heading in ("bound", "cases", "median", "largest", "violations"):
        table.add_column(heading, justify="left" if heading == "bound" else "right")
    for row in rows:
        table.add_row(
            row["bound"], str(row["cases"]), f"{row['median']:.3f}", f"{row['largest']:.3f}", str(row["violations"])
        )
    console.print(table)


def print_reference(console: Console, rows: Sequence[dict[str, Any]], rounded: Sequence[dict[str, Any]]) -> None:
    """Errors and bounds of every layer, and its routing."""
    table = Table(
        title="bounds on the reference model: medians over tokens and experts, relative to the clean output",
        title_justify="left", title_style="bold",
    )  # fmt: skip
    for heading in ("layer", "error", "measured", "bound", "measured / bound", "largest"):
        table.add_column(heading, justify="left" if heading == "error" else "right")
    for row in rows:
        table.add_row(
            str(row["layer"]), row["kind"], f"{row['measured']:.4g}", f"{row['bound']:.4g}", f"{row['ratio']:.3f}",
            f"{row['largest']:.3f}",
        )  # fmt: skip
    console.print(table)
    for row in rounded:
        console.print(
            f"layer {row['layer']}: with all experts rounded to {row['bits']} bits, {row['whole_model_observed']:.1%} "
            f"of tokens keep their experts; certain by bounds alone {row['whole_model_certified']:.1%}, given measured "
            f"errors {row['whole_model_certified_measured']:.1%}",
            highlight=False,
        )
