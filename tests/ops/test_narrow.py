"""Slicing 2-byte stacks in loops: same values and derivatives as plain scans, and no widened copy of the stack."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.ops import narrow

LAYERS, WIDTH = 6, 64


def stack(dtype: Any, width: int = WIDTH) -> jax.Array:
    values = np.random.default_rng(0).standard_normal((LAYERS, width, width)) / width**0.5
    return jnp.asarray(values, dtype)


def step(carry: jax.Array, layer: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    w, bias = layer
    out = jnp.matmul(carry, w, preferred_element_type=jnp.float32).astype(carry.dtype) + bias
    return out, jnp.sum(out)


def run(scan: Any, x: jax.Array, w: jax.Array) -> Any:
    return scan(step, x, (w, jnp.arange(LAYERS, dtype=jnp.float32).astype(x.dtype)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_values_and_derivatives_are_those_of_a_plain_scan(dtype: Any) -> None:
    x, w = jnp.ones((3, WIDTH), dtype), stack(dtype)
    for function in (lambda scan: run(scan, x, w), lambda scan: jax.grad(lambda v: run(scan, x, v)[0].sum())(w)):
        for actual, expected in zip(
            jax.tree.leaves(function(narrow.scan)), jax.tree.leaves(function(jax.lax.scan)), strict=True
        ):
            assert actual.dtype == expected.dtype
            np.testing.assert_array_equal(actual, expected)


def test_take_has_the_derivative_of_indexing() -> None:
    w = stack(jnp.bfloat16)
    grad = jax.jit(jax.grad(lambda v, i: jnp.sum(narrow.take(v, i).astype(jnp.float32) * 3.0)))(w, jnp.asarray(2))
    expected = np.zeros(w.shape)
    expected[2] = 3.0
    np.testing.assert_array_equal(np.asarray(grad, np.float64), expected)
    np.testing.assert_array_equal(jax.jit(narrow.take)(w, jnp.asarray(4)), w[4])


def test_no_widened_copy_of_the_stack() -> None:
    """By the compiled program's own analysis: two slices of float32 at most, where all layers would take six."""
    width, dtype = 512, jnp.bfloat16
    x = jax.ShapeDtypeStruct((3, width), dtype)
    w = jax.ShapeDtypeStruct((LAYERS, width, width), dtype)
    compiled = jax.jit(lambda x, w: run(narrow.scan, x, w)).lower(x, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * width**2 * 4
