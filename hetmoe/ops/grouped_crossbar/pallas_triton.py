"""Triton kernel for NVIDIA GPUs: blocks of rows times their matrices, converters included.

A program makes one block of rows by some columns. It goes through the tiles, and through the rows of each tile in
chunks: DAC, matmul on the tensor cores, and, when a tile is done, ADC and the sum. Digital blocks take a branch without
converters. Programs that share weights (the blocks of one expert, whatever the seed) run side by side, so that what one
of them fetches is in the cache for the others. Dynamic ranges read a tile's inputs twice, the second time from cache.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from hetmoe.analog.devices import GroupRange, Stream
from hetmoe.ops.grouped_crossbar import kernel_math
from hetmoe.ops.grouped_crossbar.blocks import ANALOG, DIGITAL, EMPTY, Matrix, Tables
from hetmoe.ops.grouped_crossbar.shape import Shape, weights_of

BLOCKS_SIDE_BY_SIDE = 8  # of rows, before the next columns: their inputs and the weights stay in the cache together


def blocks_matmul(
    x: Array, tables: Tables, matrices: tuple[Matrix, ...], shape: Shape, *, interpret: bool
) -> tuple[Array, ...]:
    """As `pallas_tpu.blocks_matmul`."""
    blocks, block, _ = x.shape
    packed = weights_of(matrices[0]).shape[2]
    inputs, tree = jax.tree.flatten((x, tables, tuple(_flat_words(matrix) for matrix in matrices)))

    def kernel(*refs: Any) -> None:
        x_ref, of, parts = jax.tree.unflatten(tree, refs[: len(inputs)])
        _program_instance(x_ref, of, parts, refs[len(inputs) :], shape, blocks, packed // shape.columns)

    return tuple(
        pl.pallas_call(
            kernel,
            grid=(blocks * (packed // shape.columns),),
            out_shape=[jax.ShapeDtypeStruct((blocks, block, packed), jnp.float32) for _ in matrices],
            compiler_params=plgpu.CompilerParams(num_warps=shape.sizes.warps, num_stages=shape.sizes.stages),
            interpret=interpret,
            name="grouped_crossbar",
        )(*inputs)
    )


def _flat_words(matrix: Matrix) -> Matrix:
    """Key words by chip and position: the kernel indexes one axis."""
    noise = matrix.chip.noise
    if noise is None:
        return matrix
    words = noise.words.reshape(noise.words.shape[0], -1)
    return dataclasses.replace(
        matrix, chip=dataclasses.replace(matrix.chip, noise=dataclasses.replace(noise, words=words))
    )


def _place(blocks: int, stripes: int) -> tuple[Array, Array]:
    """(block of rows, block of columns) of this program."""
    number, side = pl.program_id(0), min(BLOCKS_SIDE_BY_SIDE, blocks)
    first = jax.lax.div(number, side * stripes) * side
    here = jnp.minimum(blocks - first, side)
    rest = jax.lax.rem(number, side * stripes)
    return first + jax.lax.rem(rest, here), jax.lax.div(rest, here)


def _program_instance(
    x: Any, of: Tables, matrices: tuple[Matrix, ...], outs: tuple[Any, ...], shape: Shape, blocks: int, stripes: int
) -> None:
    b, n = _place(blocks, stripes)
    mode = _load(of.mode, b)
    columns = pl.ds(n * shape.columns, shape.columns)

    def write(results: tuple[Array, ...]) -> None:
        for out, result in zip(outs, results, strict=True):
            plgpu.store(out.at[b, :, columns], result)

    @pl.when(mode == ANALOG)
    def _analog() -> None:
        write(_analog_block(x, of, matrices, shape, b, n))

    if matrices[0].clean is not None:

        @pl.when(mode == DIGITAL)
        def _digital() -> None:
            write(_digital_block(x, of, matrices, shape, b, n))

    @pl.when(mode == EMPTY)
    def _empty() -> None:
        write(tuple(jnp.zeros((x.shape[1], shape.columns), jnp.float32) for _ in outs))


def _load(ref: Any, *index: Any) -> Array:
    return plgpu.load(ref.at[index])


def _zeros(x: Any, matrices: tuple[Matrix, ...], shape: Shape) -> tuple[Array, ...]:
    return tuple(jnp.zeros((x.shape[1], shape.columns), jnp.float32) for _ in matrices)


def _dot(x: Array, w: Array, dtype: Any) -> Array:
    return jnp.dot(
        x.astype(dtype), w.astype(dtype), precision=kernel_math.precision(dtype), preferred_element_type=jnp.float32
    )


def _digital_block(x: Any, of: Tables, matrices: tuple[Matrix, ...], shape: Shape, b: Array, n: Array) -> Any:
    chunk, number = shape.sizes.chunk, _load(of.clean, b)
    weights = [matrix.clean.w for matrix in matrices if matrix.clean is not None]

    def add(c: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        rows = pl.ds(c * chunk, chunk)
        inputs = _load(x, b, slice(None), rows)
        return tuple(
            total + _dot(inputs, _part(w, number, rows, n, shape), inputs.dtype)
            for w, total in zip(weights, sums, strict=True)
        )

    return jax.lax.fori_loop(0, x.shape[2] // chunk, add, _zeros(x, matrices, shape))


def _part(w: Any, index: Array, rows: Any, n: Array, shape: Shape) -> Array:
    return _load(w, index, rows, pl.ds(n * shape.columns, shape.columns))


def _analog_block(x: Any, of: Tables, matrices: tuple[Matrix, ...], shape: Shape, b: Array, n: Array) -> Any:
    options, layout, chunk = shape.options, shape.layout, shape.sizes.chunk
    chunks = layout.tile // chunk

    def one_tile(t: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        def inputs_of(c: Array) -> Array:
            return _load(x, b, slice(None), pl.ds(t * layout.tile + c * chunk, chunk))

        bound = _range(of, b, t, chunks, inputs_of, x.shape[1])

        def add(c: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            rows, inputs = pl.ds(t * layout.tile + c * chunk, chunk), inputs_of(c)
            dtype = kernel_math.operand_dtype(inputs.dtype, weights_of(matrices[0]).dtype, options.dac_bits)
            if options.dac_bits is not None:
                inputs = kernel_math.dac_codes(inputs, bound, options.dac_bits)
            inputs = inputs.astype(dtype)
            return tuple(
                total + _dot(inputs, _weights(of, m, shape, b, n, t, c, rows), dtype)
                for m, total in zip(matrices, sums, strict=True)
            )

        sums = jax.lax.fori_loop(0, chunks, add, _zeros(x, matrices, shape))
        return tuple(
            total + _convert(y, of, m, shape, bound, b, n, t)
            for m, y, total in zip(matrices, sums, totals, strict=True)
        )

    return jax.lax.fori_loop(0, layout.tiles, one_tile, _zeros(x, matrices, shape))


def _range(of: Tables, b: Array, t: Array, chunks: int, inputs_of: Any, rows: int) -> Array:
    """DAC range of this tile's inputs `[rows, 1]`."""
    if of.input_range is not None:
        return jnp.broadcast_to(_load(of.input_range, b, t), (rows, 1))

    def widen(c: Array, largest: Array) -> Array:
        return jnp.maximum(largest, jnp.max(jnp.abs(inputs_of(c).astype(jnp.float32)), axis=1, keepdims=True))

    return jax.lax.fori_loop(0, chunks, widen, jnp.zeros((rows, 1), jnp.float32))


