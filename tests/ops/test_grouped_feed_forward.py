"""The network of the experts, block by block: values, gradients, unused blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.ops.grouped_matmul.feed_forward import grouped_feed_forward
from tests.numpy_reference import Float32
from tests.ops.crossbar_battery import sum_error
from tests.ops.matmul_count import multiplications

HIDDEN, INNER, BLOCK = 24, 20, 4
EXPERT, USED = np.array([0, 0, 2, 2]), np.array([True, True, True, False])
Weights = tuple[Float32, Float32, Float32]


def weights() -> Weights:
    rng = np.random.default_rng(0)
    shapes = ((3, HIDDEN, INNER), (3, HIDDEN, INNER), (3, INNER, HIDDEN))
    gate, up, down = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return gate / np.float32(4), up / np.float32(4), down / np.float32(4)


def inputs() -> Float32:
    return np.random.default_rng(1).standard_normal((len(EXPERT), BLOCK, HIDDEN)).astype(np.float32)


def exact(x: Any, of: Any) -> np.ndarray:
    """In float64, zero in blocks that are not used."""
    gate, up, down = (np.asarray(w, np.float64)[EXPERT] for w in of)
    a = np.asarray(x, np.float64) @ gate
    return a / (1 + np.exp(-a)) * (np.asarray(x, np.float64) @ up) @ down * USED[:, None, None]


def run(x: Any, *of: Any) -> jax.Array:
    return grouped_feed_forward(x, *of, jnp.asarray(EXPERT), jnp.asarray(USED))


def test_values_are_those_of_float64() -> None:
    found = jax.jit(run)(inputs(), *weights())
    # Relative to the sums of magnitudes: two products of HIDDEN terms, then one of INNER, here of order 1 to 10.
    np.testing.assert_allclose(found, exact(inputs(), weights()), rtol=0, atol=20 * sum_error(HIDDEN))


def test_in_two_bytes_the_inner_rows_are_rounded_to_them() -> None:
    low = [jnp.asarray(leaf, jnp.bfloat16) for leaf in (inputs(), *weights())]
    found, wanted = jax.jit(run)(*low), exact(low[0].astype(jnp.float32), [w.astype(jnp.float32) for w in low[1:]])
    assert found.dtype == jnp.float32
    error = np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < error < 2**-7  # rounded, and once


def test_gradients_are_central_differences() -> None:
    cotangent = np.random.default_rng(2).standard_normal(inputs().shape)
    given = (inputs(), *weights())
    found = jax.jit(jax.grad(lambda *of: jnp.sum(run(*of) * cotangent), argnums=(0, 1, 2, 3)))(*given)
    rng = np.random.default_rng(3)
    for position, gradient in enumerate(found):
        direction = rng.standard_normal(given[position].shape)

        def along(step: float, position: int = position, direction: np.ndarray = direction) -> float:
            moved = [np.asarray(leaf, np.float64) for leaf in given]
            moved[position] += step * direction
            return float(np.sum(exact(moved[0], moved[1:]) * cotangent))

        slope = (along(1e-5) - along(-1e-5)) / 2e-5
        size = np.sum(np.abs(np.asarray(gradient, np.float64) * direction))
        assert abs(np.sum(np.asarray(gradient, np.float64) * direction) - slope) < 1e-5 * size
    assert not np.any(found[0][3]) and not np.any(found[1][1])  # an unused block, an expert without tokens


@pytest.mark.parametrize("axes", [(0, None), (None, 0)])
def test_vmap_equals_loop(axes: tuple[int | None, int | None]) -> None:
    x, of = inputs(), weights()
    xs = x if axes[0] is None else np.stack([x, -x])
    ofs = of if axes[1] is None else tuple(np.stack([w, 2 * w]) for w in of)
    found = jax.jit(jax.vmap(run, in_axes=(axes[0], *[axes[1]] * 3)))(xs, *ofs)
    for number in range(2):
        one = xs if axes[0] is None else xs[number]
        wanted = exact(one, ofs if axes[1] is None else [w[number] for w in ofs])
        # As above; doubling three matrices makes results at most 8 times as large (but for the bend of silu).
        np.testing.assert_allclose(found[number], wanted, rtol=0, atol=160 * sum_error(HIDDEN))


def test_unused_blocks_are_not_multiplied() -> None:
    broken = [w.copy() for w in weights()]
    for w in broken:
        w[2] = np.nan
    found = np.asarray(jax.jit(run)(inputs(), *broken))
    assert np.isfinite(found[:2]).all() and np.isnan(found[2]).all() and not found[3].any()


def test_work_is_three_products_per_slot() -> None:
    once = len(EXPERT) * BLOCK * HIDDEN * INNER
    assert multiplications(run, *map(jnp.asarray, (inputs(), *weights()))) == 3 * once


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_platform_decides_on_ragged_dot(platform: str) -> None:
    """Where every matrix takes all blocks in turn, each is one `ragged_dot`; a loop over blocks has none."""
    traced = jax.jit(run).trace(*map(jnp.asarray, (inputs(), *weights())))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count('chlo.ragged_dot"') == (3 if platform == "tpu" else 0)
