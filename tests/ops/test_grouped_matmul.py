"""One matmul per block of tokens: values, gradients, and no more work than that, in every implementation.

`ragged` is what the XLA implementation runs on TPU; here it takes the place of the loop over blocks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.ops.dispatch import dispatch, from_blocks, to_blocks
from hetmoe.ops.grouped_crossbar.api import digital_products
from hetmoe.ops.grouped_matmul import by_block, ragged
from hetmoe.ops.grouped_matmul.xla import grouped_matmul
from tests.ops.crossbar_battery import KERNELS, sum_error
from tests.ops.matmul_count import multiplications

TOKENS, COPIES, EXPERTS, ROWS, COLUMNS = 13, 2, 5, 24, 9
BLOCK = {"by_block": 4, "ragged": 4} | dict.fromkeys(KERNELS, 16)
Multiply = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


@pytest.fixture(params=tuple(BLOCK))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "ragged":
        monkeypatch.setattr(by_block, "products", ragged.products)
        monkeypatch.setattr(by_block, "weights_gradient", ragged.weights_gradient)
    return request.param


def kernel(name: str, x: jax.Array, w: jax.Array, expert: jax.Array, used: jax.Array | None) -> jax.Array:
    used = jnp.ones(expert.shape, bool) if used is None else used
    return digital_products(x, (w,), block_expert=expert, used=used, implementation=name)[0]


def multiply(way: str) -> Multiply:
    return functools.partial(kernel, way) if way in KERNELS else grouped_matmul


def routed(dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x, w, chosen experts); expert 3 gets no token."""
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((TOKENS, ROWS)), dtype)
    w = jnp.asarray(rng.standard_normal((EXPERTS, ROWS, COLUMNS)), dtype)
    return x, w, jnp.asarray(rng.choice([0, 1, 2, 4], (TOKENS, COPIES)), jnp.int32)


def through_blocks(x: jax.Array, w: jax.Array, chosen: jax.Array, way: str) -> jax.Array:
    """`[tokens, copies, columns]`: every token times the weights of its experts."""
    plan = dispatch(chosen, EXPERTS, BLOCK[way])
    used = (plan.slot_token < TOKENS).reshape(-1, BLOCK[way]).any(axis=1)
    return from_blocks(multiply(way)(to_blocks(x, plan), w, plan.block_expert, used), plan)


def wide(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32), np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_equal_per_token_products(way: str, dtype: Any) -> None:
    x, w, chosen = routed(dtype)
    y = jax.jit(functools.partial(through_blocks, way=way))(x, w, chosen)
    assert y.dtype == jnp.float32
    picked = wide(w)[np.asarray(chosen)]
    wanted = np.einsum("tk,tjkn->tjn", wide(x), picked)
    # Products of bf16 are exact in float32, so both dtypes have the error of a float32 sum.
    bound = sum_error(ROWS) * np.einsum("tk,tjkn->tjn", np.abs(wide(x)), np.abs(picked))
    assert np.all(np.abs(np.asarray(y) - wanted) <= bound)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_equal_per_token_products(way: str, dtype: Any) -> None:
    x, w, chosen = routed(dtype)
    # Cotangents that bf16 holds exactly, since the backward pass reads them in the dtype of x.
    cotangent = jnp.asarray(np.random.default_rng(5).integers(-8, 9, (TOKENS, COPIES, COLUMNS)), jnp.float32)

    def gradients(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.grad(lambda x, w: jnp.sum(through_blocks(x, w, chosen, way) * cotangent), argnums=(0, 1))(x, w)

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


def test_weights_are_read_in_the_dtype_of_x(way: str) -> None:
    x, w, chosen = routed()
    low, run = x.astype(jnp.bfloat16), jax.jit(functools.partial(through_blocks, way=way))
    np.testing.assert_array_equal(run(low, w, chosen), run(low, w.astype(jnp.bfloat16), chosen))


@pytest.mark.parametrize("axes", [(None, 0, None), (0, None, None), (None, None, 0), (0, 0, 0)])
def test_vmap_equals_loop(way: str, axes: tuple[int | None, ...]) -> None:
    """Over weights (noise keys), inputs, routings, or all."""
    x, w, chosen = routed()
    stacks = (jnp.stack([x, 2 * x, -x]), jnp.stack([w, 2 * w, -w]), jnp.stack([chosen, chosen[::-1], 0 * chosen]))
    given = tuple(one if axis is None else stack for one, stack, axis in zip((x, w, chosen), stacks, axes, strict=True))
    together = jax.jit(jax.vmap(functools.partial(through_blocks, way=way), in_axes=axes))(*given)
    for number, found in enumerate(together):
        one, weights, routing = (part if axis is None else part[number] for part, axis in zip(given, axes, strict=True))
        picked = wide(weights)[np.asarray(routing)]
        bound = sum_error(ROWS) * np.einsum("tk,tjkn->tjn", np.abs(wide(one)), np.abs(picked))
        assert np.all(np.abs(np.asarray(found) - np.einsum("tk,tjkn->tjn", wide(one), picked)) <= bound)


@pytest.mark.parametrize("axes", [(None, 0), (0, None), (0, 0)])
def test_vmap_of_gradients_equals_loop(way: str, axes: tuple[int | None, ...]) -> None:
    x, w, chosen = routed()

    def gradients(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.grad(lambda x, w: jnp.sum(jnp.square(through_blocks(x, w, chosen, way))), argnums=(0, 1))(x, w)

    given = (x if axes[0] is None else jnp.stack([x, -x]), w if axes[1] is None else jnp.stack([w, 2 * w]))
    together = jax.jit(jax.vmap(gradients, in_axes=axes))(*given)
    for number in range(2):
        one, weights = (wide(part if axis is None else part[number]) for part, axis in zip(given, axes, strict=True))
        picked = weights[np.asarray(chosen)]
        owner = np.eye(EXPERTS)[np.asarray(chosen)]

        def both(x: np.ndarray, w: np.ndarray, owner: np.ndarray = owner) -> tuple[np.ndarray, np.ndarray]:
            y = 2 * np.einsum("tk,tjkn->tjn", x, w)
            return np.einsum("tjn,tjkn->tk", y, w), np.einsum("tje,tk,tjn->ekn", owner, x, y)

        # Sums of ROWS products, then sums over columns, or tokens, of products with them: both errors are relative to
        # the same sums of magnitudes.
        error = sum_error(ROWS) + sum_error(TOKENS * COPIES)
        magnitudes = both(np.abs(one), np.abs(picked))
        for found, wanted, magnitude in zip(together, both(one, picked), magnitudes, strict=True):
            assert np.all(np.abs(found[number] - wanted) <= error * magnitude)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_platform_decides_on_ragged_dot(platform: str) -> None:
    """Forward and for both gradients; elsewhere it would multiply every row by every expert, or be slow."""
    x, w, chosen = routed()

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(through_blocks(x, w, chosen, "by_block")))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, w)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count('chlo.ragged_dot"') == (3 if platform == "tpu" else 0)


