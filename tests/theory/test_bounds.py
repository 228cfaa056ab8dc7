"""Searches for violations of the bounds; exact moments against 100,000 simulated chips."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from scipy.special import expit

from hetmoe.analog.converter_error import converter_error_bound
from hetmoe.analog.devices import DEVICES, Stream, group_range
from hetmoe.analog.error_tail import draw_slopes, linear_tail, markov_bound, noise_of
from hetmoe.analog.expert_tail import ExpertSlopes, TwoLayerSlopes, expert_tail, two_layer_tail
from hetmoe.analog.gaussian_moments import relu_moves, swiglu_exact, two_layer_exact
from hetmoe.analog.neuron_norm import expert_neuron_norm_bound, neuron_norm_bound
from hetmoe.analog.second_moment import ExpertNoise, Moments, expert_second_moment, linear_second_moment
from hetmoe.analog.spec import analog_spec
from hetmoe.analog.two_layer import (
    TwoLayer,
    TwoLayerNoise,
    two_layer,
    two_layer_change_bound,
    two_layer_second_moment,
)  # fmt: skip
from hetmoe.errors import InputError
from hetmoe.ops.crossbar_matmul.api import crossbar_matmul
from hetmoe.quantize.bounds.expert import Expert, activations
from theory.cases import Case, case_of, programmed, root_mean_square
from theory.digital_cases import converter_cases, quantization_cases, routing_cases
from theory.noise_cases import expert_cases, linear_cases

SEEDS = st.integers(0, 2**31)


@settings(max_examples=12)
@given(seed=SEEDS, device=st.sampled_from(list(DEVICES)))
def test_no_noise_violates_a_bound_of_a_matrix(seed: int, device: str) -> None:
    assert not any(case.violated for case in linear_cases(seed, device, 2000))


@settings(max_examples=6)
@given(seed=SEEDS, device=st.sampled_from(list(DEVICES)))
def test_no_noise_violates_a_bound_of_an_expert(seed: int, device: str) -> None:
    assert not any(case.violated for case in expert_cases(seed, device, 1000))


@settings(max_examples=15)
@given(seed=SEEDS)
def test_no_rounding_violates_a_bound(seed: int) -> None:
    assert not any(case.violated for case in converter_cases(seed) + quantization_cases(seed) + routing_cases(seed))


@settings(max_examples=15)
@given(data=st.data())
def test_converters_at_any_magnitude(data: st.DataObject) -> None:
    """Ranges far too small or large, coarse and fine converters, tiles of one row, inputs of 0."""
    rng = np.random.default_rng(data.draw(SEEDS))
    rows, columns = data.draw(st.sampled_from([1, 7, 20])), data.draw(st.sampled_from([1, 5]))
    tile_rows, magnitude = data.draw(st.sampled_from([1, 3, 512])), 10.0 ** data.draw(st.integers(-4, 4))
    bits = [data.draw(st.sampled_from([None, 2, 5, 8, 12])) for _ in range(2)]
    spec = analog_spec(
        dac_bits=bits[0], adc_bits=bits[1], tile_rows=tile_rows,
        bound_axis=data.draw(st.sampled_from(["tile", "column"])),
    )  # fmt: skip
    x = jnp.asarray(rng.normal(size=(4, rows)) * magnitude * (rng.random((4, rows)) < 0.8), jnp.float32)
    w = jnp.asarray(rng.normal(size=(rows, columns)), jnp.float32)
    ranges = None
    if data.draw(st.booleans()):
        ranges = jnp.asarray(magnitude * 10.0 ** rng.uniform(-1, 1, -(-rows // tile_rows)), jnp.float32)
    adc_bound = float(10.0 ** rng.uniform(-1, 1.5))
    found = crossbar_matmul(
        x, w, input_range=ranges, dac_bits=bits[0], adc_bits=bits[1], adc_bound=adc_bound, tile_rows=tile_rows,
        bound_axis=spec.options.bound_axis,
    )  # fmt: skip
    bound = converter_error_bound(x, w, input_range=ranges, adc_bound=adc_bound, options=spec.options)
    error = np.abs(np.asarray(found, np.float64) - np.asarray(x, np.float64) @ np.asarray(w, np.float64))
    assert (error <= bound).all()


def test_the_converter_bound_is_reached() -> None:
    """An input just below half a step, an output just below half of one, and one that clips."""
    spec = analog_spec(dac_bits=2, adc_bits=None)  # levels -1, 0, 1
    x, w = jnp.asarray([[0.4999]]), jnp.asarray([[2.0]])
    ranges = jnp.ones(1)
    bound = converter_error_bound(x, w, input_range=ranges, adc_bound=12.0, options=spec.options)
    np.testing.assert_allclose(bound, 0.9998, rtol=1e-4)  # it becomes 0
    found = crossbar_matmul(x, w, input_range=ranges, dac_bits=2, adc_bits=None)
    np.testing.assert_allclose(np.abs(found - 0.9998), bound, rtol=1e-4)
    spec = analog_spec(dac_bits=None, adc_bits=2)
    clipped = crossbar_matmul(jnp.asarray([[1.0]]), w, input_range=ranges, dac_bits=None, adc_bits=2, adc_bound=0.25)
    bound = converter_error_bound(jnp.asarray([[1.0]]), w, input_range=ranges, adc_bound=0.25, options=spec.options)
    assert float(clipped[0, 0]) == 0.5
    np.testing.assert_allclose(bound, 1.5 + 0.25, rtol=1e-4)  # half a step beside what is clipped


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


@pytest.mark.parametrize("kind", ["two-layer", "gated"])
def test_exact_moments_of_gaussian_noise(kind: str) -> None:
    """With biases as well: noise whose mean is not 0 is put in by hand."""
    rng = np.random.default_rng(3)
    x, shapes = rng.normal(size=(2, 5)), [(5, 4), (5, 4), (4, 5)]
    clean = [rng.normal(size=shape) for shape in shapes]
    noise = [Moments(0.3 * rng.normal(size=s), rng.uniform(0.01, 0.5, s)) for s in shapes]
    held = [
        w + n.mean + np.sqrt(n.variance) * rng.normal(size=(CHIPS, *w.shape)) for w, n in zip(clean, noise, strict=True)
    ]
    up, gate = (np.einsum("tk,ckn->ctn", x, part) for part in (held[1], held[0]))
    if kind == "two-layer":
        expert, of_noise = TwoLayer(*clean[1:]), TwoLayerNoise(*noise[1:])
        exact, bound = two_layer_exact(x, expert, of_noise), two_layer_second_moment(x, expert, of_noise).rms
        hidden, out = np.maximum(up, 0), two_layer(x, expert)
    else:
        expert, of_noise = Expert(*clean), ExpertNoise(*noise)
        exact = swiglu_exact(x, expert, of_noise)
        bound = expert_second_moment(x, activations(x, expert), expert, of_noise).rms
        hidden, out = gate / (1 + np.exp(-gate)) * up, activations(x, expert).out
    root, error = root_mean_square(np.einsum("ctn,cno->cto", hidden, held[2]) - out)
    assert (np.abs(root - exact) < 5 * error).all() and (error < 0.01 * root).all()
    assert (exact <= bound).all()


def test_a_neuron_that_stays_active_reaches_the_bound() -> None:
    """`df = V^T dW^T x` then, whose second moment is exact; with a noisy last layer both parts add up."""
    x, expert = np.array([[1.0, 2.0]]), TwoLayer(np.array([[5.0], [6.0]]), np.array([[2.0, -1.0]]))
    none, small = Moments(np.zeros((2, 1)), np.zeros((2, 1))), Moments(np.zeros((2, 1)), np.array([[0.02], [0.03]]))
    square = 0.02 * 1 + 0.03 * 4
    last = Moments(np.zeros((1, 2)), np.array([[0.1, 0.2]]))
    for up, down, wanted in (
        (small, Moments(np.zeros((1, 2)), np.zeros((1, 2))), square * 5),
        (none, last, 17**2 * 0.3), (small, last, square * 5 + (17**2 + square) * 0.3),
    ):  # fmt: skip
        found = two_layer_second_moment(x, expert, TwoLayerNoise(up, down)).rms[0]
        assert 1 <= found / np.sqrt(wanted) < 1.03
        np.testing.assert_allclose(two_layer_exact(x, expert, TwoLayerNoise(up, down)), np.sqrt(wanted), rtol=1e-9)


def test_moments_of_relu() -> None:
    mean, std = np.array([-1.0, 0.0, 2.0, 0.7, 3.0, -3.0, 0.0]), np.array([1.0, 0.5, 0.1, 2.0, 0.0, 0.0, 0.0])
    moved, variance = relu_moves(mean, std)
    z = np.maximum(mean + std * np.random.default_rng(0).normal(size=(400_000, 7)), 0)
    np.testing.assert_allclose(moved + np.maximum(mean, 0), z.mean(axis=0), atol=5 * 2.0 / np.sqrt(400_000))
    np.testing.assert_allclose(variance, z.var(axis=0), atol=5 * 4.0 / np.sqrt(400_000))
    assert not moved[4:].any() and not variance[4:].any()


@pytest.mark.parametrize("size", [1e-4, 1e-7, 1e-10])
def test_small_gaussian_noise_is_not_lost_in_rounding(size: float) -> None:
    """To first order it is linear, and its second moment that of the slopes."""
    rng = np.random.default_rng(4)
    x, (gate, up, down) = rng.normal(size=(3, 5)), (rng.normal(size=shape) for shape in ((5, 4), (5, 4), (4, 5)))
    noise = [Moments(np.zeros(w.shape), np.square(size * w)) for w in (gate, up, down)]
    a, u = x @ gate, x @ up
    s = 1 / (1 + np.exp(-a))
    spread = [np.square(x) @ one.variance for one in noise[:2]]

    def of_last(variance, hidden):
        return np.sqrt(variance @ np.square(down).sum(axis=1) + np.square(hidden) @ noise[2].variance.sum(axis=1))

    wanted = of_last(np.where(u > 0, spread[1], 0), np.maximum(u, 0))
    np.testing.assert_allclose(two_layer_exact(x, TwoLayer(up, down), TwoLayerNoise(*noise[1:])), wanted, rtol=1e-3)
    slope = s * (1 + a * (1 - s))
    wanted = of_last(np.square(slope * u) * spread[0] + np.square(a * s) * spread[1], a * s * u)
    np.testing.assert_allclose(swiglu_exact(x, Expert(gate, up, down), ExpertNoise(*noise)), wanted, rtol=1e-3)


@pytest.mark.parametrize("gate", [-3.0, 0.7, 5.0])
@pytest.mark.parametrize(("std", "accuracy"), [(0.1, 1e-9), (3.0, 1e-6), (10.0, 1e-3)])
def test_moments_of_silu(gate: float, std: float, accuracy: float) -> None:
    """One neuron, whose gate is noisy: against adaptive quadrature, to what `NODES` says."""
    one, none, up, down = np.ones((1, 1)), np.zeros((1, 1)), 2.0, 3.0
    noise = ExpertNoise(Moments(none, std**2 * one), Moments(none, none), Moments(none, none))

    def squared_move(z: float) -> float:
        noisy = gate + std * z
        return (noisy * expit(noisy) - gate * expit(gate)) ** 2 * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)

    wanted = (
        np.sqrt(integrate.quad(squared_move, -12, 12, limit=400, points=[0.0], epsabs=0, epsrel=1e-11)[0]) * up * down
    )
    found = swiglu_exact(one, Expert(gate * one, up * one, down * one), noise)
    np.testing.assert_allclose(found, wanted, rtol=accuracy)


def test_bias_of_an_active_neuron_reaches_the_bound() -> None:
    """No spread, one neuron: `df = V b x`, whether it pushes the neuron up or down; and the mean's bound as well."""
    x, expert, none = np.array([[2.0]]), TwoLayer(np.array([[3.0]]), np.array([[1.5]])), np.zeros((1, 1))
    for bias in (0.1, -0.1):
        noise = TwoLayerNoise(Moments(np.array([[bias]]), none), Moments(none, none))
        found = two_layer_second_moment(x, expert, noise)
        wanted = 1.5 * 0.1 * 2
        # Mean and variance are bounded each by the mean square: sqrt(2), and not more.
        assert wanted <= found.rms[0] <= np.sqrt(2) * wanted * (1 + 1e-6)
        # The remainder E da^2 / (4 |a|), 1 / 120 of the move itself, is cut off at the root mean square.
        np.testing.assert_allclose(found.mean, wanted, rtol=1e-6)
        np.testing.assert_allclose(two_layer_exact(x, expert, noise), wanted, rtol=1e-9)


