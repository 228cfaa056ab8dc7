"""The crossbar matmul written for reading: the specification that every implementation is checked against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hetmoe.analog.converters import convert, convert_output
from hetmoe.analog.tiles import row_blocks
from hetmoe.ops.crossbar_matmul.base import CrossbarOptions


def crossbar_matmul(
    x: Array, w: Array, input_range: Array | None, adc_bound: Array, weight_max: Array, options: CrossbarOptions
) -> Array:
    """`x[M, K]`, `w[K, N]`, ranges `[blocks]` or None, weight maxima `[blocks, N or 1]`; returns float32 [M, N]."""
    total = jnp.zeros((x.shape[0], w.shape[1]), jnp.float32)
    for block, (start, size) in enumerate(row_blocks(w.shape[0], options.tile_rows)):
        inputs = x[:, start : start + size].astype(jnp.float32)
        if input_range is None:
            bound = jnp.max(jnp.abs(inputs), axis=1, keepdims=True)  # dynamic: per token and row-block
        else:
            bound = input_range[block].reshape(1, 1)
        if options.dac_bits is not None:
            inputs = convert(inputs, bound, options.dac_bits)
        tile = w[start : start + size].astype(jnp.float32)
        outputs = jnp.matmul(inputs, tile, precision=jax.lax.Precision.HIGHEST)
        if options.adc_bits is not None:
            outputs = convert_output(outputs, bound * adc_bound * weight_max[block : block + 1], options.adc_bits)
        total = total + outputs
    return total
