"""What accuracy costs: share of parameters kept digital against perplexity and accuracy, and the best trade-offs."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from hetmoe.report.figures import ReportFigure, condition_slug, metric_names
from hetmoe.report.groups import BITS, REFERENCE, Condition, Estimate, Groups, Line, Metric
from hetmoe.report.panels import Axis, Panel, Series, draw_panels
from hetmoe.report.style import DIGITAL_COLOUR, LineStyle, line_styles

_DIGITAL = Line(placement=REFERENCE, fraction=None)
_DIGITAL_STYLE = LineStyle(colour=DIGITAL_COLOUR, marker="*", dash="none", filled=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TradeOff:
    """One placement under one condition at one noise scale."""

    line: Line
    share: float  # of crossbar-capable parameters that stay digital
    estimate: Estimate


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other dominates, both coordinates to be small; equal points are all kept."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    kept: list[int] = []
    best = float("inf")
    last: tuple[float, float] | None = None
    for index in order:
        if points[index] == last or points[index][1] < best:
            kept.append(index)
            last, best = points[index], points[index][1]
    return sorted(kept)


def trade_offs(groups: Groups, condition: Condition, scale: float, metric: Metric) -> list[TradeOff]:
    """All placements with a result there, the digital model last."""
    found = [
        TradeOff(line=line, share=measured.digital_share, estimate=measured.estimate(metric))
        for line in groups.lines
        if (measured := groups.measured.get((condition, scale, line))) is not None
    ]
    if found and groups.digital is not None:
        digital = groups.digital
        value = getattr(digital, metric.name) * metric.factor
        found.append(
            TradeOff(
                line=_DIGITAL,
                share=digital.digital_parameters / digital.crossbar_parameters,
                estimate=Estimate(mean=value, count=1, interval=None),
            )
        )
    return found


def best_trade_offs(points: Sequence[TradeOff], metric: Metric) -> list[TradeOff]:
    """Those that no other dominates (smaller or equal share and better or equal mean), by share."""
    sign = -1 if metric.higher_is_better else 1
    best = front([(p.share, sign * p.estimate.mean) for p in points])
    return sorted((points[i] for i in best), key=lambda p: p.share)


def pareto_metrics(groups: Groups) -> list[Metric]:
    """Perplexity, and accuracy where there is one; bits per byte rank placements as perplexity does."""
    return [metric for metric in groups.metrics if metric != BITS]


def pareto_figures(groups: Groups) -> list[ReportFigure]:
    """One figure per condition, one row per noise scale."""
    styles = {**line_styles(groups.lines), _DIGITAL: _DIGITAL_STYLE}
    metrics = pareto_metrics(groups)
    figures: list[ReportFigure] = []
    for condition in groups.conditions:
        scales = groups.scales_of([condition])
        cells = [[trade_offs(groups, condition, scale, metric) for metric in metrics] for scale in scales]
        rows = [
            [
                Panel(
                    metric=metric,
                    title=f"c = {scale:g}",
                    series=_series(points, styles),
                    tokens_per_byte=groups.tokens_per_byte,
                    one_column=True,
                )
                for metric, points in zip(metrics, row, strict=True)
            ]
            for scale, row in zip(scales, cells, strict=True)
        ]
        drawn = draw_panels(condition.label, rows, Axis(label="parameters kept digital (%)"), None)
        points_of_panels = [points for row in cells for points in row]
        for axes, points, metric in zip(drawn.figure.axes, points_of_panels, metrics * len(scales), strict=True):
            best = best_trade_offs(points, metric)
            low, high = axes.get_ylim()
            # A front that leaves the panel leaves it straight; far values would overflow the renderer.
            means = np.clip([p.estimate.mean for p in best], low / 2, 2 * high)
            shares = [100 * p.share for p in best]
            axes.plot(shares, means, color="0.25", lw=1.0, drawstyle="steps-post", zorder=1.5, label="front")
        hidden = f" Triangles at the upper edge: {drawn.beyond} means lie beyond the axis." if drawn.beyond else ""
        figures.append(
            ReportFigure(
                name=f"pareto-{condition_slug(condition)}",
                title=f"Cost and quality: {condition.label}",
                caption=f"{metric_names(metrics)} (vertical, means over seeds with 95 % confidence intervals) against "
                "the share of all parameters of crossbar-capable modules that stays digital (horizontal), one row per "
                "noise scale c. Grey steps: the front of placements whose mean no other beats at as small a share; "
                f"neighbours whose intervals overlap may change places with other seeds.{hidden}",
                figure=drawn.figure,
            )
        )
    return figures


def _series(points: Sequence[TradeOff], styles: dict[Line, LineStyle]) -> list[Series]:
    return [
        Series(
            label=p.line.label, style=styles[p.line], x=[100 * p.share], estimates=[p.estimate], connected=[False]
        )
        for p in points
    ]  # fmt: skip
