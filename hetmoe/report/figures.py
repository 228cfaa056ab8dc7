"""The line figures of a report: which measurements each one shows, and its caption."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.figure

from hetmoe.report.groups import (
    BASELINES,
    Condition,
    Groups,
    Line,
    Measured,
    Metric,
    bits_label,
    time_label,
)  # fmt: skip
from hetmoe.report.panels import Axis, Drawn, Panel, Series, draw_panels
from hetmoe.report.style import LineStyle, line_styles

_BANDS = "Bands and bars: 95 % confidence interval of the mean over seeds (Student t); none where there is one seed."


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportFigure:
    """A figure of the report."""

    name: str  # of its files, without suffix
    title: str
    caption: str  # says what the axes are
    figure: matplotlib.figure.Figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """A value on the x axis of a figure."""

    key: Any  # the swept value
    x: float
    connected: bool = True


Lookup = Callable[[Line, float, Any], Measured | None]  # (placement, noise scale of the row, key of the place)


def slug(*parts: object) -> str:
    """A file name and HTML id of lower-case letters, digits, points and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(str(part).lower() for part in parts)).strip("-.")


def condition_slug(condition: Condition) -> str:
    """The name of a condition in file names."""
    return slug(condition.device, _time_slug(condition.time_s), _bits_slug(condition.bits))


def noise_figures(groups: Groups) -> list[ReportFigure]:
    """Every metric against noise scale: one figure per condition that has at least two scales."""
    figures: list[ReportFigure] = []
    for condition in groups.conditions:
        scales = groups.scales_of([condition])
        if len(scales) < 2:
            continue

        def lookup(line: Line, _: float, scale: float, condition: Condition = condition) -> Measured | None:
            return groups.measured.get((condition, scale, line))

        row = _row(groups, line_styles(groups.lines), [Place(key=s, x=s) for s in scales], lookup, 0.0, "")
        drawn = draw_panels(condition.label, [row], Axis(label="programming-noise scale c"), groups.digital)
        figures.append(
            _figure(
                f"noise-{condition_slug(condition)}",
                f"Against noise scale: {condition.label}",
                groups,
                "programming-noise scale c (horizontal), one line per placement and digital fraction",
                drawn,
            )
        )
    return figures


def fraction_figures(groups: Groups) -> list[ReportFigure]:
    """Every metric against the digital fraction: one figure per condition, one row per noise scale."""
    styles = line_styles([Line(placement=rule, fraction=None) for rule in groups.rules])
    places = [Place(key=f, x=100 * f) for f in sorted({0.0, *groups.fractions})]
    start = Line(placement=BASELINES[0], fraction=None)
    figures: list[ReportFigure] = []
    for condition in groups.conditions:

        def lookup(line: Line, scale: float, fraction: float, condition: Condition = condition) -> Measured | None:
            own = groups.measured.get((condition, scale, Line(placement=line.placement, fraction=fraction)))
            if own is not None or fraction != 0:
                return own
            rule_has_any = any(lookup(line, scale, f, condition) for f in groups.fractions if f != 0)
            return groups.measured.get((condition, scale, start)) if rule_has_any else None

        rows = _rows(groups, groups.scales_of([condition]), styles, places, lookup)
        if not rows:
            continue
        axis = Axis(label="digital fraction of each layer's experts (%)")
        drawn = draw_panels(condition.label, rows, axis, groups.digital)
        figures.append(
            _figure(
                f"fraction-{condition_slug(condition)}",
                f"Against digital fraction: {condition.label}",
                groups,
                "share of each layer's experts that stays digital (horizontal; 0 = experts_analog), one line per rule, "
                "one row per noise scale c",
                drawn,
            )
        )
    return figures


def time_figures(groups: Groups) -> list[ReportFigure]:
    """Every metric against time since programming, where times were swept: one figure per device and bits."""
    figures: list[ReportFigure] = []
    for (device, bits), conditions in _by(groups.conditions, lambda c: (c.device, c.bits)):
        times = sorted({c.time_s for c in conditions if c.time_s is not None})
        just_programmed = any(c.time_s is None for c in conditions)
        if len(times) + just_programmed < 2:
            continue
        later = [t for t in times if t > 0]
        places = [Place(key=t, x=t) for t in later]
        # These have no place on a logarithmic axis: left of it, unconnected.
        step = max(3.0, (later[-1] / later[0]) ** 0.2) if later else 3.0
        for key in ([0.0] if 0 in times else []) + ([None] if just_programmed else []):
            places.insert(0, Place(key=key, x=(places[0].x if places else 1.0) / step, connected=False))
        just = "programmed" if 0 in times else "0 s"
        ticks = [(place.x, just if place.key is None else time_label(place.key)) for place in places]

        def lookup(
            line: Line, scale: float, time_s: float | None, device: str = device, bits: int = bits
        ) -> Measured | None:
            return groups.measured.get((Condition(device=device, time_s=time_s, bits=bits), scale, line))

        rows = _rows(groups, groups.scales_of(conditions), line_styles(groups.lines), places, lookup)
        axis = Axis(label="time since programming", logarithmic=True, ticks=ticks)
        label = f"{device}, {bits_label(bits)}"
        drawn = draw_panels(label, rows, axis, groups.digital)
        figures.append(
            _figure(
                f"time-{slug(device, _bits_slug(bits))}",
                f"Against time: {label}",
                groups,
                "time since programming (horizontal, logarithmic; 0 s = just programmed, without drift), one "
                "line per placement and digital fraction, one row per noise scale c",
                drawn,
            )
        )
    return figures


