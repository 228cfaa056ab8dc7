"""Crossbar arithmetic in XLA, over any matmul: dense (here) or grouped by expert (`hetmoe.ops.grouped_crossbar`).

On CPU the time over the plain matmul is that of one pass over the inputs, one over each tile's outputs and one over the
weights for their maximum; slicing row-blocks in a Python loop lets XLA fuse each ADC with the running sum, where a
batched matmul over tiles would write all partial sums to memory first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hetmoe.analog.converters import convert, convert_output
from hetmoe.analog.read_noise import ReadDraw, read_draws, read_noise_std
from hetmoe.analog.tiles import row_blocks
from hetmoe.ops.crossbar_matmul.base import CrossbarOptions

# (inputs of one row-block, first row, rows, use |w| instead of w) -> product with that row-block of the weights
TileMatmul = Callable[[Array, int, int, bool], Array]


def tiled_product(
    x: Array,
    matmul: TileMatmul,
    input_range: Callable[[int], Array] | None,
    adc_bound: Array,
    weight_max: Callable[[int], Array],
    analog: Array | None,
    options: CrossbarOptions,
    read: ReadDraw | None,
) -> Array:
    """Converters around a tiled matmul.

    Args:
        x: inputs `[..., K]`.
        matmul: multiplies one row-block.
        input_range: row-block -> DAC range broadcast against `x`; None = `max |x|` per vector and row-block.
        adc_bound: lambda, scalar.
        weight_max: row-block -> `max |w|` broadcast against the outputs.
        analog: bool broadcast against `x[..., :1]`; where False, converters and noise are by-passed. None = all True.
        options: static options.
        read: per-product noise, its rows numbered `[...]`, or None.

    Returns:
        float32 `[..., N]`.
    """

    def where_analog(converted: Array, plain: Array) -> Array:
        return converted if analog is None else jnp.where(analog, converted, plain)

    rows = x.shape[-1]
    if options.adc_bits is None and read is None:
        # No per-tile operation on the outputs is left, so the tiles need not be multiplied apart.
        inputs = [_dac(x[..., s : s + n], b, input_range, options)[0] for b, (s, n) in _blocks(rows, options)]
        return matmul(where_analog(jnp.concatenate(inputs, axis=-1), x.astype(jnp.float32)), 0, rows, False)

    total: Array | None = None
    for block, (start, size) in _blocks(rows, options):
        part = x[..., start : start + size].astype(jnp.float32)
        converted, bound = _dac(part, block, input_range, options)
        inputs = where_analog(converted, part)
        outputs = matmul(inputs, start, size, False)
        result = outputs
        if read is not None:
            noise = read.noise
            square = matmul(jnp.square(inputs), start, size, True) if noise.kind == "pcm" else None
            # Of the tile, also where ADCs are per column.
            tile_max = read.shard.largest_column(jnp.max(weight_max(block), axis=-1, keepdims=True))
            std = read_noise_std(noise, inputs, tile_max, square)
            draws = read_draws(read, block, outputs.shape[-1]).reshape(outputs.shape)
            result = result + std * draws
        if options.adc_bits is not None:
            result = convert_output(result, bound * adc_bound * weight_max(block), options.adc_bits)
        result = where_analog(result, outputs)
        total = result if total is None else total + result
    assert total is not None
    return total


def _blocks(rows: int, options: CrossbarOptions) -> list[tuple[int, tuple[int, int]]]:
    return list(enumerate(row_blocks(rows, options.tile_rows)))


def _dac(
    part: Array, block: int, input_range: Callable[[int], Array] | None, options: CrossbarOptions
) -> tuple[Array, Array]:
    """(inputs after the DAC, its range)."""
    part = part.astype(jnp.float32)
    bound = jnp.max(jnp.abs(part), axis=-1, keepdims=True) if input_range is None else input_range(block)
    return (part if options.dac_bits is None else convert(part, bound, options.dac_bits)), bound


def crossbar_matmul(
    x: Array,
    w: Array,
    input_range: Array | None,
    adc_bound: Array,
    weight_max: Array,
    options: CrossbarOptions,
    analog: Array | None,
    read: ReadDraw | None,
) -> Array:
    """`x[M, K]`, `w[K, N]`, ranges `[blocks]` or None, weight maxima `[blocks, N or 1]`; returns float32 [M, N]."""

    def matmul(inputs: Array, start: int, size: int, absolute: bool) -> Array:
        tile = w[start : start + size].astype(jnp.float32)
        return jnp.matmul(inputs, jnp.abs(tile) if absolute else tile, precision=jax.lax.Precision.HIGHEST)

    ranges = None if input_range is None else lambda block: input_range[block].reshape(1, 1)
    return tiled_product(
        x, matmul, ranges, adc_bound, lambda block: weight_max[block : block + 1], analog, options, read
    )
