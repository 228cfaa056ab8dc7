"""A sum in a fixed order: its value, and that nothing around it changes a bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.ops.pairwise_sum import pairwise_sum


def normal(*shape: int) -> np.ndarray:
    """Values of different sizes, whose float32 sums depend on the order."""
    rng = np.random.default_rng(7)
    return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3, shape)).astype(np.float32)


def halves(values: np.ndarray) -> np.ndarray:
    """Of a last axis: zeros up to a power of two, then the first half plus the second, until one is left."""
    parts = list(np.moveaxis(values, -1, 0))
    while len(parts) & (len(parts) - 1):
        parts.append(np.zeros_like(parts[0]))
    while len(parts) > 1:
        middle = len(parts) // 2
        parts = [a + b for a, b in zip(parts[:middle], parts[middle:], strict=True)]
    return parts[0]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 64, 100])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_sum_over_any_axis_of_any_size(axis: int, size: int) -> None:
    shape = [2, 3, 4]
    shape[axis] = size
    values = normal(*shape)
    found = np.asarray(pairwise_sum(jnp.asarray(values), axis))
    wide = values.astype(np.float64)
    assert found.dtype == np.float32 and found.shape == wide.sum(axis=axis, keepdims=True).shape
    # Every element goes through log2(size) additions at most, each off by 2^-24 of its result.
    bound = np.ceil(np.log2(size)) * 2.0**-24 * np.abs(wide).sum(axis=axis, keepdims=True)
    assert np.all(np.abs(found - wide.sum(axis=axis, keepdims=True)) <= bound * (1 + 1e-6))
    np.testing.assert_array_equal(found, np.expand_dims(halves(np.moveaxis(values, axis, -1)), axis))


def test_one_element_is_itself_and_none_are_zero() -> None:
    values = jnp.asarray([[3.25], [-0.0]], jnp.float32)
    np.testing.assert_array_equal(pairwise_sum(values, 1), values)
    np.testing.assert_array_equal(pairwise_sum(jnp.zeros((2, 0), jnp.float32), 1), [[0.0], [0.0]])


def test_infinity_and_nan_come_through() -> None:
    values = jnp.asarray([[1, np.inf, 2], [np.inf, 1, -np.inf], [np.nan, 0, 0]], jnp.float32)
    np.testing.assert_array_equal(pairwise_sum(values, 1)[:, 0], [np.inf, np.nan, np.nan])


def test_bits_are_the_same_whatever_is_around_the_sum() -> None:
    """Alone, compiled, beside other operations, for many at once, and for some of the columns."""
    values = jnp.asarray(normal(6, 77, 20))
    alone = np.asarray(pairwise_sum(values, 1))
    compiled = jax.jit(pairwise_sum, static_argnums=1)

    @jax.jit
    def fused(x: jax.Array) -> jax.Array:
        half = x * 2
        return pairwise_sum(half / 2, 1) * 3 / 3 + 0 * jnp.sum(half)

    ways = {
        "jit": compiled(values, 1),
        "vmap": jax.vmap(lambda x: pairwise_sum(x, 0))(values),
        "jit of vmap over columns": jax.jit(jax.vmap(lambda x: pairwise_sum(x, 1), in_axes=2, out_axes=2))(values),
        "some columns": jnp.concatenate([compiled(values[..., :7], 1), compiled(values[..., 7:], 1)], axis=2),
        "one column": jnp.concatenate([compiled(values[..., n : n + 1], 1) for n in range(20)], axis=2),
        "another axis": jnp.moveaxis(compiled(jnp.moveaxis(values, 1, 0), 0), 0, 1),
    }
    for name, found in ways.items():
        np.testing.assert_array_equal(np.asarray(found).view(np.int32), alone.view(np.int32), err_msg=name)
    # Powers of two cost nothing, a third a rounding.
    np.testing.assert_allclose(fused(values), alone, rtol=3e-7)
    assert np.any(compiled(jnp.roll(values, 1, axis=1), 1) != alone)  # order matters for these values


def test_zeros_behind_the_values_change_nothing() -> None:
    """A power of two of them: the order of halves is another one otherwise."""
    values = normal(3, 50)
    padded = np.pad(values, ((0, 0), (0, 14)))
    np.testing.assert_array_equal(pairwise_sum(jnp.asarray(values), 1), pairwise_sum(jnp.asarray(padded), 1))


def test_gradient_is_one_everywhere() -> None:
    gradient = jax.grad(lambda x: pairwise_sum(x, 0)[0])(jnp.arange(5, dtype=jnp.float32))
    np.testing.assert_array_equal(gradient, np.ones(5))
