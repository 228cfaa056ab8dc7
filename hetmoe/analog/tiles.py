"""How a matrix is cut into crossbar tiles along its input dimension."""

import jax.numpy as jnp
from jaxtyping import Array

from hetmoe.errors import InputError


def row_blocks(rows: int, tile_rows: int) -> tuple[tuple[int, int], ...]:
    """(start, size) of the balanced row-blocks of a matrix with `rows` inputs.

    `ceil(rows / tile_rows)` blocks whose sizes differ by at most one, larger ones first:
    1000 rows at 512 give 500 and 500, 1408 give 470, 469 and 469 (as in aihwkit and aihwkit-lightning).

    Raises:
        InputError: for fewer than one row or tile row.
    """
    if rows < 1 or tile_rows < 1:
        raise InputError(f"rows={rows} and tile_rows={tile_rows} must both be at least 1")
    count = -(-rows // tile_rows)
    small, larger = divmod(rows, count)
    blocks, start = [], 0
    for index in range(count):
        size = small + (index < larger)
        blocks.append((start, size))
        start += size
    return tuple(blocks)


def spread_rows(values: Array, rows: int, tile_rows: int, axis: int) -> Array:
    """Repeats one value per row-block to one value per row along `axis`."""
    sizes = [size for _, size in row_blocks(rows, tile_rows)]
    if len(sizes) == 1:
        return values  # broadcasts
    parts = [
        jnp.repeat(jnp.take(values, jnp.array([index]), axis=axis), size, axis=axis) for index, size in enumerate(sizes)
    ]
    return jnp.concatenate(parts, axis=axis)


def block_max(w: Array, tile_rows: int, *, per_column: bool) -> Array:
    """`max |w|` of every tile: `[..., blocks, 1]`, or `[..., blocks, columns]` per column. `w` is `[..., K, N]`."""
    rows = w.shape[-2]
    parts = [jnp.max(jnp.abs(w[..., s : s + n, :]), axis=-2, keepdims=True) for s, n in row_blocks(rows, tile_rows)]
    columns = jnp.concatenate(parts, axis=-2)
    return columns if per_column else jnp.max(columns, axis=-1, keepdims=True)
