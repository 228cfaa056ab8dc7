"""One matmul per block of tokens: values, gradients, and no more work than that."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.ops.dispatch import dispatch, from_blocks, to_blocks
from hetmoe.ops.grouped_matmul.xla import grouped_matmul
from tests.ops.crossbar_battery import sum_error
from tests.ops.matmul_count import multiplications

TOKENS, COPIES, EXPERTS, BLOCK, ROWS, COLUMNS = 13, 2, 5, 4, 24, 9


def routed(dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x, w, chosen experts); expert 3 gets no token."""
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((TOKENS, ROWS)), dtype)
    w = jnp.asarray(rng.standard_normal((EXPERTS, ROWS, COLUMNS)), dtype)
    return x, w, jnp.asarray(rng.choice([0, 1, 2, 4], (TOKENS, COPIES)), jnp.int32)


def through_blocks(x: jax.Array, w: jax.Array, chosen: jax.Array) -> jax.Array:
    """`[tokens, copies, columns]`: every token times the weights of its experts."""
    plan = dispatch(chosen, EXPERTS, BLOCK)
    return from_blocks(grouped_matmul(to_blocks(x, plan), w, plan.block_expert, None), plan)


def wide(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32), np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_equal_per_token_products(dtype: Any) -> None:
    x, w, chosen = routed(dtype)
    y = jax.jit(through_blocks)(x, w, chosen)
    assert y.dtype == jnp.float32
    picked = wide(w)[np.asarray(chosen)]
    wanted = np.einsum("tk,tjkn->tjn", wide(x), picked)
    # Products of bf16 are exact in float32, so both dtypes have the error of a float32 sum.
    bound = sum_error(ROWS) * np.einsum("tk,tjkn->tjn", np.abs(wide(x)), np.abs(picked))
    assert np.all(np.abs(np.asarray(y) - wanted) <= bound)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_equal_per_token_products(dtype: Any) -> None:
    x, w, chosen = routed(dtype)
    # Cotangents that bf16 holds exactly, since the backward pass reads them in the dtype of x.
    cotangent = jnp.asarray(np.random.default_rng(5).integers(-8, 9, (TOKENS, COPIES, COLUMNS)), jnp.float32)

    def gradients(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.grad(lambda x, w: jnp.sum(through_blocks(x, w, chosen) * cotangent), argnums=(0, 1))(x, w)

    dx, dw = jax.jit(gradients)(x, w)
    assert dx.dtype == dw.dtype == dtype
    one_hot = np.eye(EXPERTS)[np.asarray(chosen)]
    wanted_x = np.einsum("tjn,tjkn->tk", wide(cotangent), wide(w)[np.asarray(chosen)])
    wanted_w = np.einsum("tje,tk,tjn->ekn", one_hot, wide(x), wide(cotangent))
    size_x = np.einsum("tjn,tjkn->tk", np.abs(wide(cotangent)), np.abs(wide(w)[np.asarray(chosen)]))
    size_w = np.einsum("tje,tk,tjn->ekn", one_hot, np.abs(wide(x)), np.abs(wide(cotangent)))
    # bf16: each copy's dx, their sum, and dw are rounded to 8 bits.
    rounding = 0.0 if dtype == jnp.float32 else 2.0**-8
    assert np.all(np.abs(wide(dx) - wanted_x) <= (sum_error(COPIES * COLUMNS) + 2 * rounding) * size_x)
    assert np.all(np.abs(wide(dw) - wanted_w) <= (sum_error(TOKENS * COPIES) + rounding) * size_w)
    assert not wide(dw)[3].any() and wide(dw)[4].any()


def test_weights_are_read_in_the_dtype_of_x() -> None:
    x, w, chosen = routed()
    low = x.astype(jnp.bfloat16)
    mixed = jax.jit(through_blocks)(low, w, chosen)
    np.testing.assert_array_equal(mixed, jax.jit(through_blocks)(low, w.astype(jnp.bfloat16), chosen))


def test_vmap_over_weights_equals_loop() -> None:
    """Noise keys map over weights while tokens stay."""
    x, w, chosen = routed()
    stack = jnp.stack([w, 2 * w, -w])
    together = jax.jit(jax.vmap(through_blocks, in_axes=(None, 0, None)))(x, stack, chosen)
    for found, weights in zip(together, stack, strict=True):
        picked = wide(weights)[np.asarray(chosen)]
        bound = sum_error(ROWS) * np.einsum("tk,tjkn->tjn", np.abs(wide(x)), np.abs(picked))
        assert np.all(np.abs(np.asarray(found) - np.einsum("tk,tjkn->tjn", wide(x), picked)) <= bound)


def test_counting_sees_loops_and_calls() -> None:
    a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
    assert multiplications(jnp.matmul, a, b) == 3 * 5 * 7
    looped = jax.jit(lambda a, b: jax.lax.map(lambda row: row @ b, jnp.stack([a, a])))
    assert multiplications(looped, a, b) == 2 * 3 * 5 * 7


def test_work_is_one_product_per_slot() -> None:
    """There are blocks * block * K * N products forward, and as much for each gradient: no expert sees all tokens."""
    x, w, chosen = routed()
    plan = jax.jit(dispatch, static_argnums=(1, 2))(chosen, EXPERTS, BLOCK)
    blocks = jax.jit(to_blocks)(x, plan)
    once = blocks.shape[0] * BLOCK * ROWS * COLUMNS
    assert once < EXPERTS * TOKENS * ROWS * COLUMNS
    forward = multiplications(lambda x, w: grouped_matmul(x, w, plan.block_expert, None), blocks, w)
    assert forward == once

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(grouped_matmul(x, w, plan.block_expert, None)))

    assert multiplications(jax.grad(loss, argnums=(0, 1)), blocks, w) == 3 * once
    assert multiplications(jax.vmap(through_blocks, in_axes=(None, 0, None)), x, jnp.stack([w, w]), chosen) == 2 * once


def test_blocks_that_are_not_used_are_not_multiplied() -> None:
    """Forward and backward: NaN in the weights that they would meet stays there."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3)), jnp.float32).at[1].set(jnp.nan)
    x = jnp.ones((3, 4, 5))
    expert, used = jnp.array([0, 0, 1]), jnp.array([True, True, False])

    def total(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(grouped_matmul(x, w, expert, used))

    y = grouped_matmul(x, w, expert, used)
    np.testing.assert_allclose(y[0], x[0] @ w[0], rtol=1e-6)
    assert not np.any(y[2])
    dx, dw = jax.grad(total, argnums=(0, 1))(x, w)
    assert np.all(np.isfinite(dx)) and not np.any(dx[2]) and np.any(dx[0])
    np.testing.assert_allclose(dw, np.stack([np.full((5, 3), 8.0), np.zeros((5, 3))]))
