"""Dense feed-forward networks and shared experts, which stay as they are while their inputs move."""

import dataclasses

import numpy as np
from jaxtyping import Float64
from scipy.special import expit

from hetmoe.models.params import FeedForward
from hetmoe.quantize.bounds.expert import Expert, Norms, activation_bound, activations, norms, unchanged
from hetmoe.quantize.bounds.rounding import rounding, widened

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class DenseNetwork:
    """A SwiGLU network, and the matrix `[hidden, 1]` of the sigmoid that multiplies its output, if there is one."""

    weights: Expert
    norms: Norms
    gate: Float64[Array, "hidden 1"] | None

    def out(self, x: Float64[Array, "tokens hidden"]) -> Float64[Array, "tokens hidden"]:
        """The output for inputs x."""
        out = activations(x, self.weights).out
        return out if self.gate is None else expit(x @ self.gate) * out

    def change(self, x: Float64[Array, "tokens hidden"], radius: Float64[Array, "tokens"]) -> Float64[Array, "tokens"]:
        """Bounds the change of the output if each input moves by at most `radius`.

        The sigmoid s rises with its logit, and `|s' f' - s f| <= s' |f' - f| + |s' - s| |f|`.
        """
        clean, size = activations(x, self.weights), np.linalg.norm(x, axis=1)
        change = activation_bound(unchanged(self.norms), clean, size, radius)
        if self.gate is None:
            return change
        logit, length = (x @ self.gate)[:, 0], float(np.linalg.norm(self.gate))
        reach = widened(radius * length + rounding(x.shape[1], (size + radius) * length))
        low, own, high = expit(logit - reach), expit(logit), expit(logit + reach)
        turned = widened(np.maximum(high - own, own - low)) + rounding(1, 1.0)
        size_out = widened(np.linalg.norm(clean.out, axis=1))
        return widened((own + turned) * change + turned * size_out) + rounding(2, size_out + change)


def dense_network(weights: FeedForward, gate: Array | None = None) -> DenseNetwork:
    """From weights in float64."""
    matrices = Expert(weights.gate, weights.up, weights.down)
    return DenseNetwork(matrices, norms(matrices), gate)
