"""From a layer's weights to the operands of the kernels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hetmoe.analog.devices import Stream, compensation_factor, group_range
from hetmoe.analog.programming import ProgrammedMatrix, SeededMatrix, as_read, drawn_matrix, stream_key, with_maxima
from hetmoe.analog.spec import AnalogSpec
from hetmoe.analog.tiles import row_blocks
from hetmoe.ops.grouped_crossbar.blocks import ANALOG, DIGITAL, EMPTY, Chip, Clean, Matrix, Noise, Tables


def make_tables(
    group: Int[Array, "blocks"],
    used: Bool[Array, "blocks"],
    analog: Bool[Array, "groups"],
    input_range: Float[Array, "groups tiles"] | None,
    adc_bound: Float[Array, ""],
) -> Tables:
    """Tables of blocks that belong to a group (an expert) each; `used` is False where all rows are padding."""
    mode = jnp.where(used, jnp.where(analog[group], ANALOG, DIGITAL), EMPTY).astype(jnp.int32)
    return Tables(
        mode=mode,
        clean=group,
        programmed=group,
        chip=group,
        input_range=None if input_range is None else input_range[group],
        adc_bound=jnp.broadcast_to(adc_bound.astype(jnp.float32), group.shape),
    )


def make_matrix(
    clean: Float[Array, "groups K N"], analog_side: ProgrammedMatrix | SeededMatrix, spec: AnalogSpec
) -> Matrix:
    """One matrix of every group, programmed or to be programmed in the kernel."""
    if isinstance(analog_side, ProgrammedMatrix):
        return Matrix(
            clean=Clean(w=clean, low=None, high=None),
            programmed=analog_side.w,
            chip=Chip(weight_max=analog_side.weight_max, noise=None),
        )
    key, numbers, rows = analog_side.key, jnp.arange(clean.shape[0]), spec.options.tile_rows

    def of_group(item: tuple[Array, Array]) -> tuple[Array, Array | None, tuple[Array, Array]]:
        w, number = item
        result = drawn_matrix(key, w, spec, expert=number)
        maxima = with_maxima(as_read(result, spec).astype(w.dtype), spec).weight_max
        factor = None
        if spec.drift_compensation:
            factor = compensation_factor(result.initial, result.at_time, rows)[:, 0]
        return maxima, factor, _tile_ranges(w.astype(jnp.float32), spec)

    # One group at a time: what is programmed for the maxima is thrown away.
    maxima, factor, (low, high) = jax.lax.map(of_group, (clean, numbers))
    words = jax.vmap(lambda e: jnp.stack([jax.random.key_data(stream_key(key, s, e)) for s in Stream]))(numbers)
    noise = Noise(
        words=words,
        scale=jnp.broadcast_to(spec.noise_scale, numbers.shape),
        time_s=None if spec.time_s is None else jnp.broadcast_to(spec.time_s, numbers.shape),
        factor=factor,
    )
    return Matrix(clean=Clean(w=clean, low=low, high=high), programmed=None, chip=Chip(weight_max=maxima, noise=noise))


def _tile_ranges(w: Float[Array, "K N"], spec: AnalogSpec) -> tuple[Array, Array]:
    """Lowest and highest weight of the device's scale group: `[tiles, 1]`, or `[tiles, N]` if columns differ."""
    starts = jnp.array([start for start, _ in row_blocks(w.shape[0], spec.options.tile_rows)])

    def per_tile(values: Array) -> Array:
        return values[starts] if values.shape[0] > 1 else jnp.broadcast_to(values, (len(starts), values.shape[1]))

    found = group_range(w, spec.device.scale_group, spec.options.tile_rows)
    return per_tile(found.low), per_tile(found.high)
