"""Triton kernels for NVIDIA GPUs of the gradients of blocks of rows and of their matrices.

For the rows, a program makes one block of rows by one chunk of inputs: it goes through the columns in stripes, and
multiplies the gradient of the outputs by the chunk's weights, transposed. For the matrices, a program makes one chunk
of rows by one stripe of columns of one gradient: it goes through the blocks that add to it, sorted by matrix. The DAC's
codes are made once, before that: as many programs as there are stripes would each convert them again, which takes
longer than their products.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from hetmoe.ops.grouped_crossbar import kernel_math
from hetmoe.ops.grouped_crossbar.block_sizes import for_gradients
from hetmoe.ops.grouped_crossbar.blocks import ANALOG, DIGITAL, EMPTY, Matrix, Tables
from hetmoe.ops.grouped_crossbar.gradient_order import Ranges, make_ranges
from hetmoe.ops.grouped_crossbar.pallas_triton import (
    converted,
    flat_words,
    load,
    part,
    side_by_side,
    weights_chunk,
)
from hetmoe.ops.grouped_crossbar.shape import Shape, weights_of


def inputs_gradient(
    x: Array,
    grads: tuple[Array, ...],
    insides: tuple[Array | None, ...],
    tables: Tables,
    matrices: tuple[Matrix, ...],
    shape: Shape,
    *,
    interpret: bool,
) -> Array:
    """As `pallas_tpu_backward.inputs_gradient`."""
    blocks, block, rows = x.shape
    shape = dataclasses.replace(shape, sizes=for_gradients(shape.sizes, block, len(grads)))
    given = (x, grads, insides, tables, tuple(flat_words(matrix) for matrix in matrices))
    inputs, tree = jax.tree.flatten(given)
    chunks = rows // shape.sizes.chunk

    def kernel(*refs: Any) -> None:
        x_ref, g, inside, of, parts = jax.tree.unflatten(tree, refs[: len(inputs)])
        _inputs_instance(x_ref, g, inside, of, parts, refs[len(inputs)], shape, side_by_side(blocks, chunks))

    return pl.pallas_call(
        kernel,
        grid=(blocks * chunks,),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=shape.sizes.warps, num_stages=shape.sizes.stages),
        interpret=interpret,
        name="grouped_crossbar_inputs_gradient",
    )(*inputs)


def _inputs_instance(
    x: Any, grads: tuple[Any, ...], insides: tuple[Any, ...], of: Tables, matrices: tuple[Matrix, ...], out: Any,
    shape: Shape, place: tuple[Array, Array],
) -> None:  # fmt: skip
    """One block by one chunk of inputs, at `place`."""
    b, number = place
    chunk, options = shape.sizes.chunk, shape.options
    t, c = _tile_and_chunk(number, shape)
    rows, mode, size = pl.ds(number * chunk, chunk), load(of.mode, b), (x.shape[1], chunk)
    dtype = kernel_math.gradient_dtype(x.dtype, weights_of(matrices[0]).dtype, None)

    def total(weights: Any, *, is_drawn: bool) -> Array:
        # XLA pushes the transpose of a factor up through all that it is computed from, and copies what has two uses at
        # every one of them: of a drawn weight that never ends. So the gradient is turned there, and the result.
        def add(n: Array, found: Array) -> Array:
            for index in range(len(matrices)):
                w = weights(index, n)
                for g in kernel_math.gradient_parts(_through(grads[index], insides[index], b, t, n, shape), dtype):
                    found += kernel_math.dot(*((w, g) if is_drawn else (g, w)), dtype, (1, 1))
            return found

        start = jnp.zeros(size[::-1] if is_drawn else size, jnp.float32)
        found = jax.lax.fori_loop(0, grads[0].shape[2] // shape.columns, add, start)
        return found.T if is_drawn else found

    def write(result: Array) -> None:
        plgpu.store(out.at[b, :, rows], result.astype(out.dtype))

    if matrices[0].chip is not None:

        @pl.when(mode == ANALOG)
        def _analog() -> None:
            is_drawn = matrices[0].noise is not None
            dx = total(lambda index, n: weights_chunk(of, matrices[index], shape, b, n, t, c, rows), is_drawn=is_drawn)
            if options.dac_bits is not None and of.input_range is not None:
                inside = kernel_math.passes_dac(load(x, b, slice(None), rows), load(of.input_range, b, t))
                dx = jnp.where(inside, dx, 0.0)
            write(dx)

    clean = [matrix.clean.w for matrix in matrices if matrix.clean is not None]
    if clean:

        @pl.when(mode == DIGITAL)
        def _digital() -> None:
            write(total(lambda index, n: part(clean[index], load(of.clean, b), rows, n, shape), is_drawn=False))

    @pl.when(mode == EMPTY)
    def _empty() -> None:
        write(jnp.zeros(size, jnp.float32))


def _tile_and_chunk(number: Array, shape: Shape) -> tuple[Array, Array]:
    """Which tile a chunk of packed rows is in, and its number there."""
    chunks = shape.layout.tile // shape.sizes.chunk
    return jax.lax.div(number, chunks), jax.lax.rem(number, chunks)


def _through(grad: Any, inside: Any, b: Array, t: Array, n: Array, shape: Shape) -> Array:
    """The gradient of a tile's sums, before their ADCs."""
    columns = pl.ds(n * shape.columns, shape.columns)
    g = load(grad, b, slice(None), columns)
    return kernel_math.passed(g, None if inside is None else load(inside, b, t, slice(None), columns))


