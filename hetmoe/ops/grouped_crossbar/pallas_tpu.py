"""Mosaic kernel for TPU: blocks of rows times their matrices, converters included, in one pass over both.

The grid runs over (groups of blocks, columns, tiles, blocks of a group). A step multiplies one tile of one block: DAC,
matmul on the matrix unit, ADC, and adds to the block's sum in VMEM. Within a group the blocks come last, so that a tile
of weights that consecutive blocks share (one expert, whatever the seed) is fetched once for all of them; a group is as
large as VMEM has room for sums. Weights that are programmed on the way are kept for the next block of the same chip.
Clean and programmed weights have a window each; the one that a block does not need rests where nothing is fetched.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from hetmoe.analog.devices import GroupRange, Stream
from hetmoe.ops.grouped_crossbar import kernel_math
from hetmoe.ops.grouped_crossbar.blocks import ANALOG, DIGITAL, Matrix, Tables
from hetmoe.ops.grouped_crossbar.shape import Shape, weights_of

SUM_BYTES = 4 * 2**20  # VMEM for the running sums of a group of blocks
VMEM_BYTES = 48 * 2**20  # v5e and v6e have 128 MiB, v5p 64 (jax, pallas/mosaic/tpu_info.py); older ones 16: too few


def blocks_matmul(
    x: Array, tables: Tables, matrices: tuple[Matrix, ...], shape: Shape, *, keep_inside: bool, interpret: bool
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Packed rows `x[blocks, block, K]` times one matrix of each of `matrices` (packed); float32, packed columns.

    `keep_inside` also returns, for each matrix, which tiles' sums were within the bounds of their ADCs, int8
    `[blocks, tiles, block, N]`, all of them in blocks that are not analog (for the gradient; the blocks come first so
    that mapped axes fold into them without a copy). `interpret` runs the kernel's operations one by one on any device.
    """
    blocks, block, _ = x.shape
    layout, columns = shape.layout, shape.columns
    packed = weights_of(matrices[0]).shape[2]
    group = group_size(blocks, len(matrices) * block * columns * 4)
    scalars, scalar_tree = jax.tree.flatten((flat_tables(tables), [noise_scalars(matrix) for matrix in matrices]))

    def window(size: tuple[int, ...], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        def index_map(g: Array, n: Array, t: Array, i: Array, *refs: Any) -> tuple[Any, ...]:
            return index(jax.tree.unflatten(scalar_tree, refs)[0], g * group + i, n, t)

        return pl.BlockSpec(size, index_map)

    arrays, specs = matrix_windows(matrices, shape, window)
    inputs, input_tree = jax.tree.flatten({"x": x, "matrices": arrays})
    rows = window((1, block, layout.tile), lambda _of, b, _n, t: (b, 0, t))
    in_specs = jax.tree.leaves({"x": rows, "matrices": specs}, is_leaf=lambda leaf: isinstance(leaf, pl.BlockSpec))
    last = layout.tiles - 1
    # Results leave VMEM when their index changes: until the last tile it stays that of the group's first block.
    result = window(
        (1, block, columns), lambda _of, b, n, t: (jnp.where(t == last, b, jax.lax.div(b, group) * group), 0, n)
    )
    of_tile = window((1, 1, block, columns), lambda _of, b, n, t: (b, t, 0, n))
    count, kept_count = len(matrices), len(matrices) if keep_inside else 0
    out_shape = [jax.ShapeDtypeStruct((blocks, block, packed), jnp.float32)] * count
    out_shape += [jax.ShapeDtypeStruct((blocks, layout.tiles, block, packed), jnp.int8)] * kept_count
    sums = [pltpu.VMEM((group, block, columns), jnp.float32) for _ in matrices]

    def kernel(*refs: Any) -> None:
        of, noise = jax.tree.unflatten(scalar_tree, refs[: len(scalars)])
        refs = refs[len(scalars) :]
        given = jax.tree.unflatten(input_tree, refs[: len(inputs)])
        refs = refs[len(inputs) :]
        outs, insides, refs = refs[:count], refs[count : count + kept_count], refs[count + kept_count :]
        _step(of, noise, given, (outs, insides), refs[:count], refs[count:], shape, group)

    found = tuple(
        pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(blocks // group, packed // columns, layout.tiles, group),
                in_specs=in_specs,
                out_specs=[result] * count + [of_tile] * kept_count,
                scratch_shapes=[*sums, *kept_weights(matrices, shape)],
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            interpret=interpret,
            name="grouped_crossbar",
        )(*scalars, *inputs)
    )
    return found[:count], found[count:]


def kept_weights(matrices: tuple[Matrix, ...], shape: Shape) -> list[Any]:
    """Room for a tile of every matrix that is programmed on the way."""
    size = (shape.layout.tile, shape.columns)
    return [pltpu.VMEM(size, weights_of(matrix).dtype) for matrix in matrices if matrix.noise is not None]


def group_size(blocks: int, bytes_each: int) -> int:
    """The largest divisor of the number of blocks whose sums fit (`block_sizes.BLOCKS_MULTIPLE`)."""
    most = max(1, SUM_BYTES // bytes_each)
    return next(size for size in range(min(blocks, most), 0, -1) if blocks % size == 0)


def flat_tables(tables: Tables) -> Tables:
    """One-dimensional: a second axis would be padded to 128 in scalar memory."""
    return (
        tables
        if tables.input_range is None
        else dataclasses.replace(tables, input_range=tables.input_range.reshape(-1))
    )


def noise_scalars(matrix: Matrix) -> dict[str, Array]:
    """What a matrix that is programmed on the way has in scalar memory."""
    noise = matrix.noise
    if noise is None:
        return {}
    words = jax.lax.bitcast_convert_type(noise.words, jnp.int32).reshape(-1)
    found = {"words": words, "scale": noise.scale}
    return found if noise.time_s is None else {**found, "time_s": noise.time_s}


def matrix_windows(
    matrices: tuple[Matrix, ...], shape: Shape, window: Callable[..., pl.BlockSpec]
) -> tuple[list[dict[str, Array]], list[dict[str, pl.BlockSpec]]]:
    """The arrays of every matrix, and which part of each a step sees; `window` takes (tables, block, column, tile)."""
    layout, columns = shape.layout, shape.columns

    def weights(name: str, *modes: int) -> pl.BlockSpec:
        def index(of: Tables, b: Array, n: Array, t: Array) -> tuple[Any, ...]:
            mode, needed = of.mode[b], jnp.bool_(False)
            for wanted in modes:
                needed = needed | (mode == wanted)
            return tuple(jnp.where(needed, value, 0) for value in (getattr(of, name)[b], t, n))

        return window((1, layout.tile, columns), index)

    def per_tile(name: str, values: Array) -> tuple[Array, pl.BlockSpec]:
        wide = values.shape[2] > 1
        size = (1, layout.tiles, columns if wide else 1)
        return values, window(size, lambda of, b, n, _t: (getattr(of, name)[b], 0, n if wide else 0))

    pairs: list[dict[str, tuple[Array, pl.BlockSpec]]] = []
    for matrix in matrices:
        clean, noise = matrix.clean, matrix.noise
        found = {} if matrix.chip is None else {"weight_max": per_tile("chip", matrix.chip.weight_max)}
        if clean is not None:
            found["clean"] = (
                clean.w,
                weights("clean", DIGITAL) if noise is None else weights("clean", DIGITAL, ANALOG),
            )
            if clean.low is not None and clean.high is not None:
                found |= {"low": per_tile("clean", clean.low), "high": per_tile("clean", clean.high)}
        if matrix.programmed is not None:
            found["programmed"] = (matrix.programmed, weights("programmed", ANALOG))
        if noise is not None and noise.factor is not None:
            found["factor"] = per_tile("chip", noise.factor[:, :, None])
        pairs.append(found)
    arrays = [{name: pair[0] for name, pair in found.items()} for found in pairs]
    return arrays, [{name: pair[1] for name, pair in found.items()} for found in pairs]


def _step(
    of: Tables, noise: list[dict[str, Any]], given: dict[str, Any], results: tuple[tuple[Any, ...], tuple[Any, ...]],
    sums: tuple[Any, ...], kept: tuple[Any, ...], shape: Shape, group: int,
) -> None:  # fmt: skip
    """One tile of one block."""
    outs, insides = results
    n, t, i = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    b = pl.program_id(0) * group + i
    matrices, x_ref = given["matrices"], given["x"]

    @pl.when(t == 0)
    def _start() -> None:
        for total in sums:
            total[i] = jnp.zeros(total.shape[1:], jnp.float32)

    if "clean" in matrices[0]:

        @pl.when(of.mode[b] == DIGITAL)
        def _digital() -> None:
            for matrix, total in zip(matrices, sums, strict=True):
                total[i] += kernel_math.dot(x_ref[0], matrix["clean"][0], x_ref.dtype)

    if "weight_max" in matrices[0]:

        @pl.when(of.mode[b] == ANALOG)
        def _analog() -> None:
            _analog_tile(of, noise, given, (sums, insides), kept, shape, (b, i, n, t))

    if insides:

        @pl.when(of.mode[b] != ANALOG)
        def _unconverted() -> None:
            _let_pass(insides)

    @pl.when(t == shape.layout.tiles - 1)
    def _finish() -> None:
        for out, total in zip(outs, sums, strict=True):
            out[0] = total[i]


def _let_pass(insides: tuple[Any, ...]) -> None:
    """No ADC clips anything of this block."""
    for inside in insides:
        inside[...] = jnp.ones(inside.shape, jnp.int8)


def _analog_tile(
    of: Tables, noise: list[dict[str, Any]], given: dict[str, Any], results: tuple[tuple[Any, ...], tuple[Any, ...]],
    kept: tuple[Any, ...], shape: Shape, place: tuple[Any, Any, Any, Any],
) -> None:  # fmt: skip
    """Adds what the ADCs read to the sums; `place` is (block, its number in the group, column, tile)."""
    b, i, _, t = place
    sums, insides = results
    options, x = shape.options, given["x"][0]
    bound = dac_range(of.input_range, x, b * shape.layout.tiles + t)
    inputs = x if options.dac_bits is None else kernel_math.dac_codes(x, bound, options.dac_bits)
    for index, (matrix, total) in enumerate(zip(given["matrices"], sums, strict=True)):
        if "programmed" in matrix:
            w = matrix["programmed"][0]
        else:
            w = kept_tile(of, noise[index], matrix, kept[index], shape, place)
        y = kernel_math.dot(inputs, w, kernel_math.operand_dtype(x.dtype, w.dtype, options.dac_bits))
        if options.dac_bits is not None:
            y = y * kernel_math.step_size(bound, options.dac_bits)
        if options.adc_bits is not None:
            largest = matrix["weight_max"][0, pl.ds(t, 1), :]
            limit = bound * of.adc_bound[b] * largest
            if insides:
                insides[index][0, 0] = kernel_math.passes_adc(y, limit)
            y = kernel_math.adc(y, limit, options.adc_bits)
        total[i] += y


def dac_range(static: Any, x: Array, index: Array) -> Array:
    """DAC range of a tile's inputs `x[rows, tile]`: entry `index` of the static ones `[1, 1]`, else `[rows, 1]`."""
    if static is None:
        return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=1, keepdims=True)
    return jnp.full((1, 1), static[index], jnp.float32)


def kept_tile(
    of: Tables, noise: dict[str, Any], matrix: dict[str, Any], kept: Any, shape: Shape,
    place: tuple[Any, Any, Any, Any],
) -> Array:  # fmt: skip
    """This tile as programmed on the block's chip, from the block before if that was the same."""
    b, i, n, t = place
    before = jnp.maximum(b - 1, 0)
    same = (of.mode[before] == ANALOG) & (of.chip[before] == of.chip[b]) & (of.clean[before] == of.clean[b])

    @pl.when((i == 0) | jnp.logical_not(same))
    def _program() -> None:
        kept[...] = _programmed(of, noise, matrix, shape, (b, n, t))

    return kept[...]


def _programmed(
    of: Tables, noise: dict[str, Any], matrix: dict[str, Any], shape: Shape, place: tuple[Any, Any, Any]
) -> Array:
    b, n, t = place
    assert shape.device is not None
    size, chip, streams = (shape.layout.tile, shape.columns), of.chip[b], len(Stream)

    def spread(word: Array) -> Array:
        return jax.lax.bitcast_convert_type(jnp.full(size, word, jnp.int32), jnp.uint32)

    def words(stream: Stream) -> tuple[Array, Array]:
        first = (chip * streams + stream) * 2
        return spread(noise["words"][first]), spread(noise["words"][first + 1])

    at = pl.ds(t, 1)
    return kernel_math.programmed_block(
        matrix["clean"][0],
        shape.device,
        GroupRange(matrix["low"][0, at, :], matrix["high"][0, at, :]),
        rows=spread(shape.layout.first_row(t)) + jax.lax.broadcasted_iota(jnp.uint32, size, 0),
        columns=spread(n * shape.columns) + jax.lax.broadcasted_iota(jnp.uint32, size, 1),
        width=shape.width,
        words=words,
        noise_scale=noise["scale"][chip],
        time_s=jnp.full(size, noise["time_s"][chip]) if "time_s" in noise else None,
        factor=matrix["factor"][0, at, :] if "factor" in matrix else None,
    )