@pytest.mark.parametrize("active", [0.5, -0.5])
def test_the_remainder_of_a_relu(active: float) -> None:
    """Noise of two points +-2|a|, at which the remainder is exactly E da^2 / (4 |a|): the mean's bound is reached."""
    x, expert, none = np.array([[1.0]]), TwoLayer(np.array([[active]]), np.array([[1.0]])), np.zeros((1, 1))
    noise = TwoLayerNoise(Moments(none, np.ones((1, 1))), Moments(none, none))  # da = +-1
    moved = np.mean([max(active + da, 0) - max(active, 0) for da in (1, -1)])
    found = two_layer_second_moment(x, expert, noise)
    assert moved == 0.25 and found.mean[0] >= moved
    np.testing.assert_allclose(found.mean, 1 / (4 * 0.5), rtol=1e-6)


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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": jnp.ones((2, 3))}, "must equal the first of w"),
        ({"input_range": jnp.ones(3)}, r"input_range has shape \[3\]"),
        ({"adc_bound": 0.0}, "adc_bound=0.0"), ({"w": jnp.full((4, 2), jnp.nan)}, "w has values that are not finite"),
        ({"input_range": jnp.asarray([1.0, jnp.inf])}, "input_range has values that are not finite"),
    ],
)  # fmt: skip
def test_converters_that_cannot_be(changes, said: str) -> None:
    given = {"x": jnp.ones((2, 4)), "w": jnp.ones((4, 2)), "input_range": jnp.ones(2), "adc_bound": 3.0} | changes
    with pytest.raises(InputError, match=said):
        converter_error_bound(**given, options=analog_spec(tile_rows=2).options)


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


