"""Maxima with NaN, in the shapes in which XLA on CPU is known to lose it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.ops.largest import largest


@pytest.mark.parametrize(("shape", "axis"), [((8, 7), -1), ((4, 128, 96), -2), ((64, 96), (0, 1)), ((2, 3, 1000), -1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nan_is_kept(shape, axis, dtype) -> None:
    rng = np.random.default_rng(0)
    run = jax.jit(largest, static_argnums=1)
    for _ in range(20):
        x = np.array(jnp.asarray(rng.normal(size=shape), dtype).astype(jnp.float32))
        np.testing.assert_array_equal(run(jnp.asarray(x, dtype), axis).astype(jnp.float32), x.max(axis=axis))
        x.flat[rng.integers(x.size)] = np.nan
        # numpy's maximum keeps NaN
        np.testing.assert_array_equal(run(jnp.asarray(x, dtype), axis).astype(jnp.float32), x.max(axis=axis))
