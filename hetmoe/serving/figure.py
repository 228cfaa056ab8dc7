"""A run over time: throughput, queue, power and plan."""

from collections.abc import Sequence
from typing import Any

import matplotlib.figure
import numpy as np

from hetmoe.report.style import COLOURS
from hetmoe.serving.adaptive import Look
from hetmoe.serving.loop import Run


def draw_run(title: str, run: Run, looks: Sequence[Look]) -> Any:
    """Three panels over one time axis, and three more for the `looks` of a policy, if one decided."""
    rows = [span.record() for span in run.spans]
    edges = np.array([rows[0]["start_s"], *(row["end_s"] for row in rows)])

    def values(name: str) -> np.ndarray:
        return np.array([np.nan if row[name] is None else row[name] for row in rows])

    panels = 6 if looks else 3
    figure = matplotlib.figure.Figure(figsize=(10, 2.3 * panels + 0.6), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True)
    drawn = (
        ("tokens per second", (("tokens_per_s", "generated"), ("prompt_tokens_per_s", "of prompts"))),
        ("requests", (("waiting", "waiting in the queue"), ("running", "running"))),
        ("power (W)", (("power_w", "all, actions included"),)),
    )
    for panel, (label, lines) in zip(axes, drawn, strict=False):
        for number, (name, said) in enumerate(lines):
            panel.stairs(values(name), edges, baseline=None, color=COLOURS[number], lw=1.6, label=said)
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
    if looks:
        axes[3].stairs(values("expected_loss"), edges, baseline=None, color=COLOURS[0], lw=1.6)
        axes[3].set_ylabel("expected loss\n(nats per token)")
        axes[3].set_ylim(bottom=0)
        _draw_looks(axes[4], axes[5], run, looks)
    for panel in axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if panel in axes[:3]:
            panel.legend(frameon=False, fontsize=8.5, ncols=2)
    axes[-1].set_xlabel("seconds")
    figure.suptitle(title)
    return figure


def _draw_looks(energies: Any, experts: Any, run: Run, looks: Sequence[Look]) -> None:
    times = [look.time_s for look in looks]
    until = [*times, run.end_s]
    for name, style, said in (("running", "-", "of the plan"), ("budget", ":", "budget, actions included")):
        values = [getattr(look, name) * 1e6 for look in looks]
        colour = COLOURS[0] if name == "running" else "black"
        energies.stairs(values, until, baseline=None, color=colour, ls=style, lw=1.6, label=said)
    energies.set_ylabel("experts' energy\n(µJ per token)")
    experts.stairs([look.digital for look in looks], until, baseline=None, color=COLOURS[0], lw=1.6, label="digital")
    for number, (name, said) in enumerate((("moved", "moved"), ("reprogrammed", "programmed again"))):
        some = [(look.time_s, getattr(look, name)) for look in looks if getattr(look, name)]
        experts.plot(
            [time for time, _ in some], [count for _, count in some], ls="", marker="ov"[number], ms=4,
            color=COLOURS[number + 1], label=said,
        )  # fmt: skip
    experts.set_ylabel("experts")
    for panel in (energies, experts):
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=8.5, ncols=3)
