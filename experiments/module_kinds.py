"""Loss when one kind of module alone is analog, against noise scale (the paper's figure on what is sensitive).

    python experiments/module_kinds.py                         # docs/experiments/module_kinds.json, .png
    python experiments/module_kinds.py --model allenai/OLMoE-1B-7B-0924 --dtype bfloat16 --noise-scale 1 --noise-scale 2

Kinds are those that the model has of: routed experts, attention projections, shared experts, dense feed-forward
networks, LM head. Each is analog in all layers while everything else is digital, on the same chips. Shown are the
increase of the loss over the digital model, the same per million parameters of the kind, and its difference to that of
the experts, paired by seed, with 95 % intervals. Cost: about four minutes on two CPU cores.

Paper: dense modules are about 5 % of the parameters but more sensitive than the experts, so they stay digital.
The reference model agrees: at c = 1 analog experts cost 0.008 nats, attention 0.022, the LM head 0.086, at c = 10 0.68,
3.0 and 4.7; per parameter attention and LM head are 60 to 130 times as sensitive as the experts at every c. It has no
shared experts and no dense layers.
"""

from typing import Annotated, Any

import numpy as np
import typer

from common import (
    Options,
    Setup,
    add_legend,
    analog_only,
    as_record,
    digits,
    draw_line,
    make_table,
    panels,
    plus_minus,
    prepare,
    run,
    scales_or,
)
from hetmoe.evaluate.noise_sweep import Placement
from hetmoe.evaluate.statistics import Interval, mean_interval, paired_difference
from hetmoe.placement.parameters import switch_sizes
from hetmoe.placement.plan import plan_shapes
from hetmoe.report.style import COLOURS

SCALES = (1.0, 2.5, 5.0, 7.5, 10.0)
MARKERS = ("o", "s", "^", "D", "v")


def draw(setup: Setup, scales: list[float], total: dict[str, list[Interval]], each: dict[str, list[Interval]]) -> Any:
    """Increase against noise scale, for the kind as a whole and per million parameters."""
    figure, (left, right) = panels(2, f"{setup.model.name}: one kind of module analog, {setup.options.device} noise")
    for (kind, intervals), colour, marker in zip(total.items(), COLOURS, MARKERS, strict=False):
        look: dict[str, Any] = {"color": colour, "marker": marker, "ms": 5, "lw": 1.5}
        draw_line(left, scales, intervals, kind, look)
        draw_line(right, scales, each[kind], kind, look)
    left.set_ylabel("loss increase (nats per token)")
    right.set_ylabel("loss increase per million parameters")
    for axes in (left, right):
        axes.set(xlabel="programming-noise scale c", yscale="log")
    add_legend(figure, left, len(total))
    return figure


def main(
    options: Options,
    noise_scale: Annotated[list[float] | None, typer.Option(help="Noise scale c; repeatable.")] = None,
) -> None:
    """Evaluate and print."""
    scales = scales_or(noise_scale, SCALES)
    setup = prepare("module_kinds", options)
    kinds, sizes = plan_shapes(setup.config), switch_sizes(setup.config)
    millions = {kind: sizes[kind] * int(np.prod(shape)) / 1e6 for kind, shape in kinds.items()}
    lines = [Placement(name=kind, plans=[analog_only(setup.config, [kind])]) for kind in kinds]
    spec = setup.spec(scales[0])
    points = setup.sweep(spec, lines, scales, "kinds x seeds")
    increase = {k: [setup.losses(points[k, c]) - setup.digital_loss for c in scales] for k in kinds}
    total = {k: [mean_interval(values) for values in rows] for k, rows in increase.items()}
    each = {k: [mean_interval(values / millions[k]) for values in rows] for k, rows in increase.items()}
    to_experts = {
        k: [
            paired_difference(a / millions[k], b / millions["experts"])
            for a, b in zip(rows, increase["experts"], strict=True)
        ]
        for k, rows in increase.items()
        if k != "experts"
    }
    columns = [f"c = {c:g}" for c in scales]
    for title, intervals in (
        ("Loss increase, nats per token (mean and 95 % interval over seeds)", total),
        ("Loss increase per million parameters of the kind", each),
        ("The same minus that of the experts, paired by seed", to_experts),
    ):
        table = make_table(title, "kind", ["million parameters", *columns])
        for kind, row in intervals.items():
            table.add_row(kind, f"{millions[kind]:.3f}", *(plus_minus(i, places=4) for i in row))
        setup.console.print(table)
    results = {
        "noise_scales": scales,
        "million_parameters": millions,
        "loss_increase_per_seed": {k: digits(rows) for k, rows in increase.items()},
        "loss_increase": {k: [as_record(i) for i in rows] for k, rows in total.items()},
        "per_million_parameters": {k: [as_record(i) for i in rows] for k, rows in each.items()},
        "per_million_minus_experts": {k: [as_record(i) for i in rows] for k, rows in to_experts.items()},
    }
    setup.save(results, draw(setup, scales, total, each), spec)


if __name__ == "__main__":
    run(main)
