"""Programming noise of every device against the published fits, written here once more in float64."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.devices import GroupRange, Stream, get_device

# Highest power first, r = g / g_max, result in uS; with the g_max the fit refers to (uS).
PAIR_FITS = {
    "pcm": ([-1.1731, 1.9650, 0.26348], 25.0),
    "hermes": ([4.68961419, -8.48101252, 4.71806468, 0.16603222], 20.7),
    "hermes1": ([0.68841818, -2.16310839, 2.32443916, 0.15781817], 10.35),
    "reram_wan": ([-16.815, 45.393, -43.853, 16.030, 0.348], 40.0),
    "state_independent": ([0.2], 25.0),
}
WAN_FITS = {
    1.0: [-16.815, 45.393, -43.853, 16.030, 0.348],
    86400.0: [-16.458, 47.095, -50.773, 22.086, 0.701],
    172800.0: [-11.934, 37.062, -43.507, 20.274, 0.782],
}
# Published sigma / g_max in percent at r = 0, 0.5, 1.
TABLE = {"pcm": (1.05, 3.81, 4.22), "hermes": (0.80, 4.79, 5.28), "hermes1": (1.52, 8.36, 9.73)}
AFM_LOW = [2.939751381126213e-05, -0.00371581208142707, 0.22419685954327148, 2.5797410660159494]
AFM_HIGH = [1.2329755395573392e-05, -0.003054993405157235, 0.2453487119885723, 2.110295720240385]

UNIT = GroupRange(jnp.float32([[-1.0]]), jnp.float32([[1.0]]))


def pair_std(name, r):
    """Sigma / g_max in float64."""
    coefficients, g_max = PAIR_FITS[name]
    return np.polyval(coefficients, np.asarray(r, np.float64)) / g_max


def expected_std(name, w):
    """Standard deviation of W' before clipping at c = 1, for weights in a group of range -1..1."""
    w = np.asarray(w, np.float64)
    if name in PAIR_FITS:
        return pair_std(name, np.abs(w))
    if name == "reram_cmo":
        return (0.00081107 + 0.00106879 * (9.0 + (88.199997 - 9.0) * (w + 1) / 2)) * 2 / (88.199997 - 9.0)
    if name == "afm":
        g = 180 * np.abs(w)
        return np.where(g < 0.6, 0, np.where(g <= 52.5, np.polyval(AFM_LOW, g), np.polyval(AFM_HIGH, g))) / 180
    return np.full_like(w, 0.05) if name == "additive" else np.abs(w)


def program(device, w, normals, noise_scale=1.0):
    """Programs `w` in a group of range -1..1; a stream not named in `normals` draws zeros."""
    w = jnp.asarray(w, jnp.float32)

    def draw(stream):
        return jnp.broadcast_to(jnp.asarray(normals.get(stream, 0.0), jnp.float32), w.shape)

    result = device.program(w, scale=UNIT, draw=draw, noise_scale=noise_scale, time_s=None)
    return np.asarray(result.initial, np.float64)


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("name", TABLE)
def test_published_percentages(name):
    device = get_device(name)
    std = device.programming_std(jnp.float32([0, 0.5, 1]) * device.g_max_us) / device.g_max_us
    np.testing.assert_allclose(np.asarray(std) * 100, TABLE[name], rtol=0, atol=0.0051)


def test_published_percentages_of_the_other_fits():
    wan = get_device("reram_wan")
    np.testing.assert_allclose(wan.programming_std(jnp.float32([20.0])) / 40.0, 0.0506, rtol=0, atol=5e-5)
    afm = get_device("afm").programming_std(jnp.float32([0.59, 0.6, 30, 52.5, 90, 135, 180])) / 180
    expected = [0, 0.0151, 0.0375, 0.0465, 0.0469, 0.0549, 0.1067]
    np.testing.assert_allclose(afm, expected, rtol=0, atol=5.1e-5)


@pytest.mark.parametrize("name", PAIR_FITS)
def test_pair_curve_over_all_conductances(name):
    device, r = get_device(name), np.linspace(0, 1, 101, dtype=np.float32)
    assert device.g_max_us == PAIR_FITS[name][1]
    found = np.asarray(device.programming_std(jnp.asarray(r * np.float32(device.g_max_us)))) / device.g_max_us
    np.testing.assert_allclose(found, pair_std(name, r), rtol=3e-5)


