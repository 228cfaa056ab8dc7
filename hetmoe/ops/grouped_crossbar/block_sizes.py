"""Block sizes of the kernels, by platform and by how many rows a block holds.

On GPU a program of eight warps has 128 x 256 numbers in registers, half of what a multiprocessor of Hopper holds: the
sums of a tile and the totals of 128 columns of one matrix or, without converters, sums alone of 256 columns of one or
two matrices. The fewer columns, the more often are the same inputs read, from shared memory by the tensor cores: on
Hopper they, and what is on its way there, would take 1.2 times as long as the products for 128 columns, and 1.5 times
for 64. Chunks of 64 two-byte rows in four stages fill 128 to 192 KiB of 227. Two matrices in one loop would make the
compiler wait for every product where a tile ends: they have programs of their own.
On TPU a tile of weights of 512 x 512 and its successor are 1 MiB of VMEM.
"""

import dataclasses
from typing import Literal

Platform = Literal["tpu", "cuda"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """How a kernel cuts its work.

    Attributes:
        columns: of outputs made at a time.
        chunk: rows of weights multiplied at a time; a tile is padded to a multiple of it.
        warps: of a GPU program.
        stages: of the GPU's software pipeline.
        apart: whether matrices that share their inputs have GPU programs of their own.
    """

    columns: int
    chunk: int
    warps: int = 0
    stages: int = 0
    apart: bool = False


# On TPU as many blocks share what is fetched as divide their number (`pallas_tpu.group_size`): it must not be a prime.
BLOCKS_MULTIPLE = 16
ROWS = (16, 32, 64, 128)  # of a block; both platforms want powers of two, and at least 16 two-byte rows
WARPGROUP_ROWS = 64  # from these on a GPU program multiplies by four warps at a time


def rows_per_block(rows: int, groups: int) -> int:
    """Rows of a block for `rows` rows in `groups` groups, each padded to whole blocks: about half the mean load."""
    return next((size for size in ROWS if size * 2 * groups >= rows), ROWS[-1])


# Of a step's tile of one matrix on TPU. Two matrices, clean and programmed, each with its successor, are eight of them:
# 16 MiB of the 48 that a kernel may take (`pallas_tpu.VMEM_BYTES`). Drawing noise needs several in float32 beside them.
TILE_BYTES = 2 * 2**20


# Rows of weights at a time where a GPU program draws their noise: what it computes for each weight is written out for
# all of a thread's weights, in registers. Of chunks of 64 rows ptxas spilled kilobytes a thread, and took minutes.
DRAWN_CHUNK = 16


def choose(
    platform: Platform, *, rows: int, tile: int, columns: int, matrices: int, item_bytes: int, is_drawn: bool,
    has_chip: bool,
) -> BlockSizes:  # fmt: skip
    """Sizes for blocks of `rows` rows and matrices with `columns` columns of `item_bytes` bytes a weight.

    `tile` is how many rows the largest tile has; `is_drawn` says whether weights are programmed in the kernel, and
    `has_chip` whether any block may be analog.

    Raises:
        NotImplementedError: for tiles that a TPU cannot hold.
    """
    if platform == "tpu":
        aligned = -(-columns // 128) * 128
        fitting = (c for c in (512, 256, 128) if aligned % c == 0 and tile * c * item_bytes <= TILE_BYTES)
        if (width := next(fitting, None)) is None:
            raise NotImplementedError(
                f"tiles of {tile} rows are too large for the memory of a TPU core: use tile_rows of at most "
                f"{TILE_BYTES // (128 * item_bytes)}, or implementation='xla'"
            )
        return BlockSizes(columns=width, chunk=128)
    apart = has_chip and not is_drawn and matrices > 1 and rows >= WARPGROUP_ROWS
    is_large = rows == ROWS[-1] and item_bytes == 2 and not is_drawn
    widest = max(16, 128 // (1 if apart else matrices))
    if is_large and not has_chip and columns % (2 * widest) == 0:
        widest *= 2
    fitting = next((c for c in (16, 32, 64, 128, 256) if c >= min(columns, widest)), widest)
    # Of two programs of four warps on a multiprocessor one may convert while the other multiplies.
    warps = 4 if has_chip and rows < ROWS[-1] else _warps(rows, fitting)
    chunk = DRAWN_CHUNK if is_drawn else 128 // item_bytes
    return BlockSizes(columns=fitting, chunk=chunk, warps=warps, stages=4 if is_large else 3, apart=apart)


def _warps(rows: int, columns: int) -> int:
    return 8 if rows * columns >= 128 * 64 else 4


def for_gradients(sizes: BlockSizes, rows: int, matrices: int) -> BlockSizes:
    """Sizes of the GPU's gradient kernels for those of its forward kernel and its blocks of `rows` rows.

    They load float32 gradients and bytes of which passed an ADC: for blocks of 128 rows, half the columns in two stages
    take up to 112 KiB of shared memory; all columns in three would take 288 KiB, more than there are.
    """
    together = min(sizes.columns, max(16, 128 // matrices))
    warps = _warps(rows, together)
    return dataclasses.replace(sizes, columns=max(16, together // 2), warps=warps, stages=2, apart=False)
