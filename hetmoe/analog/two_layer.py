"""Bounds of what independent noise in the weights does to two-layer ReLU experts `f(x) = V^T relu(W^T x)`.

As `hetmoe.analog.second_moment` does for SwiGLU experts. With `a = W^T x`, `h = relu(a)` and deviations dW, dV,

    df = V^T dh + dV^T (h + dh),        dh = relu(a + da) - relu(a).

- First order: where a > 0 a neuron passes `da` on, else nothing. The remainder is not 0 only where da has the other
  sign than a and is larger, and is at most |da| there; `E |da| 1{|da| >= |a|} <= E da^2 / |a|`. So
  `|E dh| <= 1{a > 0} |E da| + E da^2 / |a|`. ReLU's Lipschitz constant is 1, so that `E dh^2 <= E da^2`.
- What is left is as for SwiGLU: neurons are independent of each other, and of dV.

In neuron norms: with `std = c |W|` and no bias, `E da_i^2 <= c^2 max_k x_k^2 |w_i|^2`, so to first order in c the
output moves by at most `c max|x| sqrt(sum_i |w_i|^2 |V_i|^2)`: each neuron by the product of norms that MaxNNScore is
made of.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64

from hetmoe.analog.second_moment import Moments, OutputMoments, linear_second_moment, output_moments

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class TwoLayer:
    """Weights of an expert in float64."""

    up: Float64[Array, "inputs neurons"]
    down: Float64[Array, "neurons outputs"]


@dataclasses.dataclass(frozen=True)
class TwoLayerNoise:
    """Moments of the deviations of its weights."""

    up: Moments
    down: Moments


def two_layer(x: Float64[Array, "tokens inputs"], expert: TwoLayer) -> Float64[Array, "tokens outputs"]:
    """What the expert makes of the inputs."""
    return np.maximum(x @ expert.up, 0) @ expert.down


def two_layer_second_moment(
    x: Float64[Array, "tokens inputs"], expert: TwoLayer, noise: TwoLayerNoise
) -> OutputMoments:
    """Bounds `|E df|` and `sqrt(E |df|^2)` for every token."""
    active = x @ expert.up
    mean, square = np.abs(x @ noise.up.mean), linear_second_moment(x, noise.up)
    root = np.sqrt(square)
    beyond = np.divide(square, np.abs(active), out=root.copy(), where=np.abs(active) > root)
    first_order = np.where(active > 0, mean, 0.0)
    return output_moments(
        np.maximum(active, 0), np.minimum(first_order + beyond, root), root, expert.down, noise.down
    )  # fmt: skip
