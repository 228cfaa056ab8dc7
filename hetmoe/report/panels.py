"""Panels of lines with bands: one row per noise scale (or one row), one column per metric."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.markers import CARETUPBASE

from hetmoe.report.groups import ACCURACY, BITS, PERPLEXITY, Estimate, Metric
from hetmoe.report.style import DIGITAL_COLOUR, LineStyle
from hetmoe.sweep.store import SweepResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A line: one estimate per place on the x axis; `connected` places are joined, the others stand alone."""

    label: str
    style: LineStyle
    x: Sequence[float]
    estimates: Sequence[Estimate]
    connected: Sequence[bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """The x axis that all panels share; `ticks` are places with their names, None = chosen by the plotting library."""

    label: str
    logarithmic: bool = False
    ticks: Sequence[tuple[float, str]] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One metric of one row."""

    metric: Metric
    title: str
    series: Sequence[Series]
    tokens_per_byte: float
    one_column: bool = False  # for the upper edge: all values are compared at once, not place by place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure and how many means lie beyond its axes (marked by a triangle at the upper edge)."""

    figure: matplotlib.figure.Figure
    beyond: int


def draw_panels(title: str, rows: Sequence[Sequence[Panel]], axis: Axis, digital: SweepResult | None) -> Drawn:
    """Draws rows of panels under one legend; the model without noise is a grey line."""
    columns = len(rows[0])
    figure = matplotlib.figure.Figure(figsize=(4.4 * columns, 3.2 * len(rows) + 1.0), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    beyond = 0
    for axes_of_row, row in zip(grid, rows, strict=True):
        for axes, panel in zip(axes_of_row, row, strict=True):
            beyond += _draw(axes, panel, digital)
            _set_x(axes, axis, named=row is rows[-1])
    legend = {s.label: s.style for row in rows for panel in row for s in panel.series}
    add_legend(figure, legend, with_digital=digital is not None)
    figure.suptitle(plain(title))
    figure.align_ylabels()
    return Drawn(figure=figure, beyond=beyond)


def add_legend(figure: matplotlib.figure.Figure, styles: dict[str, LineStyle], *, with_digital: bool) -> None:
    """One legend for all panels, below them."""
    handles = [Line2D([], [], **style.line) for style in styles.values()]
    labels = [plain(label) for label in styles]
    if with_digital:
        handles.insert(0, Line2D([], [], color=DIGITAL_COLOUR, lw=1.2))
        labels.insert(0, "all_digital (no noise)")
    longest = max(map(len, labels))
    columns = max(1, int(figure.get_figwidth() * 11 / (longest + 7)))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False)


def plain(text: str) -> str:
    """Text that every font can show and that a legend does not leave out (as it does labels that start with _)."""
    shown = text.encode("ascii", "backslashreplace").decode().replace("\n", " ")
    return f" {shown}" if shown.startswith("_") else shown


def y_ticks(axes: Axes) -> None:
    """Logarithmic ticks as plain numbers, few enough to be read."""
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    step = max(1, round(decades / 8))
    values = [s * 10.0**p for p in powers if p % step == 0 for s in subs]
    axes.set_yticks([v for v in values if low <= v <= high])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _draw(axes: Axes, panel: Panel, digital: SweepResult | None) -> int:
    metric = panel.metric
    reference = None if digital is None else getattr(digital, metric.name) * metric.factor
    estimates = [e for s in panel.series for e in s.estimates]
    cap = upper_limit(panel, digital)
    if reference is not None:
        axes.axhline(reference, color=DIGITAL_COLOUR, lw=1.2, label="all_digital", zorder=1)
    for series in panel.series:
        _draw_series(axes, series, cap)
    low, high = _visible(estimates, reference, cap)
    if metric == PERPLEXITY and low > 0 and high / low > 10:
        axes.set_yscale("log")
        axes.set_ylim(low / (high / low) ** 0.05, high if high == cap else high * (high / low) ** 0.05)
        y_ticks(axes)
    else:
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - room, high if high == cap else high + room)
    axes.set_ylabel(metric.label)
    axes.set_title(plain(panel.title), fontsize="medium")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return sum(e.mean > cap for e in estimates)


