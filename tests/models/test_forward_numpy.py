"""The whole forward pass, digital and analog, against an independent float64 model over a numpy crossbar matmul.

A crossbar's converters are discontinuous: where a value lies within float32 rounding of a code's boundary the two sides
may differ by a whole code, which then reaches all later tokens of that sequence. About one code in 10^4 lies so near.
So many short sequences are compared, and all but a stated share of them must agree to float32 rounding.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedWeights
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.models.config import ModelConfig, Rope
from hetmoe.models.transformer import forward
from hetmoe.placement.plan import Plan, all_analog
from tests import numpy_reference
from tests.models import numpy_model
from tests.models.analog_tiny import SITE_OF, TILE_ROWS, programmed_by_hand, random_ranges
from tests.models.tiny import full_config, random_params, random_tokens, tiny_config

CONFIG = tiny_config(num_layers=2)
BATCH, SEQ = 16, 4
# Float32 rounding through two layers, relative to the largest logit: 20 products in a row of a few units (6e-8) each.
ROUNDING = 2e-6
SEQUENCES_NEAR_A_BOUNDARY = 0.25

_forward = jax.jit(forward, static_argnames="config")


def analog_product(
    plan: Plan,
    spec: AnalogSpec,
    programmed: ProgrammedWeights,
    ranges: Calibration | None,
    config: ModelConfig = CONFIG,
) -> Any:
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
        dense = layer in config.dense_layers
        place = (config.dense_layers if dense else config.moe_layers).index(layer)
        stack = programmed.dense_layers if dense else programmed.layers
        matrix = stack[name].w[place]
        of = None
        if ranges is not None:
            of = (ranges.dense_layers if dense else ranges.layers)[SITE_OF[name]][place]
        if name in ("gate", "up", "down"):
            of = None if of is None else of[expert]
            return crossbar(x, matrix[expert], of) if plan.experts[place, expert] else x @ w
        if name.startswith("shared"):
            return crossbar(x, matrix, of) if plan.shared_experts[place] else x @ w
        if name.startswith("ffn"):
            return crossbar(x, matrix, of) if plan.dense_ffn[place] else x @ w
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
        {"num_kv_heads": 1, "experts_per_token": 3, "rms_norm_eps": 0.1, "rope": Rope(theta=10.0)},
        {"qk_norm": "head", "sliding_window": 3, "qkv_bias": True, "output_bias": True},
        {"qk_norm": None, "dense_layers": (0,), "dense_intermediate_size": 19, "shared_intermediate_size": 15},
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
        if field in ("clip_qkv", "norm_topk_prob", "rms_norm_eps", "rope", "sliding_window"):
            base = getattr(tiny_config(), field)
            other = ModelConfig(**(vars(config) | {field: base}))
            without, _ = numpy_model.forward(params, np.asarray(tokens), other, numpy_model.digital)
            assert np.abs(without - expected).max() > 1000 * ROUNDING * np.abs(expected).max(), (field, value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "latent": dataclasses.replace(full_config().latent, query_rank=None),
            "qkv_bias": False,
            "dense_layers": (0, 2),
            "shared_gate": False,
            "rope": dataclasses.replace(full_config().rope, interleaved=False),
        },
        {
            "num_layers": 5,
            "dense_layers": (0, 1, 3),
            "expert_groups": None,
            "groups_per_token": None,
            "group_score": None,
        },
    ],
)
def test_digital_with_every_feature(changes: dict[str, Any]) -> None:
    config = full_config(**changes)
    params, tokens = random_params(config, 0), random_tokens(config, 1, (3, 11))
    actual = _forward(params, tokens, config)
    expected, _ = numpy_model.forward(params, np.asarray(tokens), config, numpy_model.digital)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


def test_every_leaf_matters() -> None:
    """Each reaches the logits of the package's model (their values are those of numpy, by the test above)."""
    config = full_config()
    params, tokens = random_params(config, 0), random_tokens(config, 1, (3, 11))
    before = _forward(params, tokens, config)
    leaves, treedef = jax.tree.flatten_with_path(params)
    for index, (path, leaf) in enumerate(leaves):
        # Halves are not added in one direction only: a shift of all logits of a router changes nothing.
        changed = [value for _, value in leaves]
        changed[index] = leaf * jnp.asarray(np.random.default_rng(2).uniform(0.2, 1.8, leaf.shape), leaf.dtype)
        after = _forward(jax.tree.unflatten(treedef, changed), tokens, config)
        assert np.abs(after - before).max() > 100 * ROUNDING * np.abs(before).max(), jax.tree_util.keystr(path)


def check(
    spec: AnalogSpec,
    programmed: ProgrammedWeights,
    ranges: Calibration | None,
    plans: list[Plan],
    config: ModelConfig = CONFIG,
) -> None:
    """Compares all plans with numpy, and asserts that each differs from digital by far more than what is tolerated."""
    params, tokens = random_params(config, 0), random_tokens(config, 1, (BATCH, SEQ))
    digital, _ = numpy_model.forward(params, np.asarray(tokens), config, numpy_model.digital)
    for plan in plans:
        actual = _forward(params, tokens, config, plan=plan, spec=spec, programmed=programmed, calibration=ranges)
        product = analog_product(plan, spec, programmed, ranges, config)
        expected, _ = numpy_model.forward(params, np.asarray(tokens), config, product)
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


@pytest.mark.parametrize("static", [True, False])
def test_every_kind_of_module(static: bool) -> None:
    """Latent attention, shared experts and a dense layer between layers with experts; in turn on crossbars and not."""
    config = full_config()
    programmed = programmed_by_hand(random_params(config, 0), 2, noise=0.1, per_column=False)
    spec = analog_spec(adc_bound=3.0, tile_rows=TILE_ROWS)
    everything = all_analog(config)
    plans = [
        everything,
        dataclasses.replace(
            everything,
            experts=jnp.asarray(np.random.default_rng(3).random((2, config.num_experts)) < 0.5),
            attention=jnp.asarray([False, True, False]),
            shared_experts=jnp.asarray([False, True]),
            lm_head=jnp.asarray(False),
        ),
        dataclasses.replace(
            everything,
            attention=jnp.asarray([True, False, False]),
            shared_experts=jnp.asarray([True, False]),
            dense_ffn=jnp.asarray([False]),
        ),
    ]
    check(spec, programmed, random_ranges(config, 5) if static else None, plans, config)
