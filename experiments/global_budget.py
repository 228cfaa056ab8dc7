"""One parameter budget for the whole model against per-layer placement of as many digital parameters.

    python experiments/global_budget.py                        # docs/experiments/global_budget.json, .png
    python experiments/global_budget.py --model allenai/OLMoE-1B-7B-0924 --dtype bfloat16

Nothing is digital by structure: attention, LM head, shared experts and dense layers compete with the routed experts
for the budget (a knapsack over loss increases of single modules, by noise_sensitivity or measured). Baselines keep all
dense modules digital and a fraction F of each layer's experts by a rule; the budget is the parameters that this keeps
digital. A further budget is half of the dense modules' parameters, which only the knapsack can use. All placements run
on the same chips; differences to the baseline by max_neuron_norm at the same budget are paired by seed, with 95 %
intervals. Scores are taken at the largest noise scale, on text that is not evaluated. Cost: about eight minutes on two
CPU cores.

The paper places per layer, with dense modules always digital.
In the reference model the budget for the dense modules alone buys exactly the dense modules, by both rules. Beyond that
the knapsack gives the last layer most experts (9 or 10 of 32 at 12.5 %, the first layer 1 or 2), and beats per-layer
max_neuron_norm: at c = 5 the loss increase is 21 to 23 % smaller at 12.5 % of experts and 31 to 34 % at 25 %, more than
half of it due to the scores (15 and 25 to 26 % per layer by the same scores). At c = 1 the gain is within the intervals
at 25 %. At half of the dense budget the LM head does not fit, and the loss is that of an analog LM head.
"""

import dataclasses
from typing import Annotated, Any

import jax.numpy as jnp
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
from hetmoe.evaluate.rules import scoring_scale
from hetmoe.evaluate.statistics import mean_interval, paired_difference
from hetmoe.placement.budget import place_within
from hetmoe.placement.module_scores import ModuleScores, module_parameters
from hetmoe.placement.parameters import digital_parameters
from hetmoe.placement.plan import Plan, place, plan_shapes
from hetmoe.placement.scores import DEVICE_RULES, score_modules
from hetmoe.report.style import COLOURS

SCALES = (1.0, 2.5, 5.0)
FRACTIONS = (0.0, 0.125, 0.25)
NORM = "per layer, max_neuron_norm"
LOOKS = {
    NORM: (COLOURS[0], "s", "-"),
    "per layer, noise_sensitivity": (COLOURS[1], "D", "--"),
    "per layer, measured": (COLOURS[2], "^", "--"),
    "whole model, noise_sensitivity": (COLOURS[1], "D", "-"),
    "whole model, measured": (COLOURS[2], "^", "-"),
}


def with_dense(plan: Plan, setup: Setup) -> Plan:
    """The same experts, with dense modules digital but not by structure, so that all plans share one program."""
    return dataclasses.replace(analog_only(setup.config, ["experts"]), experts=plan.experts)


def module_losses(setup: Setup, scale: float) -> dict[str, ModuleScores]:
    """Loss increase of every module alone, by both rules."""
    return {
        rule: score_modules(
            setup.model, rule, key=setup.score_key, tokens=jnp.asarray(setup.text.sample.tokens),
            spec=setup.spec(scale), calibration=setup.calibration, seeds=8, dense=True, jobs=setup.options.threads,
        )
        for rule in DEVICE_RULES
    }  # fmt: skip


def make_plans(setup: Setup, losses: dict[str, ModuleScores]) -> dict[tuple[str, str], Plan]:
    """(budget, rule) to plan."""
    config, costs = setup.config, module_parameters(setup.config)
    scores = {"max_neuron_norm": setup.scorer().scores("max_neuron_norm", setup.spec(1.0))}
    scores |= {rule: np.asarray(found.experts) for rule, found in losses.items()}
    dense_only = analog_only(config, ["experts"])
    half = digital_parameters(dense_only, config)[0] / 2
    plans = {
        ("half of the dense", f"whole model, {r}"): place_within(s, costs, half, config) for r, s in losses.items()
    }
    for fraction in FRACTIONS:
        name = f"dense + {fraction:.1%}"
        budget = digital_parameters(with_dense(place(scores["max_neuron_norm"], fraction), setup), config)[0]
        for rule, values in scores.items():
            if fraction > 0 or rule == "max_neuron_norm":  # without experts, every rule keeps the same modules
                plans[name, f"per layer, {rule}"] = with_dense(place(values, fraction), setup)
        for rule, found in losses.items():
            plans[name, f"whole model, {rule}"] = place_within(found, costs, budget, config)
    return plans


