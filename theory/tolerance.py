"""The tolerance c*: the first noise scale, going up, at which a mixture no longer classifies what it has learned.

That is where accuracy falls below `LEARNED` on one of the levels, each by itself. Scales go up by factors of sqrt(2),
and the step in which accuracy fails first is bisected. All scales and placements use the same draws.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from hetmoe.analog.spec import AnalogSpec
from theory.analog import Bench, draw_chip, mixed_accuracy, noisy_outputs, output_errors
from theory.model import Mixture, ModelSpec
from theory.train import learned

SCALES = 0.01 * 2.0 ** (np.arange(35) / 2)  # to 1311
HALVINGS = 5  # of a factor of sqrt(2): c* is known to 1.1 %


def first_failure(
    fails: Callable[[Float[Array, ""], Bool[Array, "placements experts"]], Bool[Array, "placements"]],
    digital: Bool[Array, "placements experts"],
) -> Float[Array, "placements"]:
    """The first scale, going up, at which each placement fails.

    Args:
        fails: whether placements fail at a scale.
        digital: the placements.

    Returns:
        0 where a placement fails at no noise or at the first of `SCALES`, infinity where it fails at none.
    """
    scales = jnp.asarray(np.concatenate([[0.0], SCALES]), jnp.float32)
    failed = jax.lax.map(lambda scale: fails(scale, digital), scales)  # [scales, placements]

    def between(failed: Array, digital: Array) -> Array:
        first = jnp.argmax(failed)

        def halve(ends: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            low, high = ends
            middle = jnp.sqrt(low * high)
            bad = fails(middle, digital[None])[0]
            return (jnp.where(bad, low, middle), jnp.where(bad, middle, high)), None

        (low, high), _ = jax.lax.scan(halve, (scales[first - 1], scales[first]), None, length=HALVINGS)
        found = jnp.where(first <= 1, 0.0, jnp.sqrt(low * high))
        return jnp.where(jnp.any(failed), found, jnp.inf)

    return jax.lax.map(lambda each: between(*each), (failed.T, digital))


@partial(jax.jit, static_argnames="spec")
def tolerances(
    mixtures: Mixture, benches: Bench, chips: Key[Array, "runs chips"], digital: Bool[Array, "runs placements experts"],
    spec: ModelSpec, analog: AnalogSpec,
) -> Float[Array, "runs placements"]:  # fmt: skip
    """c* of many mixtures, as `first_failure` gives it.

    Args:
        mixtures: weights.
        benches: of the mixtures.
        chips: keys, of each mixture's own chips.
        digital: experts that are digital, for every placement.
        spec: structure.
        analog: device and converters; its `noise_scale` is not looked at.
    """

    def one(mixture: Mixture, bench: Bench, chips: jax.Array, digital: Array) -> Array:
        draws = jax.vmap(lambda key: draw_chip(key, mixture, spec))(chips)

        def fails(scale: Array, digital: Array) -> Array:
            noisy = jax.vmap(lambda drawn: noisy_outputs(mixture, drawn, bench.inputs, spec, analog, scale))(draws)
            return ~learned(mixed_accuracy(bench, noisy, digital))

        return first_failure(fails, digital)

    return jax.vmap(one)(mixtures, benches, chips, digital)


@partial(jax.jit, static_argnames="spec")
def sensitivities(
    mixtures: Mixture, benches: Bench, chips: Key[Array, "runs chips"], spec: ModelSpec, analog: AnalogSpec
) -> Float[Array, "runs experts"]:
    """Mean square change of outputs by the noise of each expert alone, at `analog.noise_scale`."""

    def one(mixture: Mixture, bench: Bench, chips: jax.Array) -> Array:
        def of_chip(key: jax.Array) -> Array:
            drawn = draw_chip(key, mixture, spec)
            return noisy_outputs(mixture, drawn, bench.inputs, spec, analog, analog.noise_scale)

        return output_errors(bench, jax.vmap(of_chip)(chips))

    return jax.vmap(one)(mixtures, benches, chips)


def highest(scores: Float[Array, "*runs experts"], count: int) -> Bool[Array, "*runs experts"]:
    """Marks the `count` experts of the highest score; ties go to the lower index."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True) < count
