"""Block sizes of the kernels, by platform and by how many rows a block holds.

None of them is measured: the kernels have been lowered for these platforms, never compiled or run there
(`experiments/bench_kernels.py --sweep-blocks` will measure them). They follow from sizes.
On GPU a program holds the sums of a tile and the total in registers, 128 KiB for one matrix of 128 x 128 and as much
for two of 128 x 64, half of what a multiprocessor of Hopper has; chunks of 64 two-byte rows in three stages fill 96 KiB
of its shared memory. On TPU a tile of weights of 512 x 512 and its successor are 1 MiB of VMEM.
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
    """

    columns: int
    chunk: int
    warps: int = 0
    stages: int = 0


# On TPU as many blocks share what is fetched as divide their number (`pallas_tpu.group_size`): it must not be a prime.
BLOCKS_MULTIPLE = 16
ROWS = (16, 32, 64, 128)  # of a block; both platforms want powers of two, and at least 16 two-byte rows


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
    platform: Platform, *, rows: int, tile: int, columns: int, matrices: int, item_bytes: int, is_drawn: bool
) -> BlockSizes:
    """Sizes for blocks of `rows` rows and matrices with `columns` columns of `item_bytes` bytes a weight.

    `tile` is how many rows the largest tile has; `is_drawn` says whether weights are programmed in the kernel.

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
    widest = max(16, 128 // matrices)
    fitting = next((c for c in (16, 32, 64, 128) if c >= min(columns, widest)), widest)
    chunk = DRAWN_CHUNK if is_drawn else 128 // item_bytes
    return BlockSizes(columns=fitting, chunk=chunk, warps=8 if rows * fitting >= 128 * 64 else 4, stages=3)


def for_gradients(sizes: BlockSizes) -> BlockSizes:
    """Sizes of the GPU's gradient kernels for those of its forward kernel.

    They load float32 gradients and bytes of which passed an ADC: for blocks of 128 rows, half the columns in two stages
    take up to 112 KiB of shared memory; all columns in three would take 288 KiB, more than there are.
    """
    return dataclasses.replace(sizes, columns=max(16, sizes.columns // 2), stages=2)