def kept(plan: Plan, setup: Setup) -> dict[str, float]:
    """Share of each kind's modules that a plan keeps digital."""
    return {kind: float(1 - np.mean(np.asarray(getattr(plan, kind)))) for kind in plan_shapes(setup.config)}


def draw(
    setup: Setup, increase: dict[tuple[str, str, float], np.ndarray], share: dict[str, float], scales: list[float]
) -> Any:
    """Loss increase against the digital share of parameters, one panel per noise scale."""
    title = f"{setup.model.name}: one budget for the whole model, {setup.options.device} noise"
    figure, row = panels(len(scales), title, width=4.2)
    for axes, scale in zip(row, scales, strict=True):
        for rule, (colour, marker, dash) in LOOKS.items():
            budgets = [b for b in share if (b, rule, scale) in increase]
            face = colour if dash == "-" else "white"
            look = {"color": colour, "marker": marker, "ls": dash, "ms": 5, "lw": 1.5, "mfc": face}
            intervals = [mean_interval(increase[b, rule, scale]) for b in budgets]
            draw_line(axes, [100 * share[b] for b in budgets], intervals, rule, look)
        axes.set(xlabel="parameters kept digital (%)", ylabel="loss increase (nats per token)", title=f"c = {scale:g}")
        axes.set_yscale("log")
    add_legend(figure, row[0], 3)
    return figure


def main(
    options: Options,
    noise_scale: Annotated[list[float] | None, typer.Option(help="Noise scale c; repeatable.")] = None,
) -> None:
    """Score, place, evaluate and print."""
    scales = scales_or(noise_scale, SCALES)
    setup = prepare("global_budget", options)
    losses = module_losses(setup, scoring_scale(scales))
    plans = make_plans(setup, losses)
    lines = [Placement(name=f"{budget}: {rule}", plans=[plan]) for (budget, rule), plan in plans.items()]
    points = setup.sweep(setup.spec(scales[0]), lines, scales, "placements x seeds")
    increase = {(b, r, c): setup.losses(points[f"{b}: {r}", c]) - setup.digital_loss for b, r in plans for c in scales}

    budgets = dict.fromkeys(budget for budget, _ in plans)
    counts = {key: digital_parameters(plan, setup.config) for key, plan in plans.items()}
    share = {b: max(d / total for (other, _), (d, total) in counts.items() if other == b) for b in budgets}
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        columns, kinds = [f"c = {c:g}" for c in scales], [f"{kind} digital" for kind in plan_shapes(setup.config)]
        title = f"{budget} ({share[budget]:.1%} of parameters): loss increase, 0.001 nats"
        increases = make_table(title, "placement", [*columns, *kinds])
        differences = make_table(f"{budget}: the same minus {NORM}, paired by seed", "placement", columns)
        for (other, rule), plan in plans.items():
            if other != budget:
                continue
            against = {}
            if rule != NORM and (budget, NORM) in plans:
                against = {c: paired_difference(increase[budget, rule, c], increase[budget, NORM, c]) for c in scales}
            totals = {c: mean_interval(increase[budget, rule, c]) for c in scales}
            shown = [f"{part:.1%}" for part in kept(plan, setup).values()]
            increases.add_row(rule, *(plus_minus(totals[c], 1e3, 2) for c in scales), *shown)
            if against:
                differences.add_row(rule, *(plus_minus(against[c], 1e3, 2) for c in scales))
            rows.append({
                "budget": budget, "rule": rule,
                "digital_parameters": counts[budget, rule][0], "kept": kept(plan, setup),
                "experts_digital_per_layer": (~np.asarray(plan.experts)).sum(axis=1).tolist(),
                "loss_increase": [as_record(totals[c]) for c in scales],
                "minus_baseline": [as_record(against[c]) for c in scales] if against else None,
                "loss_increase_per_seed": {f"c={c:g}": digits(increase[budget, rule, c]) for c in scales},
            })  # fmt: skip
        setup.console.print(increases)
        if differences.row_count:
            setup.console.print(differences)
    per_module = {
        rule: {kind: digits(getattr(found, kind), 5) for kind in plan_shapes(setup.config)}
        for rule, found in losses.items()
    }
    results = {
        "noise_scales": scales, "scored_at": scoring_scale(scales),
        "crossbar_parameters": next(iter(counts.values()))[1],
        "rows": rows, "module_losses": per_module,
    }  # fmt: skip
    setup.save(results, draw(setup, increase, share, scales), setup.spec(scales[0]))


if __name__ == "__main__":
    run(main)
