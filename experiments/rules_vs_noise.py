"""Share of the loss that each placement rule takes back, against noise scale (the paper's figures on placement rules).

    python experiments/rules_vs_noise.py                       # docs/experiments/rules_vs_noise.json, .png
    python experiments/rules_vs_noise.py --fast                # 4 seeds, c = 2.5 and 10
    python experiments/rules_vs_noise.py --model allenai/OLMoE-1B-7B-0924 --dtype bfloat16 --noise-scale 1.5

Compared are all rules of `hetmoe.RULES`, with both neuron axes of `down` for max_neuron_norm, at 12.5 % and 25 % of
each layer's experts digital, all on the same chips. The share recovered is that of the loss increase of all experts
analog over the digital model (programming noise and converters), paired by seed, with 95 % intervals; `random` is drawn
anew for every seed. Rules look at text that is not evaluated. `noise_sensitivity` and `measured` are scored at the
largest noise scale, as in `hetmoe eval`.

How well scores order experts is their Spearman correlation with the loss increase measured for every expert alone (on
the scoring text, at `--measured-scale`), per layer and over all experts. That measurement has noise of its own: its
correlation between two halves of its seeds is shown, and, by Spearman and Brown, the most that a perfect rule would
reach. Cost: about twelve minutes on two CPU cores.

Paper: MaxNNScore beats the other rules at every c; 12.5 to 25 % of experts recover a third to a half or more of the
loss.
The reference model agrees in part. At c = 5, 12.5 and 25 % digital recover 27 and 46 % by max_neuron_norm, 15 and 29 %
at random, 20 and 34 % by router_norm, but 38 and 59 % by activation_weight, hardly less than by noise_sensitivity (39
and 59 %) and measured (41 and 60 %). Norms alone miss how much an expert is used: the correlation with the measured
loss is 0.46 for max_neuron_norm, 0.71 for activation_weight and 0.85 for noise_sensitivity, of 0.93 possible.
"""

import dataclasses
import math
from typing import Annotated, Any

import jax
import numpy as np
import typer

from common import (
    Options,
    Setup,
    add_legend,
    as_record,
    digits,
    draw_line,
    looks,
    make_table,
    panels,
    plus_minus,
    prepare,
    recovered_share,
    run,
    scales_or,
)
from hetmoe.commands.progress import show_progress
from hetmoe.evaluate.noise_sweep import Placement
from hetmoe.evaluate.rules import scoring_scale
from hetmoe.evaluate.run import loss_batches
from hetmoe.evaluate.statistics import Interval, mean_interval, paired_difference, spearman
from hetmoe.placement.measured import measure
from hetmoe.placement.plan import experts_analog, place
from hetmoe.placement.scores import BATCH, RANDOM, RULES

SCALES = (1.0, 2.5, 5.0, 7.5, 10.0)
FRACTIONS = (0.125, 0.25)
NORM, OUTPUT_NORM = "max_neuron_norm", "max_neuron_norm (output)"
ALL_ANALOG = "experts_analog"


def measured_per_seed(setup: Setup, scale: float) -> np.ndarray:
    """Loss increase of every expert alone on the scoring text, `[seeds, layers, experts]`; its mean is `measured`."""
    tokens = setup.text.sample.tokens
    layers, experts = len(setup.config.moe_layers), setup.config.num_experts
    batches, keys = loss_batches(tokens, min(BATCH, len(tokens))), jax.random.split(setup.score_key, 8)
    total = batches.tokens.shape[0] * layers * experts * len(keys)
    with show_progress(setup.console, f"measured at c = {scale:g}", "experts x seeds x batches", total) as advance:
        before = 0

        def report(done: int, _: int) -> None:
            nonlocal before
            advance(done - before)
            before = done

        found = measure(
            setup.model, setup.spec(scale), setup.calibration, keys, batches, dense=False, jobs=setup.options.threads,
            progress=report,
        )  # fmt: skip
    return np.asarray(found.per_seed.experts)


def all_scores(setup: Setup, scale: float, measured: np.ndarray) -> dict[str, np.ndarray]:
    """Scores by every rule that is not drawn anew for every seed."""
    spec = setup.spec(scale)
    scores = {
        rule: setup.scorer().scores(rule, spec) for rule in RULES if rule not in {RANDOM, "measured"}
    }  # fmt: skip
    return scores | {OUTPUT_NORM: setup.scorer("output").scores(NORM, spec), "measured": measured}


