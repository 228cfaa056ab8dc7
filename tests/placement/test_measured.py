"""Measured sensitivities against plain evaluation of a plan in which one module alone is analog."""

import dataclasses
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.calibration import RangeMethod
from hetmoe.analog.read_noise import make_read_noise
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.evaluate.calibrate import calibrate
from hetmoe.evaluate.run import Batches, evaluate_digital, evaluate_seeds, loss_batches
from hetmoe.models.config import ModelConfig
from hetmoe.models.model import Model
from hetmoe.placement import measured
from hetmoe.placement.measured import measure
from hetmoe.placement.plan import Plan, plan_shapes, stack_plans
from tests.models.tiny import full_config, random_params, random_tokens, tiny_config

KEYS = jax.random.split(jax.random.key(5), 3)
CASES: dict[str, tuple[ModelConfig, AnalogSpec, bool]] = {  # the last: calibrated
    "full": (full_config(), analog_spec("hermes", noise_scale=4.0, adc_bound=6.0), True),
    "time_tied": (
        tiny_config(num_layers=2, tie_embeddings=True),
        analog_spec("state_independent", time_s=86400.0, bound_axis="column", read_noise=make_read_noise("pcm", 0.05)),
        False,
    ),
}
TINY = tiny_config(num_layers=3)
SPEC = analog_spec("additive", noise_scale=8.0)


def made(config: ModelConfig) -> tuple[Model, Batches]:
    """A model and 5 windows in batches of 2: the last batch is padded."""
    model = Model(params=random_params(config, 0), config=config, tokenizer=None, eos_token_id=0, name="tiny")
    return model, loss_batches(np.asarray(random_tokens(config, 1, (5, 12))), 2)


def naive(model: Model, batches: Batches, spec: AnalogSpec, calibration: Any, plans: list[Plan]) -> np.ndarray:
    """Loss increase per token, `[seeds, plans]`."""
    before = float(evaluate_digital(model.params, batches, model.config).nll)
    # As many plans at once as `measure` evaluates of dense modules: one program serves both.
    at_once = sum(int(np.prod(shape)) for name, shape in plan_shapes(model.config).items() if name != "experts")
    padded = plans + plans[: -len(plans) % at_once]
    nll = np.zeros((len(KEYS), len(padded)))
    for (seed, key), first in itertools.product(enumerate(KEYS), range(0, len(padded), at_once)):
        some = stack_plans([stack_plans(padded[first : first + at_once])])
        totals = evaluate_seeds(model.params, key[None], some, spec, calibration, batches, model.config)
        nll[seed, first : first + at_once] = totals.nll[0]
    return (nll[:, : len(plans)] - before) / (5 * 11)


def alone(config: ModelConfig, name: str, index: tuple[int, ...]) -> Plan:
    flags = {n: np.zeros(s, bool) for n, s in plan_shapes(config).items()}
    flags[name][index] = True
    return Plan(**{n: jnp.asarray(f) for n, f in flags.items()})


# The second compiles for a minute of two cores; it last ran, and passed, on 2026-11-23.
@pytest.mark.parametrize("name", ["full", pytest.param("time_tied", marks=pytest.mark.slow)])
def test_same_as_evaluating_one_module_at_a_time(name: str) -> None:
    config, spec, calibrated = CASES[name]
    model, batches = made(config)
    ranges = None
    if calibrated:
        ranges = calibrate(model.params, batches.tokens[0, :, :-1], config, RangeMethod(min_tokens=1))
    finished: list[tuple[int, int]] = []
    found = measure(
        model,
        spec,
        ranges,
        KEYS,
        batches,
        dense=True,
        jobs=2,
        progress=lambda *n: finished.append(n),
        experts_at_once=3,
    )
    shapes = plan_shapes(config)
    plans = [alone(config, module, index) for module, shape in shapes.items() for index in np.ndindex(shape)]
    every = naive(model, batches, spec, ranges, plans)
    for module, shape in shapes.items():
        value = getattr(found.per_seed, module)
        assert value.shape == (len(KEYS), *shape)
        count = int(np.prod(shape))
        expected, every = every[:, :count].reshape(len(KEYS), *shape), every[:, count:]
        # Log-likelihoods of order 5 in float32, summed over 55 tokens, differ in rounding only: an expert's output is
        # added to the residual stream in another order. An ADC step that flips would show as 1e-2 of the largest.
        np.testing.assert_allclose(value, expected, rtol=2e-3, atol=3e-6 + 1e-4 * np.abs(expected).max())
        assert np.abs(expected).max() > 1e-4  # noise did something
    assert {f.name for f in dataclasses.fields(found.per_seed) if getattr(found.per_seed, f.name) is not None} == set(
        shapes
    )
    layers, experts = plan_shapes(config)["experts"]
    assert finished[-1] == (3 * layers * experts * 3,) * 2
    assert [n for n, _ in finished] == sorted(n for n, _ in finished)


def test_one_compiled_function_for_all_layers_experts_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = made(TINY)
    chex.clear_trace_counter()
    counted = jax.jit(
        chex.assert_max_traces(measured._increase.__wrapped__, n=1), static_argnames=("config", "capacity")
    )
    monkeypatch.setattr(measured, "_increase", counted)
    for scale in (1.0, 2.0):
        measure(
            model, dataclasses.replace(SPEC, noise_scale=jnp.float32(scale)), None, KEYS, batches, dense=False, jobs=2
        )


def test_jobs_do_not_change_a_digit() -> None:
    model, batches = made(TINY)
    one, two = (measure(model, SPEC, None, KEYS, batches, dense=False, jobs=jobs) for jobs in (1, 2))
    np.testing.assert_array_equal(one.per_seed.experts, two.per_seed.experts)


def test_mean_and_standard_error_over_seeds() -> None:
    model, batches = made(TINY)
    found = measure(model, SPEC, None, KEYS, batches, dense=False, jobs=1)
    values = np.asarray(found.per_seed.experts)
    np.testing.assert_allclose(found.mean.experts, values.sum(0) / 3)
    error = np.sqrt(((values - values.mean(0)) ** 2).sum(0) / 2 / 3)
    np.testing.assert_allclose(found.standard_error.experts, error)
