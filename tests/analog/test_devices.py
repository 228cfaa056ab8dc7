"""The contract of every device: exactness, shapes, draws, transformations, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.devices import DEVICES, GroupRange, Stream, get_device, group_range
from hetmoe.errors import InputError

NAMES = ["pcm", "hermes", "hermes1", "reram_wan", "reram_cmo", "state_independent", "afm", "additive", "proportional"]
PAIRS = ["pcm", "hermes", "hermes1", "reram_wan", "state_independent"]
DRIFTING = ["pcm", "hermes", "hermes1", "reram_cmo", "state_independent"]
TILE_ROWS = 24


def draws(seed, shape):
    return lambda stream: jnp.asarray(np.random.default_rng([seed, int(stream)]).standard_normal(shape, np.float32))


def make_weights(shape=(2, 70, 12)):
    """Weights of three unequal tiles (24, 23, 23 rows) per matrix; the first matrix's second tile is all zero."""
    w = np.random.default_rng(7).normal(size=shape).astype(np.float32) * 0.03
    w[..., 0, :] = 0.0
    w[0, 24:47] = 0.0
    return jnp.asarray(w)


def program(device, w, *, seed=3, noise_scale=1.0, time_s=None):
    scale = group_range(w, device.scale_group, TILE_ROWS)
    return device.program(w, scale=scale, draw=draws(seed, w.shape), noise_scale=noise_scale, time_s=time_s)


def both(device, w, **kwargs):
    """Weights at once, and a day later where the device drifts."""
    time_s = jnp.float32(86400.0) if device.has_drift else None
    return program(device, w, time_s=time_s, **kwargs)


def test_registry_names_every_device():
    assert list(DEVICES) == NAMES
    for name in NAMES:
        assert get_device(name).name == name
        assert hash(get_device(name)) == hash(dataclasses.replace(get_device(name)))
        assert get_device(name).has_drift == (name in DRIFTING)


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(InputError, match=r"'pmc'.*pcm, hermes, hermes1, reram_wan"):
        get_device("pmc")


def test_group_range_over_every_group():
    w = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    rows = [slice(0, 3), slice(3, 5), slice(5, 7)]  # 7 rows at most 3 per tile
    for name, reduce in (("low", np.min), ("high", np.max)):
        tile = np.concatenate([np.repeat(reduce(w[:, s], (1, 2), keepdims=True), w[:, s].shape[1], 1) for s in rows], 1)
        column_tile = np.concatenate(
            [np.repeat(reduce(w[:, s], 1, keepdims=True), w[:, s].shape[1], 1) for s in rows], 1
        )
        expected = {
            "tile": tile,
            "column_tile": column_tile,
            "column": reduce(w, 1, keepdims=True),
            "matrix": reduce(w, (1, 2), keepdims=True),
        }
        for group, value in expected.items():
            found = getattr(group_range(jnp.asarray(w), group, 3), name)
            assert found.ndim == 3
            np.testing.assert_array_equal(np.broadcast_to(found, np.broadcast_shapes(found.shape, value.shape)), value)
    assert group_range(jnp.asarray(w), "none", 3).low.shape == (1, 1, 1)
    with pytest.raises((InputError, TypeError), match="'row'"):  # the type checker, when on, refuses it first
        group_range(jnp.asarray(w), "row", 3)


@pytest.mark.parametrize(
    ("low", "high", "largest"), [(-3.0, 2.0, 3.0), (-1.0, 2.0, 2.0), (1.0, 2.0, 2.0), (-4.0, -2.0, 4.0)]
)
def test_group_range_largest_is_the_magnitude(low, high, largest):
    assert GroupRange(jnp.float32(low), jnp.float32(high)).largest == largest


@pytest.mark.parametrize("name", NAMES)
def test_zero_noise_scale_gives_the_target_exactly(name):
    w = make_weights()
    result = program(get_device(name), w, noise_scale=jnp.float32(0))
    np.testing.assert_array_equal(result.initial, w)
    np.testing.assert_array_equal(result.at_time, w)


@pytest.mark.parametrize("name", NAMES)
def test_shape_dtype_and_zero_tile_are_kept(name):
    w = make_weights()
    result = both(get_device(name), w)
    for value in result:
        assert value.shape == w.shape
        assert value.dtype == jnp.float32
        assert jnp.all(jnp.isfinite(value))
        np.testing.assert_array_equal(value[0, 24:47], 0.0)
        assert jnp.all(jnp.any(value[1] != w[1], axis=0))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_streams_needed_are_drawn_once(name):
    device, w, used = get_device(name), make_weights(), []

    def draw(stream):
        used.append(stream)
        return jnp.zeros(w.shape, jnp.float32)

    scale = group_range(w, device.scale_group, TILE_ROWS)
    device.program(w, scale=scale, draw=draw, noise_scale=1.0, time_s=None)
    polarities = ("PLUS", "MINUS") if name in PAIRS else ("PLUS",)
    assert sorted(used) == [Stream[f"PROGRAM_{sign}"] for sign in polarities]
    if device.has_drift:
        used.clear()
        device.program(w, scale=scale, draw=draw, noise_scale=1.0, time_s=5.0)
        assert sorted(used) == [
            Stream[f"{kind}_{sign}"] for kind in ("PROGRAM", "DRIFT", "READ") for sign in polarities
        ]