def bits_figures(groups: Groups) -> list[ReportFigure]:
    """Every metric against converter bits, where bits were swept: one figure per device and time."""
    figures: list[ReportFigure] = []
    for (device, time_s), conditions in _by(groups.conditions, lambda c: (c.device, c.time_s)):
        bits = sorted({c.bits for c in conditions if c.bits})
        ideal = any(not c.bits for c in conditions)
        if len(bits) + ideal < 2:
            continue
        places = [Place(key=b, x=float(b)) for b in bits]
        if ideal:
            places.append(Place(key=0, x=float(bits[-1] + max(1, bits[-1] - bits[0]) * 0.25), connected=False))
        ticks = [(place.x, f"{place.key}" if place.key else "ideal") for place in places]

        def lookup(
            line: Line, scale: float, key: int, device: str = device, time_s: float | None = time_s
        ) -> Measured | None:
            return groups.measured.get((Condition(device=device, time_s=time_s, bits=key), scale, line))

        rows = _rows(groups, groups.scales_of(conditions), line_styles(groups.lines), places, lookup)
        label = f"{device}, {time_label(time_s)}"
        drawn = draw_panels(label, rows, Axis(label="DAC and ADC bits", ticks=ticks), groups.digital)
        figures.append(
            _figure(
                f"bits-{slug(device, _time_slug(time_s))}",
                f"Against converter bits: {label}",
                groups,
                "DAC and ADC bits (horizontal; ideal = no rounding), one line per placement and digital fraction, one "
                "row per noise scale c",
                drawn,
            )
        )
    return figures


def _rows(
    groups: Groups,
    scales: Sequence[float],
    styles: dict[Line, LineStyle],
    places: Sequence[Place],
    lookup: Lookup,
) -> list[list[Panel]]:
    rows = [_row(groups, styles, places, lookup, scale, f"c = {scale:g}") for scale in scales]
    return [row for row in rows if row[0].series]


def _row(
    groups: Groups,
    styles: dict[Line, LineStyle],
    places: Sequence[Place],
    lookup: Lookup,
    scale: float,
    title: str,
) -> list[Panel]:
    panels: list[Panel] = []
    for metric in groups.metrics:
        series: list[Series] = []
        for line, style in styles.items():
            found = [(place, m) for place in places if (m := lookup(line, scale, place.key)) is not None]
            if found:
                series.append(
                    Series(
                        label=line.label,
                        style=style,
                        x=[place.x for place, _ in found],
                        estimates=[measured.estimate(metric) for _, measured in found],
                        connected=[place.connected for place, _ in found],
                    )
                )
        panels.append(Panel(metric=metric, title=title, series=series, tokens_per_byte=groups.tokens_per_byte))
    return panels


def _figure(name: str, title: str, groups: Groups, axes: str, drawn: Drawn) -> ReportFigure:
    hidden = ""
    if drawn.beyond:
        hidden = (
            f" Triangles at the upper edge: {drawn.beyond} means lie beyond the axis, which ends before they squeeze "
            "other lines; the tables have them."
        )
    return ReportFigure(
        name=name,
        title=title,
        caption=f"{metric_names(groups.metrics)} (vertical) against {axes}. {_BANDS}{hidden}",
        figure=drawn.figure,
    )


def metric_names(metrics: Sequence[Metric]) -> str:
    """The start of a caption."""
    names = [metric.label for metric in metrics]
    text = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return text[0].upper() + text[1:]


def _by(conditions: Sequence[Condition], key: Callable[[Condition], Any]) -> list[tuple[Any, list[Condition]]]:
    grouped: dict[Any, list[Condition]] = {}
    for condition in conditions:
        grouped.setdefault(key(condition), []).append(condition)
    return list(grouped.items())


def _time_slug(time_s: float | None) -> str:
    return "programmed" if time_s is None else f"{time_s:.12g}s"


def _bits_slug(bits: int) -> str:
    return f"{bits}bit" if bits else "ideal"