def _draw_series(axes: Axes, series: Series, cap: float) -> None:
    # A value far beyond the axis would overflow the renderer: what leaves the panel leaves it at 100 times the edge.
    far = 100 * cap
    x = np.array(series.x)
    mean = np.minimum([e.mean for e in series.estimates], far)
    low = np.array([e.mean if e.interval is None else e.interval.low for e in series.estimates])
    high = np.array([e.mean if e.interval is None else e.interval.high for e in series.estimates])
    low, high = np.clip(low, -far, far), np.clip(high, -far, far)
    style = series.style
    joined = np.array(series.connected, bool)
    many = joined.sum() > 1
    shown = joined if many else np.zeros_like(joined)
    if many:
        axes.plot(x[shown], mean[shown], label=series.label, zorder=3, **style.line)
        axes.fill_between(
            x[shown], low[shown], high[shown], where=(mean <= cap)[shown], color=style.colour, alpha=0.2, lw=0, zorder=2
        )
    if not shown.all():
        alone = ~shown
        reach = np.where(mean > cap, 0, np.abs(np.array([mean - low, high - mean])))[:, alone]
        label = f"{series.label} (alone)" if many else series.label
        bars: dict[str, Any] = {**style.line, "ls": "none", "capsize": 2.5, "label": label, "zorder": 3}
        axes.errorbar(x[alone], mean[alone], reach, **bars)
    cut = x[np.array([e.mean > cap for e in series.estimates])]
    if cut.size:
        look: dict[str, Any] = {"ls": "none", "marker": CARETUPBASE, "color": series.style.colour, "clip_on": False}
        axes.plot(cut, np.ones_like(cut), transform=axes.get_xaxis_transform(), **look)


def upper_limit(panel: Panel, digital: SweepResult | None) -> float:
    """Where the axis ends, so that placements that fail outright do not squeeze the others; infinite if none does.

    A line fails outright when it rises above twice the smallest perplexity and, in nats per token, to more than three
    times the height of a typical placement (the lower median at the x where that is largest). The axis then ends
    above the other lines. Bits per byte are treated as the perplexities that they stand for, accuracies not at all.
    """
    if panel.metric == ACCURACY:
        return math.inf
    nats = _nats(panel)
    by_x: dict[float, list[float]] = {}
    for line in panel.series:
        for x, estimate in zip(line.x, line.estimates, strict=True):
            by_x.setdefault(0.0 if panel.one_column else x, []).append(nats(estimate.mean))
    low = min(value for column in by_x.values() for value in column)
    if digital is not None:
        low = min(low, nats(getattr(digital, panel.metric.name)))
    typical = max(sorted(column)[(len(column) - 1) // 2] for column in by_x.values())
    failing = low + max(math.log(2), 3 * (typical - low))
    sound = [line for line in panel.series if all(nats(e.mean) <= failing for e in line.estimates)]
    if len(sound) == len(panel.series):
        return math.inf
    shown = [e for line in sound or panel.series for e in line.estimates if nats(e.mean) <= failing]
    highs = [nats(e.mean if e.interval is None else e.interval.high) for e in shown]
    top = min(max(highs), failing)
    return _value(panel, top + 0.08 * max(top - low, 0.01))


def _nats(panel: Panel) -> Callable[[float], float]:
    """From the panel's metric to nats per token."""
    if panel.metric == BITS:
        return lambda bits: bits * math.log(2) / panel.tokens_per_byte
    return math.log


def _value(panel: Panel, nats: float) -> float:
    return nats / math.log(2) * panel.tokens_per_byte if panel.metric == BITS else math.exp(nats)


def _visible(estimates: Sequence[Estimate], reference: float | None, cap: float) -> tuple[float, float]:
    """The range of all means and intervals up to the cap; an interval may lower the range by half at most."""
    means = [e.mean for e in estimates if e.mean <= cap] + ([] if reference is None else [reference])
    least = min(means)
    lows = [e.interval.low for e in estimates if e.interval is not None and e.mean <= cap]
    highs = [e.interval.high for e in estimates if e.interval is not None and e.mean <= cap]
    if any(e.mean > cap for e in estimates):
        highs.append(cap)
    return max(min([least, *lows]), least / 2), min(max([*means, *highs]), cap)


def _set_x(axes: Axes, axis: Axis, *, named: bool) -> None:
    if named:
        axes.set_xlabel(axis.label)
    if axis.logarithmic:
        axes.set_xscale("log")
    if axis.ticks is not None:
        axes.set_xticks([place for place, _ in axis.ticks], [plain(name) for _, name in axis.ticks], minor=False)
        axes.set_xticks([], minor=True)
