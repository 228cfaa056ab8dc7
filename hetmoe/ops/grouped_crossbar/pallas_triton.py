"""Triton kernel for NVIDIA GPUs: blocks of rows times their matrices, converters included.

A program makes one block of rows by some columns. It goes through the tiles, and through the rows of each tile in
chunks: matmul on the tensor cores, and, when a tile is done, ADC and the sum. Digital blocks take a branch without
converters. Programs that share weights (the blocks of one expert, whatever the seed) run side by side, so that what one
of them fetches is in the cache for the others. The DAC's codes are made once, before that: as many programs as there
are stripes of columns would each convert the same inputs, which takes longer than their products.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from hetmoe.analog.converters import round_half_even
from hetmoe.analog.devices import GroupRange, Stream
from hetmoe.ops.grouped_crossbar import kernel_math
from hetmoe.ops.grouped_crossbar.blocks import ANALOG, DIGITAL, EMPTY, Matrix, Tables
from hetmoe.ops.grouped_crossbar.shape import Shape, weights_of
from hetmoe.ops.triton_instructions import clip, multiply_add

BLOCKS_SIDE_BY_SIDE = 8  # of rows, before the next columns: their inputs and the weights stay in the cache together


def blocks_matmul(
    x: Array, tables: Tables, matrices: tuple[Matrix, ...], shape: Shape, *, keep_inside: bool, interpret: bool
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """As `pallas_tpu.blocks_matmul`."""
    blocks, block, _ = x.shape
    packed = weights_of(matrices[0]).shape[2]
    bound = None
    if matrices[0].chip is not None:
        factors = kernel_math.operand_dtype(x.dtype, weights_of(matrices[0]).dtype, shape.options.dac_bits)
        x, bound = converted(x, tables, shape, factors)
    inputs, tree = jax.tree.flatten((x, bound, tables, tuple(flat_words(matrix) for matrix in matrices)))
    count, kept_count = len(matrices), len(matrices) if keep_inside else 0
    out_shape = [jax.ShapeDtypeStruct((blocks, block, packed), jnp.float32)] * count
    out_shape += [jax.ShapeDtypeStruct((blocks, shape.layout.tiles, block, packed), jnp.int8)] * kept_count

    together, stripes = 1 if shape.sizes.apart else count, packed // shape.columns

    def kernel(*refs: Any) -> None:
        x_ref, bound_ref, of, parts = jax.tree.unflatten(tree, refs[: len(inputs)])
        outs, insides = refs[len(inputs) :][:count], refs[len(inputs) :][count:]
        b, number = side_by_side(blocks, count // together * stripes)
        place = b, jax.lax.rem(number, stripes)
        for first in range(0, count, together):
            own = slice(first, first + together)

            @pl.when(jax.lax.div(number, stripes) * together == first)
            def _own(own: slice = own) -> None:
                _program_instance(x_ref, bound_ref, of, parts[own], (outs[own], insides[own]), shape, place, interpret)

    found = tuple(
        pl.pallas_call(
            kernel,
            grid=(blocks * (count // together) * stripes,),
            out_shape=out_shape,
            compiler_params=plgpu.CompilerParams(num_warps=shape.sizes.warps, num_stages=shape.sizes.stages),
            interpret=interpret,
            name="grouped_crossbar",
        )(*inputs)
    )
    return found[:count], found[count:]


def converted(x: Array, tables: Tables, shape: Shape, dtype: jnp.dtype) -> tuple[Array, Array]:
    """(inputs or, where a DAC converts them, their codes, in `dtype`; its ranges `[blocks, tiles, block]`)."""
    bits, tiles = shape.options.dac_bits, shape.layout.tiles
    in_tiles = x.astype(jnp.float32).reshape(*x.shape[:2], tiles, -1)
    if tables.input_range is None:
        bound = jnp.max(jnp.abs(in_tiles), axis=3)
    else:
        bound = jnp.broadcast_to(tables.input_range[:, None, :], in_tiles.shape[:3])
    if bits is None:
        return x.astype(dtype), bound.swapaxes(1, 2)
    bounds = bound[..., None]
    codes = round_half_even(jnp.clip(in_tiles, -bounds, bounds) / kernel_math.step_size(bounds, bits))
    codes = jnp.where((tables.mode == ANALOG)[:, None, None, None], codes, in_tiles).reshape(x.shape)
    return codes.astype(dtype), bound.swapaxes(1, 2)


def flat_words(matrix: Matrix) -> Matrix:
    """Key words by chip and position: the kernel indexes one axis."""
    chip, noise = matrix.chip, matrix.noise
    if chip is None or noise is None:
        return matrix
    words = noise.words.reshape(noise.words.shape[0], -1)
    return dataclasses.replace(matrix, chip=dataclasses.replace(chip, noise=dataclasses.replace(noise, words=words)))


def side_by_side(blocks: int, stripes: int) -> tuple[Array, Array]:
    """(block of rows, stripe of the matrix) of this program."""
    number, side = pl.program_id(0), min(BLOCKS_SIDE_BY_SIDE, blocks)
    first = jax.lax.div(number, side * stripes) * side
    here = jnp.minimum(blocks - first, side)
    rest = jax.lax.rem(number, side * stripes)
    return first + jax.lax.rem(rest, here), jax.lax.div(rest, here)


def _program_instance(
    x: Any, bound: Any, of: Tables, matrices: tuple[Matrix, ...], results: tuple[tuple[Any, ...], tuple[Any, ...]],
    shape: Shape, place: tuple[Array, Array], interpret: bool,
) -> None:  # fmt: skip
    """One block of rows by some columns, at `place`."""
    (outs, insides), (b, n) = results, place
    mode = load(of.mode, b)
    columns = pl.ds(n * shape.columns, shape.columns)

    def write(results: tuple[Array, ...]) -> None:
        for out, result in zip(outs, results, strict=True):
            plgpu.store(out.at[b, :, columns], result)

    if matrices[0].chip is not None:

        @pl.when(mode == ANALOG)
        def _analog() -> None:
            write(_analog_block(x, bound, of, matrices, insides, shape, place, interpret))

    if matrices[0].clean is not None:

        @pl.when(mode == DIGITAL)
        def _digital() -> None:
            write(_digital_block(x, of, matrices, shape, b, n))

    @pl.when(mode == EMPTY)
    def _empty() -> None:
        write(_zeros(x, matrices, shape))

    if insides:

        @pl.when(mode != ANALOG)
        def _unconverted() -> None:
            @pl.loop(0, shape.layout.tiles)
            def _tile(t: Array) -> None:
                for inside in insides:
                    plgpu.store(inside.at[b, t, :, columns], jnp.ones((x.shape[1], shape.columns), jnp.int8))


def load(ref: Any, *index: Any) -> Array:
    """`ref[index]`."""
    return plgpu.load(ref.at[index])


def _zeros(x: Any, matrices: tuple[Matrix, ...], shape: Shape) -> tuple[Array, ...]:
    return tuple(jnp.zeros((x.shape[1], shape.columns), jnp.float32) for _ in matrices)


def _digital_block(x: Any, of: Tables, matrices: tuple[Matrix, ...], shape: Shape, b: Array, n: Array) -> Any:
    chunk, number = shape.sizes.chunk, load(of.clean, b)
    weights = [matrix.clean.w for matrix in matrices if matrix.clean is not None]

    def add(c: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        rows = pl.ds(c * chunk, chunk)
        inputs = load(x, b, slice(None), rows)
        return tuple(
            total + kernel_math.dot(inputs, part(w, number, rows, n, shape), inputs.dtype)
            for w, total in zip(weights, sums, strict=True)
        )

    return jax.lax.fori_loop(0, x.shape[2] // chunk, add, _zeros(x, matrices, shape))


def part(w: Any, index: Array, rows: Any, n: Array, shape: Shape) -> Array:
    """Some rows of one stored matrix, columns of stripe `n`."""
    return load(w, index, rows, pl.ds(n * shape.columns, shape.columns))


def _analog_block(
    x: Any, bounds: Any, of: Tables, matrices: tuple[Matrix, ...], insides: tuple[Any, ...], shape: Shape,
    place: tuple[Array, Array], interpret: bool,
) -> Any:  # fmt: skip
    """Chunks of all tiles in one loop: a loop of its own for each tile would wait for memory whenever it begins."""
    (b, n), (layout, chunk) = place, (shape.layout, shape.sizes.chunk)
    chunks, nothing = layout.tile // chunk, tuple(None for _ in matrices)
    chip, adc_bound = load(of.chip, b), load(of.adc_bound, b)

    def bounds_of(t: Array) -> tuple[Array, tuple[Array, ...]]:
        """Of the inputs of a tile, and of its weights."""
        bound = load(bounds, b, t, slice(None))
        if shape.options.adc_bits is None:
            return bound, ()
        return bound, tuple(_per_tile(m.chip.weight_max, chip, t, n, shape) for m in matrices if m.chip)

    def add(c: Array, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        t, within = jax.lax.div(c, chunks), jax.lax.rem(c, chunks)
        totals, sums, bound = carry
        rows = pl.ds(c * chunk, chunk)
        inputs = load(x, b, slice(None), rows)
        sums = tuple(
            y + kernel_math.dot(inputs, weights_chunk(of, m, shape, b, n, t, within, rows), inputs.dtype)
            for m, y in zip(matrices, sums, strict=True)
        )

        def read(totals: Any, sums: Any, bound: Any) -> tuple[Any, Any, Any]:
            of_inputs = bound[0][:, None]
            limits = tuple(of_inputs * adc_bound * largest for largest in bound[1])
            found = tuple(
                total + _convert(y, inside, shape, of_inputs, limit, (b, n, t), interpret)
                for y, inside, limit, total in zip(sums, insides or nothing, limits or nothing, totals, strict=True)
            )
            # The next tile's sums. A constant would be written in two instructions each.
            zero = jnp.where(of_inputs >= 0, 0.0, jnp.nan)
            following = jnp.minimum(t + 1, layout.tiles - 1)
            return found, tuple(jnp.broadcast_to(zero, y.shape) for y in sums), bounds_of(following)

        return jax.lax.cond(within == chunks - 1, read, lambda *carry: carry, totals, sums, bound)

    zeros = _zeros(x, matrices, shape)
    return jax.lax.fori_loop(0, layout.tiles * chunks, add, (zeros, zeros, bounds_of(jnp.int32(0))))[0]


def _convert(
    y: Array, inside: Any, shape: Shape, bound: Array, limit: Array | None, place: tuple[Array, Array, Array],
    interpret: bool,
) -> Array:  # fmt: skip
    """A tile's sums over codes, as its ADC reads them; `inside` gets which of them are within its bound."""
    options, (b, n, t) = shape.options, place
    step = jnp.ones_like(bound) if options.dac_bits is None else kernel_math.step_size(bound, options.dac_bits)
    if options.adc_bits is None:
        return y * step
    assert limit is not None
    if inside is not None:
        columns = pl.ds(n * shape.columns, shape.columns)
        plgpu.store(inside.at[b, t, :, columns], kernel_math.passes_adc(y * step, limit))
    return _adc(y, step, limit, options.adc_bits, interpret=interpret)


