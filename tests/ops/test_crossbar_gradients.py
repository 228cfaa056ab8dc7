"""Gradients of the crossbar matmul: straight through rounding, zero where a converter clips, finite everywhere."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.tiles import block_max
from tests.numpy_reference import Float32, crossbar_tiles
from tests.ops.crossbar_battery import IMPLEMENTATIONS, sum_error

BATCH, ROWS, COLUMNS, TILE_ROWS, TILE = 6, 20, 7, 12, 10  # two row-blocks of 10
RANGES = np.float32([1.3, 0.9])
every_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def data() -> tuple[Float32, Float32, Float32]:
    """(x, w, cotangent of the output)."""
    rng = np.random.default_rng(3)
    shapes = ((BATCH, ROWS), (ROWS, COLUMNS), (BATCH, COLUMNS))
    x, w, cotangent = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, w, cotangent


@functools.cache
def gradient_function(name: str, dac_bits: int | None, adc_bits: int | None, axis: str) -> Callable[..., Any]:
    """Compiled gradients of `sum(y * cotangent)` with respect to every array of a dictionary."""

    def loss(arrays: dict[str, jax.Array], cotangent: jax.Array) -> jax.Array:
        static: dict[str, Any] = {"dac_bits": dac_bits, "adc_bits": adc_bits, "bound_axis": axis}
        return jnp.sum(IMPLEMENTATIONS[name](**arrays, **static, tile_rows=TILE_ROWS) * cotangent)

    return jax.jit(jax.grad(loss))


def gradients(
    name: str, values: dict[str, Any], cotangent: Float32, *, dac_bits: int | None, adc_bits: int | None, axis: str
) -> dict[str, np.ndarray]:
    found = gradient_function(name, dac_bits, adc_bits, axis)(jax.tree.map(jnp.asarray, values), cotangent)
    return jax.tree.map(np.asarray, found)


def straight_through(
    x: Float32, w: Float32, cotangent: Float32, **arguments: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dx, dw, share of outputs in range) of the rule, float64: a clipped input or output passes nothing on.

    The gradient for the weights is that of the digital matmul with the inputs that the DAC really gives.
    """
    dx, dw, passed = [], [], []
    for index, tile in enumerate(crossbar_tiles(x, w, **arguments)):
        part = slice(TILE * index, TILE * (index + 1))
        open_ = np.ones(cotangent.shape, bool)
        if tile.adc_bound is not None:
            open_ = np.abs(tile.sums) < tile.adc_bound
            assert np.all(np.abs(np.abs(tile.sums) - tile.adc_bound) > 1e-5 * tile.adc_bound)  # no doubtful case
        through = np.where(open_, cotangent.astype(np.float64), 0)
        dynamic = np.max(np.abs(x[:, part]), axis=-1, keepdims=True)
        limit = dynamic if arguments["input_range"] is None else RANGES[index]
        inside = (np.abs(x[:, part]) < limit) | (arguments["dac_bits"] is None)
        dx.append(np.where(inside, through @ w[part].T.astype(np.float64), 0))
        dw.append((tile.dac_codes.astype(np.float64) * tile.dac_step).T @ through)
        passed.append(open_.mean())
    return np.concatenate(dx, axis=1), np.concatenate(dw), np.array(passed)


def assert_same(actual: np.ndarray, wanted: np.ndarray, terms: int, magnitude: float) -> None:
    """`terms` products of magnitude up to `magnitude` were summed in float32."""
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=(sum_error(terms) + 2.0**-23) * terms * magnitude)


