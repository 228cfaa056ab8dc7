"""Random matrices at several precisions, and the weights that they stand for in float64."""

import jax.numpy as jnp
import numpy as np

from hetmoe.quantize.grid import Grid, Quantized
from hetmoe.quantize.mixed import MixedMatrix, make_mixed
from hetmoe.quantize.packed import pack
from tests.quantize.grids import values_of

GRIDS = (
    Grid(bits=3, group=32, symmetric=False), Grid(bits=2, group=64, symmetric=True),
    Grid(bits=8, group=32, symmetric=True), None,
)  # fmt: skip


def random_quantized(rng: np.random.Generator, grid: Grid, count: int, rows: int, columns: int) -> Quantized:
    groups = (count, rows // grid.group, columns)
    return Quantized(
        codes=jnp.asarray(rng.integers(0, grid.largest + 1, (count, rows, columns)), jnp.uint8),
        scale=jnp.asarray(rng.uniform(0.5, 1.0, groups) / grid.largest, jnp.float16),
        zero=None if grid.symmetric else jnp.asarray(rng.uniform(0, grid.largest, groups), jnp.float16),
        grid=grid,
    )


def random_mixed(seed: int, pool: np.ndarray, rows: int, columns: int) -> tuple[MixedMatrix, np.ndarray]:
    """The matrix of every expert in the pools of `GRIDS`, and its float64 values `[*pool.shape, rows, columns]`."""
    rng, pools = np.random.default_rng(seed), []
    exact = np.zeros((*pool.shape, rows, columns))
    for number, grid in enumerate(GRIDS):
        count = int(np.sum(pool == number))
        if grid is None:
            w = rng.standard_normal((count, rows, columns)).astype(np.float32)
            pools.append(jnp.asarray(w))
            exact[pool == number] = w
        else:
            q = random_quantized(rng, grid, count, rows, columns)
            pools.append(pack(q))
            exact[pool == number] = values_of(q)
    return make_mixed(pools, pool), exact