def test_tails_of_experts_by_hand() -> None:
    """One neuron, one input: every term is a number."""
    one, still = np.ones((1, 1)), np.zeros((1, 1))
    x, expert = np.array([[2.0]]), TwoLayer(3 * one, -4 * one)
    reach = np.sqrt(2 * np.log(4 / 0.1))
    noise, slopes = TwoLayerNoise(Moments(still, 0.01 * one), Moments(0.2 * one, 0.04 * one)), (0.1 * one, 0.2 * one)
    moved = 2 * 0.1 * (1 + reach)
    last = 6 * np.sqrt(0.04 + 0.04) + reach * 6 * 0.2 + moved * (np.sqrt(0.04 + 0.04) + reach * 0.2)
    found = two_layer_tail(x, expert, noise, TwoLayerSlopes(*slopes), 0.1)
    np.testing.assert_allclose(found, 4 * moved + last, rtol=1e-6)
    gated = Expert(3 * one, 5 * one, -4 * one)
    noises = ExpertNoise(Moments(still, 0.04 * one), Moments(still, 0.01 * one), noise.down)
    reach, silu = np.sqrt(2 * np.log(6 / 0.1)), 6 / (1 + np.exp(-6))
    da, du, steepest = 2 * 0.2 * (1 + reach), 2 * 0.1 * (1 + reach), 1.09984
    moved = steepest * da * 10 + silu * du + steepest * da * du
    last = silu * 10 * (np.sqrt(0.08) + reach * 0.2) + moved * (np.sqrt(0.08) + reach * 0.2)
    found = expert_tail(x, gated, noises, ExpertSlopes(0.2 * one, *slopes), 0.1)
    np.testing.assert_allclose(found, 4 * moved + last, rtol=1e-6)


