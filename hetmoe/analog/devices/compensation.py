"""Global drift compensation: one factor per tile undoes the average drift."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from hetmoe.analog.tiles import row_blocks, spread_rows
from hetmoe.ops.pairwise_sum import pairwise_sum
from hetmoe.parallel.shard import WHOLE, Shard


def global_drift_compensation(
    programmed: Float[Array, "*batch K N"], drifted: Float[Array, "*batch K N"], tile_rows: int, shard: Shard = WHOLE
) -> Float[Array, "*batch K N"]:
    """Multiplies every tile of `drifted` by `mean|programmed| / mean|drifted|` over that tile.

    A tile is a row-block times all columns. A tile that reads zero everywhere keeps the factor 1.

    aihwkit (`inference/compensation/drift.py`) drives each input of a tile in turn (one-hot vectors), takes the mean
    magnitude of all outputs right after programming and again at inference, floors both at 1e-4, and multiplies the
    tile's digital output by their ratio. The outputs of one-hot inputs are the weights, so the ratio is the one here
    but for the converters and read noise of that measurement, and the floor.

    Folding the factor into the weights equals scaling the output behind the ADC as long as the ADC's bound follows the
    weights it converts (`bound = range * lambda * max|W|`): sums and bound then grow alike and the codes stay the same.
    With a bound fixed in advance the two differ.

    Args:
        programmed: weights right after programming (`Programmed.initial`).
        drifted: weights at inference (`Programmed.at_time`).
        tile_rows: most rows of a tile.
        shard: which columns of the matrix these are.
    """
    factor = compensation_factor(programmed, drifted, tile_rows, shard)
    return drifted * spread_rows(factor, drifted.shape[-2], tile_rows, axis=-2)


def compensation_factor(
    programmed: Float[Array, "*batch K N"], drifted: Float[Array, "*batch K N"], tile_rows: int, shard: Shard = WHOLE
) -> Float[Array, "*batch blocks 1"]:
    """What `global_drift_compensation` multiplies every tile by."""
    before, after = (_mean_magnitude(w, tile_rows, shard) for w in (programmed, drifted))
    return jnp.where(after > 0, before / jnp.where(after > 0, after, 1.0), 1.0)


def _mean_magnitude(w: Float[Array, "*batch K N"], tile_rows: int, shard: Shard) -> Float[Array, "*batch blocks 1"]:
    parts = [
        pairwise_sum(jnp.abs(w[..., start : start + size, :]), -2) / size
        for start, size in row_blocks(w.shape[-2], tile_rows)
    ]
    columns = shard.gather_columns(jnp.concatenate(parts, axis=-2))
    return pairwise_sum(columns, -1) / columns.shape[-1]
