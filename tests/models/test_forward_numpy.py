"""The whole forward pass, digital and analog, against an independent float64 model over a numpy crossbar matmul.

A crossbar's converters are discontinuous: where a value lies within float32 rounding of a code's boundary the two sides
may differ by a whole code, which then reaches all later tokens of that sequence. About one code in 10^4 lies so near.
So many short sequences are compared, and all but a stated share of them must agree to float32 rounding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedWeights
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.models.config import ModelConfig
from hetmoe.models.transformer import forward
from hetmoe.placement.plan import Plan
from tests import numpy_reference
from tests.models import numpy_model
from tests.models.analog_tiny import TILE_ROWS, programmed_by_hand, random_ranges
from tests.models.tiny import random_params, random_tokens, tiny_config

CONFIG = tiny_config(num_layers=2)
BATCH, SEQ = 16, 4
# Float32 rounding through two layers, relative to the largest logit: 20 products in a row of a few units (6e-8) each.
ROUNDING = 2e-6
SEQUENCES_NEAR_A_BOUNDARY = 0.25

_forward = jax.jit(forward, static_argnames="config")


def analog_product(plan: Plan, spec: AnalogSpec, programmed: ProgrammedWeights, ranges: Calibration | None) -> Any:
    """The product of `numpy_model.forward` under a plan; converters of `spec`, weights as programmed."""
    options = spec.options

    def crossbar(x: np.ndarray, w: Any, of: Any) -> np.ndarray:
        return numpy_reference.crossbar_matmul(
            x.astype(np.float32),
            np.asarray(w),
            input_range=None if of is None else np.asarray(of),
            dac_bits=options.dac_bits,
            adc_bits=options.adc_bits,
            adc_bound=float(spec.adc_bound),
            bound_axis=options.bound_axis,
            tile_rows=options.tile_rows,
        ).astype(np.float64)

    def product(name: str, layer: int, expert: int, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        assert plan.attention is not None
        if name == "lm_head":
            assert programmed.lm_head is not None
            if not plan.lm_head:
                return x @ w
            return crossbar(x, programmed.lm_head.w, None if ranges is None else ranges.lm_head)
        matrix = getattr(programmed.layers, name).w[layer]
        if name in ("gate", "up", "down"):
            stored = {"gate": "experts_in", "up": "experts_in", "down": "experts_mid"}[name]
            of = None if ranges is None else getattr(ranges.layers, stored)[layer, expert]
            return crossbar(x, matrix[expert], of) if plan.experts[layer, expert] else x @ w
        of = (
            None
            if ranges is None
            else getattr(ranges.layers, "attention_out" if name == "o" else "attention_in")[layer]
        )
        return crossbar(x, matrix, of) if plan.attention[layer] else x @ w

    return product


def random_plan(seed: int, attention: list[bool], lm_head: bool) -> Plan:
    """Half of the experts, and the dense modules given."""
    experts = np.random.default_rng(seed).random((CONFIG.num_layers, CONFIG.num_experts)) < 0.5
    return Plan(experts=jnp.asarray(experts), attention=jnp.asarray(attention), lm_head=jnp.asarray(lm_head))


def sequences_off(actual: np.ndarray, expected: np.ndarray) -> float:
    """Share of sequences with a logit that is further off than by rounding."""
    off = np.abs(actual - expected).max(axis=(1, 2)) > ROUNDING * np.abs(expected).max()
    return float(off.mean())


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True, "clip_qkv": 0.7, "norm_topk_prob": True},
        {"num_kv_heads": 1, "experts_per_token": 3, "rms_norm_eps": 0.1, "rope_theta": 10.0},
    ],
)
def test_digital(changes: dict[str, Any]) -> None:
    config = tiny_config(num_layers=2, **changes)
    params, tokens = random_params(config, 0), random_tokens(config, 1, (3, 11))
    actual = _forward(params, tokens, config)
    expected, _ = numpy_model.forward(params, np.asarray(tokens), config, numpy_model.digital)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())
    for field, value in changes.items():  # every one of these options matters here
        if field in ("clip_qkv", "norm_topk_prob", "rms_norm_eps", "rope_theta"):
            base = getattr(tiny_config(), field)
            other = ModelConfig(**(vars(config) | {field: base}))
            without, _ = numpy_model.forward(params, np.asarray(tokens), other, numpy_model.digital)
            assert np.abs(without - expected).max() > 1000 * ROUNDING * np.abs(expected).max(), (field, value)


def check(spec: AnalogSpec, programmed: ProgrammedWeights, ranges: Calibration | None, plans: list[Plan]) -> None:
    """Compares all plans with numpy, and asserts that each differs from digital by far more than what is tolerated."""
    params, tokens = random_params(CONFIG, 0), random_tokens(CONFIG, 1, (BATCH, SEQ))
    digital, _ = numpy_model.forward(params, np.asarray(tokens), CONFIG, numpy_model.digital)
    for plan in plans:
        actual = _forward(params, tokens, CONFIG, plan=plan, spec=spec, programmed=programmed, calibration=ranges)
        product = analog_product(plan, spec, programmed, ranges)
        expected, _ = numpy_model.forward(params, np.asarray(tokens), CONFIG, product)
        assert sequences_off(np.asarray(actual), expected) <= SEQUENCES_NEAR_A_BOUNDARY
        assert np.median(np.abs(expected - digital)) > 500 * ROUNDING * np.abs(expected).max()


def test_dynamic_ranges() -> None:
    programmed = programmed_by_hand(random_params(CONFIG, 0), 2, noise=0.1, per_column=False)
    spec = analog_spec(adc_bound=3.0, tile_rows=TILE_ROWS)
    plans = [random_plan(3, [True, True], True), random_plan(4, [True, False], False)]
    check(spec, programmed, None, plans)


def test_static_ranges_and_column_bounds() -> None:
    programmed = programmed_by_hand(random_params(CONFIG, 0), 2, noise=0.1, per_column=True)
    spec = analog_spec(adc_bound=2.0, tile_rows=TILE_ROWS, bound_axis="column", dac_bits=7, adc_bits=6)
    plans = [random_plan(3, [True, True], True), random_plan(4, [False, True], True)]
    check(spec, programmed, random_ranges(CONFIG, 5), plans)
