"""The tables of a report, for the page and as CSV."""

import csv
import dataclasses
import io
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hetmoe.evaluate.statistics import spearman
from hetmoe.placement.scores import MEASURED
from hetmoe.report.groups import (
    BASELINES,
    REFERENCE,
    Condition,
    Estimate,
    Groups,
    Line,
    Metric,
    difference,
    percent,
)  # fmt: skip
from hetmoe.report.pareto import best_trade_offs, pareto_metrics, trade_offs
from hetmoe.sweep.points import scored_rule
from hetmoe.sweep.store import Failure

_ABSENT = "-"
_POINT_COLUMNS = ("device", "time_s", "bits", "noise_scale", "placement", "fraction")
_ESTIMATE_COLUMNS = ("mean", "standard_error", "low_95", "high_95", "n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the page; the first cell of each row names the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def means(groups: Groups, condition: Condition) -> list[Table]:
    """One table per metric: placements x noise scales."""
    scales = groups.scales_of([condition])
    tables: list[Table] = []
    for metric in groups.metrics:
        rows: list[list[str]] = []
        if groups.digital is not None:
            value = getattr(groups.digital, metric.name) * metric.factor
            rows.append([REFERENCE, *[number(value, metric)] * len(scales)])
        for line in groups.lines_of([condition]):
            found = (groups.measured.get((condition, scale, line)) for scale in scales)
            rows.append([line.label, *(mean_cell(m and m.estimate(metric), metric) for m in found)])
        tables.append(
            Table(
                caption=f"{metric.label}: mean ± standard error (n seeds); {condition.label}",
                header=["placement", *(f"c = {scale:g}" for scale in scales)],
                rows=rows,
            )
        )
    return tables


def differences(groups: Groups, condition: Condition) -> list[Table]:
    """Paired differences: one table per metric to `experts_analog`, one to `random` at the same fraction."""
    scales = groups.scales_of([condition])
    tables: list[Table] = []
    for against, metric in itertools.product((BASELINES[0], "random"), groups.metrics):
        rows = [
            [line.label, *(_difference_cell(groups, condition, scale, (line, other), metric) for scale in scales)]
            for line, other in comparisons(groups.lines_of([condition]))
            if other.placement == against
        ]
        if rows:
            same = " at the same fraction" if against == "random" else ""
            tables.append(
                Table(
                    caption=f"{metric.label}: difference to {against}{same}, mean [95 % interval] (n seeds in common), "
                    f"* = the interval excludes 0; {condition.label}",
                    header=["placement", *(f"c = {scale:g}" for scale in scales)],
                    rows=rows,
                )
            )
    return tables


def comparisons(lines: Sequence[Line]) -> list[tuple[Line, Line]]:
    """(placement, compared with): everything with `experts_analog`, rules with `random` at the same fraction."""
    start = Line(placement=BASELINES[0], fraction=None)
    pairs = [(line, start) for line in lines if line != start and start in lines]
    for line in lines:
        drawn = Line(placement="random", fraction=line.fraction)
        if line.fraction is not None and line != drawn and drawn in lines:
            pairs.append((line, drawn))
    return pairs


def fronts(groups: Groups, condition: Condition) -> Table:
    """The placements that no other beats in both share and quality."""
    rows: list[list[str]] = []
    for scale in groups.scales_of([condition]):
        for metric in pareto_metrics(groups):
            best = best_trade_offs(trade_offs(groups, condition, scale, metric), metric)
            rows.extend(
                [f"c = {scale:g}", metric.label, p.line.label, percent(p.share), mean_cell(p.estimate, metric)]
                for p in best
            )
    return Table(
        caption=f"Placements on the front of digital share and quality, by their means over seeds; {condition.label}",
        header=["noise scale", "metric", "placement", "parameters kept digital", "mean ± standard error (n seeds)"],
        rows=rows,
    )


def correlations(maps: dict[str, np.ndarray]) -> Table | None:
    """Spearman rank correlations between score maps of one shape, over all experts and layer by layer."""
    if len(maps) < 2:
        return None
    layers = len(next(iter(maps.values())))
    rows = [
        [f"{a}, {b}", *(_ABSENT if r is None else f"{r:.3f}" for r in (overall, *by_layer))]
        for a, b, overall, by_layer in _correlations(maps)
    ]
    return Table(
        caption="Spearman rank correlation between the rules' scores: over the experts of all layers, and per layer "
        f"with experts ({_ABSENT} where a rule scores all experts equally)",
        header=["rules", "all layers", *(f"layer {index}" for index in range(layers))],
        rows=rows,
    )


def csv_files(groups: Groups, maps: dict[str, np.ndarray], failures: Sequence[Failure]) -> dict[str, bytes]:
    """Every table for all conditions, in full precision, with one value per column."""
    files = {
        "means.csv": _csv([*_POINT_COLUMNS, "metric", *_ESTIMATE_COLUMNS], _mean_rows(groups)),
        "differences.csv": _csv(
            [*_POINT_COLUMNS, "against", "metric", *_ESTIMATE_COLUMNS], _difference_rows(groups)
        ),
        "pareto.csv": _csv(
            [*_POINT_COLUMNS, "metric", "digital_share", "on_front", *_ESTIMATE_COLUMNS], _pareto_rows(groups)
        ),
    }  # fmt: skip
    if failures:
        files["failed.csv"] = _csv([*_POINT_COLUMNS, "seed_index", "error"], map(_failure_row, failures))
    if len(maps) > 1:
        rows = [
            [a, b, layer, "" if r is None else r]
            for a, b, overall, by_layer in _correlations(maps)
            for layer, r in (("all", overall), *enumerate(by_layer))
        ]
        files["spearman.csv"] = _csv(["rule_a", "rule_b", "layer", "spearman"], rows)
    return files


def number(value: float, metric: Metric) -> str:
    """A mean, or huge values by their exponent."""
    return f"{value:,.{metric.digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def mean_cell(estimate: Estimate | None, metric: Metric) -> str:
    """`mean ± standard error (n)`; without the error where one seed is all there is."""
    if estimate is None:
        return _ABSENT
    spread = "" if estimate.interval is None else f" ± {number(estimate.interval.standard_error, metric)}"
    return f"{number(estimate.mean, metric)}{spread} ({estimate.count})"


def _difference_cell(
    groups: Groups, condition: Condition, scale: float, pair: tuple[Line, Line], metric: Metric
) -> str:
    estimate = _difference(groups, condition, scale, pair, metric)
    if estimate is None:
        return _ABSENT
    mean = _signed(estimate.mean, metric)
    if estimate.interval is None:
        return f"{mean} ({estimate.count})"
    low, high = estimate.interval.low, estimate.interval.high
    star = " *" if low > 0 or high < 0 else ""
    return f"{mean} [{_signed(low, metric)}, {_signed(high, metric)}] ({estimate.count}){star}"


def _signed(value: float, metric: Metric) -> str:
    text = number(abs(value), dataclasses.replace(metric, digits=metric.digits + 1))
    return f"{'-' if value < 0 else '+'}{text}"


def _difference(
    groups: Groups, condition: Condition, scale: float, pair: tuple[Line, Line], metric: Metric
) -> Estimate | None:
    a, b = (groups.measured.get((condition, scale, line)) for line in pair)
    return None if a is None or b is None else difference(a, b, metric)


def _correlations(
    maps: dict[str, np.ndarray],
) -> list[tuple[str, str, float | None, list[float | None]]]:
    """Of all pairs; those with what was measured come first, since other rules stand in for it."""
    ordered = sorted(maps.items(), key=lambda item: scored_rule(item[0]) != MEASURED)
    return [
        (a, b, _rank(x.ravel(), y.ravel()), [_rank(*rows) for rows in zip(x, y, strict=True)])
        for (a, x), (b, y) in itertools.combinations(ordered, 2)
    ]


def _rank(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return spearman(a, b)


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue().encode()


def _point(condition: Condition, scale: float, line: Line) -> list[Any]:
    time_s = "programmed" if condition.time_s is None else condition.time_s
    fraction = "" if line.fraction is None else line.fraction
    return [condition.device, time_s, condition.bits, scale, line.placement, fraction]


def _numbers(estimate: Estimate) -> list[Any]:
    interval = estimate.interval
    if interval is None:
        return [estimate.mean, "", "", "", estimate.count]
    return [estimate.mean, interval.standard_error, interval.low, interval.high, estimate.count]


def _failure_row(failure: Failure) -> list[Any]:
    point = failure.point
    condition = Condition(device=point.device, time_s=point.time_s, bits=point.bits)
    line = Line(placement=point.placement, fraction=point.fraction)
    return [*_point(condition, point.noise_scale, line), point.seed_index, failure.error]


def _mean_rows(groups: Groups) -> Iterable[list[Any]]:
    if groups.digital is not None:
        for metric in groups.metrics:
            value = getattr(groups.digital, metric.name) * metric.factor
            yield ["none", "programmed", 0, 0, REFERENCE, "", metric.name, value, "", "", "", 1]
    for condition, scale, line in _cells(groups):
        for metric in groups.metrics:
            estimate = groups.measured[condition, scale, line].estimate(metric)
            yield [*_point(condition, scale, line), metric.name, *_numbers(estimate)]


def _difference_rows(groups: Groups) -> Iterable[list[Any]]:
    for condition in groups.conditions:
        for scale in groups.scales_of([condition]):
            for pair in comparisons(groups.lines_of([condition])):
                for metric in groups.metrics:
                    estimate = _difference(groups, condition, scale, pair, metric)
                    if estimate is not None:
                        point = _point(condition, scale, pair[0])
                        yield [*point, pair[1].placement, metric.name, *_numbers(estimate)]


def _pareto_rows(groups: Groups) -> Iterable[list[Any]]:
    for condition in groups.conditions:
        for scale, metric in itertools.product(groups.scales_of([condition]), pareto_metrics(groups)):
            points = trade_offs(groups, condition, scale, metric)
            best = best_trade_offs(points, metric)
            for p in points:
                yield [*_point(condition, scale, p.line), metric.name, p.share, int(p in best), *_numbers(p.estimate)]


def _cells(groups: Groups) -> list[tuple[Condition, float, Line]]:
    every = itertools.product(groups.conditions, groups.noise_scales, groups.lines)
    return [key for key in every if key in groups.measured]
