"""Noise of every product: its size, where its draws come from, and where it enters."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.read_noise import make_read_noise
from hetmoe.ops.crossbar_matmul import api
from tests.numpy_reference import Float32, crossbar_tiles

ROWS, COLUMNS, TILE_ROWS = 20, 8, 12  # two row-blocks of 10
RANGES = np.float32([1.3, 0.9])
STD = 0.1
KEY = 11
every_implementation = pytest.mark.parametrize("name", ["xla"])  # no kernel draws it
every_kind = pytest.mark.parametrize("kind", ["additive", "pcm"])
STATIC = ("dac_bits", "adc_bits", "bound_axis", "tile_rows", "implementation")
compiled = jax.jit(api.crossbar_matmul, static_argnames=STATIC)


def data(rows: int) -> tuple[Float32, Float32]:
    """Four different input vectors, repeated, and weights; tiles differ in magnitude."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((4, ROWS)).astype(np.float32)
    scale = np.repeat(np.float32([0.5, 2.0]), 10)[:, None]
    return np.tile(x, (rows // 4, 1)), rng.standard_normal((ROWS, COLUMNS)).astype(np.float32) * scale


def noise_of(name: str, kind: str, x: Float32, w: Float32, *, seed: int = KEY, **options: Any) -> np.ndarray:
    """What noise of `STD` adds to the output of an ideal ADC."""
    options = {"adc_bits": None, "tile_rows": TILE_ROWS, "implementation": name} | options
    arrays, key = (jnp.asarray(x), jnp.asarray(w)), jax.random.key(seed)
    noises = make_read_noise(kind, STD), make_read_noise(kind, 0.0)
    noisy, clean = (compiled(*arrays, read_noise=noise, read_key=key, **options) for noise in noises)
    return np.asarray(noisy) - np.asarray(clean)


def tile_stds(kind: str, x: Float32, w: Float32, *, tile_rows: int, input_range: Float32 | None) -> list[np.ndarray]:
    """Standard deviation of every tile's noise from the published formula, in normalised units and float64."""
    arguments: dict[str, Any] = {"dac_bits": 8, "adc_bits": None, "adc_bound": 12.0, "bound_axis": "tile"}
    stds, start = [], 0
    for index, tile in enumerate(crossbar_tiles(x, w, input_range=input_range, tile_rows=tile_rows, **arguments)):
        part = slice(start, start + tile.dac_codes.shape[-1])
        start = part.stop
        limit = np.abs(x[:, part]).max(axis=-1, keepdims=True) if input_range is None else input_range[index]
        limit, largest = np.asarray(limit, np.float64), np.float64(np.abs(w[part]).max())
        inputs = tile.dac_codes * np.float64(tile.dac_step) / limit
        weights = w[part] / largest
        if kind == "additive":
            normalised = STD * np.linalg.norm(inputs, axis=-1, keepdims=True) * np.ones(COLUMNS)
        else:
            normalised = STD * np.sqrt(np.square(inputs) @ np.abs(weights))
        stds.append(normalised * limit * largest)
    return stds


def draws(seed: int, tile: int, rows: int) -> np.ndarray:
    """The normals that a tile's outputs should get, from JAX's own generator."""
    with jax.threefry_partitionable(True):
        return np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(seed), tile), (rows, COLUMNS)))


@every_implementation
@every_kind
@pytest.mark.parametrize(("tile_rows", "ranges"), [(TILE_ROWS, RANGES), (512, None)], ids=["static", "dynamic"])
def test_every_element_has_its_own_draw_and_size(name: str, kind: str, tile_rows: int, ranges: Float32 | None) -> None:
    """Output (m, n) of tile t gets `std_t * normal(fold_in(key, t))[m, n]`."""
    x, w = data(8)
    given = None if ranges is None else jnp.asarray(ranges)
    found = noise_of(name, kind, x, w, tile_rows=tile_rows, input_range=given)
    stds = tile_stds(kind, x, w, tile_rows=tile_rows, input_range=ranges)
    wanted = sum(std * draws(KEY, tile, 8) for tile, std in enumerate(stds))
    # Noise is recovered from a difference of outputs of magnitude up to 30 and a dozen roundings of its own.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=12 * 2.0**-23 * 30)
    assert np.abs(wanted).max() > 0.1


@every_implementation
@every_kind
def test_noise_does_not_depend_on_the_group_of_the_adc_bound(name: str, kind: str) -> None:
    """Weights are normalised by their tile's maximum (docstring of `ReadNoise`), also if ADC bounds are per column."""
    x, w = data(8)
    # Rounding of outputs of magnitude up to 30.
    per_tile, per_column = (noise_of(name, kind, x, w, tile_rows=512, bound_axis=axis) for axis in ("tile", "column"))
    np.testing.assert_allclose(per_column, per_tile, rtol=0, atol=12 * 2.0**-23 * 30)