def test_counting_sees_loops_and_calls() -> None:
    a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
    assert multiplications(jnp.matmul, a, b) == 3 * 5 * 7
    looped = jax.jit(lambda a, b: jax.lax.map(lambda row: row @ b, jnp.stack([a, a])))
    assert multiplications(looped, a, b) == 2 * 3 * 5 * 7


def test_work_is_one_product_per_slot() -> None:
    """There are blocks * block * K * N products forward, and as much for each gradient: no expert sees all tokens."""
    x, w, chosen = routed()
    block = BLOCK["by_block"]
    plan = jax.jit(dispatch, static_argnums=(1, 2))(chosen, EXPERTS, block)
    blocks = jax.jit(to_blocks)(x, plan)
    once = blocks.shape[0] * block * ROWS * COLUMNS
    assert once < EXPERTS * TOKENS * ROWS * COLUMNS
    forward = multiplications(lambda x, w: grouped_matmul(x, w, plan.block_expert, None), blocks, w)
    assert forward == once

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(grouped_matmul(x, w, plan.block_expert, None)))

    assert multiplications(jax.grad(loss, argnums=(0, 1)), blocks, w) == 3 * once
    mapped = jax.vmap(lambda w: grouped_matmul(blocks, w, plan.block_expert, None))
    assert multiplications(mapped, jnp.stack([w, w])) == 2 * once


def test_blocks_that_are_not_used_add_nothing(way: str) -> None:
    """Forward and backward: NaN in the weights that they would meet stays there."""
    bad = 1e30 if way == "ragged" else jnp.nan  # what XLA makes of ragged_dot on CPU adds 0 * w for other experts
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3)), jnp.float32).at[1].set(bad)
    x = jnp.ones((3, 16, 5))
    expert, used = jnp.array([0, 0, 1]), jnp.array([True, True, False])

    def total(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(multiply(way)(x, w, expert, used))

    y = multiply(way)(x, w, expert, used)
    np.testing.assert_allclose(y[0], x[0] @ w[0], rtol=1e-6)
    assert not np.any(y[2])
    dx, dw = jax.grad(total, argnums=(0, 1))(x, w)
    assert np.all(np.isfinite(dx)) and not np.any(dx[2]) and np.any(dx[0])
    np.testing.assert_allclose(dw, np.stack([np.full((5, 3), 32.0), np.zeros((5, 3))]))
