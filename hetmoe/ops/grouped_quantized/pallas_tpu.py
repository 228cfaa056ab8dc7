"""Mosaic kernel for TPU: blocks of rows times packed weights, unpacked in VMEM once for the blocks that share them.

The grid is that of the crossbar kernel: groups of blocks, columns, tiles, blocks of a group. A block unpacks its tile
unless the one before it, of those whose matrix is among these, has left it there. Blocks of other matrices fetch and
multiply nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from hetmoe.ops.grouped_crossbar.kernel_math import dot
from hetmoe.ops.grouped_crossbar.pallas_tpu import VMEM_BYTES, group_size
from hetmoe.ops.grouped_quantized import kernel_math
from hetmoe.ops.grouped_quantized.shape import Shape
from hetmoe.quantize.packed import Packed

OTHER, SAME, NEW = 0, 1, 2  # what a block does: nothing; multiply by what lies unpacked; unpack before that


@struct.dataclass
class Steps:
    """One entry per block."""

    action: Int[Array, "blocks"]
    slot: Int[Array, "blocks"]  # whose weights are fetched, or were; -1 = nothing is in this group of blocks
    rows: Int[Array, "blocks"]  # likewise the block whose rows are


def make_steps(own: Int[Array, "blocks"], slot: Int[Array, "blocks"], group: int) -> Steps:
    """What the blocks do, in groups of `group` that follow each other; a block without work repeats its neighbour's."""
    is_own, slots = own.reshape(-1, group) != 0, slot.reshape(-1, group)
    number = jnp.broadcast_to(jnp.arange(group, dtype=jnp.int32), is_own.shape)
    last = jax.lax.cummax(jnp.where(is_own, number, -1), axis=1)  # with work, up to this one
    before = jnp.concatenate([jnp.full_like(last[:, :1], -1), last[:, :-1]], axis=1)
    at = jnp.where(last < 0, jnp.argmax(is_own, axis=1, keepdims=True).astype(jnp.int32), last)
    is_new = (before < 0) | (jnp.take_along_axis(slots, jnp.maximum(before, 0), axis=1) != slots)
    first = group * jnp.arange(is_own.shape[0], dtype=jnp.int32)[:, None]
    has_any = is_own.any(axis=1, keepdims=True)
    return Steps(
        action=jnp.where(is_own, jnp.where(is_new, NEW, SAME), OTHER).reshape(-1),
        slot=jnp.where(has_any, jnp.take_along_axis(slots, at, axis=1), -1).reshape(-1),
        rows=(first + at).reshape(-1),
    )


def blocks_matmul(x: Array, own: Array, slot: Array, packed: Packed, shape: Shape, *, interpret: bool) -> Array:
    """As `pallas_triton.blocks_matmul`."""
    blocks, shifts, block, _ = x.shape
    chunk, columns = shape.sizes.chunk, shape.sizes.columns
    group = group_size(blocks, block * columns * 4)
    steps, steps_tree = jax.tree.flatten(make_steps(own, slot, group))

    def window(size: tuple[int, ...], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        def index_map(g: Array, n: Array, t: Array, i: Array, *refs: Any) -> tuple[Any, ...]:
            return index(jax.tree.unflatten(steps_tree, refs), g * group + i, n, t)

        return pl.BlockSpec(size, index_map)

    def of_matrix(*size: int) -> pl.BlockSpec:
        def index(of: Steps, b: Array, n: Array, t: Array) -> tuple[Any, ...]:
            place, middle = of.slot[b], (0,) * (len(size) - 2)
            return tuple(jnp.where(place < 0, 0, value) for value in (place, t, *middle, n))

        return window((1, *size), index)

    def by_tile(values: Array) -> Array:
        """Bits of float16 numbers: TPUs have no vectors of them."""
        bits = jax.lax.bitcast_convert_type(values, jnp.int16)
        return bits.reshape(bits.shape[0], shape.steps, shape.groups, shape.width)

    given = {"x": x, "planes": packed.planes, "scale": by_tile(packed.scale)}
    specs: dict[str, Any] = {
        "x": window((1, shifts, block, chunk), lambda of, b, _n, t: (of.rows[b], 0, 0, t)),
        "planes": tuple(of_matrix(chunk * bits // shape.planes[0], columns) for bits in shape.planes),
        "scale": of_matrix(1, shape.groups, columns),
    }
    if packed.zero is not None:
        given["zero"], specs["zero"] = by_tile(packed.zero), specs["scale"]
    inputs, tree = jax.tree.flatten(given)
    last = shape.steps - 1
    # Results leave VMEM when their index changes: until the last tile it stays that of the group's first block.
    result = window(
        (1, block, columns), lambda _of, b, n, t: (jnp.where(t == last, b, jax.lax.div(b, group) * group), 0, n)
    )

    def kernel(*refs: Any) -> None:
        of = jax.tree.unflatten(steps_tree, refs[: len(steps)])
        refs = refs[len(steps) :]
        _step(of, jax.tree.unflatten(tree, refs[: len(inputs)]), *refs[len(inputs) :], shape=shape, group=group)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(steps),
            grid=(blocks // group, -(-shape.width // columns), shape.steps, group),
            in_specs=jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, pl.BlockSpec)),
            out_specs=result,
            scratch_shapes=[
                pltpu.VMEM((group, block, columns), jnp.float32),
                pltpu.VMEM((shifts, chunk, columns), x.dtype),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((blocks, block, shape.width), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="grouped_quantized",
    )(*steps, *inputs)


def _step(of: Steps, given: dict[str, Any], out: Any, sums: Any, kept: Any, *, shape: Shape, group: int) -> None:
    """One tile of one block."""
    t, i = pl.program_id(2), pl.program_id(3)
    action, x = of.action[pl.program_id(0) * group + i], given["x"]

    @pl.when(t == 0)
    def _start() -> None:
        sums[i] = jnp.zeros(sums.shape[1:], jnp.float32)

    @pl.when(action == NEW)
    def _unpack() -> None:
        planes = tuple(plane[0].astype(jnp.int32) for plane in given["planes"])
        scale, zero = _of_group(given["scale"], shape), None if "zero" not in given else _of_group(given["zero"], shape)
        for position in range(shape.shifts):
            codes = kernel_math.unpack(planes, position, shape)
            kept[position] = kernel_math.dequantize(codes, scale, zero, shape, kept.dtype)

    @pl.when(action != OTHER)
    def _multiply() -> None:
        for position in range(shape.shifts):
            sums[i] += dot(x[0, position], kept[position], x.dtype)

    @pl.when(t == shape.steps - 1)
    def _finish() -> None:
        out[0] = sums[i]


def _of_group(bits: Any, shape: Shape) -> Array:
    """Steps or zeros of a tile, by row."""
    return kernel_math.per_row(kernel_math.float16_value(bits[0, 0].astype(jnp.int32)), shape)
