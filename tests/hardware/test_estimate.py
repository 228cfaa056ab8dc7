"""The model of a step against a second form of it, closed forms, and its own promises."""

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.hardware.demand import model_demand
from hetmoe.hardware.deployment import Deployment, deployment, stack_deployments
from hetmoe.hardware.estimate import Estimate, estimate, estimate_grid
from hetmoe.hardware.explain import explain
from hetmoe.hardware.machine import AnalogChips, DigitalUnit, Link, System, stack_systems
from hetmoe.hardware.parts import SCHEDULES, Parts
from hetmoe.hardware.step import Step, decode_step, prefill_step, stack_steps
from hetmoe.models.config import ModelConfig
from hetmoe.placement.plan import Plan, all_analog, all_digital, experts_analog, plan_shapes
from tests.hardware.plain_model import PlainModel
from tests.models.tiny import full_config, tiny_config

PLAIN = {
    "capacity": 1e9, "bandwidth": 2e12, "rate": 3e14, "busy": 400.0, "idle": 60.0, "rows": 8.0, "columns": 16.0,
    "operation_time": 1e-7, "operation_energy": 1e-8, "planes": 1.0, "tiles": 64.0, "chips": 0.0, "static": 0.1,
    "programming_time": math.inf, "programming_energy": 0.0, "link_bandwidth": 3e10, "link_latency": 1e-6,
    "link_energy": 5e-11, "area": 1e-6,
}  # fmt: skip
# float32 sums of up to a few hundred terms, none of them cancelling: some 100 roundings of 6e-8.
RTOL = 2e-5


def system(hw: dict[str, float]) -> System:
    n = {name: jnp.float32(value) for name, value in hw.items()}
    return System(
        digital=DigitalUnit(
            capacity=n["capacity"], bandwidth=n["bandwidth"], rate=n["rate"], busy_power=n["busy"],
            idle_power=n["idle"], area=jnp.float32(math.nan),
        ),
        analog=AnalogChips(
            rows=n["rows"], columns=n["columns"], operation_time=n["operation_time"],
            operation_energy=n["operation_energy"], planes=n["planes"], tiles=n["tiles"], chips=n["chips"],
            static_power=n["static"], tile_area=n["area"], programming_time=n["programming_time"],
            programming_energy=n["programming_energy"],
        ),
        link=Link(bandwidth=n["link_bandwidth"], latency=n["link_latency"], energy=n["link_energy"]),
    )  # fmt: skip


def random_plan(config: ModelConfig, rng: np.random.Generator) -> Plan:
    flags: dict[str, Any] = {name: jnp.asarray(rng.random(shape) < 0.6) for name, shape in plan_shapes(config).items()}
    return Plan(**flags)


def random_frequency(config: ModelConfig, rng: np.random.Generator) -> np.ndarray:
    """Shares of real choices: every token takes different experts."""
    count, top = config.num_experts, config.experts_per_token
    weights = rng.dirichlet(np.ones(count) * 2, size=len(config.moe_layers))
    chosen = [[rng.choice(count, top, replace=False, p=row) for _ in range(50)] for row in weights]
    return np.stack([np.bincount(np.ravel(layer), minlength=count) / 50 for layer in chosen])


