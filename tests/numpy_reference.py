"""Crossbar matrix multiplication in plain numpy: the independent reference that tests compare against.

It shares no code with the package. Every elementwise step (range, step, quotient, rounding, bound, clip, sum over
tiles) is one IEEE float32 operation in the order that the arithmetic states. The sum inside a tile is taken in
float64 and rounded once to float32, so it depends neither on the BLAS nor on the number of threads; a float32
matmul differs from it by its own accumulation error only. Such a difference can move an ADC code where the sum lies
next to a rounding boundary: `boundary_distance` says how near each output element comes to one.
"""

import dataclasses
import itertools
from typing import Literal

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
BoundAxis = Literal["tile", "column"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What happens in one row-block; `...` are the leading axes of x.

    Attributes:
        dac_codes: `[..., rows]` integer DAC codes as float32, or the raw inputs if the DAC is off.
        dac_step: `[..., 1]` or `[]`: input units per DAC code (1 if the DAC is off).
        sums: `[..., N]` sums before the ADC.
        adc_bound: Broadcasts to `[..., N]`; None if the ADC is off.
        adc_step: Output units per ADC code; None if the ADC is off.
        adc_position: `[..., N]` sums in units of the ADC step, before rounding; None if the ADC is off.
        output: `[..., N]` what the tile adds to the digital sum.
    """

    dac_codes: Float32
    dac_step: Float32
    sums: Float32
    adc_bound: Float32 | None
    adc_step: Float32 | None
    adc_position: Float32 | None
    output: Float32


def row_blocks(size: int, tile_rows: int) -> list[slice]:
    """Balanced row-blocks of at most `tile_rows` rows, the larger ones first."""
    count = -(-size // tile_rows)
    small, larger = divmod(size, count)
    edges = np.cumsum([0] + [small + 1] * larger + [small] * (count - larger))
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def crossbar_tiles(
    x: Float32,
    w: Float32,
    *,
    input_range: Float32 | None,
    dac_bits: int | None,
    adc_bits: int | None,
    adc_bound: float,
    bound_axis: BoundAxis,
    tile_rows: int,
) -> list[Tile]:
    """Every tile's intermediate values; arguments as in `crossbar_matmul`."""
    if x.dtype != np.float32 or w.dtype != np.float32:
        raise TypeError(f"x and w must be float32, got {x.dtype} and {w.dtype}")
    if bound_axis not in ("tile", "column"):
        raise ValueError(f"bound_axis must be 'tile' or 'column', got {bound_axis!r}")
    blocks = row_blocks(w.shape[0], tile_rows)
    if input_range is not None and input_range.shape != (len(blocks),):
        raise ValueError(f"input_range needs shape {(len(blocks),)}, got {input_range.shape}")

    tiles = []
    for index, block in enumerate(blocks):
        inputs, weights = x[..., block], w[block]
        if input_range is None:
            limit = np.max(np.abs(inputs), axis=-1, keepdims=True)
        else:
            limit = np.asarray(input_range[index], np.float32)

        if dac_bits is None:
            codes, dac_step, quantised = inputs, np.float32(1), inputs
        else:
            dac_step = np.float32(2) * limit / np.float32(2**dac_bits - 2)
            codes = np.rint(np.clip(inputs, -limit, limit) / _divisor(dac_step))
            quantised = codes * dac_step
        sums = (quantised.astype(np.float64) @ weights.astype(np.float64)).astype(np.float32)

        if adc_bits is None:
            bound, adc_step, position, output = None, None, None, sums
        else:
            largest = np.max(np.abs(weights), axis=0 if bound_axis == "column" else None)
            bound = limit * np.float32(adc_bound) * largest
            adc_step = np.float32(2) * bound / np.float32(2**adc_bits - 2)
            position = sums / _divisor(adc_step)
            output = np.clip(np.rint(position) * adc_step, -bound, bound)
        tiles.append(
            Tile(
                dac_codes=codes,
                dac_step=np.asarray(dac_step),
                sums=sums,
                adc_bound=None if bound is None else np.asarray(bound),
                adc_step=None if adc_step is None else np.asarray(adc_step),
                adc_position=position,
                output=output,
            )
        )
    return tiles


def crossbar_matmul(
    x: Float32,
    w: Float32,
    *,
    input_range: Float32 | None = None,
    dac_bits: int | None = 8,
    adc_bits: int | None = 8,
    adc_bound: float = 12.0,
    bound_axis: BoundAxis = "tile",
    tile_rows: int = 512,
) -> Float32:
    """`x @ w` through DACs, tiles and ADCs.

    Args:
        x: `[..., K]` float32.
        w: `[K, N]` float32, the programmed weights.
        input_range: `[row-blocks]` static ranges, or None: the largest magnitude per token and row-block.
        dac_bits: None switches the DAC off, and its clipping with it.
        adc_bits: None switches the ADC off, and its clipping with it.
        adc_bound: lambda; a tile's bound is `range * lambda * max|w|`.
        bound_axis: The maximum is over the whole tile, or over each of its columns.
        tile_rows: Rows of a tile; K is cut into balanced blocks of at most so many.

    Returns:
        `[..., N]` float32, the tiles summed one after the other.
    """
    tiles = crossbar_tiles(
        x,
        w,
        input_range=input_range,
        dac_bits=dac_bits,
        adc_bits=adc_bits,
        adc_bound=adc_bound,
        bound_axis=bound_axis,
        tile_rows=tile_rows,
    )
    total = tiles[0].output
    for tile in tiles[1:]:
        total = total + tile.output
    return total


def boundary_distance(tiles: list[Tile]) -> Float32:
    """`[..., N]`: least distance over the tiles from a sum to an ADC rounding boundary, in codes (0 is a tie).

    Elements at or beyond the bound count as far away: there the next code is clipped to the same output.
    """
    distances = []
    for tile in tiles:
        if tile.adc_position is None or tile.adc_step is None or tile.adc_bound is None:
            raise ValueError("without an ADC there are no boundaries")
        fraction = np.abs(tile.adc_position - np.floor(tile.adc_position) - np.float32(0.5))
        full_scale = np.rint(tile.adc_bound / _divisor(tile.adc_step))
        distances.append(np.where(np.abs(tile.adc_position) >= full_scale, np.float32(0.5), fraction))
    return np.min(np.stack(np.broadcast_arrays(*distances)), axis=0)


def largest_adc_step(tiles: list[Tile]) -> Float32:
    """Largest ADC step over the tiles, broadcastable to the output: what one moved code can change."""
    steps = [tile.adc_step for tile in tiles if tile.adc_step is not None]
    return np.max(np.stack(np.broadcast_arrays(*steps)), axis=0)


def _divisor(step: Float32) -> Float32:
    """The step, with 1 in place of 0, where the numerator is 0 as well."""
    return np.where(step > 0, step, np.float32(1))
