"""Chips whose experts were programmed at different times, and what probing them returns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from hetmoe.analog.converters import steps
from hetmoe.analog.programming import (
    ProgrammedMatrix,
    ProgrammedWeights,
    drawn_matrix,
    matrix_key,
    with_maxima,
)
from hetmoe.analog.random import require_key
from hetmoe.analog.spec import AnalogSpec
from hetmoe.analog.tiles import row_blocks
from hetmoe.errors import InputError
from hetmoe.models.matrices import crossbar_matrices
from hetmoe.models.params import Params
from hetmoe.ops.crossbar_matmul.xla import crossbar_matmul
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.runtime.probe import Readings, converter_error_variance, probe_vectors, read_probes

FITTING = 6.0  # standard deviations of a tile's output that the ADC's range holds while probing


@struct.dataclass
class Chips:
    """State of the analog copies of all experts; one expert is programmed as a whole."""

    age: Float[Array, "layers experts"]  # s since its programming
    epoch: Int[Array, "layers experts"]  # how often it was programmed before
    factor: Float[Array, "layers experts matrices"]  # that its outputs are multiplied by, of `EXPERT_MATRICES`
    noise: Float[Array, ""]  # multiplies the noise scale: temperature, for example


def fresh_chips(layers: int, experts: int) -> Chips:
    """Just programmed, without compensation."""
    return Chips(
        age=jnp.zeros((layers, experts), jnp.float32),
        epoch=jnp.zeros((layers, experts), jnp.int32),
        factor=jnp.ones((layers, experts, len(EXPERT_MATRICES)), jnp.float32),
        noise=jnp.float32(1.0),
    )


def check_drifting(spec: AnalogSpec) -> AnalogSpec:
    """Raises InputError unless the device drifts; time and compensation are this module's."""
    if not spec.device.has_drift:
        raise InputError(f"device {spec.device.name!r} has no drift model: use pcm, hermes or another that drifts")
    if spec.drift_compensation or spec.time_s is None:
        raise InputError("give a spec with time_s (any) and without drift_compensation: both are decided while it runs")
    return spec


def _weights(
    key: jax.Array, w: Array, spec: AnalogSpec, age: Array, epoch: Array, noise: Array, expert: Array
) -> Array:
    """One expert's matrix as the tile holds it, without the digital factor; float32."""
    aged = dataclasses.replace(spec, time_s=age, noise_scale=spec.noise_scale * noise)
    return drawn_matrix(jax.random.fold_in(key, epoch), w, aged, expert=expert).at_time


@jax.jit
def deployed_weights(key: jax.Array, params: Params, spec: AnalogSpec, chips: Chips) -> ProgrammedWeights:
    """What `forward` needs of chips in this state: experts only.

    A factor behind the ADC is the same as one in the weights, since the ADC's bound follows the weights
    (`hetmoe.analog.devices.global_drift_compensation`). An expert that is programmed again draws anew.

    Args:
        key: of the chips, as of `program`.
        params: targets.
        spec: device and converters, with some time; ages are those of `chips`.
        chips: their state.
    """
    key = require_key(key)
    targets = crossbar_matrices(params.layers, dense=False)

    def one_layer(item: tuple[Array, Chips]) -> dict[str, ProgrammedMatrix]:
        number, of_layer = item
        found = {}
        for column, name in enumerate(EXPERT_MATRICES):
            w = targets[name][number]
            layer_key = matrix_key(key, name, number)

            def one(expert: tuple[Array, ...], layer_key: jax.Array = layer_key) -> ProgrammedMatrix:
                target, age, epoch, factor, index = expert
                read = _weights(layer_key, target, spec, age, epoch, of_layer.noise, index)
                return with_maxima((factor * read).astype(target.dtype), spec)

            parts = (w, of_layer.age, of_layer.epoch, of_layer.factor[:, column], jnp.arange(w.shape[0]))
            found[name] = jax.lax.map(one, parts)
        return found

    layers = jnp.arange(chips.age.shape[0])
    noise = jnp.broadcast_to(chips.noise, layers.shape)
    per_layer = Chips(age=chips.age, epoch=chips.epoch, factor=chips.factor, noise=noise)
    return ProgrammedWeights(layers=jax.lax.map(one_layer, (layers, per_layer)), dense_layers={}, lm_head=None)


def probe_ranges(
    held: Float[Array, "K N"], weight_max: Float[Array, "blocks columns"], spec: AnalogSpec
) -> Float[Array, "blocks"]:
    """DAC ranges for inputs of plus and minus one.

    An output's standard deviation is the norm of its column in the tile. The range is the smallest of half the codes
    over a whole number (so that one is a code) at which `FITTING` of them fit the ADC's bound.
    """
    most = 127.0 if spec.options.dac_bits is None else steps(spec.options.dac_bits) / 2
    blocks = row_blocks(held.shape[0], spec.options.tile_rows)
    squares = jnp.square(held.astype(jnp.float32))
    norms = jnp.sqrt(jnp.stack([jnp.sum(squares[start : start + size], axis=0) for start, size in blocks]))
    bounds = spec.adc_bound * weight_max.astype(jnp.float32)
    needed = jnp.max(FITTING * norms / jnp.where(bounds > 0, bounds, 1.0), axis=1)
    return most / jnp.clip(jnp.floor(most / jnp.maximum(needed, 1.0)), 1.0, most)


@functools.partial(jax.jit, static_argnames=("probes",))
def probe_experts(
    key: jax.Array, params: Params, programmed: ProgrammedWeights, spec: AnalogSpec, probes: int
) -> Readings:
    """Probes every matrix of every expert through its tiles and converters; leaves `[layers, experts, matrices]`.

    Inputs of plus and minus one are a code of the DAC, so far below its range that ADCs do not clip; the mean square
    error of the ADCs is subtracted.

    Args:
        key: of the probes, which are the same for all experts.
        params: targets.
        programmed: what the chips hold, factors included.
        spec: converters.
        probes: vectors.
    """
    targets = crossbar_matrices(params.layers, dense=False)
    on = jnp.ones((1, 1), bool)

    def one(w: Array, held: Array, weight_max: Array, vectors: Array) -> Readings:
        ranges = probe_ranges(held, weight_max, spec)
        outputs = crossbar_matmul(vectors, held, ranges, spec.adc_bound, weight_max, spec.options, on, None)
        bounds = ranges[:, None] * spec.adc_bound * weight_max
        variance = jnp.mean(jnp.sum(jnp.atleast_2d(converter_error_variance(bounds, spec.options.adc_bits)), axis=0))
        return read_probes(w, outputs, vectors, variance)

    readings = list[Readings]()
    for column, name in enumerate(EXPERT_MATRICES):
        w, held = targets[name], programmed.layers[name]
        vectors = probe_vectors(jax.random.fold_in(key, column), probes, w.shape[-2])

        def of_layer(item: tuple[Array, Array, Array], vectors: Array = vectors) -> Readings:
            return jax.lax.map(lambda expert: one(expert[0], expert[1], expert[2], vectors), item)

        readings.append(jax.lax.map(of_layer, (w, held.w, held.weight_max)))
    return jax.tree.map(lambda *parts: jnp.stack(parts, axis=-1), *readings)
