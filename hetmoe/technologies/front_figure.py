"""Perplexity against energy and throughput, and the points that no other beats."""

from collections.abc import Sequence
from typing import Any

import matplotlib.figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from hetmoe.report.style import placement_colours
from hetmoe.technologies.tried import Point

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
MOST_PERPLEXITY = 2.0  # times the best: a deployment that fails would squeeze all others


def draw_front(title: str, points: Sequence[Point], front: Sequence[Point]) -> Any:
    """Two panels; colours are rules, markers are bits, sizes are batches; points of the front have an edge.

    Bars are standard errors over noise seeds.
    """
    figure = matplotlib.figure.Figure(figsize=(13, 6.2), layout="constrained")
    rules, bits = (list(dict.fromkeys(getattr(p.tried, name) for p in points)) for name in ("rule", "bits"))
    colours = placement_colours(rules)
    batches = sorted({p.batch for p in points})
    limit = MOST_PERPLEXITY * min(p.perplexity for p in points)
    on_front = {id(p) for p in front}
    fields = (("joules_per_token", "energy per token", "J"), ("tokens_per_s", "tokens per second", ""))
    panels = figure.subplots(1, 2)
    for axes, (field, label, unit) in zip(panels, fields, strict=True):
        for point in sorted(points, key=lambda p: id(p) in on_front):
            if point.perplexity > limit or not point.fits:
                continue
            best = id(point) in on_front
            axes.errorbar(
                getattr(point, field), point.perplexity, yerr=point.perplexity_error, elinewidth=0.8, ls="",
                marker=_MARKERS[bits.index(point.tried.bits) % 10], ms=4 + 2.2 * batches.index(point.batch),
                color=colours[point.tried.rule], mec="black" if best else "none", mew=1.0, alpha=1.0 if best else 0.45,
            )  # fmt: skip
        axes.set(xscale="log", xlabel=label, ylabel="perplexity per token")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(EngFormatter(unit))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    proxies = [_proxy(panels[0], rule, color=colours[rule], marker="o") for rule in rules]
    proxies += [_proxy(panels[0], name, color="0.4", marker=_MARKERS[n % 10]) for n, name in enumerate(bits)]
    proxies += [
        _proxy(panels[0], f"batch {batch}", color="0.4", marker="o", ms=4 + 2.2 * n) for n, batch in enumerate(batches)
    ]
    proxies.append(_proxy(panels[0], "beaten by none", color="white", marker="o", mec="black"))
    figure.legend(handles=proxies, loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)
    beyond = sum(p.perplexity > limit for p in points)
    figure.suptitle(title + (f" ({beyond} points of more than {limit:.1f} left out)" if beyond else ""))
    return figure


def _proxy(axes: Any, label: str, **look: Any) -> Any:
    (line,) = axes.plot([], [], ls="", label=label, **({"ms": 7} | look))
    return line
