"""Triton kernel for NVIDIA GPUs: blocks of rows times packed weights, unpacked in registers.

A program makes one block of rows by some columns. It goes through the bytes of the weights in chunks, each read once,
and multiplies the codes at every position of the bytes by the inputs that they meet. Blocks whose matrix is not among
these read nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from hetmoe.ops.grouped_crossbar.kernel_math import dot
from hetmoe.ops.grouped_crossbar.pallas_triton import load, side_by_side
from hetmoe.ops.grouped_quantized import kernel_math
from hetmoe.ops.grouped_quantized.shape import Shape
from hetmoe.quantize.packed import Packed


def blocks_matmul(x: Array, own: Array, slot: Array, packed: Packed, shape: Shape, *, interpret: bool) -> Array:
    """Arranged rows `x[blocks, shifts, block, bytes]` times one of `packed` each; float32 `[blocks, block, N]`.

    `own` (int32) is 0 for blocks whose result is zero, `slot` the matrix of the others. `interpret` runs the kernel's
    operations one by one on any device.
    """
    blocks, shifts, block, length = x.shape
    stripes = -(-shape.width // shape.sizes.columns)
    # By block and position in one axis: the interpreter takes no static number for an index.
    inputs, tree = jax.tree.flatten((x.reshape(blocks * shifts, block, length), own, slot, packed))

    def kernel(*refs: Any) -> None:
        x_ref, own_ref, slot_ref, packed_ref = jax.tree.unflatten(tree, refs[: len(inputs)])
        place = side_by_side(blocks, stripes)
        _program_instance(x_ref, own_ref, slot_ref, packed_ref, refs[len(inputs)], shape, place)

    return pl.pallas_call(
        kernel,
        grid=(blocks * stripes,),
        out_shape=jax.ShapeDtypeStruct((blocks, block, shape.width), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=shape.sizes.warps, num_stages=shape.sizes.stages),
        interpret=interpret,
        name="grouped_quantized",
    )(*inputs)


def _program_instance(
    x: Any, own: Any, slot: Any, packed: Packed, out: Any, shape: Shape, place: tuple[Array, Array]
) -> None:
    """One block of rows by some columns, at `place`."""
    b, n = place
    columns, size = pl.ds(n * shape.sizes.columns, shape.sizes.columns), (x.shape[1], shape.sizes.columns)
    is_own = load(own, b) != 0

    def write(result: Array) -> None:
        plgpu.store(out.at[b, :, columns], result, mask=_inside(None, columns, size, shape))

    @pl.when(is_own)
    def _multiply() -> None:
        matrix, start = load(slot, b), jnp.zeros(size, jnp.float32)
        write(
            jax.lax.fori_loop(0, shape.steps, lambda c, y: y + _chunk(x, packed, shape, b, matrix, c, columns), start)
        )

    @pl.when(jnp.logical_not(is_own))
    def _nothing() -> None:
        write(jnp.zeros(size, jnp.float32))


def _chunk(x: Any, packed: Packed, shape: Shape, b: Array, matrix: Array, c: Array, columns: Any) -> Array:
    """What one chunk of the bytes adds to a block's products."""
    chunk = shape.sizes.chunk
    planes = tuple(
        _part(plane, matrix, c * (chunk * bits // shape.planes[0]), chunk * bits // shape.planes[0], columns, shape)
        .astype(jnp.int32)
        for plane, bits in zip(packed.planes, shape.planes, strict=True)
    )  # fmt: skip

    def of_group(values: Any) -> Array:
        first = jax.lax.div(c * chunk, shape.per_group)
        return kernel_math.per_row(
            _part(values, matrix, first, shape.groups, columns, shape).astype(jnp.float32), shape
        )

    scale = of_group(packed.scale)
    zero = None if packed.zero is None else of_group(packed.zero)
    total = jnp.zeros((x.shape[1], shape.sizes.columns), jnp.float32)
    for position in range(shape.shifts):
        inputs = load(x, b * shape.shifts + position, slice(None), pl.ds(c * chunk, chunk))
        codes = kernel_math.unpack(planes, position, shape)
        total += dot(inputs, kernel_math.dequantize(codes, scale, zero, shape, inputs.dtype), inputs.dtype)
    return total


def _part(stored: Any, matrix: Array, first: Array, count: int, columns: Any, shape: Shape) -> Array:
    """Some rows of one stored matrix, zeros behind its last row and column."""
    rows = pl.ds(first, count)
    mask = _inside((rows, stored.shape[1]), columns, (count, shape.sizes.columns), shape)
    return plgpu.load(stored.at[matrix, rows, columns], mask=mask, other=None if mask is None else 0)


def _inside(rows: tuple[Any, int] | None, columns: Any, size: tuple[int, int], shape: Shape) -> Array | None:
    """Which entries of a part exist; None if all of every part do. `rows` are the part's, and how many there are."""
    masks: list[Array] = []
    if shape.width % shape.sizes.columns:
        masks.append(columns.start + jax.lax.broadcasted_iota(jnp.int32, size, 1) < shape.width)
    if rows is not None and shape.bytes % shape.sizes.chunk:
        masks.append(rows[0].start + jax.lax.broadcasted_iota(jnp.int32, size, 0) < rows[1])
    return None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]
