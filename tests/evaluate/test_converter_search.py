"""The search over K and lambda: output errors against a numpy crossbar, losses against plain evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.calibration import RangeMethod, calibration_from
from hetmoe.analog.programming import program
from hetmoe.analog.spec import analog_spec
from hetmoe.errors import InputError
from hetmoe.evaluate.calibrate import calibrate, collect_statistics
from hetmoe.evaluate.converter_search import search_by_loss, search_by_output
from hetmoe.models.config import ModelConfig
from hetmoe.models.model import Model
from hetmoe.models.trajectory import trajectory
from hetmoe.models.transformer import forward
from hetmoe.placement.plan import all_analog, experts_analog
from tests.models.tiny import full_config, random_params, random_tokens, tiny_config
from tests.numpy_reference import crossbar_matmul

METHODS = [RangeMethod(k=k, min_tokens=1) for k in (2.0, 5.0, 40.0)]
BOUNDS = [0.5, 3.0]
SPEC = analog_spec(tile_rows=12, dac_bits=6, adc_bits=5)


def made(config: ModelConfig) -> Model:
    return Model(params=random_params(config, 0), config=config, tokenizer=None, eos_token_id=0, name="tiny")


def statistics_of(model: Model, tokens: jax.Array, histogram: bool = False):
    return collect_statistics(model.params, tokens, model.config, tile_rows=12, batch=2, histogram=histogram)


def test_output_error_of_every_expert_matrix_is_that_of_a_numpy_crossbar() -> None:
    model = made(tiny_config())
    tokens = random_tokens(model.config, 1, (3, 10))
    statistics = statistics_of(model, tokens)
    found = search_by_output(model, statistics, tokens, SPEC, METHODS, BOUNDS, dense=False)
    kept = trajectory(model.params, tokens, model.config)
    x, chosen = np.asarray(kept.ffn_in[0]), np.asarray(kept.routing.chosen[0])
    experts = model.params.layers.moe.experts
    for m, how in enumerate(METHODS):
        ranges = {site: np.asarray(r[0]) for site, r in calibration_from(statistics, how).layers.items()}
        for b, bound in enumerate(BOUNDS):
            errors, norms = dict.fromkeys(("gate", "up", "down"), 0.0), dict.fromkeys(("gate", "up", "down"), 0.0)
            for expert in range(8):
                rows = x[np.any(chosen == expert, axis=1)]
                if not len(rows):
                    continue
                w = {n: np.asarray(getattr(experts, n)[0, expert]) for n in ("gate", "up", "down")}
                gate = rows @ w["gate"]
                inputs = {"gate": rows, "up": rows, "down": (gate / (1 + np.exp(-gate)) * (rows @ w["up"]))}
                for name, values in inputs.items():
                    site = "experts_mid" if name == "down" else "experts_in"
                    y = crossbar_matmul(
                        values.astype(np.float32), w[name], input_range=ranges[site][expert], dac_bits=6, adc_bits=5,
                        adc_bound=bound, tile_rows=12,
                    )  # fmt: skip
                    errors[name] += float(np.sum((y - values @ w[name]) ** 2, dtype=np.float64))
                    norms[name] += float(np.sum((values @ w[name]) ** 2, dtype=np.float64))
            for name in errors:
                # A code that sits on a rounding boundary may differ: at most a step of hundreds of sums.
                np.testing.assert_allclose(found.by_matrix[name][m, b], errors[name] / norms[name], rtol=0.02)
    np.testing.assert_allclose(found.cost, np.mean([found.by_matrix[n] for n in ("gate", "up", "down")], axis=0))
    best = np.unravel_index(np.argmin(found.cost), found.cost.shape)
    assert found.best == (METHODS[best[0]], BOUNDS[best[1]])


def test_all_matrices_are_searched_and_ideal_converters_make_no_error() -> None:
    model = made(full_config())
    tokens = random_tokens(model.config, 1, (2, 9))
    wide = [RangeMethod(method="max", min_tokens=1)]
    ideal = analog_spec(tile_rows=12, dac_bits=None, adc_bits=None)
    found = search_by_output(model, statistics_of(model, tokens), tokens, ideal, wide, [50.0], dense=True)
    names = {"gate", "up", "down", "q_a", "q_b", "kv_a", "kv_b", "o", "shared_gate", "shared_up", "shared_down"}
    assert found.by_matrix.keys() == names | {"ffn_gate", "ffn_up", "ffn_down", "lm_head"}
    assert found.cost.shape == (1, 1) and found.cost[0, 0] < 1e-12
    coarse = search_by_output(model, statistics_of(model, tokens), tokens, SPEC, wide, [50.0], dense=True)
    assert all(cost[0, 0] > 1e-4 for cost in coarse.by_matrix.values())


def test_loss_is_that_of_the_model_with_its_converters() -> None:
    model = made(tiny_config())
    windows = random_tokens(model.config, 2, (3, 11))
    statistics = statistics_of(model, windows[:, :-1])
    noisy = dataclasses.replace(SPEC, noise_scale=jnp.float32(9.0))  # set aside by the search
    found = search_by_loss(model, statistics, windows, noisy, experts_analog(model.config), METHODS, BOUNDS)
    assert found.by_matrix == {}
    clean = dataclasses.replace(SPEC, noise_scale=jnp.float32(0))
    chip = jax.jit(program, static_argnames="dense")(jax.random.key(9), model.params, clean, dense=False)
    logits_of = jax.jit(
        lambda spec, ranges: forward(
            model.params, windows[:, :-1], model.config, plan=experts_analog(model.config), spec=spec, programmed=chip,
            calibration=ranges,
        )
    )  # fmt: skip
    for m, how in enumerate(METHODS):
        ranges = calibrate(model.params, windows[:, :-1], model.config, how, tile_rows=12, batch=2)
        for b, bound in enumerate(BOUNDS):
            wide = np.asarray(logits_of(clean.replace(adc_bound=jnp.float32(bound)), ranges), np.float64)
            wide -= wide.max(-1, keepdims=True)
            log_probs = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
            loss = -np.take_along_axis(log_probs, np.asarray(windows)[:, 1:, None], axis=-1).mean()
            np.testing.assert_allclose(found.cost[m, b], loss, rtol=1e-4)


def test_statistics_are_collected_once_for_all_methods() -> None:
    model = made(tiny_config())
    tokens = random_tokens(model.config, 3, (5, 8))
    statistics = statistics_of(model, tokens, histogram=True)
    for how in (RangeMethod(k=7.0), RangeMethod(method="max"), RangeMethod(method="quantile", quantile=0.9)):
        again = calibrate(model.params, tokens, model.config, how, tile_rows=12, batch=2)
        jax.tree.map(np.testing.assert_array_equal, calibration_from(statistics, how), again)


def test_bad_candidates_are_refused() -> None:
    model = made(tiny_config())
    tokens = random_tokens(model.config, 1, (2, 5))
    statistics = statistics_of(model, tokens)
    for methods, bounds, message in (
        ([], [1.0], "at least one"),
        (METHODS, [], "at least one"),
        (METHODS, [0.0], "=0.0"),
    ):
        with pytest.raises(InputError, match=message):
            search_by_output(model, statistics, tokens, SPEC, methods, bounds, dense=False)
        with pytest.raises(InputError, match=message):
            search_by_loss(model, statistics, tokens, SPEC, all_analog(model.config), methods, bounds)
