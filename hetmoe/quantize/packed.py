"""Codes packed into bytes, as they lie in memory and on disk.

Codes of 1, 2, 4 and 8 bits make one plane; 3 bits are a plane of the two lower bits and one of the upper bit, so that
no bit is wasted. In a plane of b bits a byte holds the codes of 8 / b rows of one column and group. These rows are not
neighbours: the group's first `group * b / 8` rows are in the lowest bits, the next ones in the bits above, and so on,
so that unpacking is a shift and a mask of whole rows, without shuffling.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float16, UInt8

from hetmoe.quantize.grid import Grid, Quantized, dequantize

PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits of a code, lowest first


@struct.dataclass
class Packed:
    """Quantized weights `[K, N]` with leading axes of experts or layers."""

    planes: tuple[UInt8[Array, "*lead bytes N"], ...]  # of `PLANES[bits]` bits each: K * bits / 8 bytes of a column
    scale: Float16[Array, "*lead groups N"]
    zero: Float16[Array, "*lead groups N"] | None
    grid: Grid = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights, leading axes included."""
        *lead, groups, columns = self.scale.shape
        return (*lead, groups * self.grid.group, columns)


def pack(quantized: Quantized) -> Packed:
    """Packs codes."""
    grid, planes, shift = quantized.grid, list[Array](), 0
    for bits in PLANES[grid.bits]:
        part = (quantized.codes >> shift) & (2**bits - 1)
        planes.append(_pack_plane(part, bits, grid.group))
        shift += bits
    return Packed(planes=tuple(planes), scale=quantized.scale, zero=quantized.zero, grid=grid)


def unpack(packed: Packed) -> Quantized:
    """The codes again."""
    grid, codes, shift = packed.grid, jnp.uint8(0), 0
    for bits, plane in zip(PLANES[grid.bits], packed.planes, strict=True):
        codes = codes | (_unpack_plane(plane, bits, grid.group) << shift)
        shift += bits
    return Quantized(codes=jnp.asarray(codes), scale=packed.scale, zero=packed.zero, grid=grid)


def dequantize_packed(packed: Packed) -> Array:
    """The weights, float32 `[*lead, K, N]`."""
    return dequantize(unpack(packed))


def packed_bytes(rows: int, columns: int, grid: Grid) -> int:
    """Bytes of one packed matrix, steps and zeros included, that `Packed` takes in memory.

    Raises:
        InputError: if the group does not divide the rows.
    """
    groups = grid.groups_of(rows)
    return rows * columns * grid.bits // 8 + groups * columns * (2 if grid.symmetric else 4)


def _pack_plane(part: Array, bits: int, group: int) -> Array:
    *lead, rows, columns = part.shape
    per_byte = 8 // bits
    split = part.reshape(*lead, rows // group, per_byte, group // per_byte, columns)
    # The bits of a byte are disjoint: their sum is their union.
    return jnp.sum(split << _shifts(bits, split.ndim), axis=-3, dtype=jnp.uint8).reshape(
        *lead, rows // per_byte, columns
    )


def _unpack_plane(plane: Array, bits: int, group: int) -> Array:
    *lead, byte_rows, columns = plane.shape
    per_byte = 8 // bits
    held = group // per_byte  # rows of bytes in a group
    split = plane.reshape(*lead, byte_rows // held, 1, held, columns)
    return ((split >> _shifts(bits, split.ndim)) & (2**bits - 1)).reshape(*lead, byte_rows * per_byte, columns)


def _shifts(bits: int, rank: int) -> Array:
    """Where the codes of a byte begin, on the last axis but two of `rank`."""
    return jnp.arange(0, 8, bits, dtype=jnp.uint8).reshape((1,) * (rank - 3) + (-1, 1, 1))


def take_packed(packed: Packed, index: Array) -> Packed:
    """One of the matrices on the leading axis."""
    return jax.tree.map(lambda leaf: leaf[index], packed)