def weights_gradient(
    x: Array,
    grads: tuple[Array, ...],
    insides: tuple[Array | None, ...],
    tables: Tables,
    slot: Array,
    slots: int,
    shape: Shape,
    dtype: jnp.dtype,
    *,
    interpret: bool,
) -> tuple[Array, ...]:
    """As `pallas_tpu_backward.weights_gradient`."""
    (_, block, rows), packed = x.shape, grads[0].shape[2]
    shape = dataclasses.replace(shape, sizes=for_gradients(shape.sizes, block, len(grads)))
    chunks, stripes = rows // shape.sizes.chunk, packed // shape.columns
    codes, step = _converted(x, tables, shape, dtype)
    inputs, tree = jax.tree.flatten((codes, step, grads, insides, make_ranges(tables.mode, slot, slots)))

    def kernel(*refs: Any) -> None:
        x_ref, step_ref, g, inside, ranges = jax.tree.unflatten(tree, refs[: len(inputs)])
        outs, number = refs[len(inputs) :], pl.program_id(0)
        inner = jax.lax.rem(number, chunks * stripes)
        place = (jax.lax.div(number, chunks * stripes), jax.lax.div(inner, stripes), jax.lax.rem(inner, stripes))
        _weights_instance(x_ref, step_ref, g, inside, ranges, outs, shape, place)

    return tuple(
        pl.pallas_call(
            kernel,
            grid=(slots * chunks * stripes,),
            out_shape=[jax.ShapeDtypeStruct((slots, rows, packed), dtype) for _ in grads],
            compiler_params=plgpu.CompilerParams(num_warps=shape.sizes.warps, num_stages=shape.sizes.stages),
            interpret=interpret,
            name="grouped_crossbar_weights_gradient",
        )(*inputs)
    )


def _converted(x: Array, tables: Tables, shape: Shape, dtype: jnp.dtype) -> tuple[Array, Array | None]:
    """(inputs or, where a DAC converts them, their codes; the codes' steps `[blocks, tiles, block]`)."""
    bits = shape.options.dac_bits
    codes, bound = converted(x, tables, shape, kernel_math.gradient_dtype(x.dtype, dtype, bits))
    if bits is None:
        return codes, None
    return codes, jnp.where((tables.mode == ANALOG)[:, None, None], kernel_math.step_size(bound, bits), 1.0)


def _weights_instance(
    x: Any, step: Any, grads: tuple[Any, ...], insides: tuple[Any, ...], ranges: Ranges, outs: tuple[Any, ...],
    shape: Shape, place: tuple[Array, Array, Array],
) -> None:  # fmt: skip
    """One chunk of rows by one stripe of columns of one gradient; `place` is (gradient, chunk, stripe)."""
    slot, number, n = place
    chunk = shape.sizes.chunk
    t, _ = _tile_and_chunk(number, shape)
    rows, columns = pl.ds(number * chunk, chunk), pl.ds(n * shape.columns, shape.columns)

    def add(s: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        b = load(ranges.order, s)
        inputs = load(x, b, slice(None), rows)
        found = []
        for grad, inside, total in zip(grads, insides, sums, strict=True):
            g = _through(grad, inside, b, t, n, shape)
            if step is not None:
                g = g * load(step, b, t, slice(None))[:, None]
            shares = [kernel_math.dot(inputs, half, x.dtype, (0, 0)) for half in kernel_math.gradient_parts(g, x.dtype)]
            found.append(functools.reduce(jnp.add, shares, total))
        return tuple(found)

    start = tuple(jnp.zeros((chunk, shape.columns), jnp.float32) for _ in outs)
    sums = jax.lax.fori_loop(load(ranges.first, slot), load(ranges.first, slot + 1), add, start)
    for out, total in zip(outs, sums, strict=True):
        plgpu.store(out.at[slot, rows, columns], total.astype(out.dtype))
