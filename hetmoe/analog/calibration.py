"""Static DAC input ranges from the inputs that really reach each matrix.

The range of a row-block is `K * EMA(std)` of its inputs over calibration batches (arXiv 2603.02633; the range
initialisation of aihwkit-lightning), or a quantile, or the maximum, of their magnitude. An expert's statistics are
those of the tokens routed to it.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from hetmoe.analog.tiles import row_blocks
from hetmoe.errors import InputError

METHODS = ("ema_std", "quantile", "max")

# Magnitudes are counted in bins of 1/16 octave from 2**-24 to 2**16: a quantile is known to 4.4 %.
BINS_PER_OCTAVE, LOWEST_OCTAVE, OCTAVES = 16, -24, 40


@struct.dataclass
class Calibration:
    """DAC ranges of a whole model, in the unit of the inputs; made for one `tile_rows`.

    By site (`hetmoe.models.matrices`: matrices that read one input share its range), stacked over the layers of a kind:
    `[layers, experts, tiles]` for the sites of routed experts, `[layers, tiles]` for the others.
    """

    layers: dict[str, Float[Array, "..."]]
    dense_layers: dict[str, Float[Array, "layers tiles"]]
    lm_head: Float[Array, "tiles"]
    tokens_seen: Float[Array, "layers experts"]  # calibration tokens routed to each expert
    tile_rows: int = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangeMethod:
    """How statistics become a range. `k` multiplies the EMA of the std; `quantile` is of |x|."""

    method: Literal["ema_std", "quantile", "max"] = "ema_std"
    k: float = 12.0
    decay: float = 0.99
    quantile: float = 0.9999

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"calibration method {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if not 0 < self.k < float("inf"):
            raise InputError(f"calibration k={self.k!r} must be positive and finite")
        if not 0 <= self.decay < 1:
            raise InputError(f"calibration decay={self.decay!r} must be within [0, 1)")
        if not 0 < self.quantile <= 1:
            raise InputError(f"calibration quantile={self.quantile!r} must be within (0, 1]")


@struct.dataclass
class Moments:
    """Statistics of one batch per expert (or other group) and row-block: `[..., groups, tiles]`."""

    count: Float[Array, "*g"]
    total: Float[Array, "*g"]
    square: Float[Array, "*g"]
    maximum: Float[Array, "*g"]
    histogram: Float[Array, "*g bins"] | None  # counts of |x| by magnitude; None unless a quantile is wanted

    def group(self, index: int) -> "Moments":
        """The moments of one group, the group axis kept."""
        part = slice(index, index + 1)
        return Moments(
            count=self.count[..., part, :],
            total=self.total[..., part, :],
            square=self.square[..., part, :],
            maximum=self.maximum[..., part, :],
            histogram=None if self.histogram is None else self.histogram[..., part, :, :],
        )

    def std(self) -> Array:
        """Standard deviation; 0 where nothing was counted."""
        count = jnp.maximum(self.count, 1.0)
        return jnp.sqrt(jnp.maximum(self.square / count - jnp.square(self.total / count), 0.0))


def observe_inputs(
    x: Float[Array, "blocks rows K"], real: Array, group: Array, *, groups: int, tile_rows: int, histogram: bool
) -> Moments:
    """Moments of the inputs per group; rows that are not `real` are padding and are left out."""
    weight = real.astype(jnp.float32)[..., None]
    parts = []
    for start, size in row_blocks(x.shape[-1], tile_rows):
        part = x[..., start : start + size].astype(jnp.float32) * weight

        def add(value: Array) -> Array:
            return jax.ops.segment_sum(jnp.sum(value, axis=(1, 2)), group, num_segments=groups)

        counts = None
        if histogram:
            octave = jnp.log2(jnp.maximum(jnp.abs(part), 2.0**LOWEST_OCTAVE)) - LOWEST_OCTAVE
            bins = OCTAVES * BINS_PER_OCTAVE
            index = jnp.clip((octave * BINS_PER_OCTAVE).astype(jnp.int32), 0, bins - 1) + bins * group[:, None, None]
            counts = jnp.zeros((groups * bins,), jnp.float32)
            counts = counts.at[index.reshape(-1)].add(jnp.broadcast_to(weight, part.shape).reshape(-1))
            counts = counts.reshape(groups, bins)
        maximum = jax.ops.segment_max(jnp.max(jnp.abs(part), axis=(1, 2)), group, num_segments=groups)
        parts.append(
            Moments(
                count=add(jnp.broadcast_to(weight, part.shape)),
                total=add(part),
                square=add(jnp.square(part)),
                maximum=jnp.maximum(maximum, 0.0),  # -inf for a group without blocks
                histogram=counts,
            )
        )
    return jax.tree.map(lambda *tiles: jnp.stack(tiles, axis=1), *parts)


def merge_ranges(batches: list[Moments], how: RangeMethod) -> tuple[np.ndarray, np.ndarray]:
    """(ranges, counts) from the batches' moments, `[..., groups, tiles]`.

    The EMA starts at a group's first batch with inputs and skips its batches without. A group that never got an input
    takes the mean range of the other groups of its layer.
    """
    counts = np.sum([np.asarray(b.count) for b in batches], axis=0)
    if how.method == "ema_std":
        mean = np.zeros(counts.shape)
        started = np.zeros(counts.shape, bool)
        for batch in batches:
            new, std = np.asarray(batch.count) > 0, np.asarray(batch.std(), np.float64)
            mean = np.where(new, np.where(started, how.decay * mean + (1 - how.decay) * std, std), mean)
            started |= new
        ranges = how.k * mean
    elif how.method == "max":
        ranges = np.max([np.asarray(b.maximum) for b in batches], axis=0)
    else:
        ranges = _quantile(np.sum([np.asarray(b.histogram, np.float64) for b in batches], axis=0), how.quantile)
        ranges = np.minimum(ranges, np.max([np.asarray(b.maximum) for b in batches], axis=0))
    seen = counts > 0
    others = np.sum(ranges * seen, axis=-2, keepdims=True) / np.maximum(np.sum(seen, axis=-2, keepdims=True), 1)
    return np.where(seen, ranges, others), counts


def _quantile(histogram: np.ndarray, quantile: float) -> np.ndarray:
    """Upper edge of the bin that holds the quantile."""
    cumulative = np.cumsum(histogram, axis=-1)
    index = np.argmax(cumulative >= quantile * cumulative[..., -1:], axis=-1)
    return 2.0 ** ((index + 1) / BINS_PER_OCTAVE + LOWEST_OCTAVE)
