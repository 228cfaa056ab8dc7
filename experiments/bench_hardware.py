"""How many (plan, batch, hardware) points the hardware model estimates in a second.

    python experiments/bench_hardware.py      # docs/experiments/bench_hardware.DEVICE.json

Every one of `--plans` random plans decodes at `--batches` batch sizes on `--systems` hardware descriptions that differ
in all their numbers, in one compiled call; all terms of an estimate are made. Beside it one point at a time, by the
same function compiled for one point. A minute on two CPU cores.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from common import RESULTS, make_table
from hetmoe.checkpoint.load import load_model
from hetmoe.commands.common import make_console
from hetmoe.evaluate.provenance import provenance
from hetmoe.hardware.demand import demand_grid, model_demand
from hetmoe.hardware.deployment import Deployment, deployment, stack_deployments
from hetmoe.hardware.description import open_description
from hetmoe.hardware.estimate import Estimate, estimate, estimate_grid
from hetmoe.hardware.machine import System, stack_systems, system_of
from hetmoe.hardware.parts import SCHEDULES, Schedule
from hetmoe.hardware.routing import uniform_frequency
from hetmoe.hardware.step import Step, decode_step, stack_steps
from hetmoe.models.config import ModelConfig
from hetmoe.placement.plan import Plan, plan_shapes
from memory_olmoe import OLMOE_7B


def random_deployment(config: ModelConfig, rng: np.random.Generator) -> Deployment:
    """A share of the experts analog, the digital ones at 2 to 16 bits each."""
    shape = plan_shapes(config)["experts"]
    sizes = rng.uniform(2, 16, shape) / 8 * 3 * config.hidden_size * config.expert_intermediate_size
    return deployment(Plan(experts=jnp.asarray(rng.random(shape) < rng.random())), config, expert_bytes=sizes)


def random_system(rng: np.random.Generator) -> System:
    """The published pair, every number of it within a factor of two."""
    published = system_of(
        open_description("a100-80gb", "digital"), open_description("ibm-3d-cim", "analog"),
        open_description("pcie4-x16", "link"),
    )  # fmt: skip
    return jax.tree.map(lambda leaf: leaf * jnp.float32(2 ** rng.uniform(-1, 1)), published)


def seconds(function: Any, *arguments: Any, rounds: int) -> list[float]:
    jax.block_until_ready(function(*arguments))
    times: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return times


def measure(
    config: ModelConfig, where: Deployment, steps: Step, systems: System, schedule: Schedule, rounds: int
) -> dict[str, Any]:
    """Points per second of a grid, and of single points."""

    def one(of: Deployment, step: Step, system: System) -> Estimate:
        return estimate(config, model_demand(config, of, step), system, schedule)

    grid = jax.jit(lambda *parts: estimate_grid(config, *parts, schedule))
    times = seconds(grid, where, steps, systems, rounds=rounds)
    points = grid(where, steps, systems).step_time.size
    first = (jax.tree.map(lambda leaf: leaf[0], many) for many in (where, steps, systems))
    singles = seconds(jax.jit(one), *first, rounds=10 * rounds)
    demands = seconds(jax.jit(lambda *parts: demand_grid(config, *parts)), where, steps, rounds=rounds)
    return {
        "points": points, "seconds": times, "points_per_s": points / statistics.median(times),
        "points_per_s_range": [points / max(times), points / min(times)],
        "demand_share": statistics.median(demands) / statistics.median(times),
        "single_points_per_s": 1 / statistics.median(singles),
    }  # fmt: skip


def main(
    plans: Annotated[int, typer.Option(help="Random plans.")] = 64,
    batches: Annotated[int, typer.Option(help="Batch sizes, from 1 on.")] = 64,
    systems: Annotated[int, typer.Option(help="Hardware descriptions.")] = 128,
    rounds: Annotated[int, typer.Option(help="Calls that are timed.")] = 7,
    output: Annotated[Path | None, typer.Option("--json", help="Default: docs/experiments.")] = None,
) -> None:
    """Measure and print."""
    console, rng = make_console(), np.random.default_rng(0)
    configs = {"OLMoE-1B-7B": OLMOE_7B, "reference": load_model("reference").config}
    table = make_table("points per second", "model, schedule", ["grid", "from - to", "one at a time", "ratio"])
    rows: list[dict[str, Any]] = []
    on = stack_systems([random_system(rng) for _ in range(systems)])
    for name, config in configs.items():
        where = stack_deployments([random_deployment(config, rng) for _ in range(plans)])
        frequency, context = uniform_frequency(config), min(1024, config.max_position_embeddings)
        steps = stack_steps([decode_step(config, frequency, 1 + b, context) for b in range(batches)])
        for schedule in SCHEDULES:
            row = measure(config, where, steps, on, schedule, rounds)
            rows.append({"model": name, "schedule": schedule} | row)
            low, high = row["points_per_s_range"]
            table.add_row(
                f"{name}, {schedule}", f"{row['points_per_s']:,.0f}", f"{low:,.0f} - {high:,.0f}",
                f"{row['single_points_per_s']:,.0f}", f"{row['points_per_s'] / row['single_points_per_s']:,.0f}",
            )  # fmt: skip
    console.print(table)
    record = {
        "format": "hetmoe-experiment-1", "experiment": "bench_hardware",
        "provenance": provenance() | {"command": ["python", "experiments/bench_hardware.py", *sys.argv[1:]]},
        "plans": plans, "batches": batches, "systems": systems, "rows": rows,
    }  # fmt: skip
    device = jax.devices()[0].device_kind.lower().replace(" ", "_")
    path = output or RESULTS / f"bench_hardware.{device}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"{path}")


if __name__ == "__main__":
    typer.run(main)