@every_implementation
@pytest.mark.parametrize(("bits", "adc_bound"), [((8, 8), 12.0), ((8, 8), 0.5), ((None, 8), 12.0), ((4, None), 12.0)])
def test_straight_through_with_static_ranges(name: str, bits: tuple[int | None, int | None], adc_bound: float) -> None:
    x, w, cotangent = data()
    values = {
        "x": x,
        "w": w,
        "input_range": RANGES,
        "adc_bound": np.float32(adc_bound),
        "weight_max": np.asarray(block_max(jnp.asarray(w), TILE_ROWS, per_column=False)),
    }
    found = gradients(name, values, cotangent, dac_bits=bits[0], adc_bits=bits[1], axis="tile")
    static: dict[str, Any] = {"dac_bits": bits[0], "adc_bits": bits[1], "bound_axis": "tile", "tile_rows": TILE_ROWS}
    dx, dw, passed = straight_through(x, w, cotangent, input_range=RANGES, adc_bound=adc_bound, **static)
    assert np.all(passed < 0.9) if adc_bound < 1 else np.all(passed == 1)
    scale = float(np.abs(cotangent).max() * max(np.abs(w).max(), np.abs(x).max()))
    assert_same(found["x"], dx, COLUMNS, scale)
    assert_same(found["w"], dw, BATCH, scale)
    if bits[0] is not None:
        clipped = np.abs(x) > np.repeat(RANGES, TILE)
        assert clipped.any() and not found["x"][clipped].any()
    assert all(np.isfinite(gradient).all() for gradient in found.values())


@every_implementation
@pytest.mark.parametrize("axis", ["tile", "column"])
def test_straight_through_with_dynamic_ranges(name: str, axis: str) -> None:
    """Elements that set no range and no bound get the digital gradient; the others also move the steps."""
    x, w, cotangent = data()
    found = gradients(name, {"x": x, "w": w}, cotangent, dac_bits=8, adc_bits=8, axis=axis)
    static: dict[str, Any] = {"dac_bits": 8, "adc_bits": 8, "bound_axis": axis, "tile_rows": TILE_ROWS}
    _, dw, passed = straight_through(x, w, cotangent, input_range=None, adc_bound=12.0, **static)
    assert np.all(passed == 1)
    scale = float(np.abs(cotangent).max() * max(np.abs(w).max(), np.abs(x).max()))

    tiles = np.abs(x.reshape(BATCH, 2, TILE))
    ordinary = (tiles < tiles.max(axis=-1, keepdims=True)).reshape(x.shape)
    assert_same(found["x"][ordinary], (cotangent.astype(np.float64) @ w.T)[ordinary], COLUMNS, scale)
    tiles = np.abs(w.reshape(2, TILE, COLUMNS))
    largest = tiles.max(axis=1 if axis == "column" else (1, 2), keepdims=True)
    ordinary = (tiles < largest).reshape(w.shape)
    assert_same(found["w"][ordinary], dw[ordinary], BATCH, scale)
    assert all(np.isfinite(gradient).all() for gradient in found.values())


@every_implementation
@pytest.mark.parametrize(
    ("axis", "given"),
    [("tile", {}), ("column", {}), ("tile", {"input_range": np.float32([1.3, 0.0]), "adc_bound": np.float32(12.0)})],
    ids=["tile", "column", "static"],
)
def test_finite_at_zeros(name: str, axis: str, given: dict[str, Any]) -> None:
    x, w, cotangent = data()
    x[1], x[2, :10] = 0, 0
    w[:, 3], w[10:] = 0, 0
    found = gradients(name, {"x": x, "w": w} | given, cotangent, dac_bits=8, adc_bits=8, axis=axis)
    assert set(found) == {"x", "w", *given}
    assert all(np.isfinite(gradient).all() for gradient in found.values())


@every_implementation
def test_bf16_gradients_keep_their_dtype(name: str) -> None:
    x, w, cotangent = data()
    values = {"x": jnp.asarray(x, jnp.bfloat16), "w": jnp.asarray(w, jnp.bfloat16)}
    found = gradients(name, values, cotangent, dac_bits=8, adc_bits=8, axis="tile")
    assert found["x"].dtype == found["w"].dtype == jnp.bfloat16
    same = {key: value.astype(jnp.float32) for key, value in values.items()}
    wide = gradients(name, same, cotangent, dac_bits=8, adc_bits=8, axis="tile")
    # One rounding of the float32 gradient to bf16 (8 bits), and as much for each of the tiles' shares before.
    for key in found:
        np.testing.assert_allclose(found[key].astype(np.float32), wide[key], rtol=2.0**-7, atol=1e-5)
