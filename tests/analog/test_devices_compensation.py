"""Global drift compensation: one factor per tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.devices import get_device, global_drift_compensation, group_range

TILES = [slice(0, 6), slice(6, 11), slice(11, 16)]  # 16 rows, at most 6 per tile
TILE_ROWS = 6


def weights(seed=0, shape=(2, 16, 9)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_restores_the_mean_magnitude_of_every_tile():
    programmed, drifted = weights(0), 0.6 * weights(1)
    result = np.asarray(global_drift_compensation(programmed, drifted, TILE_ROWS), np.float64)
    for matrix in range(2):
        for rows in TILES:
            before = np.abs(np.asarray(programmed, np.float64)[matrix, rows])
            after = np.abs(np.asarray(drifted, np.float64)[matrix, rows])
            np.testing.assert_allclose(np.abs(result[matrix, rows]).mean(), before.mean(), rtol=1e-5)
            factor = before.mean() / after.mean()
            np.testing.assert_allclose(result[matrix, rows], factor * np.asarray(drifted)[matrix, rows], rtol=1e-5)


def test_undoes_a_uniform_decay_of_each_tile():
    programmed = weights()
    decay = np.ones((1, 16, 1), np.float32)
    for rows, factor in zip(TILES, (0.5, 0.25, 0.8), strict=True):
        decay[:, rows] = factor
    np.testing.assert_allclose(
        global_drift_compensation(programmed, programmed * decay, TILE_ROWS), programmed, rtol=1e-5
    )


def test_without_drift_nothing_changes():
    w = weights()
    np.testing.assert_array_equal(global_drift_compensation(w, w, TILE_ROWS), w)


def test_a_silent_tile_stays_finite():
    w = weights().at[:, 6:11].set(0.0)
    result = global_drift_compensation(weights(), w, TILE_ROWS)
    np.testing.assert_array_equal(result[:, 6:11], 0.0)
    gradient = jax.grad(lambda drifted: jnp.sum(global_drift_compensation(weights(), drifted, TILE_ROWS)))
    assert jnp.all(jnp.isfinite(jax.jit(gradient)(w)))


@pytest.mark.parametrize("name", ["pcm", "hermes"])
def test_brings_a_device_of_little_spread_in_drift_nearer_to_its_weights(name):
    device, w = get_device(name), weights(3, (2, 70, 12))

    def draw(stream):
        return jnp.asarray(np.random.default_rng([4, int(stream)]).standard_normal(w.shape, np.float32))

    scale = group_range(w, device.scale_group, 24)
    initial, at_time = device.program(w, scale=scale, draw=draw, noise_scale=1.0, time_s=3.15e7)
    error = jnp.std(at_time - w)
    compensated = jnp.std(global_drift_compensation(initial, at_time, 24) - w)
    assert compensated < 0.6 * error