def by_layer(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Spearman's correlation in every layer."""
    return [spearman(x, y) for x, y in zip(a, b, strict=True)]


def reliability(per_seed: np.ndarray) -> dict[str, Any]:
    """How well two halves of the seeds (even and odd) order the experts alike, and what that allows a perfect rule.

    Spearman and Brown: where halves correlate by r, the mean of all seeds has reliability 2r / (1 + r), and a rule
    without error correlates with it by the square root of that.
    """
    halves = [per_seed[start::2].mean(axis=0) for start in (0, 1)]
    layers = by_layer(*halves)
    overall = spearman(halves[0].ravel(), halves[1].ravel())

    def most(r: float) -> float:
        return math.sqrt(2 * r / (1 + r)) if r > 0 else 0.0

    return {
        "halves_per_layer": digits(layers, 4), "halves_mean": float(np.mean(layers)), "halves_overall": overall,
        "most_mean": float(np.mean([most(r) for r in layers])), "most_overall": most(overall),
    }  # fmt: skip


def placements(setup: Setup, scores: dict[str, np.ndarray], fractions: tuple[float, ...]) -> list[Placement]:
    """All experts analog, then every rule at every fraction, named (rule, fraction)."""
    lines = [Placement(name=ALL_ANALOG, plans=[experts_analog(setup.config)])]
    for rule, values in scores.items():
        lines += [Placement(name=f"{rule} {f:.1%}", plans=[place(values, f)]) for f in fractions]
    drawn = setup.scorer().placements(RANDOM, fractions, len(setup.keys), setup.spec(1.0))
    lines += [dataclasses.replace(p, name=f"{RANDOM} {f:.1%}") for p, f in zip(drawn, fractions, strict=True)]
    return lines


def records(table: dict[str, dict[str, list[Interval]]]) -> dict[str, Any]:
    """By fraction and rule, one record per noise scale."""
    return {f: {r: [as_record(i) for i in row] for r, row in lines.items()} for f, lines in table.items()}


def draw(
    setup: Setup, scales: list[float], shares: dict[str, dict[str, list[Interval]]], spearmans: dict[str, Any],
    ceiling: dict[str, Any], measured_scale: float,
) -> Any:  # fmt: skip
    """Shares against noise scale per fraction, and correlations with the measured loss."""
    figure, row = panels(
        len(shares) + 1, f"{setup.model.name}: placement rules, {setup.options.device} noise", height=4.8
    )
    names = list(next(iter(shares.values())))
    styles = looks([n for n in names if n != OUTPUT_NORM]) | {
        OUTPUT_NORM: looks([NORM])[NORM] | {"ls": "--", "mfc": "white"}
    }
    for axes, (fraction, lines) in zip(row, shares.items(), strict=False):
        for name in names:
            draw_line(axes, scales, lines[name], name, styles[name], 100)
        axes.set(xlabel="programming-noise scale c", ylabel="loss increase recovered (%)", title=f"{fraction} digital")
    last = row[-1]
    for place_, name in enumerate(spearmans):
        look = styles[name]
        last.plot(spearmans[name]["per_layer"], [place_] * len(spearmans[name]["per_layer"]), ls="none", ms=4,
                  color=look["color"], marker="|")  # fmt: skip
        last.plot([spearmans[name]["mean"]], [place_], ls="none", ms=7, color=look["color"], marker=look["marker"],
                  mfc=look["mfc"])  # fmt: skip
    last.axvline(ceiling["most_mean"], color="#595959", ls="--", lw=1.2)
    last.axvline(0, color="#595959", lw=0.8)
    last.set_yticks(range(len(spearmans)), list(spearmans))
    last.invert_yaxis()
    last.set(
        xlabel=f"Spearman with the measured loss (c = {measured_scale:g})",
        title="marker: mean over layers; dashed: most possible",
    )
    last.title.set_fontsize("medium")
    add_legend(figure, row[0])
    return figure


def main(
    options: Options,
    noise_scale: Annotated[list[float] | None, typer.Option(help="Noise scale c; repeatable.")] = None,
    measured_scale: Annotated[float, typer.Option(help="Noise scale of the loss that scores are compared with.")] = 5.0,
    *,
    fast: Annotated[bool, typer.Option(help="At most 4 seeds, and c = 2.5 and 10.")] = False,
) -> None:
    """Score, evaluate and print."""
    if fast:
        options = dataclasses.replace(options, seeds=min(options.seeds, 4))
    scales = scales_or(noise_scale, (2.5, 10.0) if fast else SCALES)
    setup = prepare("rules_vs_noise", options)
    top = scoring_scale(scales)
    per_seed = measured_per_seed(setup, measured_scale)
    at_top = per_seed if measured_scale == top else measured_per_seed(setup, top)
    scores = all_scores(setup, top, at_top.mean(axis=0))
    points = setup.sweep(setup.spec(top), placements(setup, scores, FRACTIONS), scales, "rules x seeds")

    rules = [NORM, OUTPUT_NORM, *(r for r in RULES if r != NORM)]
    losses = {key: setup.losses(point) for key, point in points.items()}
    shares: dict[str, dict[str, list[Interval]]] = {}
    to_norm: dict[str, dict[str, list[Interval]]] = {}
    for fraction in (f"{f:.1%}" for f in FRACTIONS):
        shares[fraction] = {
            rule: [
                recovered_share(losses[ALL_ANALOG, c], losses[f"{rule} {fraction}", c], setup.digital_loss)
                for c in scales
            ]
            for rule in rules
        }
        to_norm[fraction] = {
            rule: [paired_difference(losses[f"{NORM} {fraction}", c], losses[f"{rule} {fraction}", c]) for c in scales]
            for rule in rules
            if rule != NORM
        }
    columns = [f"c = {c:g}" for c in scales]
    increase = {c: mean_interval(losses[ALL_ANALOG, c] - setup.digital_loss) for c in scales}
    for fraction in shares:
        table = make_table(f"Share of the loss increase recovered, %, {fraction} digital", "rule", columns)
        table.add_row("experts_analog: increase, nats", *(plus_minus(increase[c], places=4) for c in scales))
        for rule in rules:
            table.add_row(rule, *(plus_minus(i, 100, 1) for i in shares[fraction][rule]))
        setup.console.print(table)
        table = make_table(
            f"Loss lower than by {NORM}, 0.001 nats, paired by seed, {fraction} digital", "rule", columns
        )
        for rule, row in to_norm[fraction].items():
            table.add_row(rule, *(plus_minus(i, 1e3, 2) for i in row))
        setup.console.print(table)

    target = per_seed.mean(axis=0)
    sensitivity = setup.scorer().scores("noise_sensitivity", setup.spec(measured_scale))
    compared = {rule: scores[rule] for rule in rules if rule in scores and rule != "measured"}
    compared["noise_sensitivity"] = sensitivity
    if at_top is not per_seed:
        compared["measured"] = scores["measured"]
    spearmans: dict[str, Any] = {
        rule: {
            "per_layer": (layers := digits(by_layer(values, target), 4)), "mean": float(np.mean(layers)),
            "overall": spearman(values.ravel(), target.ravel()),
        }
        for rule, values in compared.items()
    }  # fmt: skip
    ceiling = reliability(per_seed)
    table = make_table(
        f"Spearman correlation with the loss increase measured at c = {measured_scale:g}", "rule",
        ["mean over layers", "lowest layer", "highest layer", "all experts"],
    )  # fmt: skip
    for rule, row in spearmans.items():
        name = f"measured at c = {top:g}" if rule == "measured" else rule
        layers = row["per_layer"]
        table.add_row(name, *(f"{v:.2f}" for v in (row["mean"], min(layers), max(layers), row["overall"])))
    halves = ceiling["halves_per_layer"]
    shown = (ceiling["halves_mean"], min(halves), max(halves), ceiling["halves_overall"])
    table.add_row("two halves of the seeds", *(f"{v:.2f}" for v in shown))
    table.add_row("most that a rule can reach", f"{ceiling['most_mean']:.2f}", "", "", f"{ceiling['most_overall']:.2f}")
    setup.console.print(table)

    results = {
        "noise_scales": scales, "fractions": list(FRACTIONS), "scored_at": top, "measured_at": measured_scale,
        "experts_analog_increase": [as_record(increase[c]) for c in scales],
        "recovered_share": records(shares), "loss_lower_than_max_neuron_norm": records(to_norm),
        "loss_per_seed": {f"{name} c={c:g}": digits(values, 8) for (name, c), values in losses.items()},
        "spearman_with_measured": spearmans, "measured_reliability": ceiling,
        "scores": {rule: digits(values, 5) for rule, values in (scores | {"measured (compared with)": target}).items()},
    }  # fmt: skip
    setup.save(results, draw(setup, scales, shares, spearmans, ceiling, measured_scale), setup.spec(top))


if __name__ == "__main__":
    run(main)
