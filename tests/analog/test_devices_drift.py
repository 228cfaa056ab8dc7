"""Drift and read noise of every device that has them, against the published formulas in float64."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.devices import GroupRange, Stream, get_device

POWER_LAW = ["pcm", "hermes", "hermes1", "state_independent"]
G_MAX = {"pcm": 25.0, "hermes": 20.7, "hermes1": 10.35, "state_independent": 25.0}
T_0 = {"pcm": 20.0, "hermes": 300.0, "hermes1": 200.0, "state_independent": 20.0}
T_READ = {"pcm": 250e-9, "hermes": 512e-9, "hermes1": 512e-9, "state_independent": 250e-9}
UNIT = GroupRange(jnp.float32([[-1.0]]), jnp.float32([[1.0]]))


def sigma(name, r):
    """Programming noise over g_max."""
    if name == "pcm":
        return (0.26348 + 1.9650 * r - 1.1731 * r**2) / 25
    if name == "hermes":
        return (0.16603222 + 4.71806468 * r - 8.48101252 * r**2 + 4.68961419 * r**3) / 20.7
    if name == "hermes1":
        return (0.15781817 + 2.32443916 * r - 2.16310839 * r**2 + 0.68841818 * r**3) / 10.35
    return np.full_like(r, 0.2 / 25)


def mu(name, r):
    log = np.log(np.maximum(r, 1e-7))
    if name == "pcm":
        return np.clip(-0.0155 * log + 0.0244, 0.049, 0.1)
    if name == "state_independent":
        return np.full_like(r, 0.1)
    return np.where(r < 0.0945, np.clip(-0.0387 * log - 0.0182, 0.0720, 0.13), -0.0436 * r**2 - 0.0126 * r + 0.0736)


def sd(name, r):
    log = np.log(np.maximum(r, 1e-7))
    if name == "pcm":
        return np.clip(-0.0125 * log - 0.0059, 0.008, 0.045)
    if name == "hermes":
        low, high = np.clip(-0.0117 * log - 0.0057, 0.0091, 0.04), -0.0118 * r**2 + 0.0093 * r + 0.0073
        return np.where(r < 0.3055, low, high)
    if name == "hermes1":
        low, high = np.clip(-0.0120 * log - 0.0023, 0.0124, 0.04), -0.0165 * r**2 + 0.0116 * r + 0.0104
        return np.where(r < 0.3039, low, high)
    return np.full_like(r, 0.05)


def q(name, r):
    log = np.log(np.maximum(r, 1e-7))
    if name == "pcm":
        return np.minimum(0.2, 0.0088 / np.maximum(r**0.65, 1e-3))
    if name == "hermes":
        low = np.clip(-0.0117 * log - 0.0069, 0.015, 0.04)
        return np.where(r < 0.16, low, 0.0069 * r**3 - 0.0280 * r**2 + 0.0211 * r + 0.0123)
    if name == "hermes1":
        low = np.clip(-0.0078 * log + 0.0038, 0.0179, 0.04)
        return np.where(r < 0.1591, low, 0.0664 * r**3 - 0.1352 * r**2 + 0.0768 * r + 0.0088)
    return np.full_like(r, 1 / 25)


def growth(name, time_s):
    t = time_s + T_0[name]
    return math.sqrt(math.log((t + T_READ[name]) / (2 * T_READ[name])))


def program(device, w, normals, *, time_s, noise_scale=1.0, scale=UNIT):
    """Programs `w`; a stream not named in `normals` draws zeros. Returns (initial, at_time) in float64."""
    w = jnp.asarray(w, jnp.float32)

    def draw(stream):
        return jnp.broadcast_to(jnp.asarray(normals.get(stream, 0.0), jnp.float32), w.shape)

    result = device.program(w, scale=scale, draw=draw, noise_scale=noise_scale, time_s=time_s)
    return tuple(np.asarray(value, np.float64) for value in result)


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def assert_moments(sample, mean, variance, spread):
    """Mean within 4.5 standard errors, variance within 4.5 of its own, `spread` the fourth central moment."""
    n = sample.shape[0]
    assert np.all(np.abs(sample.mean(0) - mean) < 4.5 * np.sqrt(variance / n))
    assert np.all(np.abs(sample.var(0, ddof=1) - variance) < 4.5 * np.sqrt((spread - variance**2) / n))


# Both sides of every switch and clip; they lie at 0.0078, 0.011, 0.023, 0.07, 0.0945, 0.159, 0.16, 0.2, 0.3039, 0.3055.
LEVELS = np.float32(
    [
        0,
        1e-8,
        1e-6,
        1e-3,
        0.006,
        0.009,
        0.015,
        0.02,
        0.03,
        0.05,
        0.08,
        0.094,
        0.095,
        0.12,
        0.158,
        0.1595,
        0.17,
        0.25,
        0.303,
        0.3047,
        0.31,
        0.5,
        0.7,
        0.9,
        1,
    ]
)


@pytest.mark.parametrize("name", POWER_LAW)
def test_curves_at_all_levels(name):
    device = get_device(name)
    g, r = jnp.asarray(LEVELS * np.float32(G_MAX[name])), LEVELS.astype(np.float64)
    for found, expected in ((device.drift_mean(g), mu(name, r)), (device.drift_std(g), sd(name, r))):
        np.testing.assert_allclose(found, expected, rtol=5e-5)
    np.testing.assert_allclose(device.read_q(g), q(name, r), rtol=5e-5)
    for time_s in (0.0, 1.0, 3600.0, 3.15e7):
        np.testing.assert_allclose(device.read_growth(jnp.float32(time_s)), growth(name, time_s), rtol=1e-6)


def test_hand_computed_points():
    pcm, hermes = get_device("pcm"), get_device("hermes")
    # log 0.1 = -2.302585: 0.0155 * 2.302585 + 0.0244, 0.0125 * 2.302585 - 0.0059, 0.0088 / 10**-0.65.
    np.testing.assert_allclose(pcm.drift_mean(jnp.float32([2.5])), 0.0600901, rtol=1e-5)
    np.testing.assert_allclose(pcm.drift_std(jnp.float32([2.5])), 0.0228823, rtol=1e-5)
    np.testing.assert_allclose(pcm.read_q(jnp.float32([2.5])), 0.0393080, rtol=1e-5)
    np.testing.assert_allclose(hermes.drift_mean(jnp.float32([20.7])), 0.0174, rtol=1e-5)
    np.testing.assert_allclose(hermes.read_q(jnp.float32([20.7])), 0.0123, rtol=1e-5)


@pytest.mark.parametrize("name", POWER_LAW)
def test_whole_chain_element_by_element(name):
    """All six streams at once on random weights of both signs, against the formulas of both devices of the pair."""
    shape, c, time_s = (300, 20), 1.5, 86400.0
    w = np.random.default_rng(5).uniform(-1, 1, shape).astype(np.float32)
    w[:50] *= np.float32(0.02)
    w[0] = 0
    normals = {stream: normal(20 + stream, shape) for stream in Stream}
    initial, at_time = program(get_device(name), w, normals, time_s=time_s, noise_scale=c)

    expected = {}
    for sign, polarity in ((1, "PLUS"), (-1, "MINUS")):
        z = {kind: normals[Stream[f"{kind}_{polarity}"]].astype(np.float64) for kind in ("PROGRAM", "DRIFT", "READ")}
        r = np.maximum(sign * w.astype(np.float64), 0)
        programmed = np.maximum(0, r + c * sigma(name, r) * z["PROGRAM"])
        nu = np.abs(mu(name, r) + sd(name, r) * z["DRIFT"])
        drifted = programmed * ((time_s + T_0[name]) / T_0[name]) ** -nu
        read = np.maximum(0, drifted + drifted * q(name, programmed) * growth(name, time_s) * z["READ"])
        expected[polarity] = programmed, read
    np.testing.assert_allclose(initial, expected["PLUS"][0] - expected["MINUS"][0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(at_time, expected["PLUS"][1] - expected["MINUS"][1], rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", POWER_LAW)
def test_drift_exponents_have_the_moments_of_a_folded_gaussian(name):
    levels = np.float32([0.004, 0.05, 0.2, 0.5, 1.0])
    w, time_s = np.tile(levels, (20_000, 1)), 1e6
    _, drifted = program(get_device(name), w, {Stream.DRIFT_PLUS: normal(31, w.shape)}, time_s=time_s)
    nu = -np.log(drifted / w) / math.log1p(time_s / T_0[name])
    assert np.all(nu >= -1e-7)
    m, s = mu(name, levels.astype(np.float64)), sd(name, levels.astype(np.float64))
    erf = np.array([math.erf(value) for value in m / (s * math.sqrt(2))])
    mean = s * math.sqrt(2 / math.pi) * np.exp(-0.5 * (m / s) ** 2) + m * erf
    variance = m**2 + s**2 - mean**2
    fourth = ((nu - nu.mean(0)) ** 4).mean(0)
    assert_moments(nu, mean, variance, fourth)


@pytest.mark.parametrize("name", POWER_LAW)
def test_a_negative_exponent_is_folded_so_that_nothing_grows(name):
    w = np.tile(np.float32([0.004, 0.05, 0.2, 0.5, 1.0]), (300, 4))
    _, drifted = program(get_device(name), w, {Stream.DRIFT_PLUS: -30.0}, time_s=1e4)
    r = w.astype(np.float64)
    nu = 30 * sd(name, r) - mu(name, r)
    assert np.all(nu > 0)
    np.testing.assert_allclose(drifted, r * (1e4 / T_0[name] + 1) ** -nu, rtol=2e-5)


@pytest.mark.parametrize("name", POWER_LAW)
def test_conductance_falls_with_time_and_starts_at_the_programmed_one(name):
    w = np.random.default_rng(8).uniform(-1, 1, (300, 20)).astype(np.float32)
    kept = {stream: normal(40 + stream, w.shape) for stream in (Stream.DRIFT_PLUS, Stream.DRIFT_MINUS)}
    initial, at_zero = program(get_device(name), w, kept, time_s=0.0)
    np.testing.assert_allclose(at_zero, initial, rtol=1e-6)
    values = [np.abs(program(get_device(name), w, kept, time_s=time)[1]) for time in (0.0, 1.0, 60.0, 3600.0, 1e7)]
    for earlier, later in itertools.pairwise(values):
        assert np.all(later < earlier)


@pytest.mark.parametrize("name", POWER_LAW)
def test_read_noise_in_every_bin(name):
    levels = np.float32([-1.0, -0.3, 0.1, 0.25, 1.0])
    w, time_s = np.tile(levels, (20_000, 1)), 3600.0
    streams = {Stream.READ_PLUS: normal(51, w.shape), Stream.READ_MINUS: normal(52, w.shape)}
    _, read = program(get_device(name), w, streams, time_s=time_s)
    r = np.abs(levels.astype(np.float64))
    drifted = r * (time_s / T_0[name] + 1) ** -mu(name, r)
    std = drifted * q(name, r) * growth(name, time_s)
    assert_moments(read, np.sign(levels) * drifted, std**2, 3 * std**4)


@pytest.mark.parametrize("name", POWER_LAW)
def test_read_noise_never_gives_a_negative_conductance(name):
    _, read = program(get_device(name), np.full((300, 20), 0.5), {Stream.READ_PLUS: -100.0}, time_s=10.0)
    np.testing.assert_array_equal(read, 0.0)


@pytest.mark.parametrize("name", POWER_LAW)
def test_noise_scale_leaves_drift_and_read_noise_alone(name):
    w = np.random.default_rng(9).uniform(-1, 1, (300, 20)).astype(np.float32)
    kinds = [stream for stream in Stream if stream.name.startswith(("DRIFT", "READ"))]
    late = {stream: normal(60 + stream, w.shape) for stream in kinds}
    full = late | {Stream.PROGRAM_PLUS: normal(70, w.shape), Stream.PROGRAM_MINUS: normal(71, w.shape)}
    without = program(get_device(name), w, late, time_s=1e5)[1]
    np.testing.assert_array_equal(program(get_device(name), w, full, time_s=1e5, noise_scale=0.0)[1], without)
    assert np.max(np.abs(without - w)) > 0.1


# CMO/HfOx: an affine map of -0.4..1 to 9..88.199997 uS.
CMO_RANGE = GroupRange(jnp.float32([[-0.4]]), jnp.float32([[1.0]]))
SPAN = (88.199997 - 9.0) / 1.4


def cmo(w, normals, **kwargs):
    """Conductances in uS (initial, at_time) of weights in -0.4..1."""
    return tuple(
        9.0 + (value + 0.4) * SPAN for value in program(get_device("reram_cmo"), w, normals, scale=CMO_RANGE, **kwargs)
    )


@pytest.mark.parametrize("time_s", [1.0, 60.0, 86400.0])
def test_cmo_relaxation(time_s):
    levels = np.float32([-0.2, 0.0, 0.3, 0.5, 0.8])
    w = np.tile(levels, (20_000, 1))
    initial, relaxed = cmo(w, {Stream.DRIFT_PLUS: normal(81, w.shape)}, time_s=time_s)
    std = 0.04201137 * math.log(time_s) + 0.41183342
    np.testing.assert_allclose(initial, 9.0 + (w + 0.4) * SPAN, rtol=0, atol=1e-5)
    variance = np.full(5, std**2)
    assert_moments(relaxed - initial, -0.08900206 * math.log(time_s), variance, 3 * variance**2)


def test_cmo_read_noise():
    time_s, levels = 3600.0, np.float32([-0.3, 0.0, 0.2, 0.4, 0.8])
    w = np.tile(levels, (20_000, 1))
    _, read = cmo(w, {Stream.READ_PLUS: normal(82, w.shape)}, time_s=time_s)
    relaxed = 9.0 + (levels.astype(np.float64) + 0.4) * SPAN - 0.08900206 * math.log(time_s)
    std = 0.0277316483 * np.log10(relaxed) * math.sqrt(math.log((time_s + 1e-6) / 2e-6))
    assert_moments(read, relaxed, std**2, 3 * std**4)


def test_cmo_whole_chain_element_by_element():
    w, time_s, c = np.random.default_rng(6).uniform(-0.4, 1, (300, 20)).astype(np.float32), 1e4, 2.0
    w[0], w[1] = -0.4, 1.0
    z = {stream: normal(90 + stream, w.shape) for stream in (Stream.PROGRAM_PLUS, Stream.DRIFT_PLUS, Stream.READ_PLUS)}
    initial, at_time = cmo(w, z, time_s=time_s, noise_scale=c)
    g = 9.0 + (w.astype(np.float64) + np.float32(0.4)) * SPAN
    programmed = g + c * (0.00081107 + 0.00106879 * g) * z[Stream.PROGRAM_PLUS]
    spread = 0.04201137 * math.log(time_s) + 0.41183342
    relaxed = programmed - 0.08900206 * math.log(time_s) + spread * z[Stream.DRIFT_PLUS]
    std = 0.0277316483 * np.log10(relaxed) * math.sqrt(math.log((time_s + 1e-6) / 2e-6))
    read = np.clip(relaxed + std * z[Stream.READ_PLUS], 9.0, 88.199997)
    np.testing.assert_allclose(initial, programmed, rtol=0, atol=3e-5)
    np.testing.assert_allclose(at_time, read, rtol=0, atol=3e-5)
    assert np.any(read == 9.0)
    assert np.any(read == 88.199997)
    assert np.any(initial < 9.0)  # programming alone is not clipped


def test_cmo_at_time_zero_is_as_programmed():
    w = np.random.default_rng(6).uniform(-0.4, 1, (300, 20)).astype(np.float32)
    z = {stream: normal(95 + stream, w.shape) for stream in (Stream.PROGRAM_PLUS, Stream.DRIFT_PLUS, Stream.READ_PLUS)}
    initial, at_time = cmo(w, z, time_s=jnp.float32(0))
    np.testing.assert_array_equal(at_time, initial)
    assert np.all(np.isfinite(cmo(w, z, time_s=jnp.float32(1e-7))[1]))


def test_cmo_keeps_a_tile_of_equal_weights():
    w = np.full((300, 20), 0.25, np.float32)
    scale = GroupRange(jnp.float32([[0.25]]), jnp.float32([[0.25]]))
    normals = dict.fromkeys(Stream, 1.0)
    for value in program(get_device("reram_cmo"), w, normals, time_s=10.0, scale=scale):
        np.testing.assert_array_equal(value, w)
