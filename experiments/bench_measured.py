"""Speed of measuring every expert's loss increase, and of collecting calibration statistics, all in one run.

    python experiments/bench_measured.py                       # docs/experiments/bench_measured.json, .png

1. `measure` for all experts over all seeds, compilation included, beside the plain way: `evaluate_seeds` with plans in
   which one expert is analog. The plain way is timed, compiled, on `--naive-experts` of the experts, spread over all
   layers, and scaled to all of them; the output says so.
2. `collect_statistics`, without and with histograms, beside the same pass without collecting (jitted `hidden_states`)
   and one forward pass with log-likelihoods (`evaluate_digital`) on the same tokens: medians of interleaved rounds.

Speed (targets on two idle CPU cores, reference model, 16,384 tokens, 8 seeds): all experts measured in under 5 minutes;
collection at most 1.2 times a forward pass. Cost: about eight minutes. Run it on an otherwise idle machine: the first
line says how busy it is.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from common import Options, Setup, make_table, panels, prepare, run
from hetmoe.commands.progress import show_progress
from hetmoe.evaluate.calibrate import collect_statistics
from hetmoe.evaluate.run import evaluate_digital, evaluate_seeds
from hetmoe.models.transformer import hidden_states
from hetmoe.placement.measured import measure
from hetmoe.placement.plan import Plan, plan_shapes, stack_plans
from hetmoe.report.style import COLOURS

NOISE_SCALE = 5.0


def clocked(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def time_measure(setup: Setup) -> float:
    """Seconds for all experts and seeds."""
    layers, experts = plan_shapes(setup.config)["experts"]
    total = setup.text.batches.tokens.shape[0] * layers * experts * len(setup.keys)
    with show_progress(setup.console, "measure", "experts x seeds x batches", total) as advance:
        before = 0

        def report(done: int, _: int) -> None:
            nonlocal before
            advance(done - before)
            before = done

        return clocked(
            lambda: measure(
                setup.model, setup.spec(NOISE_SCALE), setup.calibration, setup.keys, setup.text.batches, dense=False,
                jobs=setup.options.threads, progress=report,
            ).per_seed.experts
        )  # fmt: skip


def time_naive(setup: Setup, count: int) -> tuple[float, int]:
    """(seconds for `count` experts and all seeds, compiled before; how many there are)."""
    shape = plan_shapes(setup.config)["experts"]
    every = int(np.prod(shape))
    plans: list[Plan] = []
    for number in np.linspace(0, every - 1, count).round().astype(int):
        experts = np.zeros(shape, bool)
        experts.flat[number] = True
        plans.append(Plan(experts=jnp.asarray(experts)))
    stacked = stack_plans([stack_plans(plans)])
    spec, batches, model = setup.spec(NOISE_SCALE), setup.text.batches, setup.model
    one = evaluate_seeds.lower(
        model.params, setup.keys[:1], stacked, spec, setup.calibration, batches, model.config
    ).compile()  # fmt: skip
    return clocked(
        lambda: [one(model.params, key[None], stacked, spec, setup.calibration, batches).nll for key in setup.keys]
    ), every


def time_collection(setup: Setup, rounds: int) -> dict[str, float]:
    """Median seconds of every way over the same tokens, taken in turns."""
    batches, config, params = setup.text.batches, setup.config, setup.model.params
    size = batches.tokens.shape[1]
    tokens = batches.tokens[:, :, :-1].reshape(-1, batches.tokens.shape[2] - 1)

    @jax.jit
    def hidden(params: Any, part: jax.Array) -> jax.Array:
        return hidden_states(params, part, config)[0]

    def collect(*, histogram: bool) -> Any:
        return collect_statistics(params, tokens, config, batch=size, histogram=histogram).tokens_seen

    calls: dict[str, Callable[[], Any]] = {
        "forward pass, hidden states": lambda: [hidden(params, batch[:, :-1]) for batch in batches.tokens],
        "forward pass, log-likelihoods": lambda: evaluate_digital(params, batches, config).nll,
        "collect": lambda: collect(histogram=False),
        "collect with histograms": lambda: collect(histogram=True),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):  # the first compiles
        for name, call in calls.items():
            seconds = clocked(call)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def draw(setup: Setup, seconds: dict[str, float], medians: dict[str, float]) -> Any:
    """Bars of seconds."""
    figure, (left, right) = panels(2, f"{setup.model.name}: {setup.text.size.tokens:,} tokens")
    left.barh(list(seconds), list(seconds.values()), color=COLOURS[0])
    left.set_xlabel("seconds, all experts and seeds")
    right.barh(list(medians), list(medians.values()), color=COLOURS[1])
    right.set_xlabel("seconds, median")
    for axes in (left, right):
        axes.invert_yaxis()
    return figure


def main(
    options: Options,
    naive_experts: Annotated[int, typer.Option(help="Experts that the plain way is timed on.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Timed rounds of collection.", min=1)] = 7,
) -> None:
    """Measure and print."""
    setup = prepare("bench_measured", options)
    load = os.getloadavg()[0]
    setup.console.print(f"{os.cpu_count()} cores, load average {load:.1f}, jax {jax.__version__}")
    medians = time_collection(setup, rounds)
    measured = time_measure(setup)
    part, every = time_naive(setup, naive_experts)
    naive = part * every / naive_experts
    table = make_table(f"All {every} experts, {options.seeds} seeds", "way", ["s", "ratio"])
    table.add_row("measure", f"{measured:.1f}", "1.00")
    table.add_row(f"one plan each (scaled from {naive_experts} experts, {part:.1f} s)", f"{naive:.1f}",
                  f"{naive / measured:.2f}")  # fmt: skip
    setup.console.print(table)
    hidden, likelihood = (medians[f"forward pass, {kind}"] for kind in ("hidden states", "log-likelihoods"))
    table = make_table(f"Medians of {rounds} rounds in turns", "way", ["ms", "/ hidden states", "/ log-likelihoods"])
    for name, seconds in medians.items():
        table.add_row(name, f"{1e3 * seconds:.1f}", f"{seconds / hidden:.2f}", f"{seconds / likelihood:.2f}")
    setup.console.print(table)
    seconds = {"measure": measured, "one plan each (scaled)": naive}
    results = {
        "load_average": load, "cores": os.cpu_count(), "experts": every, "measure_s": measured,
        "naive_experts": naive_experts, "naive_part_s": part, "naive_scaled_s": naive, "rounds": rounds,
        "median_s": medians,
    }  # fmt: skip
    setup.save(results, draw(setup, seconds, medians), setup.spec(NOISE_SCALE))


if __name__ == "__main__":
    run(main)