@pytest.mark.parametrize("name", ["pcm", "hermes", "hermes1", "reram_wan"])
def test_relative_noise_does_not_depend_on_g_max(name):
    device = get_device(name)
    half = dataclasses.replace(device, g_max_us=device.g_max_us / 2)
    r = jnp.linspace(0, 1, 11, dtype=jnp.float32)
    expected = device.programming_std(r * device.g_max_us) / 2
    np.testing.assert_allclose(half.programming_std(r * half.g_max_us), expected, rtol=1e-6)


@pytest.mark.parametrize("time_s", WAN_FITS)
def test_wan_has_one_fit_per_time(time_s):
    device, r = dataclasses.replace(get_device("reram_wan"), fit_time_s=time_s), np.linspace(0, 1, 21, dtype=np.float32)
    expected = np.polyval(WAN_FITS[time_s], r.astype(np.float64))
    np.testing.assert_allclose(device.programming_std(jnp.asarray(r * 40)), expected, rtol=5e-5)
    moved = program(device, np.full((1, 1), 0.7), {Stream.PROGRAM_PLUS: 1.0}) - np.float32(0.7)
    np.testing.assert_allclose(moved, [[np.polyval(WAN_FITS[time_s], 0.7) / 40]], rtol=1e-5)


@pytest.mark.parametrize(("percent", "expected"), [(0.2, [0.01043018, 0.09507835]), (2.0, [0.11283101, 1.00702072])])
def test_cmo_acceptance_ranges(percent, expected):
    device = dataclasses.replace(get_device("reram_cmo"), acceptance_percent=percent)
    found = device.programming_std(jnp.float32([9.0, 88.2]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


NAMES = [*PAIR_FITS, "reram_cmo", "afm", "additive", "proportional"]
BINS = np.float32([-1, -0.5, -0.3, 0.3, 0.4, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("name", NAMES)
def test_draws_before_clipping_follow_the_fit_in_every_bin(name):
    """One device of each weight draws, the idle one draws zero; c = 0.5 keeps the rest 5 sigma from clipping."""
    n, c = 20_000, 0.5
    w = np.tile(BINS, (n, 1))
    z = normal(11, w.shape)
    streams = {Stream.PROGRAM_PLUS: z}
    if name in PAIR_FITS:
        streams = {
            Stream.PROGRAM_PLUS: np.where(w > 0, z, np.float32(0)),
            Stream.PROGRAM_MINUS: np.where(w < 0, z, np.float32(0)),
        }
    noise = program(get_device(name), w, streams, noise_scale=c) - w
    sigma = c * expected_std(name, BINS)
    assert np.all(np.abs(noise.mean(0)) < 4.5 * sigma / math.sqrt(n))
    assert np.all(np.abs(noise.std(0, ddof=1) - sigma) < 4.5 * sigma / math.sqrt(2 * (n - 1)))
    # The same draws, element by element: this resolves the fit far below its sampling error.
    sign = np.where(w < 0, -1, 1) if name in PAIR_FITS else 1
    np.testing.assert_allclose(noise, sign * sigma * np.asarray(z, np.float64), rtol=0, atol=3e-6)


def censored_moments(g, sigma):
    """Mean and variance of max(0, g + sigma z)."""
    cumulative = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in g / sigma])
    density = np.exp(-0.5 * (g / sigma) ** 2) / math.sqrt(2 * math.pi)
    mean = g * cumulative + sigma * density
    return mean, (g**2 + sigma**2) * cumulative + g * sigma * density - mean**2


def assert_moments(sample, mean, variance):
    """Sample mean and variance within 4.5 standard errors, the variance's from the fourth central moment."""
    n = sample.shape[0]
    centred = sample - sample.mean(0)
    spread = np.sqrt(((centred**4).mean(0) - variance**2) / n)
    assert np.all(np.abs(sample.mean(0) - mean) < 4.5 * np.sqrt(variance / n))
    assert np.all(np.abs(sample.var(0, ddof=1) - variance) < 4.5 * spread)


@pytest.mark.parametrize("c", [1.0, 3.0])
@pytest.mark.parametrize("name", PAIR_FITS)
def test_programmed_conductance_has_the_moments_of_a_censored_gaussian(name, c):
    r = np.float32([0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
    w = np.tile(r, (20_000, 1))
    z = normal(12, w.shape)
    conductance = program(get_device(name), w, {Stream.PROGRAM_PLUS: z}, noise_scale=c)
    assert np.all(conductance >= 0)
    assert np.any(conductance[:, :3] == 0)
    assert_moments(conductance, *censored_moments(r.astype(np.float64), c * pair_std(name, r)))


@pytest.mark.parametrize("name", PAIR_FITS)
def test_pair_is_the_difference_of_two_censored_devices(name):
    """Idle devices clip at half their draws: they spread a zero weight and pull all others toward zero."""
    r = np.float32([0, 0.05, -0.05, 0.5, -0.5, 1.0, -1.0, 0.01])
    w = np.tile(r, (20_000, 1))
    streams = {Stream.PROGRAM_PLUS: normal(13, w.shape), Stream.PROGRAM_MINUS: normal(14, w.shape)}
    found = program(get_device(name), w, streams)
    sigma_zero = pair_std(name, 0.0)
    plus = censored_moments(np.maximum(r, 0).astype(np.float64), pair_std(name, np.maximum(r, 0)))
    minus = censored_moments(np.maximum(-r, 0).astype(np.float64), pair_std(name, np.maximum(-r, 0)))
    assert_moments(found, plus[0] - minus[0], plus[1] + minus[1])
    # The two hand-made values of a zero weight and of a full one.
    np.testing.assert_allclose(plus[1][0] + minus[1][0], sigma_zero**2 * (1 - 1 / math.pi), rtol=1e-12)
    np.testing.assert_allclose(plus[0][5] - minus[0][5], 1 - sigma_zero / math.sqrt(2 * math.pi), rtol=1e-12)


def test_bias_of_pcm_is_042_percent_of_the_maximum_per_noise_scale():
    w = np.tile(np.float32([0.5, 0.6, 0.7, 0.8, 0.9, 1.0, -0.7, -1.0]), (20_000, 1))
    streams = {Stream.PROGRAM_PLUS: normal(15, w.shape), Stream.PROGRAM_MINUS: normal(16, w.shape)}
    for c in (0.5, 1.0):
        bias = (program(get_device("pcm"), w, streams, noise_scale=c) - w).mean(0)
        # Standard error of the mean: at most 0.043 / sqrt(20000) = 3e-4 times c.
        np.testing.assert_allclose(bias / c, [-0.0042] * 6 + [0.0042] * 2, rtol=0, atol=4.5 * 3e-4)


@pytest.mark.parametrize("name", PAIR_FITS)
def test_both_polarities_draw_on_their_own(name):
    w = np.zeros((1, 1), np.float32)
    sigma = pair_std(name, 0.0)
    for plus, minus in ((1.0, 0.0), (0.0, 1.0), (2.0, 1.0), (-1.0, -2.0), (-1.0, 2.0)):
        found = program(get_device(name), w, {Stream.PROGRAM_PLUS: plus, Stream.PROGRAM_MINUS: minus})
        np.testing.assert_allclose(found, [[sigma * (max(plus, 0) - max(minus, 0))]], rtol=1e-5, atol=1e-9)


def test_afm_drops_small_weights_and_switches_fit():
    g = np.array([[0.0, 0.3, -0.59, 0.61, -20.0, 52.4, 52.6, -180.0]])
    found = 180 * program(get_device("afm"), g / 180, {Stream.PROGRAM_PLUS: 1.0})
    sigma = np.where(np.abs(g) <= 52.5, np.polyval(AFM_LOW, np.abs(g)), np.polyval(AFM_HIGH, np.abs(g)))
    expected = np.where(np.abs(g) < 0.6, 0.0, g + sigma)
    np.testing.assert_array_equal(found[0, :3], 0.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    # Signed draws: no clipping at zero nor at 180.
    flipped = 180 * program(get_device("afm"), g / 180, {Stream.PROGRAM_PLUS: 20.0})
    assert flipped[0, 4] > 0
    assert 180 * program(get_device("afm"), g / 180, {Stream.PROGRAM_PLUS: -3.0})[0, 7] < -180


def test_afm_keeps_small_weights_at_zero_noise_only():
    w = np.full((1, 1), 0.5 / 180, np.float32)
    assert program(get_device("afm"), w, {Stream.PROGRAM_PLUS: 1.0}, noise_scale=0.0) == w
    assert program(get_device("afm"), w, {Stream.PROGRAM_PLUS: 1.0}, noise_scale=1e-3) == 0


@pytest.mark.parametrize("name", ["additive", "proportional"])
def test_relative_spread_is_a_field(name):
    device = dataclasses.replace(get_device(name), sigma_rel=0.25)
    found = program(device, np.float32([[0.5, -0.5]]), {Stream.PROGRAM_PLUS: 1.0}, noise_scale=2.0)
    step = 0.5 if name == "additive" else 0.25
    np.testing.assert_allclose(found, [[0.5 + step, -0.5 + step]], rtol=1e-6)


@pytest.mark.parametrize("c", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_exact_moments_of_the_deviation(name, c):
    """`programming_moments` against the fits in float64: censored Gaussians of a pair, plain ones of the others."""
    w = np.float32([-1, -0.6, -0.1, -0.004, -0.001, 0, 0.001, 0.004, 0.02, 0.3, 1.0])
    found = get_device(name).programming_moments(jnp.asarray(w)[:, None], scale=UNIT, noise_scale=c)
    wide = w.astype(np.float64)
    if name in PAIR_FITS and c > 0:
        sides = [(g, censored_moments(g, c * pair_std(name, g))) for g in (np.maximum(wide, 0), np.maximum(-wide, 0))]
        (plus, of_plus), (minus, of_minus) = sides
        mean, variance = (of_plus[0] - plus) - (of_minus[0] - minus), of_plus[1] + of_minus[1]
    else:
        mean, variance = np.zeros_like(wide), (c * expected_std(name, wide)) ** 2
        if name == "afm" and c > 0:
            mean = np.where(180 * np.abs(wide) < 0.6, -wide, 0.0)
    # float32 erf and polynomials: 1e-5 of the largest deviation, which is what a score sums up.
    np.testing.assert_allclose(found.mean[:, 0], mean, rtol=1e-4, atol=2e-6 * c)
    np.testing.assert_allclose(found.variance[:, 0], variance, rtol=2e-4, atol=1e-9 * c)


@pytest.mark.parametrize("name", NAMES)
def test_exact_moments_are_those_of_the_draws(name):
    w = np.tile(np.float32([-0.9, -0.02, 0, 0.004, 0.3]), (20_000, 1))
    streams = {Stream.PROGRAM_PLUS: normal(21, w.shape), Stream.PROGRAM_MINUS: normal(22, w.shape)}
    found = program(get_device(name), w, streams, noise_scale=2.0) - w
    exact = get_device(name).programming_moments(jnp.asarray(w[:1]), scale=UNIT, noise_scale=2.0)
    mean, variance = (np.asarray(v, np.float64)[0] for v in exact)
    assert np.all(np.abs(found.mean(0) - mean) <= 4.5 * np.sqrt(variance / len(w)) + 1e-6)
    spread = np.sqrt(np.maximum((((found - found.mean(0)) ** 4).mean(0) - variance**2) / len(w), 0))
    assert np.all(np.abs(found.var(0, ddof=1) - variance) <= 4.5 * spread + 1e-9)


def test_moments_where_nothing_is_spread_are_zero_and_finite():
    zeros = GroupRange(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    for name in NAMES:
        found = get_device(name).programming_moments(jnp.zeros((3, 2)), scale=zeros, noise_scale=1.0)
        assert not np.any(found.mean) and not np.any(found.variance)
        tiny = get_device(name).programming_moments(jnp.float32([[0.7], [0.0]]), scale=UNIT, noise_scale=1e-30)
        assert np.all(np.isfinite(np.stack(tiny)))