def plain_arguments(
    config: ModelConfig, plan: Plan, where: Deployment, step: Step, frequency: np.ndarray, schedule: str
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    flags = {name: np.asarray(getattr(plan, name)) for name in plan_shapes(config)}
    sizes = {
        "weight": float(where.weight_bytes), "element": float(where.element_bytes),
        "experts": np.asarray(where.expert_bytes, np.float64),
    }  # fmt: skip
    load = {name: float(getattr(step, name)) for name in ("logits", "attended", "cached", "held")}
    return flags, sizes, load | {"tokens": round(float(step.tokens)), "frequency": frequency, "schedule": schedule}


def check(
    config: ModelConfig, hw: dict[str, float], plan: Plan, step: Step, frequency: np.ndarray, **sizes: Any
) -> Any:
    where = deployment(plan, config, **sizes)
    for schedule in SCHEDULES:
        found = estimate(config, model_demand(config, where, step), system(hw), schedule)
        if not bool(found.fits_chips):
            assert float(found.step_time) == math.inf  # tiles that cannot be programmed
            yield found
            continue
        wanted = PlainModel(config, hw).step(*plain_arguments(config, plan, where, step, frequency, schedule))
        for name, value in wanted.items():
            of = getattr(found.parts, name[5:]) if name.startswith("part_") else getattr(found, name)
            # A part is only as exact as the step: which side of a roof counts may turn on a rounding.
            np.testing.assert_allclose(
                float(of), value, rtol=RTOL, atol=1e-6 * wanted["step_time"] if name.startswith("part_") else 0,
                err_msg=f"{schedule}: {name}",
            )  # fmt: skip
        yield found


CONFIGS = {
    "plain": tiny_config(num_layers=2),
    "grouped queries, tied": tiny_config(num_layers=2, tie_embeddings=True, num_kv_heads=2),
    "everything": full_config(),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(4))
def test_it_agrees_with_a_second_form(name: str, seed: int) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(seed)
    frequency = random_frequency(config, rng)
    step = decode_step(config, frequency, 5, 17) if seed % 2 else prefill_step(config, frequency, 3, 6)
    sizes = {"expert_bytes": rng.uniform(100, 900, plan_shapes(config)["experts"]), "weight_bytes": 1.5}
    # From bound by memory to bound by arithmetic; few planes, few chips, weights that take turns.
    hw = PLAIN | [
        {}, {"rate": 1e12, "planes": 4.0, "tiles": 16.0}, {"chips": 1.0, "planes": 2.0, "tiles": 40.0},
        {"chips": 2.0, "tiles": 3.0, "programming_time": 1e-5, "programming_energy": 1e-6},
    ][seed]  # fmt: skip
    for found in check(config, hw, random_plan(config, rng), step, frequency, **sizes):
        assert (float(found.parts.programming) > 0) == (seed >= 2)
        assert bool(found.fits_chips) == (seed != 2)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31), batch=st.integers(1, 40), context=st.integers(1, 64),
    scale=st.lists(st.floats(-2, 2), min_size=8, max_size=8),
)  # fmt: skip
def test_any_hardware_and_any_plan_agree(seed: int, batch: int, context: int, scale: list[float]) -> None:
    config, rng = CONFIGS["everything"], np.random.default_rng(seed)
    names = ("bandwidth", "rate", "operation_time", "link_bandwidth", "link_latency", "rows", "columns", "tiles")
    hw = dict(PLAIN)
    for name, power in zip(names, scale, strict=True):
        hw[name] = hw[name] * 10**power
    for name in ("rows", "columns", "tiles"):
        hw[name] = float(max(1, round(hw[name])))
    frequency = random_frequency(config, rng)
    for _ in check(config, hw, random_plan(config, rng), decode_step(config, frequency, batch, context), frequency):
        pass


def test_all_digital_at_the_roof_of_memory_is_bytes_over_bandwidth() -> None:
    """One token per step, no context worth mentioning: weights that the token needs, read once."""
    config = tiny_config()
    frequency = np.full((1, 8), 2 / 8)
    where = deployment(all_digital(config), config, element_bytes=1e-9)
    found = estimate(config, model_demand(config, where, decode_step(config, frequency, 1, 1)), system(PLAIN))
    h, q, kv = 23, 4 * 6, 2 * 6
    weights = h * (q + 2 * kv) + q * h + h * 8 + 2 * 3 * h * 21 + h * 40 + h  # head, and one row of the embedding
    np.testing.assert_allclose(float(found.memory_traffic), 2 * weights, rtol=1e-5)
    np.testing.assert_allclose(float(found.step_time), 2 * weights / 2e12, rtol=1e-5)
    np.testing.assert_allclose(float(found.joules_per_token), 400 * 2 * weights / 2e12, rtol=1e-5)
    assert float(found.tiles) == float(found.chips) == float(found.analog_energy) == 0


def test_overlap_takes_no_longer_and_neither_less_than_the_longer_branch() -> None:
    config, rng = CONFIGS["everything"], np.random.default_rng(5)
    frequency = random_frequency(config, rng)
    demand = model_demand(config, deployment(random_plan(config, rng), config), decode_step(config, frequency, 9, 30))
    serial, overlap = (estimate(config, demand, system(PLAIN), schedule) for schedule in SCHEDULES)
    assert float(overlap.step_time) < float(serial.step_time)
    assert float(overlap.step_time) >= max(float(overlap.parts.digital), float(overlap.parts.away))
    np.testing.assert_allclose(float(overlap.digital_time), float(serial.digital_time), rtol=1e-6)
    assert float(overlap.digital_time) > float(overlap.parts.digital)


