"""Triton kernel for few rows: products with the codes themselves; steps and zeros meet the sums of a group.

Bits below a power of two are a bfloat16 number already: a shift and an instruction that takes some bits and sets others
make two of them from bytes as they lie in memory. The tensor cores sum a group's products with such numbers, and its
inputs. What the power and the zero added is taken off those sums, which the step then multiplies: two operations for
each sum of a group, where the other kernel has five for each weight (to float32, a difference, a product, to bfloat16,
and unpacking). No weight is rounded. Bytes are read in pairs, of columns side by side, since what the tensor cores read
is arranged in units of two bytes.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from hetmoe.ops.grouped_crossbar.block_sizes import WARPGROUP_ROWS
from hetmoe.ops.grouped_crossbar.kernel_math import dot
from hetmoe.ops.grouped_crossbar.pallas_triton import load, side_by_side
from hetmoe.ops.grouped_quantized.shape import Operand, Shape
from hetmoe.ops.triton_instructions import Field, bfloat16_codes, float32_pair, multiply_add
from hetmoe.quantize.packed import PLANES, Packed

LEAST_ROWS = 16  # of a group that meet the same bits of its bytes: what the tensor cores multiply at a time


class Number(NamedTuple):
    """What of a code is multiplied at a time: as bfloat16 below `2**power`, which has room for 7 bits."""

    power: int
    fields: tuple[Field, ...]  # one of each plane, `first` from the plane's first bit of the code


# Bits lie the higher, the smaller is the power that is added to them, and where some are already before they move.
NUMBERS = {
    1: (Number(1, (Field(first=0, bits=1, at=6),)),),
    2: (Number(3, (Field(first=0, bits=2, at=4),)),),
    3: (Number(3, (Field(first=0, bits=2, at=4), Field(first=0, bits=1, at=6))),),
    4: (Number(7, (Field(first=0, bits=4, at=0),)),),
    8: (Number(7, (Field(first=0, bits=4, at=0),)), Number(8, (Field(first=4, bits=4, at=3),))),
}


def serves(x: Array, packed: Packed) -> bool:
    """Whether these rows and matrices can be multiplied here."""
    held = packed.grid.group * PLANES[packed.grid.bits][0] // 8
    is_small = x.dtype == jnp.bfloat16 and x.shape[1] < WARPGROUP_ROWS
    return is_small and held >= LEAST_ROWS and packed.shape[-1] % 2 == 0


def blocks_matmul(x: Array, operands: tuple[Operand, ...], shape: Shape, *, interpret: bool) -> tuple[Array, ...]:
    """Rows `x[blocks, block, K]` times one matrix of each operand; float32 `[blocks, block, N]`."""
    blocks, block, _ = x.shape
    stripes, count = -(-shape.width // shape.sizes.columns), len(operands)
    of = [(o.own.astype(jnp.int32), o.slot.astype(jnp.int32), jax.tree.map(in_pairs, o.packed)) for o in operands]
    inputs, tree = jax.tree.flatten((x, of))

    def kernel(*refs: Any) -> None:
        x_ref, given = jax.tree.unflatten(tree, refs[: len(inputs)])
        b, number = side_by_side(blocks, count * stripes)
        place = b, jax.lax.rem(number, stripes)
        for which, out in enumerate(refs[len(inputs) :]):

            @pl.when(jax.lax.div(number, stripes) == which)
            def _own(which: int = which, out: Any = out) -> None:
                _program_instance(x_ref, given[which], out, shape, place, interpret)

    return tuple(
        pl.pallas_call(
            kernel,
            grid=(blocks * count * stripes,),
            out_shape=[jax.ShapeDtypeStruct((blocks, block, shape.width), jnp.float32) for _ in operands],
            compiler_params=plgpu.CompilerParams(num_warps=shape.sizes.warps, num_stages=shape.sizes.stages),
            interpret=interpret,
            name="grouped_quantized_codes",
        )(*inputs)
    )


def in_pairs(stored: Array) -> Array:
    """Values of neighbouring columns as one number of twice the size, the first in its lower half; no copy is made."""
    wide = {1: jnp.uint16, 2: jnp.uint32}[stored.dtype.itemsize]
    return jax.lax.bitcast_convert_type(stored.reshape(*stored.shape[:-1], -1, 2), wide)


def _program_instance(
    x: Any, operand: tuple[Any, Any, Packed], out: Any, shape: Shape, place: tuple[Array, Array], interpret: bool
) -> None:  # fmt: skip
    """One block of rows by some columns, at `place`."""
    (own, slot, pairs), (b, n), (block, columns) = operand, place, (x.shape[1], shape.sizes.columns)
    is_own, matrix = load(own, b) != 0, load(slot, b)

    def write(result: Array) -> None:
        at = n * columns + jax.lax.broadcasted_iota(jnp.int32, result.shape, 1)
        mask = None if shape.width % columns == 0 else at < shape.width
        plgpu.store(out.at[b, :, pl.ds(n * columns, columns)], result, mask=mask)

    def read(stored: Any, rows: Any, size: tuple[int, ...]) -> Array:
        """Pairs of this stripe, zeros behind the last one; `rows` may be an array of that size."""
        first = n * (columns // 2)
        lanes = first + jax.lax.broadcasted_iota(jnp.int32, size, len(size) - 1)
        is_array = not isinstance(rows, pl.Slice) and rows.ndim > 0
        at = stored.at[matrix, rows, lanes if is_array else pl.ds(first, columns // 2)]
        if shape.width % columns == 0:
            return plgpu.load(at)
        return plgpu.load(at, mask=lanes < shape.width // 2, other=0)

    def of_groups(chunk: Array) -> list[tuple[Array, Array | None]]:
        """Steps and zeros of a chunk's groups."""
        numbers = [chunk * shape.groups + g for g in range(shape.groups)]
        size = (columns // 2,)
        return [
            (
                read(pairs.scale, g, size),
                None if pairs.zero is None else read(pairs.zero, g, size),
            )
            for g in numbers
        ]

    def add(chunk: Array, carry: Any) -> Any:
        products, here = carry
        following = of_groups(jnp.minimum(chunk + 1, shape.steps - 1))  # a load takes longer than a group
        for g, (scale, zero) in enumerate(here):
            *sums, back = _sums(x, pairs, shape, b, chunk * shape.groups + g, read, interpret)
            products = _add_group(products, sums, back, scale, zero, shape, interpret)
        return products, following

    @pl.when(is_own)
    def _multiply() -> None:
        nothing = jnp.zeros((block, columns // 2), jnp.float32)
        start = ((nothing, nothing), of_groups(jnp.int32(0)))
        even, odd = jax.lax.fori_loop(0, shape.steps, add, start)[0]
        write(jnp.stack([even, odd], axis=2).reshape(block, columns))

    @pl.when(jnp.logical_not(is_own))
    def _nothing() -> None:
        write(jnp.zeros((block, columns), jnp.float32))


def _sums(
    x: Any, pairs: Packed, shape: Shape, b: Array, group: Array, read: Callable[..., Array], interpret: bool
) -> list[Array]:
    """A group's inputs times codes and what is above them, for even and odd columns, and their sum, times -1."""
    held, columns = shape.per_group, shape.sizes.columns // 2
    row, words = jax.lax.broadcasted_iota(jnp.int32, (held, columns), 0), list[Array]()
    for plane, bits in zip(pairs.planes, shape.planes, strict=True):
        own = held * bits // shape.planes[0]  # bytes of a group of this plane
        if own == held:
            words.append(read(plane, pl.ds(group * own, own), (held, columns)))
        else:  # half as many: their even positions are for the first half of the rows, the odd ones for the second
            found = read(plane, group * own + jax.lax.rem(row, own), (held, columns))
            words.append(jnp.where(row < own, found, found >> bits))

    sums = [jnp.zeros((x.shape[1], columns), jnp.float32)] * 3
    minus_ones = jnp.full((held, columns), -1, x.dtype)
    for position in range(shape.shifts):
        inputs = load(x, b, slice(None), pl.ds(group * shape.grid.group + position * held, held))
        for half, number in itertools.product(range(2), NUMBERS[shape.grid.bits]):
            first = 8 * half + shape.planes[0] * position
            fields = [dataclasses.replace(field, first=field.first + first) for field in number.fields]
            codes = bfloat16_codes(words, fields, number.power, interpret=interpret)
            sums[half] += dot(inputs, codes, inputs.dtype)
        sums[2] += dot(inputs, minus_ones, inputs.dtype)
    return sums


def _add_group(
    products: tuple[Array, ...], sums: list[Array], back: Array, scale: Array, zero: Array | None, shape: Shape,
    interpret: bool,
) -> tuple[Array, ...]:  # fmt: skip
    """Adds `step * (sum over codes - zero * sum of inputs)`; `back` is that sum of inputs, negative."""
    above = sum(2.0**number.power for number in NUMBERS[shape.grid.bits])
    steps, zeros = float32_pair(scale, interpret=interpret), (jnp.full((1,), shape.grid.largest / 2),) * 2
    if zero is not None:
        zeros = float32_pair(zero, interpret=interpret)
    found = list[Array]()
    for step, middle, part, y in zip(steps, zeros, sums, products, strict=True):
        rest = multiply_add((middle + above)[None, :], back, part, interpret=interpret)
        found.append(multiply_add(step[None, :], rest, y, interpret=interpret))
    return tuple(found)
