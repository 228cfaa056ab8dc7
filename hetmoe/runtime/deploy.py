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
from hetmoe.errors import InputError
from hetmoe.models.matrices import crossbar_matrices
from hetmoe.models.params import Params
from hetmoe.ops.crossbar_matmul.xla import crossbar_matmul
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.runtime.probe import Readings, converter_error_variance, probe_vectors, read_probes

HEADROOM = 4  # range of the DACs over the magnitude of a probe's inputs


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


@functools.partial(jax.jit, static_argnames=("probes",))
def probe_experts(
    key: jax.Array, params: Params, programmed: ProgrammedWeights, spec: AnalogSpec, probes: int
) -> Readings:
    """Probes every matrix of every expert through its tiles and converters; leaves `[layers, experts, matrices]`.

    Inputs of plus and minus one are a quarter of the DAC's range, and a code of it, so that no ADC clips; the mean
    square error of the ADCs is subtracted.

    Args:
        key: of the probes, which are the same for all experts.
        params: targets.
        programmed: what the chips hold, factors included.
        spec: converters.
        probes: vectors.
    """
    targets = crossbar_matrices(params.layers, dense=False)
    on = jnp.ones((1, 1), bool)

    half = 127.0 if spec.options.dac_bits is None else steps(spec.options.dac_bits) / 2
    reach = half / max(1.0, round(half / HEADROOM))

    def one(w: Array, held: Array, weight_max: Array, vectors: Array) -> Readings:
        ranges = jnp.full((weight_max.shape[0],), reach, jnp.float32)
        outputs = crossbar_matmul(vectors, held, ranges, spec.adc_bound, weight_max, spec.options, on, None)
        bounds = reach * spec.adc_bound * weight_max
        variance = jnp.mean(jnp.sum(jnp.atleast_2d(converter_error_variance(bounds, spec.options.adc_bits)), axis=0))
        return read_probes(w, outputs, vectors, variance)

    readings = []
    for column, name in enumerate(EXPERT_MATRICES):
        w, held = targets[name], programmed.layers[name]
        vectors = probe_vectors(jax.random.fold_in(key, column), probes, w.shape[-2])

        def of_layer(item: tuple[Array, Array, Array], vectors: Array = vectors) -> Readings:
            return jax.lax.map(lambda expert: one(*expert, vectors), item)

        readings.append(jax.lax.map(of_layer, (w, held.w, held.weight_max)))
    return Readings(*(jnp.stack(parts, axis=-1) for parts in zip(*readings, strict=True)))
