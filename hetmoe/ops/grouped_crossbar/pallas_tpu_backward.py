"""Mosaic kernels for TPU of the gradients of blocks of rows and of their matrices.

For the rows, the grid of the forward kernel with columns and tiles exchanged: (groups of blocks, tiles, columns, blocks
of a group). A step multiplies the gradient of one block's outputs by a tile of weights, transposed, and adds to the
block's sum in VMEM. For the matrices, (tiles, columns, steps): a step adds one block's inputs, transposed and as the
DAC gave them, times the gradient of its outputs. The blocks come in the order of their matrices, so that each result is
one run of steps and is written once, from a float32 sum.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from hetmoe.ops.grouped_crossbar import kernel_math
from hetmoe.ops.grouped_crossbar.blocks import ANALOG, DIGITAL, Matrix, Tables
from hetmoe.ops.grouped_crossbar.gradient_order import Steps, make_steps
from hetmoe.ops.grouped_crossbar.pallas_tpu import (
    VMEM_BYTES,
    dac_range,
    flat_tables,
    group_size,
    kept_tile,
    kept_weights,
    matrix_windows,
    noise_scalars,
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
    """Gradient of packed rows `x[blocks, block, K]`, in their dtype.

    Args:
        x: packed rows.
        grads: of the outputs of every matrix, float32 `[blocks, block, N]`, packed columns.
        insides: from the forward kernel, int8 `[blocks, tiles, block, N]`; None = no ADC.
        tables: of the blocks.
        matrices: packed.
        shape: of the kernel.
        interpret: run the kernel's operations one by one on any device.
    """
    blocks, block, _ = x.shape
    layout, columns = shape.layout, shape.columns
    last = weights_of(matrices[0]).shape[2] // columns - 1
    group = group_size(blocks, block * layout.tile * 4)
    scalars, scalar_tree = jax.tree.flatten((flat_tables(tables), [noise_scalars(matrix) for matrix in matrices]))

    def window(size: tuple[int, ...], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        def index_map(g: Array, t: Array, n: Array, i: Array, *refs: Any) -> tuple[Any, ...]:
            return index(jax.tree.unflatten(scalar_tree, refs)[0], g * group + i, n, t)

        return pl.BlockSpec(size, index_map)

    # Inputs are looked at, and results leave VMEM, at the last columns; until then neither moves.
    of_rows = window(
        (1, block, layout.tile), lambda _of, b, n, t: (jnp.where(n == last, b, jax.lax.div(b, group) * group), 0, t)
    )
    arrays, specs = matrix_windows(matrices, shape, window)
    given: dict[str, Any] = {"grads": grads, "insides": insides, "matrices": arrays}
    windows: dict[str, Any] = {
        "grads": tuple(window((1, block, columns), lambda _of, b, n, _t: (b, 0, n)) for _ in grads),
        "insides": _inside_windows(insides, window((1, 1, block, columns), lambda _of, b, n, t: (b, t, 0, n))),
        "matrices": specs,
    }
    if _may_clip(shape, tables):
        given, windows = {**given, "x": x}, {**windows, "x": of_rows}
    inputs, input_tree = jax.tree.flatten(given)

    def kernel(*refs: Any) -> None:
        of, noise = jax.tree.unflatten(scalar_tree, refs[: len(scalars)])
        refs = refs[len(scalars) :]
        parts = jax.tree.unflatten(input_tree, refs[: len(inputs)])
        out, total, *kept = refs[len(inputs) :]
        _inputs_step(of, noise, parts, out, total, kept, shape, (group, last))

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(blocks // group, layout.tiles, last + 1, group),
            in_specs=jax.tree.leaves(windows, is_leaf=_is_window),
            out_specs=of_rows,
            scratch_shapes=[pltpu.VMEM((group, block, layout.tile), jnp.float32), *kept_weights(matrices, shape)],
        ),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="grouped_crossbar_inputs_gradient",
    )(*scalars, *inputs)


def _may_clip(shape: Shape, tables: Tables) -> bool:
    """Whether an input may be outside its range: the largest one sets a dynamic range, and counts as inside."""
    return shape.options.dac_bits is not None and tables.input_range is not None


def _inside_windows(insides: tuple[Array | None, ...], spec: pl.BlockSpec) -> tuple[pl.BlockSpec | None, ...]:
    return tuple(None if inside is None else spec for inside in insides)


def _is_window(leaf: Any) -> bool:
    return isinstance(leaf, pl.BlockSpec)


def _through(grad: Any, inside: Any) -> Array:
    """The gradient of a tile's sums, before their ADCs."""
    return kernel_math.passed(grad[0], None if inside is None else inside[0, 0])


