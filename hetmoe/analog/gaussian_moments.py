"""The exact second moment of what independent Gaussian noise in the weights does to an expert's output.

Devices that do not clip (`proportional`, `additive`, `afm`, right after programming `reram_cmo`) draw Gaussian
deviations. A neuron's inputs to its activation are then Gaussian, neurons are independent of each other, and so is the
last layer. With h' the noisy neurons, and mean B and variance v of the deviations of the last layer V:

    E |df|^2 = |(V + B)^T E h' - V^T h|^2 + sum_i Var h'_i |V_i + B_i|^2 + sum_i E h'_i^2 sum_o v_io.

- ReLU, `z ~ N(m, s^2)`: `E relu(z) = m Phi(m/s) + s phi(m/s)`, `E relu(z)^2 = (m^2 + s^2) Phi(m/s) + m s phi(m/s)` (the
  partial moments of a normal distribution).
- SwiGLU, `h' = silu(z) u` with independent Gaussian z and u: products of `E silu(z)^n`, by Gauss-Hermite quadrature,
  and `E u^n`.
"""

import functools

import numpy as np
from jaxtyping import Float64
from scipy import stats

from hetmoe.analog.second_moment import ExpertNoise, Moments
from hetmoe.analog.two_layer import TwoLayer, TwoLayerNoise, two_layer
from hetmoe.quantize.bounds.expert import Expert, activations
from hetmoe.quantize.bounds.silu import silu

Array = np.ndarray
NODES = 80  # of the quadrature: polynomials up to degree 159 exactly


def two_layer_exact(
    x: Float64[Array, "tokens inputs"], expert: TwoLayer, noise: TwoLayerNoise
) -> Float64[Array, "tokens"]:
    """`sqrt(E |df|^2)` of a two-layer ReLU expert, for Gaussian noise."""
    mean, variance = x @ (expert.up + noise.up.mean), np.square(x) @ noise.up.variance
    first, second = relu_moments(mean, np.sqrt(variance))
    return _of_output(two_layer(x, expert), first, second, expert.down, noise.down)


def swiglu_exact(x: Float64[Array, "tokens hidden"], expert: Expert, noise: ExpertNoise) -> Float64[Array, "tokens"]:
    """`sqrt(E |df|^2)` of a SwiGLU expert, for Gaussian noise; to the accuracy of the quadrature."""
    gate, up = x @ (expert.gate + noise.gate.mean), x @ (expert.up + noise.up.mean)
    gate_std, up_variance = np.sqrt(np.square(x) @ noise.gate.variance), np.square(x) @ noise.up.variance
    first, second = np.zeros_like(gate), np.zeros_like(gate)
    for node, weight in zip(*_quadrature(), strict=True):
        value = silu(gate + gate_std * node)
        first += weight * value
        second += weight * np.square(value)
    return _of_output(
        activations(x, expert).out, first * up, second * (np.square(up) + up_variance), expert.down, noise.down
    )  # fmt: skip


def relu_moments(mean: Array, std: Array) -> tuple[Array, Array]:
    """(E relu(z), E relu(z)^2) of normal z."""
    positive = std > 0
    ratio = np.divide(mean, std, out=np.where(mean > 0, np.inf, -np.inf), where=positive)
    below, density = stats.norm.cdf(ratio), stats.norm.pdf(ratio)
    first, second = mean * below + std * density, (np.square(mean) + np.square(std)) * below + mean * std * density
    # Far below 0 both are differences of nearly equal numbers.
    return np.maximum(first, 0.0), np.maximum(second, 0.0)


@functools.cache
def _quadrature() -> tuple[Array, Array]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return nodes, weights / weights.sum()


def _of_output(
    clean: Float64[Array, "tokens outputs"],
    first: Float64[Array, "tokens neurons"],
    second: Float64[Array, "tokens neurons"],
    down: Float64[Array, "neurons outputs"],
    noise: Moments,
) -> Float64[Array, "tokens"]:
    held = down + noise.mean
    off = np.sum(np.square(first @ held - clean), axis=1)
    spread = np.maximum(second - np.square(first), 0.0) @ np.sum(np.square(held), axis=1)
    return np.sqrt(off + spread + second @ noise.variance.sum(axis=1))
