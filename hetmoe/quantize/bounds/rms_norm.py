"""How far a root-mean-square norm moves when its input does."""

import numpy as np
from jaxtyping import Float64

from hetmoe.quantize.bounds.rounding import rounding, widened

Array = np.ndarray


def rms_norm(x: Float64[Array, "*batch width"], eps: float) -> Float64[Array, "*batch width"]:
    """`x / sqrt(mean(x^2) + eps)`, without a gain."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps)


def lifted_length(x: Float64[Array, "*batch width"], eps: float) -> Float64[Array, "*batch"]:
    """`sqrt(|x|^2 + width eps)`: the length of x with `sqrt(width eps)` as one more element.

    The norm of x is `sqrt(width)` times the direction of this longer vector, without that element.
    """
    return np.sqrt(np.sum(np.square(x), axis=-1) + x.shape[-1] * eps)


def norm_change(
    x: Float64[Array, "*batch width"], radius: Float64[Array, "*batch"], eps: float
) -> Float64[Array, "*batch"]:
    """Bounds the change of `rms_norm(x)` for any change of x of at most `radius`, in Euclidean norm.

    Two vectors whose distance is at most r times the first one's length, r < 1, enclose an angle of at most arcsin(r),
    and their directions differ by the chord of that, `2 sin(arcsin(r) / 2)`. (It is reached, and below the bound
    `2 r / (2 - r)` that the inequality of Dunkl and Williams gives.) No two directions differ by more than 2.
    """
    sine = radius / lifted_length(x, eps)
    chord = np.where(sine < 1, 2 * np.sin(np.arcsin(np.minimum(sine, 1)) / 2), 2.0)
    width = x.shape[-1]
    return np.sqrt(width) * (np.minimum(widened(chord), 2.0) + rounding(width, 1.0))