def test_the_moment_of_the_kept_part_lowers_the_tail_of_a_two_layer_expert() -> None:
    """Many neurons that are off: they do not move to first order, though their inputs do."""
    rng = np.random.default_rng(0)
    expert = TwoLayer(np.concatenate([np.full((1, 50), -5.0), np.ones((1, 1))], axis=1), rng.normal(size=(51, 51)))
    noise = TwoLayerNoise(Moments(np.zeros((1, 51)), np.full((1, 51), 1e-4)), Moments(*np.zeros((2, 51, 51))))
    slopes = TwoLayerSlopes(np.full((1, 51), 1e-2), np.zeros((51, 51)))
    norm, x = np.linalg.norm(expert.down, 2), np.ones((1, 1))
    by_norm = norm * linear_tail(x, noise.up, slopes.up, 0.1 / 4)
    assert two_layer_tail(x, expert, noise, slopes, 0.1)[0] < by_norm[0]


def test_neuron_norms() -> None:
    """Reached where all inputs are equal: `c |x| sqrt(sum |w|^2)`; and of one active neuron."""
    w, x = np.array([[3.0, 0.0], [4.0, 1.0]]), np.array([[2.0, -2.0], [0.0, 1.0]])
    noise = Moments(np.zeros((2, 2)), np.square(0.1 * w))
    found = neuron_norm_bound(x, w, 0.1)
    np.testing.assert_allclose(found, [0.1 * 2 * np.sqrt(26), 0.1 * np.sqrt(26)], rtol=1e-8)
    np.testing.assert_allclose(np.sqrt(linear_second_moment(x[:1], noise).sum(axis=1)), found[:1], rtol=1e-8)
    expert = TwoLayer(np.array([[3.0], [4.0]]), np.array([[2.0, 1.0]]))
    found = expert_neuron_norm_bound(np.ones((1, 2)), expert, 0.1)
    np.testing.assert_allclose(found, 0.1 * 5 * np.sqrt(5), rtol=1e-6)
    # Of neurons that share an output norms add up, `sum |w_i| |V_i|`, or all go by the spectral norm.
    shared = TwoLayer(np.array([[3.0, 1.0], [4.0, 0.0]]), np.array([[1.0], [1.0]]))
    np.testing.assert_allclose(expert_neuron_norm_bound(np.ones((1, 2)), shared, 0.1), 0.1 * 6, rtol=1e-6)
    apart = TwoLayer(np.array([[3.0, 1.0], [4.0, 0.0]]), np.eye(2))
    np.testing.assert_allclose(expert_neuron_norm_bound(np.ones((1, 2)), apart, 0.1), 0.1 * np.sqrt(26), rtol=1e-6)
    for c in (-1.0, float("nan")):
        with pytest.raises(InputError, match="noise_scale="):
            neuron_norm_bound(x, w, c)