@pytest.mark.parametrize("name", NAMES)
def test_result_depends_on_the_draws_alone(name):
    device, w = get_device(name), make_weights()
    first, second, other = both(device, w), both(device, w), both(device, w, seed=4)
    for index in range(2):
        np.testing.assert_array_equal(first[index], second[index])
        assert not np.array_equal(first[index], other[index])


@pytest.mark.parametrize("name", NAMES)
def test_jit_equals_eager_and_vmap_equals_a_loop(name):
    device, w = get_device(name), make_weights()
    scales = jnp.array([0.0, 0.5, 1.0, 3.0], jnp.float32)
    time_s = jnp.float32(3600.0) if device.has_drift else None

    def run(weights, noise_scale, time):
        return program(device, weights, noise_scale=noise_scale, time_s=time)

    eager = [run(w, scale, time_s) for scale in scales]
    compiled = jax.jit(run)(w, scales[2], time_s)
    batched = jax.vmap(run, in_axes=(None, 0, None))(w, scales, time_s)
    # float32 rounding of values up to 0.13: 1e-6 is about 100 units in the last place of a typical weight of 0.03.
    for index in range(2):
        np.testing.assert_allclose(compiled[index], eager[2][index], rtol=0, atol=1e-6)
        np.testing.assert_allclose(batched[index], np.stack([value[index] for value in eager]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", DRIFTING)
def test_time_is_traced_without_retracing(name):
    device, w, traces = get_device(name), make_weights(), []

    @jax.jit
    def run(time_s):
        traces.append(None)
        return program(device, w, time_s=time_s).at_time

    values = [run(jnp.float32(time)) for time in (1.0, 1e3, 1e6)]
    assert len(traces) == 1
    assert not np.array_equal(values[0], values[1])
    np.testing.assert_allclose(values[1], program(device, w, time_s=1000.0).at_time, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite(name):
    device, w = get_device(name), make_weights()

    def total(weights, noise_scale, time_s):
        result = program(device, weights, noise_scale=noise_scale, time_s=time_s)
        return jnp.sum(result.initial) + jnp.sum(result.at_time)

    gradient = jax.jit(jax.grad(total, (0, 1, 2) if device.has_drift else (0, 1)))
    for noise_scale in (0.0, 1.0, 4.0):
        for time_s in (jnp.float32(0), jnp.float32(1e5)) if device.has_drift else (None,):
            found = gradient(w, jnp.float32(noise_scale), time_s)
            assert all(bool(jnp.all(jnp.isfinite(value))) for value in found)
            assert bool(jnp.any(found[0] != 0))
            assert bool(found[1] != 0)


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_linear_in_the_noise_scale(name):
    """With the same draws, away from clipping; the idle device of a pair, clipped at zero, is linear as well."""
    device = get_device(name)
    shape = make_weights().shape
    values = np.random.default_rng(1).uniform(0.5, 1.0, shape) * np.random.default_rng(2).choice([-1, 1], shape)
    w = jnp.asarray(values, jnp.float32)
    noise = [program(device, w, noise_scale=jnp.float32(c)).initial - w for c in (0.125, 0.25, 0.5)]
    assert float(jnp.std(noise[0])) > 1e-5
    # Each noise is a difference of weights up to 1, so it carries their rounding of 6e-8.
    np.testing.assert_allclose(noise[1], 2 * noise[0], rtol=0, atol=5e-7)
    np.testing.assert_allclose(noise[2], 4 * noise[0], rtol=0, atol=1e-6)
    slope = jax.grad(lambda c: jnp.sum(program(device, w, noise_scale=c).initial))(jnp.float32(0.25))
    np.testing.assert_allclose(slope, jnp.sum(noise[1]) / 0.25, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [2.0**-9, 8.0])
def test_scaling_the_weights_scales_the_result(name, factor):
    device, w = get_device(name), make_weights()
    plain, scaled = both(device, w), both(device, w * factor)
    for index in range(2):
        np.testing.assert_array_equal(scaled[index], plain[index] * np.float32(factor))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DRIFTING])
def test_a_time_without_a_drift_model_is_refused(name):
    message = "1, 86400, 172800 s" if name == "reram_wan" else "publishes no drift"
    with pytest.raises(InputError, match=f"'{name}'.*{message}"):
        program(get_device(name), make_weights(), time_s=86400.0)


def test_other_fit_times_and_acceptances_are_refused():
    wan = get_device("reram_wan")
    assert wan.fixed_times_s == (1.0, 86400.0, 172800.0)
    for time in wan.fixed_times_s:
        assert dataclasses.replace(wan, fit_time_s=time).fit_time_s == time
    with pytest.raises(InputError, match=r"fit_time_s=3600 s.*1, 86400, 172800 s"):
        dataclasses.replace(wan, fit_time_s=3600.0)
    with pytest.raises(InputError, match=r"acceptance_percent=0\.02.*0\.2 and 2"):
        dataclasses.replace(get_device("reram_cmo"), acceptance_percent=0.02)
