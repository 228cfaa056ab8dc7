"""Block sizes of the kernels for packed weights, by platform; none of them is measured, they follow from sizes.

On GPU a chunk is as large as keeps a few KiB of weights on their way for each program, and at least the 16 rows that
the tensor cores want at a time. On TPU a tile is unpacked into VMEM once for all blocks of its expert; its bytes are
the 128 lanes of the inputs, or several of them.
"""

from hetmoe.ops.grouped_crossbar.block_sizes import BlockSizes, Platform
from hetmoe.ops.grouped_crossbar.packing import round_up
from hetmoe.quantize.grid import Grid
from hetmoe.quantize.packed import PLANES

CUDA_CHUNK = {1: 16, 2: 32, 3: 32, 4: 32, 8: 64}  # bytes, by bits; for 3 bits at least a whole group's 32
CODES_PROGRAMS = 512  # about four for each multiprocessor of an H100 or H200
TILE_WEIGHTS = 2**20  # unpacked by one step on TPU: 4 MiB in float32


def choose(platform: Platform, *, grid: Grid, rows: int, columns: int, block: int) -> BlockSizes:
    """Sizes for blocks of `block` rows and packed matrices `[rows, columns]`; `chunk` counts bytes of a column.

    Raises:
        NotImplementedError: for matrices that a TPU cannot hold a tile of.
    """
    if platform == "tpu":
        return _tpu(grid, rows, columns)
    widest = 128 if block >= 64 else 64
    stripe = next((size for size in (16, 32, 64, 128) if size >= min(columns, widest)), widest)
    warps = 8 if block * stripe >= 128 * 64 else 4
    return BlockSizes(columns=stripe, chunk=CUDA_CHUNK[grid.bits], warps=warps, stages=3)


def choose_for_codes(grid: Grid, rows: int, columns: int, programs: int) -> BlockSizes:
    """Sizes of the GPU's products with codes, of `programs` blocks and matrices.

    The more columns a program makes, the fewer of its instructions are for anything but codes, down to half of them;
    but there should be as many programs as multiprocessors hold, four each.
    """
    planes = PLANES[grid.bits]
    busy = (size for size in (256, 128) if columns % size == 0 and programs * (columns // size) >= CODES_PROGRAMS)
    stripe = next(busy, next((size for size in (32, 64) if size >= columns), 64))
    most = 64 * 256 // stripe // len(planes)  # rows of weights at a time, as registers allow
    held, count = grid.group * planes[0] // 8, grid.groups_of(rows)
    groups = next((number for number in (4, 2) if number * grid.group <= most and count % number == 0), 1)
    return BlockSizes(columns=stripe, chunk=groups * held, warps=4, stages=3 if grid.bits == 8 else 4)


def _tpu(grid: Grid, rows: int, columns: int) -> BlockSizes:
    shifts = 8 // PLANES[grid.bits][0]
    length, most = rows // shifts, 1024 // shifts
    chunk = next((size for size in range(most, 0, -128) if length % size == 0), length)
    aligned = round_up(columns, 128)
    fitting = (c for c in (512, 256, 128) if aligned % c == 0 and chunk * shifts * c <= TILE_WEIGHTS)
    if (stripe := next(fitting, None)) is None:
        raise NotImplementedError(
            f"packed matrices of {rows} rows cannot be cut for the memory of a TPU core: at {grid.bits} bits a "
            f"multiple of {128 * shifts} rows can, and so can up to {TILE_WEIGHTS // 128}; use implementation='xla'"
        )
    return BlockSizes(columns=stripe, chunk=chunk)