def test_neurons_at_their_threshold_stay_below_neuron_norms() -> None:
    """Eight neurons with w.x = 0 and one vote: noise of any size moves them all one way."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(6, 8))
    x = np.ones((1, 6))
    w -= w.mean(axis=0)
    expert, still = TwoLayer(w, np.ones((8, 1))), Moments(np.zeros((8, 1)), np.zeros((8, 1)))
    for c in (1e-3, 1.0):
        noise = TwoLayerNoise(Moments(np.zeros(w.shape), np.square(c * w)), still)
        exact = two_layer_exact(x, expert, noise)
        assert exact[0] > c * np.sqrt(np.square(w).sum()) > 0  # more than independent errors would make
        assert exact <= expert_neuron_norm_bound(x, expert, c)
        assert exact <= two_layer_second_moment(x, expert, noise).rms


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


@settings(max_examples=30)
@given(seed=SEEDS)
def test_no_two_layer_expert_moves_by_more_than_its_weights_allow(seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs, neurons, outputs = rng.integers(1, 9, 3)
    x, sizes = rng.normal(size=(4, inputs)), 10 ** rng.uniform(-3, 1, 2)
    expert = TwoLayer(rng.normal(size=(inputs, neurons)), rng.normal(size=(neurons, outputs)))
    limits = [size * rng.random(w.shape) for size, w in zip(sizes, (expert.up, expert.down), strict=True)]
    moves = [limit * rng.uniform(-1, 1, limit.shape) for limit in limits]
    moved = TwoLayer(expert.up + moves[0], expert.down + moves[1])
    off = np.linalg.norm(two_layer(x, moved) - two_layer(x, expert), axis=1)
    assert (off <= two_layer_change_bound(x, expert, *limits)).all()


def test_a_changed_two_layer_expert_reaches_its_bound() -> None:
    one = np.ones((1, 1))
    expert, moved = TwoLayer(2 * one, 3 * one), TwoLayer(2.5 * one, 3.25 * one)
    x = np.array([[1.0]])
    np.testing.assert_allclose(
        two_layer_change_bound(x, expert, 0.5 * one, 0.25 * one), two_layer(x, moved)[0] - two_layer(x, expert)[0]
    )
    with pytest.raises(InputError, match="up_change has a negative value"):
        two_layer_change_bound(x, expert, -one, one)


REFUSED = {
    "Moments(np.zeros((3, 2)), -W)": "variance has a negative value, -1.0",
    "Moments(np.zeros((2, 2)), W)": "mean has shape [2, 2], but variance [3, 2]",
    "Moments(W * np.nan, W)": "mean[0, 0] is nan",
    "linear_second_moment(X * np.inf, NONE)": "x[0, 0] is inf",
    "linear_second_moment(X[:, :2], NONE)": "x has 2 columns, but the matrix 3 rows",
    "linear_tail(X, NONE, W[:2], 0.1)": "slopes has shape [2, 2], but noise [3, 2]",
    "markov_bound(-np.ones(1), 0.1)": "rms has a negative value, -1.0",
    "markov_bound(np.array([np.nan]), 0.1)": "rms[0] is nan",
    "TwoLayer(W, W)": "down has 3 rows, but up 2 neurons (columns)",
    "Expert(W, W[:2], W.T)": "up has shape [2, 2], but gate [3, 2]",
    "Expert(W, W * np.nan, W.T)": "up[0, 0] is nan",
    "linear_second_moment(np.full((2, 3), 100, np.int8), NONE)": "x is int8: bounds take float64 arrays",
    "two_layer_second_moment(np.float16(X), TwoLayer(W, W.T), TwoLayerNoise(NONE, DOWN))": "x is float16",
    "linear_second_moment(X + 1j, NONE)": "x is complex128",
    "Moments(np.float32(W), W)": "mean is float32",
    "noise_of(W, 'pcm')": "spec='pcm' must be an AnalogSpec",
    "noise_of(W[0], SPEC)": "w has shape [2]: it must be [K, N]",
    "noise_of(W * np.nan, SPEC)": "w[0, 0] is nan",
    "draw_slopes(W * np.inf, SPEC)": "w[0, 0] is inf",
    "half_steps(W)": "half_steps takes a Packed matrix, not ndarray",
    "activation_bound(CHANGE, activations(X, GATED), np.ones(2), -np.ones(2))": "radius[0] is -1.0",
    "activation_bound(CHANGE, activations(X, GATED), np.ones(3), np.ones(2))": "size has shape [3]: it must be [2]",
    "norm_bound(CHANGE, np.array([1.0, np.nan]))": "size[1] is nan",
    "norm_bound(CHANGE, 3.0)": "size is float: bounds take float64 arrays",
    "linear_tail(X, NONE, W, 0.1, weights=np.ones((2, 1)))": "weights has shape [2, 1], but the outputs [2, 2]",
    "linear_tail(X, NONE, W, 0.1, weights=np.full((2, 2), np.nan))": "weights[0, 0] is nan",
    "change_of(GATED, Expert(W[:, :1], W[:, :1], W.T[:1]))": "changed.gate has shape [3, 1], but clean.gate [3, 2]",
    "expert_second_moment(X, activations(X[:1], GATED), GATED, ExpertNoise(NONE, NONE, DOWN))": "activations of [1, 2]",
    "routing_margin(X, W, 3)": "experts_per_token=3 must be from 1 to 2",
    "routing_margin(X * np.nan, W, 1)": "x[0, 0] is nan",
    "certain_sets(ROUTED, NORMS, -np.ones(2), None, None)": "radius[0] is -1.0",
    "certain_sets(ROUTED, NORMS, np.ones(1), None, None)": "radius has shape [1]: it must be [2]",
    "converter_error_bound(X + 1j, W, input_range=None, adc_bound=1.0, options=SPEC.options)": "x is complex128",
    "converter_error_bound(X, W, input_range=None, adc_bound=1.0, options=SPEC)": "must be CrossbarOptions",
    "converter_error_bound(X, W, input_range=-X[0, :1], adc_bound=1.0, options=SPEC.options)": "negative value, -1.0",
}


def test_bounds_refuse_what_they_cannot_bound() -> None:
    """In a process of its own: here shapes are checked by the tests themselves (`check_arrays`)."""
    script = f"""
