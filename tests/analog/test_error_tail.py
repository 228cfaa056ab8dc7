"""Moments of devices against 100,000 chips, slopes of their draws, and tails of single matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.devices import DEVICES, Stream, group_range
from hetmoe.analog.error_tail import draw_slopes, linear_tail, markov_bound, noise_of
from hetmoe.analog.second_moment import Moments, linear_second_moment
from hetmoe.analog.spec import analog_spec
from hetmoe.errors import InputError
from theory.cases import programmed

CHIPS = 100_000


@pytest.mark.parametrize("device", list(DEVICES))
def test_the_second_moment_is_that_of_many_chips(device: str) -> None:
    """Positive inputs; weights that are positive, whose biases add up, of one tile and mixed ones of the other."""
    rng = np.random.default_rng(0)
    w, x = rng.uniform(0.1, 1, (8, 3)), rng.uniform(0.2, 1, (2, 8))
    w[:, 2] *= rng.choice([-1, 1], 8)
    spec = analog_spec(device, noise_scale=1.5)
    noise = noise_of(w, spec)
    off = programmed(jax.random.key(1), w, spec, CHIPS) - w.astype(np.float32)
    errors = np.einsum("tk,ckn->ctn", x, off)
    # The sign of the bias is lost in squares. Five standard errors: one of 10^6 tests is beyond by chance.
    assert (np.abs(errors.mean(axis=0) - x @ noise.mean) < 5 * errors.std(axis=0) / np.sqrt(CHIPS)).all()
    squares = np.square(errors)
    error = squares.std(axis=0, ddof=1) / np.sqrt(CHIPS)
    exact = linear_second_moment(x, noise)
    assert (np.abs(squares.mean(axis=0) - exact) < 5 * error).all()
    spread_only = np.square(x) @ noise.variance
    if device == "pcm":
        # Devices at zero conductance are clipped and pull weights down: no small part, and seen.
        assert (exact > 1.05 * spread_only)[:, :2].all()
        assert (np.abs(squares.mean(axis=0) - spread_only) > 10 * error)[:, :2].all()


def test_bias_of_clipped_pairs_outweighs_their_variance() -> None:
    """All-positive weights and inputs: the bias adds up like rows, the spread like their root."""
    ratios = {}
    for rows in (128, 512, 1024):
        # The same weights again and again, so that the range of a tile is the same.
        w = jnp.tile(
            jnp.abs(jnp.asarray(np.random.default_rng(0).normal(size=(128, 4)), jnp.float32)), (rows // 128, 1)
        )
        noise, x = noise_of(w, analog_spec("pcm")), np.ones((1, rows))
        ratios[rows] = np.square(x @ noise.mean) / (np.square(x) @ noise.variance)
    np.testing.assert_allclose(ratios[512], 4 * ratios[128], rtol=1e-5)
    np.testing.assert_allclose(ratios[1024], 8 * ratios[128], rtol=1e-5)
    assert (ratios[1024] > 10).all()


def test_slopes_of_draws_are_gradients_of_programming() -> None:
    """The largest norm of a weight's gradient in its normals, over draws: at those that clip nothing it is reached."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)), jnp.float32)
    for name in DEVICES:
        spec = analog_spec(name, noise_scale=2.0, tile_rows=8)
        ranges = group_range(w, spec.device.scale_group, spec.options.tile_rows)

        def held(draws, device=spec.device, ranges=ranges):
            return device.program(w, scale=ranges, draw=draws.__getitem__, noise_scale=2.0, time_s=None).initial

        largest = np.zeros(w.shape)
        for seed in range(40):
            keys = jax.random.split(jax.random.key(seed), 2)
            streams = (Stream.PROGRAM_PLUS, Stream.PROGRAM_MINUS)
            draws = {s: jnp.abs(jax.random.normal(k, w.shape, jnp.float32)) for s, k in zip(streams, keys, strict=True)}
            slopes = jax.grad(lambda d: held(d).sum())(draws)  # each weight has its own normals
            largest = np.maximum(largest, np.sqrt(sum(np.square(np.asarray(one)) for one in slopes.values())))
        np.testing.assert_allclose(draw_slopes(w, spec), largest, rtol=1e-4, err_msg=name)


def test_moments_at_a_time_are_not_exact() -> None:
    for ask in (noise_of, draw_slopes):
        with pytest.raises(InputError, match="without time_s"):
            ask(jnp.ones((2, 2)), analog_spec("pcm", time_s=60.0))


def test_tails() -> None:
    with pytest.raises(InputError, match="delta=0"):
        markov_bound(np.ones(1), 0)
    with pytest.raises(InputError, match=r"delta=1\.5"):
        linear_tail(np.ones((1, 1)), Moments(np.zeros((1, 1)), np.ones((1, 1))), np.ones((1, 1)), 1.5)
    np.testing.assert_allclose(markov_bound(np.array([2.0]), 0.25), 4.0)
    # One weight of standard normal noise: |z| exceeds 1 + sqrt(2 log 100) much more seldom than in 1 % of cases.
    tail = linear_tail(np.ones((1, 1)), Moments(np.zeros((1, 1)), np.ones((1, 1))), np.ones((1, 1)), 0.01)
    np.testing.assert_allclose(tail, 1 + np.sqrt(2 * np.log(100)))
    # The column of the largest slope counts, all variances, and the bias as it is; and factors of outputs.
    x, reach = np.array([[1.0, 2.0]]), np.sqrt(2 * np.log(1 / 0.05))
    noise = Moments(np.array([[0.3, 0.0], [0.1, 0.0]]), np.array([[0.0, 1.0], [0.0, 4.0]]))
    slopes = np.array([[0.5, 1.0], [0.1, 2.0]])
    np.testing.assert_allclose(
        linear_tail(x, noise, slopes, 0.05), np.sqrt(0.5**2 + 1 + 16) + reach * np.sqrt(1 + 16), rtol=1e-8
    )
    weighed = linear_tail(x, noise, slopes, 0.05, weights=np.array([[10.0, 0.1]]))
    np.testing.assert_allclose(weighed, np.sqrt(25 + 0.17) + reach * np.sqrt(100 * (0.25 + 0.04)), rtol=1e-8)


@pytest.mark.parametrize("device", list(DEVICES))
def test_moments_of_weights_of_any_magnitude(device: str) -> None:
    """They are proportional to the weights and to their square, far beyond what float32 squares hold."""
    w = np.random.default_rng(0).normal(size=(20, 3))
    spec = analog_spec(device, noise_scale=1.5, tile_rows=8)
    base, slopes = noise_of(w, spec), draw_slopes(w, spec)
    for power in (-80, -30, 70):
        size = 2.0**power
        found = noise_of(w * size, spec)
        np.testing.assert_array_equal(found.mean, base.mean * size)
        np.testing.assert_array_equal(found.variance, base.variance * size**2)
        np.testing.assert_array_equal(draw_slopes(w * size, spec), slopes * size)
    assert np.isfinite(noise_of(0 * w, spec).variance).all()
