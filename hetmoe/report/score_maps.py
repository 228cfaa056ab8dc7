"""Score maps: layers x experts, with the experts that each rule keeps digital."""

from collections.abc import Sequence
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.lines import Line2D

from hetmoe.errors import InputError
from hetmoe.placement.plan import digital_count, place
from hetmoe.placement.scores import DEVICE_RULES
from hetmoe.report.figures import ReportFigure, slug
from hetmoe.report.groups import percent
from hetmoe.report.panels import plain
from hetmoe.report.style import CHOSEN_MARKERS, SEQUENTIAL
from hetmoe.sweep.points import scored_rule
from hetmoe.sweep.store import SweepRecord

_CELLS_AS_PATHS = 4000  # more cells are drawn as one picture inside the SVG


def score_maps(record: SweepRecord, fractions: Sequence[float]) -> list[ReportFigure]:
    """A heat map per rule in `record.scores`, then one of the activation frequency unless a rule is just that."""
    figures: list[ReportFigure] = []
    for rule, scores in record.scores.items():
        values = checked_map(rule, scores)
        marks = digital_marks(values, fractions)
        figures.append(
            ReportFigure(
                name=f"scores-{slug(rule)}",
                title=f"Scores by rule {rule}",
                caption=f"Score (colour) of every expert (horizontal) of every layer with experts (vertical, first on "
                f"top) by rule {rule}; a higher score is kept digital first. {_explain(marks)}",
                figure=_draw(values, f"score by {rule}", _unit(rule), marks),
            )
        )
    if record.frequencies is not None and "activation_frequency" not in record.scores:
        values = checked_map("activation frequency", record.frequencies)
        figures.append(
            ReportFigure(
                name="activation-frequency",
                title="Activation frequency",
                caption="Share of the calibration windows' tokens (colour) that choose each expert (horizontal) of "
                "every layer with experts (vertical, first on top).",
                figure=_draw(values, "activation frequency", "share", {}),
            )
        )
    return figures


def _unit(rule: str) -> str:
    return "nats per token" if scored_rule(rule) in DEVICE_RULES else "score"


def checked_map(name: str, values: Any) -> np.ndarray:
    """`[layers, experts]` floats. Raises InputError for anything else."""
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise InputError(f"the store's {name}: not numbers of [layers][experts]") from None
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise InputError(f"the store's {name}: not finite numbers of [layers][experts], but of shape {array.shape}")
    return array


def digital_marks(scores: np.ndarray, fractions: Sequence[float]) -> dict[float, np.ndarray]:
    """By fraction, `[chosen, 2]` layers and experts that stay digital there but not at any smaller fraction."""
    marks: dict[float, np.ndarray] = {}
    before = np.zeros(scores.shape, bool)
    for fraction in sorted(fractions):
        if not digital_count(fraction, scores.shape[1]):
            continue
        digital = ~np.asarray(place(scores, fraction).experts)
        marks[fraction] = np.argwhere(digital & ~before)
        before |= digital
    return marks


def _explain(marks: dict[float, np.ndarray]) -> str:
    if not marks:
        return ""
    return (
        "Marked experts stay digital: each mark names the smallest swept fraction that keeps the expert digital; "
        "larger fractions keep it too."
    )


def _draw(values: np.ndarray, title: str, unit: str, marks: dict[float, np.ndarray]) -> matplotlib.figure.Figure:
    layers, experts = values.shape
    width = min(13.5, max(6.0, 2.5 + 0.22 * experts))
    cell = min(0.4, max(0.12, (width - 2.5) / experts))
    height = max(1.2, cell * layers)  # room for the name of the axis
    figure = matplotlib.figure.Figure(figsize=(width, 1.7 + height), layout="constrained")
    axes = figure.subplots()
    mesh = axes.pcolormesh(values, cmap=SEQUENTIAL, rasterized=values.size > _CELLS_AS_PATHS)
    size = 72 * min((width - 2.5) / experts, cell) * 0.5  # points: half a cell
    handles: list[Line2D] = []
    for index, (fraction, places) in enumerate(marks.items()):
        marker = CHOSEN_MARKERS[index % len(CHOSEN_MARKERS)]
        look: dict[str, Any] = {"marker": marker, "ls": "none", "mfc": "white", "mec": "black"}
        axes.plot(places[:, 1] + 0.5, places[:, 0] + 0.5, ms=size, mew=min(0.8, size / 6), **look)
        handles.append(Line2D([], [], ms=7, mew=0.8, label=f"digital from {percent(fraction)}", **look))
    for axis, count in ((axes.xaxis, experts), (axes.yaxis, layers)):
        step = max(1, round(count / 16))
        axis.set_ticks(np.arange(0, count, step) + 0.5, [str(i) for i in range(0, count, step)])
    axes.invert_yaxis()
    axes.set_xlabel("expert")
    axes.set_ylabel("layer with experts")
    axes.set_title(plain(title), fontsize="medium")
    figure.colorbar(mesh, ax=axes, label=unit, pad=0.01)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure
