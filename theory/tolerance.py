"""The tolerance c*: the first noise scale, going up, at which a mixture no longer classifies what it has learned.

That is where accuracy falls below `LEARNED` on one of the levels, each by itself. Scales go up by factors of sqrt(2),
and the step in which accuracy fails first is bisected. All scales and placements use the same draws.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from hetmoe.analog.spec import AnalogSpec
from theory.analog import Bench, draw_chip, mixed_accuracy, noisy_outputs, output_errors
from theory.model import Mixture, ModelSpec
from theory.train import learned

SCALES = 0.01 * 2.0 ** (np.arange(35) / 2)  # to 1311
HALVINGS = 5  # of a factor of sqrt(2): c* is known to 1.1 %


def tolerance_of(
    mixture: Mixture, bench: Bench, chips: jax.Array, digital: Bool[Array, "placements experts"], spec: ModelSpec,
    analog: AnalogSpec,
) -> Float[Array, "placements"]:  # fmt: skip
    """c* of one mixture: 0 where accuracy fails without noise, infinite where it never does.

    Args:
        mixture: weights.
        bench: of the mixture.
        chips: keys.
        digital: experts that are digital, for every placement.
        spec: structure.
        analog: device and converters; its `noise_scale` is not looked at.
    """
    draws = jax.vmap(lambda key: draw_chip(key, mixture, spec))(chips)

    def fails(scale: Array, digital: Array) -> Array:
        noisy = jax.vmap(lambda drawn: noisy_outputs(mixture, drawn, bench.inputs, spec, analog, scale))(draws)
        return ~learned(mixed_accuracy(bench, noisy, digital))

    scales = jnp.asarray(np.concatenate([[0.0], SCALES]), jnp.float32)
    failed = jax.lax.map(lambda scale: fails(scale, digital), scales)  # [scales, placements]

    def between(failed: Array, digital: Array) -> Array:
        first = jnp.argmax(failed)

        def halve(ends: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            low, high = ends
            middle = jnp.sqrt(low * high)
            bad = fails(middle, digital[None])[0]
            return (jnp.where(bad, low, middle), jnp.where(bad, middle, high)), None

        # The scale before the first is 0: half of the first stands for it.
        low = jnp.where(first <= 1, scales[1] / 2, scales[first - 1])
        (low, high), _ = jax.lax.scan(halve, (low, scales[first]), None, length=HALVINGS)
        found = jnp.where(first == 0, 0.0, jnp.sqrt(low * high))
        return jnp.where(jnp.any(failed), found, jnp.inf)

    return jax.lax.map(lambda each: between(*each), (failed.T, digital))


@partial(jax.jit, static_argnames="spec")
def tolerances(
    mixtures: Mixture, benches: Bench, chips: jax.Array, digital: Bool[Array, "runs placements experts"],
    spec: ModelSpec, analog: AnalogSpec,
) -> Float[Array, "runs placements"]:  # fmt: skip
    """`tolerance_of` for many mixtures on the same chips."""
    return jax.vmap(lambda m, b, d: tolerance_of(m, b, chips, d, spec, analog))(mixtures, benches, digital)


@partial(jax.jit, static_argnames="spec")
def sensitivities(
    mixtures: Mixture, benches: Bench, chips: jax.Array, spec: ModelSpec, analog: AnalogSpec
) -> Float[Array, "runs experts"]:
    """Mean square change of outputs by the noise of each expert alone, at `analog.noise_scale`."""

    def one(mixture: Mixture, bench: Bench) -> Array:
        def of_chip(key: jax.Array) -> Array:
            drawn = draw_chip(key, mixture, spec)
            return noisy_outputs(mixture, drawn, bench.inputs, spec, analog, analog.noise_scale)

        return output_errors(bench, jax.vmap(of_chip)(chips))

    return jax.vmap(one)(mixtures, benches)


def highest(scores: Float[Array, "*runs experts"], count: int) -> Bool[Array, "*runs experts"]:
    """Marks the `count` experts of the highest score; ties go to the lower index."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True) < count
