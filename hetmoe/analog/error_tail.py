"""Errors that are exceeded with at most a given probability.

- Any noise: `P(|e| >= rms / sqrt(delta)) <= delta` (Markov's inequality for |e|^2).
- One matrix, deviations that are functions of independent standard normals z, each with a slope of at most L_ij in its
  normals: `|e|` has in z the Lipschitz constant `max_j sqrt(sum_i x_i^2 L_ij^2)`, since every normal moves one output
  only. So (Gaussian concentration: Boucheron, Lugosi and Massart, Concentration Inequalities, theorem 5.6)
  `P(|e| >= sqrt(E |e|^2) + sqrt(2 log(1 / delta)) max_j sqrt(sum_i x_i^2 L_ij^2)) <= delta`. Clipping at zero
  conductance does not make slopes larger, so that this holds for clipped devices too.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from hetmoe.analog.devices import group_range
from hetmoe.analog.devices.base import relative
from hetmoe.analog.devices.pair import DifferentialPair
from hetmoe.analog.noise_moments import programming_moments
from hetmoe.analog.second_moment import Moments, linear_second_moment
from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.quantize.bounds.inputs import check_finite, check_same_shape
from hetmoe.quantize.bounds.rounding import widened

Weights = Float[Array, "K N"] | Float[np.ndarray, "K N"]


def check_delta(delta: float) -> float:
    """Raises InputError unless it is a probability above 0 and below 1."""
    if not 0 < delta < 1:
        raise InputError(f"delta={delta!r} must be a probability between 0 and 1")
    return delta


def markov_bound(rms: Float64[np.ndarray, "tokens"], delta: float) -> Float64[np.ndarray, "tokens"]:
    """What |e| exceeds with a probability of at most delta, whatever the noise; `rms` bounds `sqrt(E |e|^2)`.

    Raises:
        InputError: unless `0 < delta < 1`, and `rms` is finite and not negative.
    """
    check_finite("rms", rms, "tokens")
    if (rms < 0).any():
        raise InputError(f"rms has a negative value, {rms.min()}")
    return widened(rms / math.sqrt(check_delta(delta)))


def linear_tail(
    x: Float64[np.ndarray, "tokens K"],
    noise: Moments,
    slopes: Float64[np.ndarray, "K N"],
    delta: float,
    weights: Float64[np.ndarray, "tokens N"] | None = None,
) -> Float64[np.ndarray, "tokens"]:
    """What the norm of a matrix's output error exceeds with a probability of at most delta, by concentration.

    Args:
        x: inputs.
        noise: exact moments of the deviations.
        slopes: L_ij, `draw_slopes`.
        delta: probability, for each token by itself.
        weights: fixed factors of every output; None = 1.

    Raises:
        InputError: unless `0 < delta < 1`; for inputs that are not finite, or shapes that do not fit.
    """
    reach = math.sqrt(2 * math.log(1 / check_delta(delta)))
    check_finite("slopes", slopes, "K N")
    check_same_shape("slopes", slopes, "noise", noise.mean)
    square, steepest = linear_second_moment(x, noise), np.square(x) @ np.square(slopes)
    if weights is not None:
        check_finite("weights", weights, "tokens N")
        check_same_shape("weights", weights, "the outputs", square)
        square, steepest = square * np.square(weights), steepest * np.square(weights)
    return widened(np.sqrt(square.sum(axis=1)) + reach * np.sqrt(np.max(steepest, axis=1)))


def noise_of(w: Weights, spec: AnalogSpec) -> Moments:
    """The moments of programming noise, float64; of weights as they are in float32.

    Exact but for float32, in which devices are calculated: about 1e-6 of each. Powers of 2 are taken out first, so that
    weights of any magnitude have them.

    Raises:
        InputError: for a spec with a time, at which they are not known in closed form; for weights that are not finite
            `[K, N]`.
    """
    single, unit = _scaled(w, spec)
    found = jax.jit(programming_moments)(single, spec)
    return Moments(np.asarray(found.mean, np.float64) * unit, np.asarray(found.variance, np.float64) * unit**2)


def _scaled(w: Weights, spec: AnalogSpec) -> tuple[Array, float]:
    """(weights over a power of 2 so that the largest is about 1, that power): noise is proportional to both."""
    if not isinstance(spec, AnalogSpec):
        raise InputError(f"spec={spec!r} must be an AnalogSpec: analog_spec('pcm', ...)")
    if spec.time_s is not None:
        raise InputError("moments are exact right after programming only: give a spec without time_s")
    wide = np.asarray(w, np.float64)
    check_finite("w", wide, "K N")
    unit = float(np.exp2(np.floor(np.log2(np.abs(wide).max())))) if wide.any() else 1.0
    return jnp.asarray(wide / unit, jnp.float32), unit


def draw_slopes(w: Weights, spec: AnalogSpec) -> Float64[np.ndarray, "K N"]:
    """Largest slope of every weight's deviation in its standard normals, right after programming.

    Of a differential pair the root of the sum of both devices' squared spreads before clipping; of other devices, which
    do not clip, the standard deviation.

    Raises:
        InputError: as `noise_of`.
    """
    device, (target, unit) = spec.device, _scaled(w, spec)
    if not isinstance(device, DifferentialPair):
        return np.sqrt(noise_of(w, spec).variance)
    largest = group_range(target, device.scale_group, spec.options.tile_rows).largest
    g = relative(target, largest) * device.g_max_us
    spreads = (device.programming_std(jnp.maximum(part, 0.0)) for part in (g, -g))
    both = jnp.sqrt(sum(jnp.square(spread) for spread in spreads))
    return np.asarray(spec.noise_scale * both * (largest / device.g_max_us), np.float64) * unit
