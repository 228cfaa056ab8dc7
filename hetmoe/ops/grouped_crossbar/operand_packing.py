"""The operands of an operation as the kernels of a platform want them."""

import dataclasses

from jaxtyping import Array

from hetmoe.ops.grouped_crossbar import block_sizes
from hetmoe.ops.grouped_crossbar.block_sizes import Platform
from hetmoe.ops.grouped_crossbar.blocks import Matrix
from hetmoe.ops.grouped_crossbar.packing import make_layout, pack_rows, pad_axis, round_up
from hetmoe.ops.grouped_crossbar.shape import Shape, Static, weights_of


def make_shape(platform: Platform, static: Static, block: int, matrices: tuple[Matrix, ...]) -> tuple[Shape, int]:
    """(shape of the kernels for blocks of `block` rows, packed columns)."""
    w = weights_of(matrices[0])
    rows, columns = w.shape[1:]
    tile = make_layout(rows, static.options.tile_rows, 1).tile
    sizes = static.sizes or block_sizes.choose(
        platform, rows=block, tile=tile, columns=columns, matrices=len(matrices), item_bytes=w.dtype.itemsize,
        is_drawn=matrices[0].noise is not None, has_chip=matrices[0].chip is not None,
    )  # fmt: skip
    layout = make_layout(rows, static.options.tile_rows, sizes.chunk)
    shape = Shape(layout=layout, options=static.options, device=static.device, width=columns, sizes=sizes)
    return shape, round_up(columns, sizes.columns)


def pack_matrix(matrix: Matrix, shape: Shape, packed: int) -> Matrix:
    """A matrix with padded tiles and `packed` columns."""

    def pack_weights(leaf: Array) -> Array:
        return pad_axis(pack_rows(leaf, shape.layout, 1), packed, 2)

    wide = lambda leaf: leaf if leaf.shape[2] == 1 else pad_axis(leaf, packed, 2)  # noqa: E731
    clean = matrix.clean
    if clean is not None:
        group = (None, None) if clean.low is None or clean.high is None else (wide(clean.low), wide(clean.high))
        clean = dataclasses.replace(clean, w=pack_weights(clean.w), low=group[0], high=group[1])
    programmed = None if matrix.programmed is None else pack_weights(matrix.programmed)
    chip = matrix.chip
    if chip is not None:
        chip = dataclasses.replace(chip, weight_max=wide(chip.weight_max))
    return Matrix(clean=clean, programmed=programmed, chip=chip)
