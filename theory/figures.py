"""Figures of the claims and bounds."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hetmoe.report.style import COLOURS
from theory.bounds import Case, over
from theory.claims import CONDITIONS, FAILS, HOLDS, Claim
from theory.experiment import PLACEMENTS, STOPS, Measured
from theory.measurements import named
from theory.reference import Layer

_VERDICT_COLOURS = {HOLDS: "#009E73", CONDITIONS: "#E69F00", FAILS: "#D55E00"}


def _figure(size: tuple[float, float], rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _plain(axes: Any) -> None:
    """Numbers as they are on logarithmic axes."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def draw_claims(measured: Measured, claims: Sequence[Claim]) -> Any:
    """Growth, order, and tolerances by stopping rule."""
    figure, panels = _figure((15, 8.2), 2, 3)
    gammas = np.array(measured.plan.gammas)
    axes = panels[0, 0]
    steps = np.arange(measured.looks.along.shape[2]) * measured.plan.train.chunk
    levels = measured.plan.train.data.levels
    for row, gamma in enumerate(gammas):
        norm = np.linalg.norm(measured.looks.along[row], axis=-2).max(axis=-2)  # [seeds, looks, relevant]
        rare = norm[..., levels - 1 :: levels].mean(axis=(0, -1))
        axes.plot(steps[1:], rare[1:], color=COLOURS[row % len(COLOURS)], label=f"rare, gamma {gamma:g}")
    frequent = np.linalg.norm(measured.looks.along[0], axis=-2).max(axis=-2)[..., ::levels].mean(axis=(0, -1))
    axes.plot(steps[1:], frequent[1:], color="black", ls="--", label=f"frequent, gamma {gammas[0]:g}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="steps",
        ylabel="largest component of an expert",
        title="growth along patterns",
    )
    axes.legend(fontsize=8, frameon=False)

    _by_gamma(panels[0, 1], named(claims, "2a"), gammas, "measured / predicted growth", 1.0)
    _by_gamma(panels[0, 2], named(claims, "2d"), gammas, "rank correlation, score and frequency served", None)
    hardware = measured.plan.hardware[0]
    for axes, stop in zip(panels[1], STOPS, strict=True):
        found = np.where(measured.learned[stop][..., None], measured.tolerances[stop, hardware], np.nan)
        for place, name in enumerate(PLACEMENTS):
            values = found[..., place]
            usable = np.where((values > 0) & np.isfinite(values), values, np.nan)
            some = np.isfinite(usable).any(axis=1)
            middle, low, high = (np.nanquantile(usable[some], q, axis=1) for q in (0.5, 0.25, 0.75))
            axes.errorbar(
                gammas[some] * (1 + 0.03 * (place - 1)), middle, [middle - low, high - middle], marker="osv"[place],
                color=COLOURS[place], label=name, capsize=2,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="gamma", ylabel="tolerance c*", title=f"{stop}: {hardware.name}")
        axes.legend(fontsize=8, frameon=False)
    for axes in panels.flat:
        _plain(axes)
    figure.suptitle(
        f"{len(gammas)} frequencies x {measured.plan.seeds} seeds; tolerances: median and quartiles over seeds"
    )
    return figure


def _by_gamma(axes: Any, claim: Claim, gammas: np.ndarray, label: str, wanted: float | None) -> None:
    columns = list(dict.fromkeys(f.column for f in claim.findings))
    for number, column in enumerate(columns):
        found = [f.estimate for f in claim.findings if f.column == column]
        shown = [(g, e) for g, e in zip(gammas, found, strict=True) if e is not None]
        axes.errorbar(
            [g * (1 + 0.03 * (number - 1)) for g, _ in shown], [e.value for _, e in shown],
            np.maximum([[e.value - e.low for _, e in shown], [e.high - e.value for _, e in shown]], 0),
            marker="osv"[number % 3], color=COLOURS[number], label=column, capsize=2,
        )  # fmt: skip
    if wanted is not None:
        axes.axhline(wanted, color="0.4", lw=1, ls=":")
    axes.set(xscale="log", xlabel="gamma", ylabel=label, title=claim.name)
    axes.legend(fontsize=8, frameon=False)


