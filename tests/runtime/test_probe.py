"""Estimates from probes: unbiased, of the variance that is derived, with and without converters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.spec import analog_spec
from hetmoe.ops.crossbar_matmul.xla import crossbar_matmul
from hetmoe.runtime.probe import (
    Readings,
    change_variance,
    converter_error_variance,
    probe_vectors,
    read_probes,
    scale_moments,
)

K, N, SETS = 12, 10, 8_000


def matrices(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Target and held weights; errors follow what rows of the target share, so that the scale's bias is not small."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(K, N)) * np.geomspace(0.5, 1, K)[:, None] + rng.normal(size=N)
    shared = w @ w.T
    np.fill_diagonal(shared, 0)
    lean = 0.4 * shared @ w / np.linalg.norm(shared) + 0.1 * rng.normal(size=(K, N))
    return w.astype(np.float32), (0.8 * w + lean).astype(np.float32)


@functools.cache
def many(probes: int, noise: float = 0.0) -> Readings:
    """Readings of `SETS` independent sets of probes."""
    w, held = matrices()

    def one(key: jax.Array) -> Any:
        vectors = probe_vectors(key, probes, K)
        outputs = jnp.matmul(vectors, held, precision="highest")
        outputs = outputs + noise * jax.random.normal(jax.random.fold_in(key, 1), outputs.shape)
        return read_probes(jnp.asarray(w), outputs, vectors, noise**2)

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), SETS))
    return Readings(*(np.asarray(leaf, np.float64) for leaf in found))


def assert_mean(values: np.ndarray, wanted: float, slack: float = 0.0) -> None:
    """Within five standard errors, and the error is small."""
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean() - wanted) < 5 * error + slack, (values.mean(), wanted, error)


def assert_variance(values: np.ndarray, wanted: float, slack: float = 0.0) -> None:
    """Within five standard errors of a sample variance, from the sample's own fourth moment."""
    deviations = np.square(values - values.mean())
    error = deviations.std() / np.sqrt(len(values))
    assert abs(deviations.mean() - wanted) < 5 * error + slack * wanted, (deviations.mean(), wanted, error)


@pytest.mark.parametrize("probes", [1, 4])
def test_the_change_is_unbiased_and_of_the_derived_variance(probes: int) -> None:
    w, held = matrices()
    found = many(probes).change
    assert_mean(found, np.square(held - w, dtype=np.float64).sum())
    assert_variance(found, float(change_variance(jnp.asarray(held - w), probes)))


def test_the_variance_is_that_of_a_quadratic_form() -> None:
    w, held = matrices(1)
    change = (held - w).astype(np.float64)
    # All 2^12 sign vectors: the exact variance of |D^T x|^2.
    signs = 1.0 - 2.0 * ((np.arange(2**K)[:, None] >> np.arange(K)) & 1)
    exact = np.square(signs @ change).sum(axis=1)
    np.testing.assert_allclose(exact.mean(), np.square(change).sum(), rtol=1e-12)
    np.testing.assert_allclose(change_variance(jnp.asarray(held - w), 1), exact.var(), rtol=1e-4)


def test_the_noise_of_converters_is_subtracted() -> None:
    w, held = matrices()
    clean, noisy = many(4), many(4, noise=0.5)
    assert_mean(noisy.change, np.square(held - w, dtype=np.float64).sum())
    assert noisy.change.std() > clean.change.std()
    np.testing.assert_allclose(noisy.rest.mean(), clean.rest.mean(), atol=5 * noisy.rest.std() / np.sqrt(SETS) + 0.02)


def test_the_scale_has_the_derived_bias_and_variance() -> None:
    w, held = matrices()
    probes = 64
    scale, bias, variance = (float(value) for value in scale_moments(jnp.asarray(w), jnp.asarray(held), probes))
    w64 = w.astype(np.float64)
    np.testing.assert_allclose(scale, (w64 * held).sum() / np.square(w64).sum(), rtol=1e-6)
    found = many(probes).scale
    # First order in 1/probes: what is left is smaller by a few over the number of probes.
    assert_mean(found, scale + bias, slack=0.1 * abs(bias))
    assert abs(bias) > 8 * found.std() / np.sqrt(SETS)  # the bias is seen
    assert_variance(found, variance, slack=0.1)


def test_the_spread_of_probes_tells_the_scales_variance() -> None:
    found = many(64)
    np.testing.assert_allclose(found.scale_variance.mean(), found.scale.var(), rtol=0.15)  # order 1/probes of it, too


def test_the_rest_is_what_a_factor_cannot_undo() -> None:
    w, held = matrices()
    w64 = w.astype(np.float64)
    scale = (w64 * held).sum() / np.square(w64).sum()
    wanted = np.square(held - scale * w64).sum()
    biases = [many(probes).rest.mean() / wanted - 1 for probes in (8, 64)]
    assert abs(biases[1]) < 0.02 and abs(biases[0]) < 0.15
    assert biases[0] < biases[1] < 0  # the scale is fitted to the same probes


def test_without_weights_nothing_is_off() -> None:
    vectors = probe_vectors(jax.random.key(0), 4, K)
    found = read_probes(jnp.zeros((K, N)), jnp.zeros((4, N)), vectors)
    assert [float(leaf) for leaf in found] == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("bits", [6, 8])
def test_the_error_of_an_adc_is_uniform(bits: int) -> None:
    """The whole path of a tile: what is subtracted is what rounding adds, for outputs over several steps."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 32)).astype(np.float32)
    spec = analog_spec("pcm", noise_scale=1.0, tile_rows=64, adc_bits=bits, dac_bits=8, adc_bound=4.0)
    vectors = probe_vectors(jax.random.key(0), 2048, 64)
    most = np.abs(w).max(axis=0)
    reach = 127.0 / 32
    outputs = crossbar_matmul(
        vectors, jnp.asarray(w), jnp.full((1,), reach), spec.adc_bound, jnp.asarray(most)[None], spec.options,
        jnp.ones((1, 1), bool), None,
    )  # fmt: skip
    error = np.square(np.asarray(outputs, np.float64) - np.asarray(vectors, np.float64) @ w).mean(axis=0)
    bounds = reach * float(spec.adc_bound) * most
    wanted = np.asarray(converter_error_variance(jnp.asarray(bounds), bits))
    clipped = (np.abs(np.asarray(vectors) @ w) > bounds).any(axis=0)
    assert (~clipped).sum() > 8
    # 2048 squares of a uniform error, whose relative standard deviation is sqrt(4 / 5).
    np.testing.assert_allclose((error / wanted)[~clipped], 1.0, atol=5 * np.sqrt(0.8 / 2048))


def test_no_converter_has_no_error() -> None:
    assert converter_error_variance(jnp.ones(3), None) == 0.0


def test_variances_by_hand() -> None:
    """Two probes of one weight of 2 read 5 and 3: a scale of 2, with a spread."""
    w, vectors = jnp.full((1, 1), 2.0), jnp.array([[1.0], [1.0]])
    found = read_probes(w, jnp.array([[5.0], [3.0]]), vectors)
    assert float(found.scale) == 2.0
    # Products 10 and 6 around 2 * 4: squares 4 + 4, times 2 / (2 - 1), over (4 + 4)^2.
    assert float(found.scale_variance) == 16 / 64
    # An ADC of 8 bits has 254 steps from -bound to bound.
    np.testing.assert_allclose(converter_error_variance(jnp.float32(1.0), 8), (2 / 254) ** 2 / 12, rtol=1e-6)
