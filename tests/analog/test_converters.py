"""The converters' arithmetic, bit for bit that of IEEE float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.converters import convert, convert_output, divide, round_half_even, step_size, steps
from hetmoe.errors import InputError

both_ways = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])


def call(
    function: Callable[..., jax.Array], compiled: bool, *arrays: np.ndarray, bits: int | None = None
) -> np.ndarray:
    static = () if bits is None else (bits,)
    run = jax.jit(function, static_argnums=() if bits is None else (len(arrays),)) if compiled else function
    return np.asarray(run(*map(jnp.asarray, arrays), *static))


def ieee(x: np.ndarray, bound: np.ndarray, bits: int) -> np.ndarray:
    """The same in numpy, where every operation is one correctly rounded float32 operation."""
    step = np.float32(2) * bound / np.float32(2**bits - 2)
    return np.rint(np.clip(x, -bound, bound) / step) * step


def some_bounds(count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.01, 50, (count, 1)).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 8, 11])
def test_number_of_levels(bits: int) -> None:
    """`2**bits - 1` codes, symmetric around zero, the outermost at the range itself."""
    bound = np.float32(2 ** (bits - 1) - 1) / np.float32(4)  # a step of exactly 1/4
    x = np.linspace(-2 * bound, 2 * bound, 16 * 2**bits + 1, dtype=np.float32)
    levels = np.unique(call(convert, True, x, bound, bits=bits))
    assert steps(bits) == 2**bits - 2
    np.testing.assert_array_equal(levels, np.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), dtype=np.float32) / 4)


@both_ways
def test_ties_go_to_the_even_code(compiled: bool) -> None:
    halves = np.arange(-127, 127, dtype=np.float32) + np.float32(0.5)
    even = np.where(np.floor(halves) % 2 == 0, np.floor(halves), np.ceil(halves))
    np.testing.assert_array_equal(call(round_half_even, compiled, halves), even)
    # A step of 1/16, so that the quotients are exact.
    found = call(convert, compiled, halves / np.float32(16), np.float32(127 / 16), bits=8)
    np.testing.assert_array_equal(found, even / 16)


@both_ways
def test_division_is_correctly_rounded(compiled: bool) -> None:
    x, step = np.random.default_rng(1).standard_normal((2000, 50)).astype(np.float32), some_bounds(2000)
    wanted = x / step
    assert np.mean(x * (np.float32(1) / step) != wanted) > 0.1  # multiplying by the reciprocal would be seen
    np.testing.assert_array_equal(call(divide, compiled, x, step), wanted)
    np.testing.assert_array_equal(call(divide, compiled, x, step[7, 0]), x / step[7, 0])


@both_ways
@pytest.mark.parametrize("bits", [2, 5, 8, 16])
def test_step_is_correctly_rounded(compiled: bool, bits: int) -> None:
    """`2 * bound / steps`, not `bound` times a rounded `2 / steps`."""
    bound = some_bounds(5000)
    count = np.float32(2**bits - 2)
    wanted = np.float32(2) * bound / count
    assert bits == 2 or np.mean(bound * (np.float32(2) / count) != wanted) > 0.01
    np.testing.assert_array_equal(call(step_size, compiled, bound, bits=bits), wanted)


@both_ways
@pytest.mark.parametrize("bits", [5, 8])
def test_ties_at_any_range(compiled: bool, bits: int) -> None:
    """Inputs half way between two codes of a range that is no power of two go where IEEE arithmetic sends them."""
    bound = some_bounds(500)
    last = 2 ** (bits - 1) - 1
    halves = np.arange(-last, last, dtype=np.float32) + np.float32(0.5)
    step = np.float32(2) * bound / np.float32(2**bits - 2)
    x = halves * step
    assert np.mean(x / step == halves) > 0.5
    np.testing.assert_array_equal(call(convert, compiled, x, bound, bits=bits), ieee(x, bound, bits))


@both_ways
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_equals_ieee_on_random_inputs(compiled: bool, bits: int) -> None:
    bound = some_bounds(500)
    x = bound * np.random.default_rng(2).uniform(-1.3, 1.3, (500, 40)).astype(np.float32)
    np.testing.assert_array_equal(call(convert, compiled, x, bound, bits=bits), ieee(x, bound, bits))


@both_ways
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_outputs_are_rounded_and_then_clipped(compiled: bool, bits: int) -> None:
    """A saturated output is the bound itself, where the top code times the step may be one rounding away from it."""
    bound = some_bounds(500)
    y = bound * np.random.default_rng(3).uniform(-1.3, 1.3, (500, 40)).astype(np.float32)
    step = np.float32(2) * bound / np.float32(2**bits - 2)
    level = np.rint(y / step) * step
    top = np.float32(2 ** (bits - 1) - 1) * step
    assert bits != 8 or np.mean(top != bound) > 0.005  # the order of clipping and rounding would be seen
    found = call(convert_output, compiled, y, bound, bits=bits)
    np.testing.assert_array_equal(found, np.clip(level, -bound, bound))
    assert np.isnan(call(convert_output, compiled, np.float32([np.nan]), bound[0], bits=bits)).all()
    np.testing.assert_array_equal(
        call(convert_output, compiled, np.float32([1, -1, 0]), np.float32(0), bits=8), [0] * 3
    )


@both_ways
def test_special_values(compiled: bool) -> None:
    x = np.float32([np.nan, np.inf, -np.inf, 0.0, 1e-30])
    found = call(convert, compiled, x, np.float32(2), bits=8)
    assert np.isnan(found[0])
    # 127 steps of a rounded 4 / 254 are the bound but for one rounding.
    np.testing.assert_allclose(found[1:], [2, -2, 0, 0], rtol=2.0**-23)
    np.testing.assert_array_equal(call(convert, compiled, np.float32([1, -1, 0]), np.float32(0), bits=8), np.zeros(3))
    assert np.isnan(call(convert, compiled, np.float32([np.nan]), np.float32(0), bits=8)).all()
    assert np.isnan(call(convert, compiled, np.float32([1.0]), np.float32(np.nan), bits=8)).all()


@both_ways
@pytest.mark.parametrize("exponent", range(-127, -116))
def test_tiny_bounds_stay_finite(compiled: bool, exponent: int) -> None:
    """A step may be subnormal, which XLA flushes to zero, though its bound is not: 2 * 2**-121 / 254 < 2**-126."""
    bound = np.float32(2.0**exponent)
    found = call(convert, compiled, bound * np.float32([1, 0.5, -1, 0]), bound, bits=8)
    assert np.isfinite(found).all()
    assert np.all(np.abs(found) <= 2 * bound)


@pytest.mark.parametrize("converter", [convert, convert_output])
def test_gradient_is_straight_through(converter: Callable[..., jax.Array]) -> None:
    """One inside the range, also within the outermost code, and zero beyond it."""
    bound = some_bounds(200)
    shares = np.float32([0.0, 0.3, -0.9, 0.997, -0.999, 1.001, -1.002, 1.02, -3.0])
    inside = np.abs(shares) < 1
    weights = np.arange(1, 10, dtype=np.float32)

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(converter(x, jnp.asarray(bound), 8) * weights[None])

    gradient = jax.jit(jax.grad(total))(jnp.asarray(bound * shares))
    wanted = np.broadcast_to(weights * inside, gradient.shape)
    np.testing.assert_allclose(gradient, wanted, rtol=2.0**-22)  # times step, by step


def test_rounding_passes_tangents_on() -> None:
    value, tangent = jax.jvp(round_half_even, (jnp.float32([0.4, 2.5]),), (jnp.float32([3.0, -1.0]),))
    np.testing.assert_array_equal(value, [0, 2])
    np.testing.assert_array_equal(tangent, [3, -1])


@pytest.mark.parametrize("bits", [1, 17, 0, -8, 8.0, "8", True, None, np.float32(8)])
def test_bad_bits_are_refused(monkeypatch: pytest.MonkeyPatch, bits: Any) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # it would refuse some of them itself
    with pytest.raises(InputError, match="must be a whole number from 2 to 16, or None for an ideal converter"):
        steps(bits)