def _adc(y: Array, scale: Array, bound: Array, bits: int, *, interpret: bool) -> Array:
    """`kernel_math.adc` of `y * scale` in six instructions for each sum: a program has as many as it can multiply."""
    step = kernel_math.step_size(bound, bits)
    # Float32 numbers near 1.5 * 2**23 are whole. It is no constant, so that no compiler takes it out again.
    whole = jnp.where(step > 0, 1.5 * 2.0**23, jnp.nan)
    code = multiply_add(y, scale / step, whole, interpret=interpret) - whole
    # Where the bound is too small to have steps, no code has a height.
    return clip(code * jnp.where(step > bound, 0.0, step), bound, interpret=interpret)


def _per_tile(values: Any, index: Array, t: Array, n: Array, shape: Shape) -> Array:
    """One value for this tile `[1, 1]`, or one for each of its columns `[1, columns]`."""
    columns = pl.ds(0, 1) if values.shape[2] == 1 else pl.ds(n * shape.columns, shape.columns)
    return load(values, index, t, columns)[None, :]


def weights_chunk(of: Tables, matrix: Matrix, shape: Shape, b: Array, n: Array, t: Array, c: Array, rows: Any) -> Array:
    """A chunk of the weights that an analog block multiplies by."""
    if matrix.programmed is not None:
        return part(matrix.programmed, load(of.programmed, b), rows, n, shape)
    clean, noise = matrix.clean, matrix.noise
    assert clean is not None and noise is not None and shape.device is not None
    size, index, chip = (shape.sizes.chunk, shape.columns), load(of.clean, b), load(of.chip, b)

    def words(stream: Stream) -> tuple[Array, Array]:
        found = (
            load(noise.words, chip, pl.ds(2 * stream, 1)),
            load(noise.words, chip, pl.ds(2 * stream + 1, 1)),
        )
        return found[0][None, :], found[1][None, :]

    first_row = shape.layout.first_row(t) + c * shape.sizes.chunk
    return kernel_math.programmed_block(
        part(clean.w, index, rows, n, shape),
        shape.device,
        GroupRange(_per_tile(clean.low, index, t, n, shape), _per_tile(clean.high, index, t, n, shape)),
        rows=first_row.astype(jnp.uint32) + jax.lax.broadcasted_iota(jnp.uint32, size, 0),
        columns=(n * shape.columns).astype(jnp.uint32) + jax.lax.broadcasted_iota(jnp.uint32, size, 1),
        width=shape.width,
        words=words,
        noise_scale=load(noise.scale, chip),
        time_s=None if noise.time_s is None else jnp.full(size, load(noise.time_s, chip)),
        factor=None if noise.factor is None else load(noise.factor, chip, t),
    )