import numpy as np
from hetmoe.analog.error_tail import draw_slopes, linear_tail, markov_bound, noise_of
from hetmoe.analog.expert_tail import ExpertSlopes, TwoLayerSlopes, expert_tail, two_layer_tail
from hetmoe.analog.gaussian_moments import swiglu_exact, two_layer_exact
from hetmoe.analog.neuron_norm import expert_neuron_norm_bound, neuron_norm_bound
from hetmoe.analog.second_moment import ExpertNoise, Moments, expert_second_moment, linear_second_moment
from hetmoe.analog.two_layer import TwoLayer, TwoLayerNoise, two_layer, two_layer_change_bound, two_layer_second_moment
from hetmoe.errors import InputError
from hetmoe.quantize.bounds.a_priori import half_steps
from hetmoe.quantize.bounds.expert import Expert, activation_bound, activations, change_of, norm_bound
from hetmoe.quantize.bounds.routing import Routed
from hetmoe.quantize.bounds.routing_change import certain_sets, router_norms
from hetmoe.quantize.bounds.stability_margin import routing_margin
from hetmoe.analog.converter_error import converter_error_bound
from hetmoe.analog.spec import analog_spec
X, W = np.ones((2, 3)), np.ones((3, 2))
NONE, DOWN = Moments(0 * W, 0 * W), Moments(0 * W.T, 0 * W.T)
GATED, SPEC = Expert(W, W, W.T), analog_spec("pcm")
CHANGE, NORMS = change_of(GATED, GATED), router_norms(np.ones(3), W)
ROUTED = Routed(X @ W, np.zeros((2, 1), int), np.ones((2, 1)))
for ask in {list(REFUSED)}:
    try:
        print("a number:", eval(ask))
    except InputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    for said, (ask, wanted) in zip(done.stdout.splitlines(), REFUSED.items(), strict=True):
        assert wanted in said, (ask, said)


def test_what_is_neither_moved_nor_bounded_is_left_out() -> None:
    found = case_of("b", "d", np.array([0.0, 1.0, 1.0]), np.array([0.0, 2.0, 0.0]), np.array([0.0, 0.2, 0.1]))
    assert found.ratios.tolist() == [0.5, np.inf] and found.error.tolist() == [0.1, 0.0] and found.violated


def test_what_counts_as_violated() -> None:
    ratios = np.array([0.5, 1.04])
    assert not Case(bound="b", device="d", ratios=ratios, error=np.array([0.01])).violated
    assert Case(bound="b", device="d", ratios=ratios, error=np.array([0.001])).violated
    assert Case(bound="b", device="d", ratios=np.array([0.9]), error=np.array([0.01]), exact=True).violated
    assert not Case(bound="b", device="d", ratios=np.array([0.0]), error=np.array([0.01]), exact=True).violated
    assert not Case(bound="b", device="d", ratios=np.array([0.9]), error=np.array([0.01])).violated
    assert Case(bound="b", device="d", ratios=np.array([2.0]), error=np.array([1.0]), share=0.02).violated
    assert not Case(bound="b", device="d", ratios=np.array([2.0]), error=np.array([1.0]), share=0.01).violated
