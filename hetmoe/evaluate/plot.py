"""The figure of a noise sweep: three metrics against noise scale, with bands of one standard error."""

import io
import math
from collections.abc import Sequence

import matplotlib.figure
import numpy as np

from hetmoe.evaluate.noise_sweep import Point

# Okabe and Ito's colour-blind safe palette; line styles and markers tell lines apart without colour.
_COLOURS = ("#D55E00", "#E69F00", "#009E73", "#0072B2", "#56B4E9", "#CC79A7", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_METRICS = (
    ("perplexity", "perplexity per token", 1.0),
    ("bits_per_byte", "bits per byte", 1.0),
    ("accuracy", "next-word accuracy, 1 of 4 (%)", 100.0),
)


def _at_five_times_the_perplexity(digital: Point, metric: str) -> float:
    perplexity, bits = digital.mean("perplexity"), digital.mean("bits_per_byte")
    return 5 * perplexity if metric == "perplexity" else bits * (1 + math.log(5) / math.log(perplexity))


def plot_sweep(digital: Point, points: Sequence[Point], title: str) -> bytes:
    """PNG of the sweep: one panel per metric, one line per placement, the digital model as a grey line."""
    figure = matplotlib.figure.Figure(figsize=(13.5, 4.6), layout="constrained")
    metrics = [m for m in _METRICS if getattr(digital, m[0]) is not None]
    panels = figure.subplots(1, len(metrics))
    names = list(dict.fromkeys(p.placement for p in points))
    for panel, (metric, label, factor) in zip(panels, metrics, strict=True):
        panel.axhline(digital.mean(metric) * factor, color="0.45", lw=1.4, ls="-", label="all digital")
        for index, name in enumerate(names):
            line = sorted((p for p in points if p.placement == name), key=lambda p: p.noise_scale)
            x = np.array([p.noise_scale for p in line])
            y = np.array([p.mean(metric) for p in line]) * factor
            error = np.array([p.standard_error(metric) or 0.0 for p in line]) * factor
            colour = _COLOURS[index % len(_COLOURS)]
            style = "--" if name.startswith("random") else "-"
            panel.plot(x, y, style, color=colour, marker=_MARKERS[index % len(_MARKERS)], ms=4.5, lw=1.5, label=name)
            panel.fill_between(x, y - error, y + error, color=colour, alpha=0.22, lw=0)
        if metric != "accuracy":
            # A model that fails outright would squeeze all others: the axis ends at 5 times the digital perplexity.
            limit = _at_five_times_the_perplexity(digital, metric)
            values = [p.mean(metric) * factor for p in points]
            low = min([digital.mean(metric), *values])
            panel.set_ylim(low - 0.04 * (limit - low), min(limit, max(values) + 0.05 * (limit - low)))
        panel.set_xlabel("programming-noise scale c")
        panel.set_ylabel(label)
        panel.grid(alpha=0.25)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        if metric == "perplexity":
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