def draw_devices(claims: Sequence[Claim]) -> Any:
    """Slopes and gains of every device, by stopping rule."""
    chosen = [named(claims, name) for name in ("4a", "4b", "4c")]
    rows = list(dict.fromkeys(f.row for f in chosen[0].findings))
    figure, panels = _figure((15, 0.34 * len(rows) + 1.8), 1, 3, sharey=True)
    for axes, claim, wanted in zip(panels[0], chosen, (1.0, 1.0, 1.0), strict=True):
        for number, stop in enumerate(STOPS):
            for finding in (f for f in claim.findings if f.column == stop):
                if finding.estimate is None:
                    continue
                e, y = finding.estimate, rows.index(finding.row) + 0.22 * (number - 1)
                reach = np.maximum([[e.value - e.low], [e.high - e.value]], 0)
                first = finding.row == rows[0]
                axes.errorbar(
                    [e.value], [y], xerr=reach, color=COLOURS[number], marker="osv"[number], ms=4, capsize=2,
                    label=stop if first else None,
                )  # fmt: skip
        axes.axvline(wanted, color="0.4", lw=1, ls=":")
        axes.set(title=claim.name, xlabel=claim.measured)
        axes.set_yticks(range(len(rows)), rows)
    panels[0, 0].invert_yaxis()
    panels[0, 0].legend(fontsize=8, frameon=False)
    return figure


def draw_settings(found: Mapping[str, Sequence[Claim]]) -> Any:
    """Verdicts as colours."""
    names = [claim.name for claim in next(iter(found.values()))]
    figure = matplotlib.figure.Figure(figsize=(12, 0.36 * len(found) + 3.2), layout="constrained")
    axes = figure.subplots()
    for row, claims in enumerate(found.values()):
        for column, claim in enumerate(claims):
            colour = _VERDICT_COLOURS.get(claim.verdict, "#BBBBBB")
            axes.add_patch(Rectangle((column, row), 0.94, 0.9, color=colour))
    axes.set(xlim=(0, len(names)), ylim=(len(found), 0))
    axes.set_xticks(np.arange(len(names)) + 0.47, names, rotation=35, ha="right")
    axes.set_yticks(np.arange(len(found)) + 0.45, list(found))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    handles = [
        Patch(color=colour, label=verdict) for verdict, colour in (*_VERDICT_COLOURS.items(), ("undecided", "#BBBBBB"))
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return figure


def draw_bounds(cases: Sequence[Case]) -> Any:
    """Distributions of measured over bound, by kind."""
    names = list(dict.fromkeys(case.bound for case in cases))
    figure, panels = _figure((10, 0.45 * len(names) + 1.4), 1, 1)
    axes = panels[0, 0]
    for row, name in enumerate(names):
        ratios = np.concatenate([case.ratios for case in cases if case.bound == name])
        jitter = np.linspace(-0.25, 0.25, len(ratios))
        axes.plot(ratios, row + jitter, ls="", marker=".", ms=3, color=COLOURS[row % len(COLOURS)], alpha=0.6)
    axes.axvline(1.0, color="0.3", lw=1, ls=":")
    axes.set(xscale="log", xlabel="measured / bound (above 1 only within five standard errors)")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    _plain(axes)
    return figure


def draw_reference(name: str, layers: Sequence[Layer]) -> Any:
    """Measured error beside its bound, layer by layer, and routing."""
    kinds = list(layers[0].measured)
    figure, panels = _figure((15, 7.6), 2, 3)
    numbers = [layer.number for layer in layers]
    for axes, kind in zip(panels.flat, kinds, strict=False):
        for colour, label, values in (
            (COLOURS[0], "measured", [layer.measured[kind] for layer in layers]),
            (COLOURS[5], "bound", [layer.bound[kind] for layer in layers]),
        ):
            low, middle, high = (np.array([np.quantile(v, q) for v in values]) for q in (0.05, 0.5, 0.95))
            axes.errorbar(
                numbers, middle, [middle - low, high - middle], marker="o", color=colour, label=label, capsize=3
            )
        worst = max(float(over(layer.measured[kind], layer.bound[kind]).max()) for layer in layers)
        axes.set(
            yscale="log",
            xlabel="layer",
            ylabel="error / size of the output",
            title=f"{kind}: at most {worst:.2f} of it",
        )
    axes = panels.flat[len(kinds)]
    for colour, label, field in ((COLOURS[0], "measured", "expert_error"), (COLOURS[5], "bound", "expert_bound")):
        axes.plot(numbers, [layer.rounded[field] for layer in layers], marker="o", color=colour, label=label)
    axes.set(yscale="log", xlabel="layer", ylabel="error", title=f"expert, rounded to {layers[0].rounded['bits']} bits")
    axes = panels.flat[len(kinds) + 1]
    for colour, label, field in (
        (COLOURS[0], "unchanged", "whole_model_observed"),
        (COLOURS[1], "certain, given measured errors", "whole_model_certified_measured"),
        (COLOURS[5], "certain, by bounds alone", "whole_model_certified"),
    ):
        axes.plot(numbers, [layer.rounded[field] for layer in layers], marker="o", color=colour, label=label)
    axes.set(xlabel="layer", ylabel="share of tokens", title="routing, all experts rounded", ylim=(-0.05, 1.05))
    for panel in panels.flat:
        _plain(panel)
        panel.set_xticks(numbers)
        panel.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{name}: medians and 5 to 95 % of tokens and experts")
    return figure
