"""Public entry: validation and dispatch by name."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hetmoe.analog.random import require_key
from hetmoe.analog.read_noise import ReadDraw, ReadNoise
from hetmoe.analog.tiles import block_max, row_blocks
from hetmoe.errors import InputError
from hetmoe.ops.crossbar_matmul import xla
from hetmoe.ops.crossbar_matmul.base import CrossbarOptions
from hetmoe.ops.grouped_crossbar.api import check_implementation, programmed_product, refuse_read


def crossbar_matmul(
    x: Float[Array, "*batch K"],
    w: Float[Array, "K N"],
    *,
    input_range: Float[Array, "blocks"] | None = None,
    dac_bits: int | None = 8,
    adc_bits: int | None = 8,
    adc_bound: Float[Array, ""] | float = 12.0,
    bound_axis: str = "tile",
    tile_rows: int = 512,
    weight_max: Float[Array, "blocks columns"] | None = None,
    read_noise: ReadNoise | None = None,
    read_key: jax.Array | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch N"]:
    """Multiplies by a matrix programmed on crossbar tiles, through their converters.

    The input dimension is cut into `ceil(K / tile_rows)` balanced row-blocks. Each tile converts its inputs (DAC: clip
    to the range r, round to `2 r / (2**bits - 2)`), multiplies, converts its outputs (ADC: bound `r * adc_bound *
    max|w|`), and the tiles' outputs are summed in float32. With both converters None it is the plain matmul.

    Args:
        x: inputs, floating point.
        w: programmed weights (noise included), floating point.
        input_range: DAC range of every row-block, in the unit of `x`; None = `max|x|` per vector and row-block.
        dac_bits: DAC resolution, 2 to 16; None = ideal, unclipped.
        adc_bits: ADC resolution, 2 to 16; None = ideal, unclipped.
        adc_bound: lambda, dimensionless.
        bound_axis: `"tile"` or `"column"`: the group whose weight maximum scales the ADC bound.
        tile_rows: rows of a tile.
        weight_max: `max|w|` per tile `[blocks, 1]` or column `[blocks, N]`, if already known; it saves a pass over `w`.
        read_noise: noise of each product, added before the ADC; needs `read_key`.
        read_key: key of that noise; the draw of an input vector depends on its position in `x` flattened.
        implementation: `"xla"`, `"pallas"` (TPU and NVIDIA GPU, no read noise), `"interpret_tpu"` or
            `"interpret_cuda"` (their kernels, operation by operation and slowly, anywhere), or None for `"xla"`.

    Returns:
        float32 outputs.

    Raises:
        InputError: for shapes, bits or a bound that do not fit, or noise without a key, or a key without noise.
        NotImplementedError: if the named implementation cannot run this; it never falls back.
    """
    options = CrossbarOptions(dac_bits=dac_bits, adc_bits=adc_bits, bound_axis=bound_axis, tile_rows=tile_rows)  # pyright: ignore[reportArgumentType]
    chosen = check_implementation(implementation)
    x, w = jnp.asarray(x), jnp.asarray(w)
    input_range = None if input_range is None else jnp.asarray(input_range)
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise InputError(f"x{list(x.shape)} @ w{list(w.shape)}: the last axis of x must equal the first of w[K, N]")
    if w.shape[1] < 1:
        raise InputError(f"w{list(w.shape)} has no columns")
    for name, array in (("x", x), ("w", w)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"{name} has dtype {array.dtype}: give floating-point values")
    blocks = len(row_blocks(w.shape[0], tile_rows))
    if input_range is not None and input_range.shape != (blocks,):
        raise InputError(f"input_range has shape {list(input_range.shape)}: one range per row-block is [{blocks}]")
    columns = w.shape[1] if bound_axis == "column" else 1
    if weight_max is not None and weight_max.shape != (blocks, columns):
        raise InputError(f"weight_max has shape {list(weight_max.shape)}: expected [{blocks}, {columns}]")
    if isinstance(adc_bound, int | float) and not 0 < adc_bound < float("inf"):
        raise InputError(f"adc_bound={adc_bound!r} must be positive and finite")
    if (read_noise is None) != (read_key is None):
        raise InputError("read_noise and read_key go together: give both or neither")

    if weight_max is None:
        weight_max = block_max(w, tile_rows, per_column=bound_axis == "column")
    batch = x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1])
    read = None
    if read_noise is not None and read_key is not None:
        read = ReadDraw(read_noise, require_key(read_key), jnp.arange(flat.shape[0], dtype=jnp.uint32))
    bound, largest = jnp.asarray(adc_bound, jnp.float32), weight_max.astype(jnp.float32)
    ranges = None if input_range is None else input_range.astype(jnp.float32)
    if chosen == "xla":
        y = xla.crossbar_matmul(flat, w, ranges, bound, largest, options, None, read)
    else:
        refuse_read((read,), chosen)
        y = programmed_product(flat, w, ranges, bound, largest, options, chosen)
    return y.reshape(*batch, w.shape[1])
