"""What of the kernels for packed weights is static.

The kernels go through a matrix by the bytes of its first plane. A byte at row `q` of that plane holds `shifts` codes of
one group, `per_group` rows apart, so that the codes at one position of the bytes `q, q + 1, ...` meet inputs that lie
side by side once the rows are arranged by position (`arrange_rows`).
"""

import dataclasses

from einops import rearrange
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hetmoe.ops.grouped_crossbar.block_sizes import BlockSizes, Platform
from hetmoe.ops.grouped_crossbar.packing import pad_axis
from hetmoe.quantize.grid import Grid
from hetmoe.quantize.packed import PLANES, Packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """What a change of recompiles.

    Attributes:
        interpret: runs the kernel of that platform operation by operation, anywhere.
        sizes: of the kernel's blocks; None = `block_sizes.choose`.
    """

    interpret: Platform | None
    sizes: BlockSizes | None = None


@struct.dataclass
class Operand:
    """Matrices of one precision, and which of them blocks of rows meet."""

    own: Bool[Array, "blocks"]  # False for blocks that need not be multiplied, whose results are zero
    slot: Int[Array, "blocks"]  # which matrix each of the other blocks meets; blocks of one matrix follow each other
    packed: Packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What a change of makes another kernel; `sizes.chunk` counts bytes of a column of the first plane."""

    grid: Grid
    rows: int  # K
    width: int  # N
    sizes: BlockSizes

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of the planes."""
        return PLANES[self.grid.bits]

    @property
    def shifts(self) -> int:
        """Codes in a byte of the first plane."""
        return 8 // self.planes[0]

    @property
    def bytes(self) -> int:
        """Of a column of the first plane."""
        return self.rows // self.shifts

    @property
    def per_group(self) -> int:
        """Bytes of a group of a column of the first plane."""
        return self.grid.group // self.shifts

    @property
    def steps(self) -> int:
        """Chunks of a column; the last one may have less in it."""
        return -(-self.bytes // self.sizes.chunk)

    @property
    def groups(self) -> int:
        """Groups in a chunk; 1 also for a part of one."""
        return max(1, self.sizes.chunk // self.per_group)


def arrange_rows(x: Float[Array, "blocks block K"], shape: Shape) -> Float[Array, "blocks shifts block bytes"]:
    """Inputs by the position of their code in a byte, and by byte; zeros up to whole chunks."""
    arranged = rearrange(
        x, "blocks block (groups shifts bytes) -> blocks shifts block (groups bytes)",
        shifts=shape.shifts, bytes=shape.per_group,
    )  # fmt: skip
    return pad_axis(arranged, shape.steps * shape.sizes.chunk, 3)
