"""How operands are laid out for the kernels: every tile padded to the same aligned number of rows.

Matrices whose tiles are aligned already (2048 rows in tiles of 512) are used as they are; of others a padded copy is
made at every call (1408 rows: 470, 469 and 469, each padded to 512).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from hetmoe.analog.tiles import row_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Rows of a matrix in tiles: the first `larger` have `size + 1` rows, the others `size`, all padded to `tile`."""

    tiles: int
    size: int
    larger: int
    tile: int

    @property
    def is_padded(self) -> bool:
        """Whether any tile has rows that the matrix lacks."""
        return self.larger > 0 or self.size != self.tile

    def first_row(self, tile: Array | int) -> Array:
        """Row of the matrix that a tile begins with."""
        return tile * self.size + jnp.minimum(tile, self.larger)


def make_layout(rows: int, tile_rows: int, multiple: int) -> Layout:
    """The layout of a matrix with `rows` inputs, padded to a multiple."""
    tiles = len(row_blocks(rows, tile_rows))
    size, larger = divmod(rows, tiles)
    return Layout(tiles=tiles, size=size, larger=larger, tile=round_up(size + (larger > 0), multiple))


def round_up(number: int, multiple: int) -> int:
    """The next multiple that is not smaller."""
    return -(-number // multiple) * multiple


def pack_rows(x: Array, layout: Layout, axis: int) -> Array:
    """Puts every row-block of `axis` at the start of its tile; the rest is zero."""
    if not layout.is_padded:
        return x
    axis = axis % x.ndim
    blocks = row_blocks(x.shape[axis], layout.size + (layout.larger > 0))
    return jnp.concatenate([pad_axis(_slice(x, *block, axis), layout.tile, axis) for block in blocks], axis=axis)


def unpack_rows(x: Array, layout: Layout, axis: int) -> Array:
    """The inverse of `pack_rows`."""
    if not layout.is_padded:
        return x
    axis = axis % x.ndim
    parts = [_slice(x, tile * layout.tile, layout.size + (tile < layout.larger), axis) for tile in range(layout.tiles)]
    return jnp.concatenate(parts, axis=axis)


def pad_axis(x: Array, size: int, axis: int) -> Array:
    """Zeros at the end of an axis up to `size`."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - length if i == axis % x.ndim else 0) for i, length in enumerate(x.shape)])


def _slice(x: Array, start: int, size: int, axis: int) -> Array:
    return x[tuple(slice(start, start + size) if i == axis else slice(None) for i in range(x.ndim))]
