"""The exact second moment of what independent Gaussian noise in the weights does to an expert's output.

Devices that do not clip (`proportional`, `additive`, `afm`, right after programming `reram_cmo`) draw Gaussian
deviations. A neuron's inputs to its activation are then Gaussian, neurons are independent of each other, and so is the
last layer. With h' = h + dh the noisy neurons, and mean B and variance v of the deviations of the last layer V:

    E |df|^2 = |(V + B)^T E dh + B^T h|^2 + sum_i Var h'_i |V_i + B_i|^2 + sum_i E h'_i^2 sum_o v_io.

- ReLU, `z ~ N(m, s^2)`: `E relu(z) - relu(m) = s phi(m/s) - |m| Phi(-|m|/s)`, and of the square of that difference
  `s^2 (Phi(m/s) - m/s phi(m/s)) + m^2 Phi(-m/s)` for m > 0, `(m^2 + s^2) Phi(m/s) + m s phi(m/s)` else (the partial
  moments of a normal distribution).
- SwiGLU, `h' = silu(z) u'` with independent Gaussian z and u': moments of `silu(z) - silu(m)`, by Gauss-Hermite
  quadrature, and those of u'.

Everything is taken as a difference from what it is without noise, so that small noise is not lost in rounding.
"""

import functools

import numpy as np
from jaxtyping import Float64
from scipy import stats

from hetmoe.analog.second_moment import ExpertNoise, Moments
from hetmoe.analog.two_layer import TwoLayer, TwoLayerNoise
from hetmoe.quantize.bounds.expert import Expert
from hetmoe.quantize.bounds.inputs import check_inputs
from hetmoe.quantize.bounds.silu import silu

Array = np.ndarray
# Of the quadrature: exact for polynomials up to degree 159; for SiLU to 1e-6 at standard deviations of 3, 1e-3 at 10.
NODES = 80


def two_layer_exact(
    x: Float64[Array, "tokens inputs"], expert: TwoLayer, noise: TwoLayerNoise
) -> Float64[Array, "tokens"]:
    """`sqrt(E |df|^2)` of a two-layer ReLU expert, for Gaussian noise.

    Raises:
        InputError: for inputs that are not finite, or shapes that do not fit.
    """
    check_inputs(x, len(expert.up))
    noise.check(expert)
    clean, bias = x @ expert.up, x @ noise.up.mean
    hidden, held = np.maximum(clean, 0), np.maximum(clean + bias, 0)
    shift = np.where((clean > 0) & (clean + bias > 0), bias, held - hidden)
    mean, variance = relu_moves(clean + bias, np.sqrt(np.square(x) @ noise.up.variance))
    return _of_output(hidden, shift + mean, variance, expert.down, noise.down)


def swiglu_exact(x: Float64[Array, "tokens hidden"], expert: Expert, noise: ExpertNoise) -> Float64[Array, "tokens"]:
    """`sqrt(E |df|^2)` of a SwiGLU expert, for Gaussian noise; to the accuracy of the quadrature.

    Raises:
        InputError: for inputs that are not finite, or shapes that do not fit.
    """
    check_inputs(x, len(expert.gate))
    noise.check(expert)
    clean, gate = x @ expert.gate, x @ (expert.gate + noise.gate.mean)
    gate_std = np.sqrt(np.square(x) @ noise.gate.variance)
    first, second = np.zeros_like(gate), np.zeros_like(gate)
    for node, weight in zip(*_quadrature(), strict=True):
        move = silu(gate + gate_std * node) - silu(gate)
        first += weight * move
        second += weight * np.square(move)
    silu_clean, silu_mean = silu(clean), silu(gate) + first
    silu_moved, silu_variance = silu(gate) - silu(clean) + first, np.maximum(second - np.square(first), 0.0)
    up, up_bias, up_variance = x @ expert.up, x @ noise.up.mean, np.square(x) @ noise.up.variance
    moved = silu_moved * (up + up_bias) + silu_clean * up_bias
    variance = silu_variance * (np.square(up + up_bias) + up_variance) + np.square(silu_mean) * up_variance
    return _of_output(silu_clean * up, moved, variance, expert.down, noise.down)


def relu_moves(mean: Array, std: Array) -> tuple[Array, Array]:
    """(E relu(z) - relu(m), variance of relu(z)) of normal z with mean m."""
    positive = std > 0
    ratio = np.divide(mean, std, out=np.where(mean > 0, np.inf, -np.inf), where=positive)
    density, size = stats.norm.pdf(ratio), np.abs(mean)
    beyond = stats.norm.cdf(-np.abs(ratio))  # of the other side of 0
    moved = std * density - size * beyond
    above = np.square(std) * (1 - beyond) - size * std * density + np.square(size) * beyond
    below = (np.square(size) + np.square(std)) * beyond - size * std * density
    # Far from 0 differences of nearly equal numbers.
    return np.maximum(moved, 0.0), np.maximum(np.where(mean > 0, above, below) - np.square(moved), 0.0)


@functools.cache
def _quadrature() -> tuple[Array, Array]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return nodes, weights / weights.sum()


def _of_output(
    hidden: Float64[Array, "tokens neurons"],
    moved: Float64[Array, "tokens neurons"],
    variance: Float64[Array, "tokens neurons"],
    down: Float64[Array, "neurons outputs"],
    noise: Moments,
) -> Float64[Array, "tokens"]:
    held = down + noise.mean
    mean = moved @ held + hidden @ noise.mean
    spread = variance @ np.sum(np.square(held), axis=1)
    second = variance + np.square(hidden + moved)
    return np.sqrt(np.sum(np.square(mean), axis=1) + spread + second @ noise.variance.sum(axis=1))
