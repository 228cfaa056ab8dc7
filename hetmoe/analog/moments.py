"""Statistics of the inputs that reach a matrix, per group (expert) and row-block."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from hetmoe.analog.tiles import row_blocks
from hetmoe.ops.largest import largest

# Magnitudes are counted in bins of 1/16 octave from 2**-24 to 2**16: a quantile is known to 4.4 %.
BINS_PER_OCTAVE, LOWEST_OCTAVE, OCTAVES = 16, -24, 40


@struct.dataclass
class Moments:
    """Statistics of one batch per expert (or other group) and row-block: `[..., groups, tiles]`."""

    count: Float[Array, "*g"]
    total: Float[Array, "*g"]
    square: Float[Array, "*g"]
    maximum: Float[Array, "*g"]
    histogram: Float[Array, "*g bins"] | None  # counts of |x| by magnitude; None unless a quantile is wanted

    def pooled(self) -> "Moments":
        """All groups of a layer as one; the group axis is kept."""
        return Moments(
            count=self.count.sum(axis=-2, keepdims=True),
            total=self.total.sum(axis=-2, keepdims=True),
            square=self.square.sum(axis=-2, keepdims=True),
            maximum=self.maximum.max(axis=-2, keepdims=True),
            histogram=None if self.histogram is None else self.histogram.sum(axis=-3, keepdims=True),
        )

    def over_devices(self, axes: tuple[str, ...]) -> "Moments":
        """Of what all devices along mesh axes saw; inside `jax.shard_map`."""

        def add(values: Array) -> Array:
            return jax.lax.psum(values, axes)

        return Moments(
            count=add(self.count),
            total=add(self.total),
            square=add(self.square),
            maximum=jax.lax.pmax(self.maximum, axes),
            histogram=None if self.histogram is None else add(self.histogram),
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
        maximum = jax.ops.segment_max(largest(jnp.abs(part), (1, 2)), group, num_segments=groups)
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
