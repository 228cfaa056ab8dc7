"""What every implementation of the crossbar matmul promises, whatever the numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.tiles import block_max
from hetmoe.ops.crossbar_matmul import api
from tests.numpy_reference import Float32
from tests.ops.crossbar_battery import (
    COMPILED,
    IMPLEMENTATIONS,
    assert_matches,
    expectation,
    golden_arrays,
    golden_cases,
    run,
)

ROWS, COLUMNS, TILE_ROWS = 20, 7, 12  # two row-blocks of 10
RANGES = np.float32([1.3, 0.9])
every_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def arguments(**changes: Any) -> dict[str, Any]:
    base = {"dac_bits": 8, "adc_bits": 8, "adc_bound": 12.0, "bound_axis": "tile", "tile_rows": TILE_ROWS}
    return {"input_range": None, **base, **changes}


@pytest.fixture
def x() -> Float32:
    return np.random.default_rng(1).standard_normal((5, ROWS)).astype(np.float32)


@pytest.fixture
def w() -> Float32:
    return np.random.default_rng(2).standard_normal((ROWS, COLUMNS)).astype(np.float32)


@every_implementation
def test_no_converters_is_the_digital_matmul(name: str, x: Float32, w: Float32) -> None:
    off = arguments(dac_bits=None, adc_bits=None)
    exact = x.astype(np.float64) @ w.astype(np.float64)
    expected = expectation(x, w, **off)
    assert_matches(run(name, x, w, **off), expected, value=exact)
    ranges_do_not_clip = run(name, x, w, **off | {"input_range": RANGES / 10})
    assert_matches(ranges_do_not_clip, expected, value=exact)


@every_implementation
@pytest.mark.parametrize(("axis", "ranges"), [("tile", None), ("column", RANGES)], ids=["dynamic", "static"])
def test_zeros_give_zeros(name: str, axis: str, ranges: Float32 | None, x: Float32, w: Float32) -> None:
    x[1], x[2, :10] = 0, 0
    w[:, 3], w[10:] = 0, 0
    options = arguments(bound_axis=axis, input_range=ranges)
    y = run(name, x, w, **options)
    assert not y[1].any() and not y[:, 3].any()
    assert_matches(y, expectation(x, w, **options))
    np.testing.assert_array_equal(run(name, x, 0 * w, **options), np.zeros_like(y))
    np.testing.assert_array_equal(run(name, 0 * x, w, **options), np.zeros_like(y))


@every_implementation
@pytest.mark.parametrize(
    ("bits", "ranges"), [((8, 8), RANGES), ((8, 8), None), ((8, None), RANGES), ((None, 8), None), ((None, None), None)]
)
def test_nan_never_becomes_a_number(
    name: str, bits: tuple[int | None, int | None], ranges: Float32 | None, x: Float32, w: Float32
) -> None:
    options = arguments(dac_bits=bits[0], adc_bits=bits[1], input_range=ranges, bound_axis="column")
    clean = run(name, x, w, **options)
    bad_x, bad_w = x.copy(), w.copy()
    bad_x[1, 15], bad_w[4, 2] = np.nan, np.nan
    y = run(name, bad_x, w, **options)
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(np.delete(y, 1, axis=0), np.delete(clean, 1, axis=0))
    y = run(name, x, bad_w, **options)
    assert np.isnan(y[:, 2]).all()
    np.testing.assert_array_equal(np.delete(y, 2, axis=1), np.delete(clean, 2, axis=1))


@every_implementation
@pytest.mark.parametrize("exponent", [-120, -122, -124, -126])
def test_tiny_inputs_stay_finite(name: str, exponent: int, x: Float32, w: Float32) -> None:
    """A step may be too small though its range is not: 2 * 2**-124 / 254 is subnormal, which XLA flushes."""
    tiny = np.ldexp(x, exponent)
    y = run(name, tiny, w, **arguments())
    assert np.isfinite(y).all()
    # Flushed steps lose the row altogether, so only the size of the result is certain.
    assert np.all(np.abs(y) <= 2 * np.abs(tiny) @ np.abs(w))


@every_implementation
def test_inputs_saturate_at_the_range(name: str, x: Float32, w: Float32) -> None:
    options = arguments(input_range=RANGES)
    limit = np.repeat(RANGES, 10)
    beyond = x + np.where(np.abs(x) >= limit, np.float32(1e6) * np.sign(x), 0).astype(np.float32)
    assert (np.abs(beyond) > 1e5).any()
    np.testing.assert_array_equal(run(name, beyond, w, **options), run(name, np.clip(x, -limit, limit), w, **options))


@every_implementation
@pytest.mark.parametrize("axis", ["tile", "column"])
def test_outputs_saturate_at_the_bound(name: str, axis: str, x: Float32, w: Float32) -> None:
    """With a small lambda and inputs of one sign, every tile gives its bound exactly."""
    options = arguments(input_range=RANGES, adc_bound=1e-3, bound_axis=axis)
    largest = [np.max(np.abs(w[s : s + 10]), axis=0 if axis == "column" else None) for s in (0, 10)]
    bounds = [r * np.float32(1e-3) * m * np.ones(COLUMNS, np.float32) for r, m in zip(RANGES, largest, strict=True)]
    y = run(name, np.abs(x) + 1, np.abs(w), **options)
    np.testing.assert_array_equal(y, np.tile(bounds[0] + bounds[1], (5, 1)))
    np.testing.assert_array_equal(run(name, -np.abs(x) - 1, np.abs(w), **options), -y)


@every_implementation
def test_bf16_is_read_exactly_and_summed_in_float32(name: str, x: Float32, w: Float32) -> None:
    low_x, low_w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    y = COMPILED[name](low_x, low_w, tile_rows=TILE_ROWS)
    assert y.dtype == jnp.float32
    wide = COMPILED[name](low_x.astype(jnp.float32), low_w.astype(jnp.float32), tile_rows=TILE_ROWS)
    np.testing.assert_array_equal(y, wide)
    mixed = COMPILED[name](jnp.asarray(x), low_w, tile_rows=TILE_ROWS)
    widened = np.asarray(low_w.astype(jnp.float32))
    assert_matches(np.asarray(mixed), expectation(x, widened, **arguments()))


@every_implementation
@pytest.mark.parametrize("mapped", [("w",), ("x", "w", "input_range", "adc_bound")], ids=["weights", "everything"])
def test_vmap_equals_loop(name: str, mapped: tuple[str, ...], x: Float32, w: Float32) -> None:
    values = {"x": x, "w": w, "input_range": RANGES, "adc_bound": np.float32(3.0)}
    factors = [np.float32(f) for f in (1.0, 1.3, 0.6)]
    stacked = {key: np.stack([value * factor for factor in factors]) for key, value in values.items() if key in mapped}

    def call(part: dict[str, jax.Array]) -> jax.Array:
        return IMPLEMENTATIONS[name](**jax.tree.map(jnp.asarray, values) | part, tile_rows=TILE_ROWS)

    together = np.asarray(jax.jit(jax.vmap(call))(jax.tree.map(jnp.asarray, stacked)))
    assert len({y.tobytes() for y in together}) == 3
    for index, y in enumerate(together):
        given = values | {key: stack[index] for key, stack in stacked.items()}
        xs, ws = given.pop("x"), given.pop("w")
        assert_matches(y, expectation(xs, ws, **arguments(**given)))


@every_implementation
@pytest.mark.parametrize("golden", ["ties_static_column", "ties_dynamic_tile"])
def test_vmap_keeps_ties(name: str, golden: str) -> None:
    """Bit for bit on sums that are exact whatever their order."""
    case = next(case for case in golden_cases() if case["name"] == golden)
    *arrays, output = golden_arrays(case)
    x, w, ranges = jax.tree.map(jnp.asarray, arrays)
    rows = jax.vmap(lambda row: IMPLEMENTATIONS[name](row, w, input_range=ranges, **case["arguments"]))
    np.testing.assert_array_equal(jax.jit(rows)(x), output)


@every_implementation
@pytest.mark.parametrize("axis", ["tile", "column"])
def test_weight_maximum_given_equals_computed(name: str, axis: str, x: Float32, w: Float32) -> None:
    maxima = block_max(jnp.asarray(w), TILE_ROWS, per_column=axis == "column")
    assert maxima.shape == (2, COLUMNS if axis == "column" else 1)
    options = arguments(bound_axis=axis)
    computed = run(name, x, w, **options)
    np.testing.assert_array_equal(run(name, x, w, weight_max=maxima, **options), computed)
    # It is really used: twice the maximum is the same as twice lambda.
    doubled = run(name, x, w, weight_max=2 * maxima, **options)
    np.testing.assert_array_equal(doubled, run(name, x, w, **options | {"adc_bound": 24.0}))
    assert (doubled != computed).any()


@every_implementation
def test_leading_axes_are_rows(name: str, x: Float32, w: Float32) -> None:
    options = arguments(input_range=RANGES)
    flat = run(name, np.tile(x[:4], (3, 1)), w, **options)
    folded = run(name, np.tile(x[:4], (3, 1)).reshape(3, 2, 2, ROWS), w, **options)
    np.testing.assert_array_equal(folded, flat.reshape(3, 2, 2, COLUMNS))
    assert run(name, x[0], w, **options).shape == (COLUMNS,)
    assert run(name, x[:0], w, **options).shape == (0, COLUMNS)


def test_default_implementation_is_one_of_the_named(x: Float32, w: Float32) -> None:
    arrays = jnp.asarray(x), jnp.asarray(w)
    named = [np.asarray(IMPLEMENTATIONS[name](*arrays)) for name in IMPLEMENTATIONS if name != "reference"]
    assert any(np.array_equal(api.crossbar_matmul(*arrays), y) for y in named)
