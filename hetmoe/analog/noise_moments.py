"""Mean and variance of what programming adds to every weight: exact, or estimated from chips."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from hetmoe.analog.devices import NoiseMoments, group_range
from hetmoe.analog.programming import ProgrammedWeights, program
from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.models.matrices import crossbar_matrices
from hetmoe.models.params import Params


def programming_moments(w: Float[Array, "*stack K N"], spec: AnalogSpec) -> NoiseMoments:
    """Exact moments of the programming noise (`spec.time_s` is not looked at); float32, of w's shape."""
    target = w.astype(jnp.float32)
    scale = group_range(target, spec.device.scale_group, spec.options.tile_rows)
    return spec.device.programming_moments(target, scale=scale, noise_scale=spec.noise_scale)


@struct.dataclass
class ModelMoments:
    """`NoiseMoments` of the matrices of a model, by name as in `ProgrammedWeights`."""

    layers: dict[str, NoiseMoments]
    dense_layers: dict[str, NoiseMoments]
    lm_head: NoiseMoments | None


def sampled_moments(key: jax.Array, params: Params, spec: AnalogSpec, *, dense: bool, chips: int) -> ModelMoments:
    """Moments at the time of `spec` estimated from `chips` programmings; variances are unbiased, two float32 copies.

    Raises:
        InputError: for fewer than 2 chips.
    """
    if chips < 2:
        raise InputError(f"chips={chips} must be at least 2: a variance is estimated from them")
    targets = ProgrammedWeights(
        layers=crossbar_matrices(params.layers, dense=dense),
        dense_layers={} if params.dense_layers is None else crossbar_matrices(params.dense_layers, dense=dense),
        lm_head=(params.embed.T if params.lm_head is None else params.lm_head) if dense else None,
    )

    sums = jax.tree.map(lambda w: NoiseMoments(*(jnp.zeros(w.shape, jnp.float32),) * 2), targets)
    for chip_key in jax.random.split(key, chips):
        sums = _add(sums, chip_key, params, targets, spec, dense)

    def finish(sum_of: NoiseMoments) -> NoiseMoments:
        mean = sum_of.mean / chips
        return NoiseMoments(mean, jnp.maximum(sum_of.variance - chips * jnp.square(mean), 0.0) / (chips - 1))

    done = jax.tree.map(finish, sums, is_leaf=lambda node: isinstance(node, NoiseMoments))
    return ModelMoments(layers=done.layers, dense_layers=done.dense_layers, lm_head=done.lm_head)


@functools.partial(jax.jit, static_argnames="dense")
def _add(sums: Any, key: jax.Array, params: Params, targets: ProgrammedWeights, spec: AnalogSpec, dense: bool) -> Any:
    """Adds one chip's deviations from the targets, and their squares."""
    programmed = program(key, params, spec, dense=dense)

    def one(target: Array, sum_of: NoiseMoments, matrix: Any) -> NoiseMoments:
        deviation = matrix.w.astype(jnp.float32) - target.astype(jnp.float32)
        return NoiseMoments(sum_of.mean + deviation, sum_of.variance + jnp.square(deviation))

    return jax.tree.map(one, targets, sums, programmed)
