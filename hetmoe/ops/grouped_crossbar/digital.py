"""Blocks of rows times clean matrices by the crossbar's kernels: what they do where no block is analog."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hetmoe.ops.crossbar_matmul.base import CrossbarOptions
from hetmoe.ops.grouped_crossbar.block_sizes import Platform
from hetmoe.ops.grouped_crossbar.blocks import Clean, Matrix
from hetmoe.ops.grouped_crossbar.operands import make_tables
from hetmoe.ops.grouped_crossbar.pallas import crossbar_blocks
from hetmoe.ops.grouped_crossbar.shape import Static


def digital_blocks(
    x: Float[Array, "blocks block K"],
    weights: tuple[Float[Array, "stored K N"], ...],
    slot: Int[Array, "blocks"],
    used: Bool[Array, "blocks"],
    interpret: Platform | None,
) -> tuple[Float[Array, "blocks block N"], ...]:
    """Every block times the matrix that `slot` names of each of `weights`; float32, zero where `used` is False."""
    none_analog = jnp.zeros((weights[0].shape[0],), bool)
    tables = make_tables(slot, used, none_analog, None, jnp.float32(0))
    matrices = tuple(Matrix(clean=Clean(w=w, low=None, high=None), programmed=None, chip=None) for w in weights)
    return crossbar_blocks(x, tables, matrices, _without_converters(x.shape[2], interpret))


def _without_converters(rows: int, interpret: Platform | None) -> Static:
    """Matrices of `rows` rows cut where no padding is needed, if they can be: a digital unit has no tiles."""
    tile = next((size for size in (512, 384, 256, 128) if rows % size == 0), 512)
    options = CrossbarOptions(dac_bits=None, adc_bits=None, tile_rows=tile)
    return Static(options=options, device=None, interpret=interpret)
