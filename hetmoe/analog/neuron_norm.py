"""Noise in neuron norms: what the placement rule's score is made of.

Where weights deviate independently by at most c times their magnitude, without bias, output j of a matrix moves by
`E e_j^2 <= c^2 sum_i x_i^2 W_ij^2 <= c^2 max_i x_i^2 |w_j|^2`, with the neuron norm |w_j| (arXiv 2603.02633's argument;
the devices of `proportional` reach the first inequality).
"""

import math

import numpy as np
from jaxtyping import Float64

from hetmoe.analog.two_layer import TwoLayer
from hetmoe.errors import InputError
from hetmoe.quantize.bounds.inputs import check_finite, check_inputs
from hetmoe.quantize.bounds.matrix_norms import spectral_norm
from hetmoe.quantize.bounds.rounding import widened

Array = np.ndarray


def neuron_norm_bound(
    x: Float64[Array, "tokens K"], w: Float64[Array, "K N"], noise_scale: float
) -> Float64[Array, "tokens"]:
    """Bounds `sqrt(E |dW^T x|^2)` by `c max|x| sqrt(sum_j |w_j|^2)`, for standard deviations of at most `c |W_ij|`.

    Raises:
        InputError: for values that are not finite, shapes that do not fit, or a c that is negative.
    """
    check_finite("w", w, "K N")
    check_inputs(x, len(w))
    if not (math.isfinite(noise_scale) and noise_scale >= 0):
        raise InputError(f"noise_scale={noise_scale!r} must be a finite number of at least 0")
    return widened(noise_scale * np.abs(x).max(axis=1) * float(np.linalg.norm(w)))


def expert_neuron_norm_bound(
    x: Float64[Array, "tokens inputs"], expert: TwoLayer, noise_scale: float
) -> Float64[Array, "tokens"]:
    """Bounds `sqrt(E |df|^2)` of a two-layer ReLU expert whose first layer is noisy like that.

    ReLU's Lipschitz constant is 1, so neurons move by no more than their inputs: `rms(dh_i) <= c max|x| |w_i|`.
    The last layer makes of that at most `sum_i |w_i| |V_i|` (Minkowski's inequality: each neuron by the product of
    norms that MaxNNScore is made of), and at most its spectral norm times the root of `sum_i |w_i|^2`.

    Raises:
        InputError: as `neuron_norm_bound`.
    """
    together = neuron_norm_bound(x, expert.up, noise_scale) * spectral_norm(expert.down)
    norms = np.linalg.norm(expert.up, axis=0) * np.linalg.norm(expert.down, axis=1)
    return widened(np.minimum(together, noise_scale * np.abs(x).max(axis=1) * norms.sum()))
