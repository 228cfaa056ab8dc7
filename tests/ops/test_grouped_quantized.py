"""Token blocks times quantized weights: values in float64, one unpacking per expert, unused blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.ops.grouped_quantized.xla import quantized_feed_forward, quantized_products
from hetmoe.quantize.mixed import MixedMatrix
from tests.ops.crossbar_battery import sum_error
from tests.quantize.random_quantized import random_mixed

POOL, HIDDEN, INNER, BLOCK = np.array([0, 3, 1, 2, 0]), 64, 128, 4
EXPERT = np.array([0, 0, 1, 3, 3, 4, 4])  # none for expert 2
USED = np.array([True] * 6 + [False])


def layer(seed: int, rows: int, columns: int) -> tuple[MixedMatrix, np.ndarray]:
    return random_mixed(seed, POOL, rows, columns)


def inputs(dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(9).standard_normal((len(EXPERT), BLOCK, HIDDEN)), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_block_meets_the_weights_of_its_expert(dtype: Any) -> None:
    (gate, exact_gate), (up, exact_up) = layer(0, HIDDEN, INNER), layer(1, HIDDEN, INNER)
    x = inputs(dtype)
    found = jax.jit(quantized_products)(x, (gate, up), jnp.asarray(EXPERT), jnp.asarray(USED))
    for y, w in zip(found, (exact_gate, exact_up), strict=True):
        assert y.dtype == jnp.float32
        wide = np.asarray(x.astype(jnp.float32), np.float64)
        size = np.abs(wide) @ np.abs(w[EXPERT])
        rounding = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-22  # of the weights, to the dtype of x
        wanted = wide @ w[EXPERT] * USED[:, None, None]
        assert np.all(np.abs(y - wanted) <= (sum_error(HIDDEN) + rounding) * size)


def network(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    a = x @ gate[EXPERT]
    return (a / (1 + np.exp(-a)) * (x @ up[EXPERT])) @ down[EXPERT] * USED[:, None, None]


def test_network_is_that_of_float64() -> None:
    parts = (layer(0, HIDDEN, INNER), layer(1, HIDDEN, INNER), layer(2, INNER, HIDDEN))
    x = inputs()
    matrices, exact = zip(*parts, strict=True)
    found = jax.jit(quantized_feed_forward)(x, *matrices, jnp.asarray(EXPERT), jnp.asarray(USED))
    wanted = network(np.asarray(x, np.float64), *exact)
    # Sums of 64 and 128 products of order 10, through a product of two of them.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4 * sum_error(INNER) * np.abs(wanted).max())
    mapped = jax.vmap(lambda x: quantized_feed_forward(x, *matrices, jnp.asarray(EXPERT), jnp.asarray(USED)))
    np.testing.assert_allclose(jax.jit(mapped)(jnp.stack([x, x]))[1], found, rtol=1e-5, atol=1e-4)


def test_a_later_expert_does_not_get_the_weights_before_an_unused_block() -> None:
    """Blocks that are not used come last in a dispatch; if they did not, nothing would change."""
    (gate, exact) = layer(0, HIDDEN, INNER)
    used = np.array([True, False, False, True, True, False, True])
    (y,) = jax.jit(quantized_products)(inputs(), (gate,), jnp.asarray(EXPERT), jnp.asarray(used))
    wanted = np.asarray(inputs(), np.float64) @ exact[EXPERT] * used[:, None, None]
    np.testing.assert_allclose(y, wanted, rtol=0, atol=sum_error(HIDDEN) * 400)