@every_implementation
@every_kind
def test_spread_and_independence(name: str, kind: str) -> None:
    """Moments over 8000 draws; every bound is five standard errors of the moment."""
    x, w = data(1000)
    found = noise_of(name, kind, x, w, input_range=jnp.asarray(RANGES))
    variance = sum(np.square(s) for s in tile_stds(kind, x, w, tile_rows=TILE_ROWS, input_range=RANGES))
    z = found / np.sqrt(variance)
    n = z.size
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5  # Var(z^4) = 105 - 9
    for row in range(4):  # each input vector on its own: 2000 draws
        assert abs(z[row::4].var() - 1) < 5 * (2 / (n / 4)) ** 0.5
    assert np.all(np.abs(z.var(axis=0) - 1) < 5 * (2 / 1000) ** 0.5)
    correlation = np.corrcoef(z.T) - np.eye(COLUMNS)
    assert np.abs(correlation).max() < 5 / 1000**0.5
    for shift in (1, 4):  # following input vectors, and the next copy of the same one
        assert abs((z[shift:] * z[:-shift]).mean()) < 5 / n**0.5


@every_implementation
@every_kind
def test_noise_enters_before_the_adc(name: str, kind: str) -> None:
    x, w = data(40)
    arguments: dict[str, Any] = {"dac_bits": 8, "adc_bits": 6, "adc_bound": 2.0, "tile_rows": 512}
    options = {"read_noise": make_read_noise(kind, 0.5), "read_key": jax.random.key(KEY), "implementation": name}
    y = np.asarray(compiled(jnp.asarray(x), jnp.asarray(w), **options, **arguments))
    (tile,) = crossbar_tiles(x, w, input_range=None, bound_axis="tile", **arguments)
    assert tile.adc_step is not None and tile.adc_bound is not None
    codes = y / tile.adc_step
    np.testing.assert_allclose(codes, np.rint(codes), rtol=0, atol=31 * 2.0**-22)  # codes of up to 31, two roundings
    assert np.all(np.abs(codes) < 31.5)
    noisy = tile.sums + 5 * tile_stds(kind, x, w, tile_rows=512, input_range=None)[0] * draws(KEY, 0, 40)
    position = np.clip(noisy / tile.adc_step, -31, 31)
    assert np.all(np.abs(codes - position) < 0.5 + 1e-3)
    assert np.mean(np.rint(codes) != np.rint(np.clip(tile.sums / tile.adc_step, -31, 31))) > 0.1


@every_implementation
def test_draws_follow_the_position_and_the_key(name: str) -> None:
    x, w = data(8)
    first = noise_of(name, "additive", x, w)
    np.testing.assert_array_equal(noise_of(name, "additive", x, w), first)
    # Another shape may sum in another order: a rounding of outputs up to 30.
    folded = noise_of(name, "additive", x.reshape(2, 2, 2, ROWS), w)
    np.testing.assert_allclose(folded, first.reshape(2, 2, 2, COLUMNS), rtol=0, atol=2.0**-22 * 30)
    np.testing.assert_allclose(noise_of(name, "additive", x[:5], w), first[:5], rtol=0, atol=2.0**-22 * 30)
    assert np.all(noise_of(name, "additive", x, w, seed=KEY + 1) != first)
    assert np.all(first[:4] != first[4:])  # equal inputs, other positions


@every_implementation
@every_kind
def test_zero_inputs_and_zero_std_have_no_noise(name: str, kind: str) -> None:
    x, w = data(8)
    x[1] = 0
    found = noise_of(name, kind, x, w)
    assert not found[1].any() and found[0].all()
    options: dict[str, Any] = {"adc_bits": None, "tile_rows": TILE_ROWS, "implementation": name}
    off = {"read_noise": make_read_noise(kind, 0.0), "read_key": jax.random.key(KEY)}
    silent, without = (np.asarray(compiled(jnp.asarray(x), jnp.asarray(w), **options, **o)) for o in (off, {}))
    # Without noise and ADC the tiles may be multiplied as one.
    np.testing.assert_allclose(silent, without, rtol=0, atol=20 * 2.0**-23 * 30)


@every_implementation
def test_one_compile_for_every_magnitude_and_key_and_vmap_equals_loop(name: str) -> None:
    x, w = map(jnp.asarray, data(4))

    def call(std: jax.Array, key: jax.Array) -> jax.Array:
        noise = make_read_noise("additive", 0.0).replace(std=std)
        return api.crossbar_matmul(x, w, adc_bits=None, read_noise=noise, read_key=key, implementation=name)

    stds, keys = jnp.float32([0.1, 0.2, 0.1]), jax.random.split(jax.random.key(3), 3)
    run = jax.jit(chex.assert_max_traces(call, n=1))
    loop = np.stack([np.asarray(run(std, key)) for std, key in zip(stds, keys, strict=True)])
    assert len({y.tobytes() for y in loop}) == 3
    # Sums of 20 products may be taken in another order.
    np.testing.assert_allclose(jax.jit(jax.vmap(call))(stds, keys), loop, rtol=0, atol=20 * 2.0**-23 * 30)


@every_implementation
@every_kind
def test_gradients_are_finite_at_zero_rows_and_columns(name: str, kind: str) -> None:
    """The root in the noise's spread has an infinite slope at zero."""
    x, w = data(4)
    x[1], w[:, 2] = 0, 0

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        noise, key = make_read_noise(kind, STD), jax.random.key(KEY)
        return jnp.sum(api.crossbar_matmul(x, w, read_noise=noise, read_key=key, implementation=name))

    dx, dw = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(x), jnp.asarray(w))
    assert np.isfinite(dx).all()
    assert np.isfinite(dw).all()