def test_terms_add_up_to_the_estimate() -> None:
    config, rng = CONFIGS["everything"], np.random.default_rng(6)
    frequency = random_frequency(config, rng)
    demand = model_demand(config, deployment(random_plan(config, rng), config), prefill_step(config, frequency, 2, 9))
    found = estimate(config, demand, system(PLAIN), "serial")
    terms = explain(config, demand, system(PLAIN), "serial")
    for part in Parts._fields:
        np.testing.assert_allclose(sum(t.time(part) for t in terms.values()), getattr(found.parts, part), rtol=1e-5)
    np.testing.assert_allclose(sum(t.operations for t in terms.values()), found.operations, rtol=1e-5)
    traffic = sum(t.demanded(f) for t in terms.values() for f in ("weight_bytes", "cache_bytes", "activation_bytes"))
    np.testing.assert_allclose(traffic, found.memory_traffic, rtol=1e-5)


def test_a_grid_is_every_combination_and_compiles_once() -> None:
    config, rng = tiny_config(num_layers=2), np.random.default_rng(1)
    frequency = random_frequency(config, rng)
    wheres = [deployment(plan(config), config) for plan in (all_digital, experts_analog, all_analog)]
    steps = [decode_step(config, frequency, batch, 8) for batch in (1, 4, 30)]
    systems = [system(PLAIN | {"bandwidth": b}) for b in (1e11, 2e12)]
    chex.clear_trace_counter()
    grid = chex.assert_max_traces(estimate_grid.__wrapped__, 1)
    counted = jax.jit(grid, static_argnames=("config", "schedule"))
    stacked = stack_deployments(wheres), stack_steps(steps), stack_systems(systems)
    found: Estimate = counted(config, *stacked, "overlap")
    counted(config, *jax.tree.map(lambda leaf: leaf * 1.5, stacked), "overlap")
    assert found.step_time.shape == (3, 3, 2) and found.parts.queue.shape == (3, 3, 2)
    for at in np.ndindex(3, 3, 2):
        alone = estimate(config, model_demand(config, wheres[at[0]], steps[at[1]]), systems[at[2]], "overlap")
        for field in dataclasses.fields(alone):
            if field.name != "parts":
                of_grid = getattr(found, field.name)[at]
                np.testing.assert_allclose(of_grid, getattr(alone, field.name), rtol=1e-6, err_msg=field.name)
        assert int(found.bound[at]) == int(alone.bound)


def test_what_does_not_fit_is_said() -> None:
    config = tiny_config(num_layers=2, experts_per_token=8)
    frequency = np.full((2, 8), 1.0)  # so that all of them are used
    where = deployment(all_analog(config), config)
    demand = model_demand(config, where, decode_step(config, frequency, 4, 8))
    fits = estimate(config, demand, system(PLAIN))
    assert bool(fits.fits_memory) and bool(fits.fits_chips)
    short = estimate(config, demand, system(PLAIN | {"capacity": float(fits.memory_used) - 1}))
    assert not bool(short.fits_memory)
    full = float(fits.tiles)
    for chips, tiles, planes, enough in ((1, full, 1, True), (1, full - 1, 1, False), (2, 1, full / 2, True)):
        hw = PLAIN | {"chips": chips, "tiles": tiles, "planes": planes}
        assert bool(estimate(config, demand, system(hw)).fits_chips) == enough
    turns = estimate(config, demand, system(PLAIN | {"chips": 1, "tiles": full / 2, "programming_time": 1.0}))
    assert bool(turns.fits_chips)
    np.testing.assert_allclose(float(turns.parts.programming), full / 2, rtol=1e-6)  # half of them are away


def test_tiles_that_share_converters_take_turns() -> None:
    """A single layer's experts on half as many converters as tiles: two rounds where there was one."""
    config = tiny_config()
    frequency = np.full((1, 8), 1.0)  # every token goes to all experts, so that all queues are full
    config = dataclasses.replace(config, experts_per_token=8)
    demand = model_demand(config, deployment(experts_analog(config), config), decode_step(config, frequency, 6, 8))
    hw = PLAIN | {"rows": 64.0, "columns": 64.0, "operation_time": 1.0}  # one tile for each matrix: 24
    for tiles, planes, rounds in ((24, 1, 6 + 6), (16, 2, 6 + 6), (8, 3, 6 * 16 / 8 + 6), (4, 6, 6 * 24 / 4)):
        found = estimate(config, demand, system(hw | {"tiles": float(tiles), "planes": float(planes), "chips": 1.0}))
        np.testing.assert_allclose(float(found.parts.queue + found.parts.shared_tiles), rounds, rtol=1e-6)
