"""Searches for violations of the bounds; exact moments against 100,000 simulated chips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.analog.converter_error import converter_error_bound
from hetmoe.analog.devices import DEVICES
from hetmoe.analog.error_tail import draw_slopes, linear_tail, markov_bound, noise_of
from hetmoe.analog.gaussian_moments import relu_moments, swiglu_exact, two_layer_exact
from hetmoe.analog.second_moment import ExpertNoise, Moments, expert_second_moment, linear_second_moment
from hetmoe.analog.spec import analog_spec
from hetmoe.analog.two_layer import TwoLayer, TwoLayerNoise, two_layer, two_layer_second_moment
from hetmoe.errors import InputError
from hetmoe.ops.crossbar_matmul.api import crossbar_matmul
from hetmoe.quantize.bounds.expert import Expert, activations
from theory.bounds import (
    Case,
    converter_cases,
    expert_cases,
    linear_cases,
    programmed,
    quantization_cases,
    root_mean_square,
)

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
    assert not any(case.violated for case in converter_cases(seed) + quantization_cases(seed))


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


@pytest.mark.parametrize("device", ["pcm", "hermes", "proportional", "afm", "reram_wan"])
def test_the_second_moment_is_that_of_many_chips(device: str) -> None:
    """Positive weights and inputs, whose biases add up, output by output."""
    rng = np.random.default_rng(0)
    w, x = rng.uniform(0.1, 1, (8, 3)), rng.uniform(0.2, 1, (2, 8))
    spec = analog_spec(device, noise_scale=1.5)
    noise = noise_of(jnp.asarray(w, jnp.float32), spec)
    off = programmed(jax.random.key(1), w, spec, CHIPS) - w.astype(np.float32)
    squares = np.square(np.einsum("tk,ckn->ctn", x, off))
    error = squares.std(axis=0, ddof=1) / np.sqrt(CHIPS)
    exact = linear_second_moment(x, noise)
    assert (np.abs(squares.mean(axis=0) - exact) < 5 * error).all()
    spread_only = np.square(x) @ noise.variance
    if device == "pcm":
        # Devices at zero conductance are clipped and pull weights down: no small part, and seen.
        assert (exact > 1.05 * spread_only).all() and (np.abs(squares.mean(axis=0) - spread_only) > 10 * error).all()


def test_bias_of_clipped_pairs_outweighs_their_variance() -> None:
    """All-positive weights and inputs, 512 rows: the bias adds up like rows, the spread like their root."""
    w = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (512, 4)), jnp.float32)
    noise, x = noise_of(w, analog_spec("pcm")), np.ones((1, 512))
    ratio = np.square(x @ noise.mean) / (np.square(x) @ noise.variance)
    assert (ratio > 5).all()


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
    mean, std = np.array([-1.0, 0.0, 2.0, 3.0, -3.0]), np.array([1.0, 0.5, 0.1, 0.0, 0.0])
    first, second = relu_moments(mean, std)
    z = mean + std * np.random.default_rng(0).normal(size=(400_000, 5))
    np.testing.assert_allclose(first, np.maximum(z, 0).mean(axis=0), atol=5 * 1.0 / np.sqrt(400_000))
    np.testing.assert_allclose(second, np.square(np.maximum(z, 0)).mean(axis=0), atol=5 * 2.0 / np.sqrt(400_000))
    np.testing.assert_array_equal(first[3:], [3.0, 0.0])


def test_slopes_of_draws_are_those_of_the_devices() -> None:
    """No pair of chips differs by more than slopes times the difference of draws; of pairs, both devices' together."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    for device in DEVICES:
        spec = analog_spec(device, noise_scale=2.0)
        slopes = draw_slopes(w, spec)
        # Where nothing is clipped the deviation has this standard deviation; clipping only lowers it.
        spread = np.sqrt(noise_of(w, spec).variance)
        assert (spread <= slopes * (1 + 1e-5)).all()
        # And it lowers it at most to that of max(z, 0), whose variance is 1/2 - 1/(2 pi).
        assert (slopes * np.sqrt(0.5 - 0.5 / np.pi) <= spread * (1 + 1e-4)).all()


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


def test_what_counts_as_violated() -> None:
    ratios = np.array([0.5, 1.04])
    assert not Case(bound="b", device="d", ratios=ratios, error=np.array([0.01])).violated
    assert Case(bound="b", device="d", ratios=ratios, error=np.array([0.001])).violated
    assert Case(bound="b", device="d", ratios=np.array([0.9]), error=np.array([0.01]), exact=True).violated
    assert not Case(bound="b", device="d", ratios=np.array([0.0]), error=np.array([0.01]), exact=True).violated
    assert not Case(bound="b", device="d", ratios=np.array([0.9]), error=np.array([0.01])).violated
    assert Case(bound="b", device="d", ratios=np.array([2.0]), error=np.array([1.0]), share=0.02).violated
    assert not Case(bound="b", device="d", ratios=np.array([2.0]), error=np.array([1.0]), share=0.01).violated
