"""Bounds of what independent noise in the weights does to two-layer ReLU experts `f(x) = V^T relu(W^T x)`.

As `hetmoe.analog.second_moment` does for SwiGLU experts. With `a = W^T x`, `h = relu(a)` and deviations dW, dV,

    df = V^T dh + dV^T (h + dh),        dh = relu(a + da) - relu(a).

- First order: where a > 0 a neuron passes `da` on, else nothing. The remainder is not 0 only where da has the other
  sign than a and is larger, and is `|da| - |a|` there, which is at most `da^2 / (4 |a|)` (`(|da| - 2 |a|)^2 >= 0`). So
  `|E dh| <= 1{a > 0} |E da| + E da^2 / (4 |a|)`. ReLU's Lipschitz constant is 1, so that `E dh^2 <= E da^2`.
- What is left is as for SwiGLU: neurons are independent of each other, and of dV.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64

from hetmoe.analog.second_moment import Moments, OutputMoments, linear_second_moment, output_moments
from hetmoe.errors import InputError
from hetmoe.quantize.bounds.inputs import check_finite, check_inputs, check_network, check_same_shape
from hetmoe.quantize.bounds.rounding import widened

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class TwoLayer:
    """Weights of an expert in float64.

    Raises:
        InputError: for shapes that do not fit, or values that are not finite.
    """

    up: Float64[Array, "inputs neurons"]
    down: Float64[Array, "neurons outputs"]

    def __post_init__(self) -> None:
        check_network(up=self.up, down=self.down)


@dataclasses.dataclass(frozen=True)
class TwoLayerNoise:
    """Moments of the deviations of its weights."""

    up: Moments
    down: Moments

    def check(self, expert: TwoLayer) -> None:
        """Raises InputError unless they are of matrices of these shapes."""
        for name in ("up", "down"):
            check_same_shape(f"noise.{name}", getattr(self, name).mean, f"expert.{name}", getattr(expert, name))


def two_layer(x: Float64[Array, "tokens inputs"], expert: TwoLayer) -> Float64[Array, "tokens outputs"]:
    """What the expert makes of the inputs.

    Raises:
        InputError: for inputs that are not finite, or do not fit.
    """
    check_inputs(x, len(expert.up))
    return np.maximum(x @ expert.up, 0) @ expert.down


def two_layer_second_moment(
    x: Float64[Array, "tokens inputs"], expert: TwoLayer, noise: TwoLayerNoise
) -> OutputMoments:
    """Bounds `|E df|` and `sqrt(E |df|^2)` for every token.

    Raises:
        InputError: for inputs that are not finite, or shapes that do not fit.
    """
    check_inputs(x, len(expert.up))
    noise.check(expert)
    active = x @ expert.up
    mean, square = np.abs(x @ noise.up.mean), linear_second_moment(x, noise.up)
    root = np.sqrt(square)
    beyond = np.divide(square, 4 * np.abs(active), out=root.copy(), where=4 * np.abs(active) > root)
    first_order = np.where(active > 0, mean, 0.0)
    return output_moments(
        np.maximum(active, 0), np.minimum(first_order + beyond, root), root, expert.down, noise.down
    )  # fmt: skip


def two_layer_change_bound(
    x: Float64[Array, "tokens inputs"],
    expert: TwoLayer,
    up_change: Float64[Array, "inputs neurons"],
    down_change: Float64[Array, "neurons outputs"],
) -> Float64[Array, "tokens"]:
    """Bounds |df| if no weight changes by more than is given, such as `half_steps` of a rounded matrix.

    `|da| <= H^T |x|` and `|dh| <= |da|`, neuron by neuron; `|df| <= |V|^T |dh| + H_V^T (|h| + |dh|)`, output by output.

    Raises:
        InputError: for values that are not finite, changes that are negative, or shapes that do not fit.
    """
    for name, change, matrix in (("up", up_change, expert.up), ("down", down_change, expert.down)):
        check_finite(f"{name}_change", change, "K N")
        check_same_shape(f"{name}_change", change, name, matrix)
        if (change < 0).any():
            raise InputError(f"{name}_change has a negative value, {change.min()}: give magnitudes")
    check_inputs(x, len(expert.up))
    moved, hidden = np.abs(x) @ up_change, np.maximum(x @ expert.up, 0)
    outputs = moved @ np.abs(expert.down) + (hidden + moved) @ down_change
    return widened(np.linalg.norm(outputs, axis=1))
