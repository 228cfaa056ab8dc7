"""Figures of the claims and bounds."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hetmoe.report.style import COLOURS
from theory.cases import Case, over
from theory.claims import CONDITIONS, FAILS, HOLDS, Claim
from theory.experiment import PLACEMENTS, STOPS, Measured
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


def draw_curves(measured: Measured) -> Any:
    """Growth along patterns, and tolerances by stopping rule."""
    figure, panels = _figure((19, 4.6), 1, 4)
    gammas, steps = np.array(measured.plan.gammas), measured.plan.train.times
    axes, levels = panels[0, 0], measured.plan.train.data.levels
    for row, gamma in enumerate(gammas):
        norm = np.linalg.norm(measured.looks.along[row], axis=-2).max(axis=-2)  # [seeds, looks, relevant]
        rare = norm[..., levels - 1 :: levels].mean(axis=(0, -1))
        axes.plot(steps[1:], rare[1:], color=COLOURS[row % len(COLOURS)], label=f"rare, gamma {gamma:g}")
    frequent = np.linalg.norm(measured.looks.along[0], axis=-2).max(axis=-2)[..., ::levels].mean(axis=(0, -1))
    axes.plot(steps[1:], frequent[1:], color="black", ls="--", label=f"frequent, gamma {gammas[0]:g}")
    axes.set(
        xscale="log", yscale="log", xlabel="steps", ylabel="components of an expert's neurons, norm",
        title="growth along patterns, of the expert with most",
    )  # fmt: skip
    axes.legend(fontsize=8, frameon=False)
    hardware = measured.plan.hardware[0]
    for axes, stop in zip(panels[0, 1:], STOPS, strict=True):
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
    for axes in panels[0, 1:]:
        axes.set_xticks(gammas, [f"{gamma:g}" for gamma in gammas])
    figure.suptitle(
        f"{len(gammas)} frequencies x {measured.plan.seeds} seeds; tolerances: median and quartiles over seeds"
    )
    return figure


def draw_training_claims(claims: Sequence[Claim]) -> Any:
    """Steps 1 and 2: every finding with its interval."""
    chosen = [claim for claim in claims if claim.name[0] in "12"]
    figure, panels = _figure((16, 8), 2, -(-len(chosen) // 2))
    for axes, claim in zip(panels.flat, chosen, strict=False):
        _intervals(axes, claim)
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    for axes in panels.flat[len(chosen) :]:
        axes.set_visible(False)
    return figure


def draw_device_claims(claims: Sequence[Claim]) -> Any:
    """Steps 3 and 4: every finding with its interval, of every device."""
    chosen = [claim for claim in claims if claim.name[0] in "34"]
    rows = len({f.row for f in chosen[0].findings})
    figure, panels = _figure((20, 0.34 * rows + 1.8), 1, len(chosen), sharey=True)
    for axes, claim in zip(panels[0], chosen, strict=True):
        _intervals(axes, claim)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _intervals(axes: Any, claim: Claim) -> None:
    """Rows of findings, columns side by side; the criterion's limits as lines."""
    rows, columns = (list(dict.fromkeys(getattr(f, axis) for f in claim.findings)) for axis in ("row", "column"))
    for number, column in enumerate(columns):
        known = [(rows.index(f.row), f.estimate) for f in claim.findings if f.column == column and f.estimate]
        values = np.array([[e.value, e.low, e.high] for _, e in known]).reshape(-1, 3).T
        axes.errorbar(
            values[0], [row + 0.22 * (number - (len(columns) - 1) / 2) for row, _ in known],
            xerr=np.maximum([values[0] - values[1], values[2] - values[0]], 0), ls="", color=COLOURS[number],
            marker="osv"[number % 3], ms=4, capsize=2, label=column,
        )  # fmt: skip
    for limit in (claim.criterion.low, claim.criterion.high):
        if np.isfinite(limit):
            axes.axvline(limit, color="0.4", lw=1, ls=":")
    axes.set(title=f"{claim.name}:\n{claim.verdict}", xlabel=claim.measured, ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), rows)
    axes.title.set_fontsize(10)
    axes.xaxis.label.set_fontsize(8)


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
        Patch(color=colour, label=verdict)
        for verdict, colour in (*_VERDICT_COLOURS.items(), ("undecided, or not derived", "#BBBBBB"))
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
    axes.set(xscale="log", xlabel="measured / bound (of what is random, within standard errors)")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    _plain(axes)
    return figure


def draw_reference(name: str, layers: Sequence[Layer]) -> Any:
    """Measured error beside its bound, layer by layer, and routing."""
    kinds = list(layers[0].measured)
    figure, panels = _figure((15, 8.4), 2, 3)
    numbers = [layer.number for layer in layers]
    for axes, kind in zip(panels.flat, kinds, strict=False):
        exact = kind in layers[0].exact
        for colour, label, values in (
            (COLOURS[0], "measured", [layer.measured[kind] for layer in layers]),
            (COLOURS[5], "exact" if exact else "bound", [layer.bound[kind] for layer in layers]),
        ):
            low, middle, high = (np.array([np.quantile(v, q) for v in values]) for q in (0.05, 0.5, 0.95))
            axes.errorbar(
                numbers, middle, [middle - low, high - middle], marker="o", color=colour, label=label, capsize=3
            )
        ratios = np.concatenate([over(layer.measured[kind], layer.bound[kind]) for layer in layers])
        said = f"{np.median(ratios):.2f} of what is exact" if exact else f"at most {ratios.max():.2f} of the bound"
        axes.set(yscale="log", xlabel="layer", ylabel="error / size of the output", title=f"{kind}: {said}")
    axes = panels.flat[len(kinds)]
    for colour, label, field in ((COLOURS[0], "measured", "expert_error"), (COLOURS[5], "bound", "expert_bound")):
        axes.plot(numbers, [layer.rounded[field] for layer in layers], marker="o", color=colour, label=label)
    axes.set(yscale="log", xlabel="layer", ylabel="error", title=f"expert, rounded to {layers[0].rounded['bits']} bits")
    axes = panels.flat[len(kinds) + 1]
    for colour, style, label, field in (
        (COLOURS[0], "-o", "unchanged", "whole_model_observed"),
        (COLOURS[1], "-s", "certain, given measured errors", "whole_model_certified_measured"),
        (COLOURS[5], "--v", "certain, by bounds alone", "whole_model_certified"),
    ):
        axes.plot(numbers, [layer.rounded[field] for layer in layers], style, color=colour, label=label)
    axes.set(
        xlabel="layer (the first one's input is as it was)", ylabel="share of tokens",
        title="routing, all experts rounded", ylim=(-0.05, 1.05),
    )  # fmt: skip
    for panel in panels.flat:
        _plain(panel)
        panel.set_xticks(numbers)
        panel.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    figure.suptitle(f"{name}: medians and 5 to 95 % of tokens and experts")
    return figure
