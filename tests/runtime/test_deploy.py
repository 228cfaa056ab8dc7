"""Chips whose experts have their own age, epoch and factors, and probing them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.programming import ProgrammedWeights, program, with_maxima
from hetmoe.analog.spec import analog_spec
from hetmoe.errors import InputError
from hetmoe.models.matrices import crossbar_matrices
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.runtime.deploy import (
    Chips,
    check_drifting,
    deployed_weights,
    fresh_chips,
    probe_experts,
    probe_ranges,
)
from hetmoe.runtime.probe import change_variance
from tests.runtime.small import CONFIG, SPEC, model

KEY = jax.random.key(3)
SHAPE = (CONFIG.num_layers, CONFIG.num_experts)


def deviations(chips: Chips) -> dict[str, np.ndarray]:
    targets = crossbar_matrices(model().params.layers, dense=False)
    held = deployed_weights(KEY, model().params, SPEC, chips).layers
    return {name: np.asarray(held[name].w) - np.asarray(targets[name]) for name in EXPERT_MATRICES}


def aged(age: float) -> Chips:
    return fresh_chips(*SHAPE).replace(age=jnp.full(SHAPE, age, jnp.float32))


@pytest.mark.parametrize("age", [60.0, 86400.0])
def test_chips_of_one_age_are_those_of_program(age: float) -> None:
    """But for the epoch, which is folded into the key of each matrix: the same device, time and maxima."""
    params, at_age = model().params, dataclasses.replace(SPEC, time_s=age)
    found = deployed_weights(KEY, params, SPEC, aged(age))
    whole = program(KEY, params, at_age, dense=False)
    for name in EXPERT_MATRICES:
        w, wanted = np.asarray(found.layers[name].w), np.asarray(whole.layers[name].w)
        target = np.asarray(crossbar_matrices(params.layers, dense=False)[name])
        spread = [np.square(values - target).sum() for values in (w, wanted)]
        np.testing.assert_allclose(spread[0], spread[1], rtol=0.15)  # other draws of one distribution: 7,680 weights
        columns = np.abs(w).max(axis=(-2, -1))
        np.testing.assert_allclose(np.asarray(found.layers[name].weight_max).max(axis=(-2, -1)), columns, rtol=1e-6)
    assert found.lm_head is None and not found.dense_layers


def test_the_noise_of_a_seed_stays_while_it_ages() -> None:
    young, old = deviations(aged(0.0)), deviations(aged(600.0))
    for name in EXPERT_MATRICES:
        assert np.corrcoef(young[name].ravel(), old[name].ravel())[0, 1] > 0.5


def test_an_expert_that_is_programmed_again_draws_anew_and_alone() -> None:
    chips = aged(60.0)
    again = chips.replace(epoch=chips.epoch.at[1, 2].set(1))
    before, after = deviations(chips), deviations(again)
    same = np.ones(SHAPE, bool)
    same[1, 2] = False
    for name in EXPERT_MATRICES:
        np.testing.assert_array_equal(before[name][same], after[name][same])
        noise = [values[name][1, 2].ravel() for values in (before, after)]
        off = [values - values.mean() for values in noise]
        # Independent up to drift, which shrinks both: |correlation| of 960 pairs.
        assert abs(np.corrcoef(*off)[0, 1]) < 5 / np.sqrt(noise[0].size) + 0.1


def test_ages_are_those_of_each_expert() -> None:
    chips = aged(60.0)
    one_old = deviations(chips.replace(age=chips.age.at[0, 1].set(1e6)))
    young, old = deviations(chips), deviations(aged(1e6))
    for name in EXPERT_MATRICES:
        np.testing.assert_allclose(one_old[name][0, 1], old[name][0, 1], atol=1e-7)
        np.testing.assert_allclose(one_old[name][0, 0], young[name][0, 0], atol=1e-7)


def test_factors_multiply_what_was_read() -> None:
    chips = aged(60.0)
    factor = chips.factor.at[1, 3, 2].set(1.5)
    plain = deployed_weights(KEY, model().params, SPEC, chips).layers
    found = deployed_weights(KEY, model().params, SPEC, chips.replace(factor=factor)).layers
    name = EXPERT_MATRICES[2]
    np.testing.assert_allclose(found[name].w[1, 3], 1.5 * plain[name].w[1, 3], rtol=1e-6)
    np.testing.assert_allclose(found[name].weight_max[1, 3], 1.5 * plain[name].weight_max[1, 3], rtol=1e-6)
    np.testing.assert_array_equal(found[name].w[0], plain[name].w[0])
    np.testing.assert_array_equal(found[EXPERT_MATRICES[0]].w, plain[EXPERT_MATRICES[0]].w)


def test_temperature_scales_the_noise() -> None:
    targets = crossbar_matrices(model().params.layers, dense=False)
    hot = deviations(aged(60.0).replace(noise=jnp.float32(2.0)))
    wanted = program(KEY, model().params, dataclasses.replace(SPEC, time_s=60.0, noise_scale=4.0), dense=False)
    for name in EXPERT_MATRICES:
        size = np.square(np.asarray(wanted.layers[name].w) - np.asarray(targets[name])).sum()
        np.testing.assert_allclose(np.square(hot[name]).sum(), size, rtol=0.15)


@pytest.mark.parametrize("bits", [None, 8, 10])
def test_probing_reads_what_chips_hold(bits: int | None) -> None:
    """Through tiles of 16 rows and their converters, against the weights themselves."""
    spec = analog_spec(
        "pcm", noise_scale=2.0, time_s=1.0, tile_rows=16, adc_bound=4.0, adc_bits=bits, dac_bits=None if not bits else 8
    )
    chips, probes, params = aged(3600.0), 400, model().params
    held = deployed_weights(KEY, params, spec, chips)
    found = probe_experts(jax.random.key(9), params, held, spec, probes)
    targets = crossbar_matrices(params.layers, dense=False)
    for column, name in enumerate(EXPERT_MATRICES):
        w, off = np.asarray(targets[name], np.float64), np.asarray(held.layers[name].w) - np.asarray(targets[name])
        exact = np.square(off).sum(axis=(-2, -1))
        for place in np.ndindex(SHAPE):
            error = np.sqrt(float(change_variance(jnp.asarray(off[place]), probes)))
            slack = 0.0 if bits is None else 0.02 * exact[place]  # converters add a variance that is not in `error`
            assert abs(float(found.change[*place, column]) - exact[place]) < 5 * error + slack
        np.testing.assert_allclose(found.size[..., column], np.square(w).sum(axis=(-2, -1)), rtol=1e-5)
        along = (w * (w + off)).sum(axis=(-2, -1)) / np.square(w).sum(axis=(-2, -1))
        limit = 6 * np.sqrt(np.asarray(found.scale_variance[..., column]))
        assert (np.abs(np.asarray(found.scale[..., column]) - along) < limit).all()
        assert (along < 0.95).all() and (limit < 0.05).all()  # drift is seen


def test_the_error_of_the_converters_is_not_taken_for_noise() -> None:
    """Chips that hold their targets exactly, read by coarse ADCs: all that is seen is rounding, tile by tile."""
    spec = analog_spec("pcm", time_s=1.0, tile_rows=16, adc_bound=4.0, adc_bits=6)
    params = model().params
    targets = crossbar_matrices(params.layers, dense=False)
    hold = jax.vmap(jax.vmap(lambda w: with_maxima(w.astype(jnp.float32), spec)))
    exact = {name: hold(targets[name]) for name in EXPERT_MATRICES}
    exact = ProgrammedWeights(layers=exact, dense_layers={}, lm_head=None)
    found = probe_experts(jax.random.key(9), params, exact, spec, 400)
    for column, name in enumerate(EXPERT_MATRICES):
        rows, columns = targets[name].shape[-2:]
        for place in np.ndindex(SHAPE):
            w = np.asarray(targets[name][place])
            ranges = np.asarray(probe_ranges(targets[name][place], exact.layers[name].weight_max[place], spec))
            blocks = np.array_split(w, -(-rows // 16))
            steps = [2 * r * 4.0 * np.abs(b).max() / 62 for r, b in zip(ranges, blocks, strict=True)]
            rounding = columns * sum(step**2 / 12 for step in steps)  # in every column one error of each tile
            assert len(blocks) > 1
            # 400 probes of `columns` errors each: their mean square is known to 1 % and better.
            assert abs(float(found.change[*place, column])) < 0.15 * rounding


def test_probes_are_codes_that_do_not_clip() -> None:
    rng = np.random.default_rng(0)
    spec = dataclasses.replace(SPEC, adc_bound=jnp.float32(0.5))
    held = rng.normal(size=(40, 8)).astype(np.float32) * np.geomspace(0.1, 1, 40)[:, None]
    most = np.abs(held)
    blocks = [(0, 14), (14, 13), (27, 13)]
    weight_max = np.stack([most[start : start + size].max(keepdims=True)[0] for start, size in blocks])
    ranges = np.asarray(probe_ranges(jnp.asarray(held), jnp.asarray(weight_max), spec))
    codes = 127 / ranges  # of an input of one, with 8 bits
    np.testing.assert_allclose(codes, np.round(codes), rtol=1e-6)
    for reach, (start, size), top in zip(ranges, blocks, weight_max, strict=True):
        spread = np.linalg.norm(held[start : start + size], axis=0).max()
        assert reach * 0.5 * top[0] >= 6 * spread * (1 - 1e-6)
        coarser = 127 / (np.round(127 / reach) + 1)
        assert coarser * 0.5 * top[0] < 6 * spread  # the next smaller range would not do


def test_probing_does_not_clip_large_tiles() -> None:
    """512 rows of equal weights: outputs spread far beyond a quarter of the range, which would clip a third of them."""
    w = jnp.ones((1, 1, 512, 8), jnp.float32)
    spec = analog_spec("pcm", time_s=1.0, adc_bound=3.0)
    ranges = probe_ranges(w[0, 0], jnp.ones((1, 1)), spec)
    assert float(ranges[0]) * 3.0 >= 6 * np.sqrt(512)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (analog_spec("additive"), "no drift model"),
        (analog_spec("pcm"), "time_s"),
        (analog_spec("pcm", time_s=1.0, drift_compensation=True), "drift_compensation"),
    ],
)
def test_chips_must_drift_by_themselves(spec, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_drifting(spec)