def _inputs_step(
    of: Tables, noise: list[dict[str, Any]], given: dict[str, Any], out: Any, total: Any, kept: list[Any],
    shape: Shape, counts: tuple[int, int],
) -> None:  # fmt: skip
    """One stripe of columns, of one tile, of one block; `counts` is (blocks of a group, number of the last stripe)."""
    t, n, i = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    group, last = counts
    b = pl.program_id(0) * group + i

    @pl.when(n == 0)
    def _start() -> None:
        total[i] = jnp.zeros(total.shape[1:], jnp.float32)

    def add(weights: list[Array]) -> None:
        for grad, inside, w in zip(given["grads"], given["insides"], weights, strict=True):
            dtype = kernel_math.gradient_dtype(out.dtype, w.dtype, None)
            for g in kernel_math.gradient_parts(_through(grad, inside), dtype):
                total[i] += kernel_math.dot(g, w, dtype, (1, 1))

    if "clean" in given["matrices"][0]:

        @pl.when(of.mode[b] == DIGITAL)
        def _digital() -> None:
            add([matrix["clean"][0] for matrix in given["matrices"]])

    if "weight_max" in given["matrices"][0]:

        @pl.when(of.mode[b] == ANALOG)
        def _analog() -> None:
            add(
                [
                    matrix["programmed"][0]
                    if "programmed" in matrix
                    else kept_tile(of, noise[index], matrix, kept[index], shape, (b, i, n, t))
                    for index, matrix in enumerate(given["matrices"])
                ]
            )

    @pl.when(n == last)
    def _finish() -> None:
        out[0] = total[i].astype(out.dtype)

    if "x" in given:

        @pl.when((n == last) & (of.mode[b] == ANALOG))
        def _clip() -> None:
            x = given["x"][0]
            inside = kernel_math.passes_dac(x, dac_range(of.input_range, x, b * shape.layout.tiles + t))
            out[0] = jnp.where(inside, total[i], 0.0).astype(out.dtype)


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
    """Gradients `[slots, K, N]` (packed) in `dtype`, that of the weights; one for every matrix that shares the rows.

    Args:
        x: packed rows `[blocks, block, K]`.
        grads: as for `inputs_gradient`.
        insides: likewise.
        tables: of the blocks; those marked empty add to no gradient.
        slot: which of the gradients each block adds to `[blocks]`.
        slots: how many there are; exact zeros where no block adds.
        shape: of the kernel.
        dtype: of the weights.
        interpret: run the kernel's operations one by one on any device.
    """
    _, block, rows = x.shape
    layout, columns, packed = shape.layout, shape.columns, grads[0].shape[2]
    steps = make_steps(tables.mode, slot, slots)
    scalars, scalar_tree = jax.tree.flatten((steps, flat_tables(tables).input_range))

    def window(size: tuple[int, ...], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        def index_map(t: Array, n: Array, s: Array, *refs: Any) -> tuple[Any, ...]:
            return index(jax.tree.unflatten(scalar_tree, refs)[0], s, n, t)

        return pl.BlockSpec(size, index_map)

    of_outputs = window((1, block, columns), lambda at, s, n, _t: (at.block[s], 0, n))
    of_sums = window((1, 1, block, columns), lambda at, s, n, t: (at.block[s], t, 0, n))
    windows = {
        "x": window((1, block, layout.tile), lambda at, s, _n, t: (at.block[s], 0, t)),
        "grads": tuple(of_outputs for _ in grads),
        "insides": _inside_windows(insides, of_sums),
    }
    inputs, input_tree = jax.tree.flatten({"x": x, "grads": grads, "insides": insides})
    count = len(grads)

    def kernel(*refs: Any) -> None:
        at, ranges = jax.tree.unflatten(scalar_tree, refs[: len(scalars)])
        refs = refs[len(scalars) :]
        given = jax.tree.unflatten(input_tree, refs[: len(inputs)])
        refs = refs[len(inputs) :]
        _weights_step(at, ranges, given, refs[:count], refs[count:], shape)

    return tuple(
        pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(layout.tiles, packed // columns, steps.block.shape[0]),
                in_specs=jax.tree.leaves(windows, is_leaf=_is_window),
                out_specs=[window((1, layout.tile, columns), lambda at, s, n, t: (at.slot[s], t, n))] * count,
                scratch_shapes=[pltpu.VMEM((layout.tile, columns), jnp.float32) for _ in grads],
            ),
            out_shape=[jax.ShapeDtypeStruct((slots, rows, packed), dtype)] * count,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            interpret=interpret,
            name="grouped_crossbar_weights_gradient",
        )(*scalars, *inputs)
    )


def _weights_step(
    at: Steps, ranges: Any, given: dict[str, Any], outs: tuple[Any, ...], sums: tuple[Any, ...], shape: Shape
) -> None:
    """Adds one block's share to a tile of some columns."""
    t, s = pl.program_id(0), pl.program_id(2)
    end, slot, options = pl.num_programs(2) - 1, at.slot[s], shape.options
    x_ref, dtype = given["x"], outs[0].dtype

    @pl.when((s == 0) | (at.slot[jnp.maximum(s - 1, 0)] != slot))
    def _start() -> None:
        for total in sums:
            total[...] = jnp.zeros(total.shape, jnp.float32)

    def add(inputs: Array, step: Array | None, dac_bits: int | None) -> None:
        factors = kernel_math.gradient_dtype(x_ref.dtype, dtype, dac_bits)
        for grad, inside, total in zip(given["grads"], given["insides"], sums, strict=True):
            g = _through(grad, inside)
            for share in kernel_math.gradient_parts(g if step is None else g * step, factors):
                total[...] += kernel_math.dot(inputs, share, factors, (0, 0))

    @pl.when(at.mode[s] == DIGITAL)
    def _digital() -> None:
        add(x_ref[0], None, None)

    @pl.when(at.mode[s] == ANALOG)
    def _analog() -> None:
        x = x_ref[0]
        if options.dac_bits is None:
            add(x, None, None)
        else:
            bound = dac_range(ranges, x, at.block[s] * shape.layout.tiles + t)
            codes = kernel_math.dac_codes(x, bound, options.dac_bits)
            add(codes, kernel_math.step_size(bound, options.dac_bits), options.dac_bits)

    @pl.when((s == end) | (at.slot[jnp.minimum(s + 1, end)] != slot))
    def _finish() -> None:
        for out, total in zip(outs, sums, strict=True):
            out[0] = total[...].astype(dtype)