def _convert(y: Array, of: Tables, matrix: Matrix, shape: Shape, bound: Array, b: Array, n: Array, t: Array) -> Array:
    """A tile's sums over codes, as its ADC reads them."""
    options = shape.options
    if options.dac_bits is not None:
        y = y * kernel_math.step_size(bound, options.dac_bits)
    if options.adc_bits is None:
        return y
    largest = _per_tile(matrix.chip.weight_max, _load(of.chip, b), t, n, shape)
    return kernel_math.adc(y, bound * _load(of.adc_bound, b) * largest, options.adc_bits)


def _per_tile(values: Any, index: Array, t: Array, n: Array, shape: Shape) -> Array:
    """One value for this tile `[1, 1]`, or one for each of its columns `[1, columns]`."""
    columns = pl.ds(0, 1) if values.shape[2] == 1 else pl.ds(n * shape.columns, shape.columns)
    return _load(values, index, t, columns)[None, :]


def _weights(of: Tables, matrix: Matrix, shape: Shape, b: Array, n: Array, t: Array, c: Array, rows: Any) -> Array:
    """A chunk of the weights that an analog block multiplies by."""
    if matrix.programmed is not None:
        return _part(matrix.programmed, _load(of.programmed, b), rows, n, shape)
    clean, noise = matrix.clean, matrix.chip.noise
    assert clean is not None and noise is not None and shape.device is not None
    size, index, chip = (shape.sizes.chunk, shape.columns), _load(of.clean, b), _load(of.chip, b)

    def words(stream: Stream) -> tuple[Array, Array]:
        found = (
            _load(noise.words, chip, pl.ds(2 * stream, 1)),
            _load(noise.words, chip, pl.ds(2 * stream + 1, 1)),
        )
        return found[0][None, :], found[1][None, :]

    first_row = shape.layout.first_row(t) + c * shape.sizes.chunk
    return kernel_math.programmed_block(
        _part(clean.w, index, rows, n, shape),
        shape.device,
        GroupRange(_per_tile(clean.low, index, t, n, shape), _per_tile(clean.high, index, t, n, shape)),
        rows=first_row.astype(jnp.uint32) + jax.lax.broadcasted_iota(jnp.uint32, size, 0),
        columns=(n * shape.columns).astype(jnp.uint32) + jax.lax.broadcasted_iota(jnp.uint32, size, 1),
        width=shape.width,
        words=words,
        noise_scale=_load(noise.scale, chip),
        time_s=None if noise.time_s is None else jnp.full(size, _load(noise.time_s, chip)),
        factor=None if noise.factor is None else _load(noise.factor, chip, t),
    )
