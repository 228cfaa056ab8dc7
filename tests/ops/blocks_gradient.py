"""The gradient of blocks of rows times their matrices, straight through the converters, in XLA.

Ranges, bounds and programming noise count as constants; an input within its range (or at it) and an output within its
bound pass their gradient on. One block at a time: the gradient of the weights is added up in float32, as large as the
weights and once for each matrix, whatever the number of blocks. Written for reading: what the gradient kernels
(`pallas_gradient`) are tested against.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hetmoe.analog.converters import convert, convert_output
from hetmoe.analog.devices import Device, GroupRange, Stream
from hetmoe.analog.tiles import row_blocks, spread_rows
from hetmoe.ops.crossbar_matmul.base import CrossbarOptions
from hetmoe.ops.grouped_crossbar import kernel_math
from hetmoe.ops.grouped_crossbar.blocks import ANALOG, EMPTY, Chip, Clean, Matrix, Tables


def blocks_gradient(
    x: Array,
    tables: Tables,
    matrices: tuple[Matrix, ...],
    grads: tuple[Array, ...],
    options: CrossbarOptions,
    device: Device | None,
) -> tuple[Array, tuple[tuple[Array | None, Array | None], ...]]:
    """Gradients of x `[blocks, block, K]`, and of clean and programmed weights; `grads` are `[blocks, block, N]`."""
    zeros = lambda w: None if w is None else jnp.zeros(w.shape, jnp.float32)  # noqa: E731
    start = tuple((zeros(None if m.clean is None else m.clean.w), zeros(m.programmed)) for m in matrices)

    def one(sums: Any, block: tuple[Array, Tables, tuple[Array, ...]]) -> tuple[Any, Array]:
        rows, of, grad = block
        dx, new = jnp.zeros(rows.shape, jnp.float32), []
        for matrix, total, g in zip(matrices, sums, grad, strict=True):
            g_used = jnp.where(of.mode == EMPTY, 0.0, g)
            w = _weights(of, matrix, options, device)
            product = lambda x, w, m=matrix: _product(x, w, of, m.chip, options)  # noqa: E731
            _, pull = jax.vjp(product, rows.astype(jnp.float32), w.astype(jnp.float32))
            part, dw = pull(g_used)
            dx += part
            new.append(_add(total, dw, of, is_stored=matrix.programmed is not None))
        return tuple(new), dx.astype(rows.dtype)

    sums, dx = jax.lax.scan(one, start, (x, tables, grads))
    return dx, jax.tree.map(lambda total, w: total.astype(w.dtype), sums, _weights_tree(matrices))


def _weights_tree(matrices: tuple[Matrix, ...]) -> Any:
    return tuple((None if m.clean is None else m.clean.w, m.programmed) for m in matrices)


def _add(total: Any, dw: Array, of: Tables, *, is_stored: bool) -> Any:
    """Adds a block's gradient to the weights that it multiplied by."""
    clean, programmed = total
    is_analog = of.mode == ANALOG
    if programmed is not None:
        programmed = programmed.at[of.programmed].add(jnp.where(is_analog, dw, 0.0))
    if clean is not None:
        clean = clean.at[of.clean].add(jnp.where(is_analog, 0.0, dw) if is_stored else dw)
    return clean, programmed


def _weights(of: Tables, matrix: Matrix, options: CrossbarOptions, device: Device | None) -> Array:
    """What the block multiplies by."""
    if matrix.programmed is None and matrix.clean is not None and matrix.chip.noise is not None:
        clean = matrix.clean.w[of.clean]
        return jnp.where(of.mode == ANALOG, _programmed(of, matrix.clean, matrix.chip, options, device), clean)
    assert matrix.programmed is not None
    stored = matrix.programmed[of.programmed]
    return stored if matrix.clean is None else jnp.where(of.mode == ANALOG, stored, matrix.clean.w[of.clean])


def _programmed(of: Tables, clean: Clean, chip: Chip, options: CrossbarOptions, device: Device | None) -> Array:
    noise, w = chip.noise, clean.w[of.clean]
    assert noise is not None and device is not None and clean.low is not None and clean.high is not None
    rows, columns = w.shape
    words = noise.words[of.chip]
    spread = lambda values: spread_rows(values, rows, options.tile_rows, axis=0)  # noqa: E731
    factor = None if noise.factor is None else spread(noise.factor[of.chip][:, None])
    return kernel_math.programmed_block(
        w,
        device,
        GroupRange(spread(clean.low[of.clean]), spread(clean.high[of.clean])),
        rows=jax.lax.broadcasted_iota(jnp.uint32, w.shape, 0),
        columns=jax.lax.broadcasted_iota(jnp.uint32, w.shape, 1),
        width=columns,
        words=lambda stream: (words[Stream(stream), 0], words[Stream(stream), 1]),
        noise_scale=noise.scale[of.chip],
        time_s=None if noise.time_s is None else noise.time_s[of.chip],
        factor=factor,
    )


def _product(x: Array, w: Array, of: Tables, chip: Chip, options: CrossbarOptions) -> Array:
    """The block's product; where a value is converted, the derivative is that of `_through`."""
    is_analog, total = of.mode == ANALOG, jnp.zeros((x.shape[0], w.shape[1]), jnp.float32)
    for tile, (start, size) in enumerate(row_blocks(w.shape[0], options.tile_rows)):
        inputs = x[:, start : start + size]
        fixed = jax.lax.stop_gradient(inputs)
        if of.input_range is None:
            bound = jnp.max(jnp.abs(fixed), axis=1, keepdims=True)
        else:
            bound = of.input_range[tile].reshape(1, 1)
        if options.dac_bits is not None:
            converted = convert(fixed, bound, options.dac_bits)
            inputs = _through(inputs, converted, jnp.abs(fixed) <= bound, is_analog)
        y = jnp.matmul(inputs, w[start : start + size], precision=jax.lax.Precision.HIGHEST)
        if options.adc_bits is not None:
            limit = bound * of.adc_bound * chip.weight_max[of.chip, tile][None, :]
            fixed = jax.lax.stop_gradient(y)
            y = _through(y, convert_output(fixed, limit, options.adc_bits), jnp.abs(fixed) < limit, is_analog)
        total += y
    return total


def _through(value: Array, converted: Array, inside: Array, is_analog: Array) -> Array:
    """`converted` where analog, with the derivative of `value` where it is inside."""
    straight = converted + jnp.where(inside, value - jax.lax.stop_gradient(value), 0.0)
    return jnp.where(is_analog, straight, value)
