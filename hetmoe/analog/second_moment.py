"""Bounds of what independent noise in the weights does to outputs, in the mean over the noise.

Deviations of different weights are independent, of mean b and variance v (the device's own, after clipping). What is
said of one matrix is exact; of a SwiGLU expert it is an upper bound, in exact arithmetic.

With `f(x) = D^T h`, `h = silu(a) u`, `a = G^T x`, `u = U^T x` and deviations da, du, dD:

    dh = ds u + silu(a) du + ds du,        ds = silu(a + da) - silu(a),
    df = D^T dh + dD^T (h + dh).

- da and du have exact first and second moments, and do not depend on each other; `|ds| <= L |da|` with the steepest
  slope L of SiLU, and `|E ds| <= |silu'(a)| |E da| + E da^2 / 4`, since `|silu''| <= 1/2`. So (Minkowski's inequality)
  `rms(dh) <= L rms(da) |u| + |silu(a)| rms(du) + L rms(da) rms(du)`, and likewise `|E dh|`.
- Neurons are independent: `E |D^T dh|^2 <= |D^T E dh|^2 + sum_i E dh_i^2 |D_i|^2`.
- dD does not depend on dh: with its mean B and row sums of variances V, `E |dD^T h'|^2 = E |B^T h'|^2 + sum_i V_i E
  h'_i^2` for `h' = h + dh`. Its mean part adds to the one above (Cauchy-Schwarz), its variance is uncorrelated with it.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64

from hetmoe.errors import InputError
from hetmoe.quantize.bounds.expert import Activations, Expert
from hetmoe.quantize.bounds.inputs import check_finite, check_inputs, check_same_shape
from hetmoe.quantize.bounds.matrix_norms import spectral_norm
from hetmoe.quantize.bounds.rounding import widened
from hetmoe.quantize.bounds.silu import STEEPEST, silu, slope

Array = np.ndarray
MOST_CURVED = 0.5  # |silu''|, at 0: silu'' = s (1 - s) (2 + z (1 - 2 s)) with s(0) = 1/2


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and variance of the deviation of every weight of a matrix `[K, N]`, float64.

    Raises:
        InputError: for shapes that differ, values that are not finite, or negative variances.
    """

    mean: Float64[Array, "K N"]
    variance: Float64[Array, "K N"]

    def __post_init__(self) -> None:
        check_finite("mean", self.mean, "K N")
        check_finite("variance", self.variance, "K N")
        check_same_shape("mean", self.mean, "variance", self.variance)
        if (self.variance < 0).any():
            raise InputError(f"variance has a negative value, {self.variance.min()}")


def linear_second_moment(x: Float64[Array, "tokens K"], noise: Moments) -> Float64[Array, "tokens N"]:
    """`E (dW^T x)_j^2 = (sum_i b_ij x_i)^2 + sum_i v_ij x_i^2`, exactly.

    Raises:
        InputError: for inputs that are not finite `[tokens, K]`.
    """
    check_inputs(x, len(noise.mean))
    return np.square(x @ noise.mean) + np.square(x) @ noise.variance


@dataclasses.dataclass(frozen=True)
class ExpertNoise:
    """Moments of the deviations of one expert's weights."""

    gate: Moments
    up: Moments
    down: Moments

    def check(self, expert: Expert) -> None:
        """Raises InputError unless they are of matrices of these shapes."""
        for name in ("gate", "up", "down"):
            check_same_shape(f"noise.{name}", getattr(self, name).mean, f"expert.{name}", getattr(expert, name))


@dataclasses.dataclass(frozen=True)
class OutputMoments:
    """Bounds of the change of an expert's output, one for each token."""

    mean: Float64[Array, "tokens"]  # of |E df|
    rms: Float64[Array, "tokens"]  # of sqrt(E |df|^2)


def expert_second_moment(
    x: Float64[Array, "tokens hidden"], clean: Activations, expert: Expert, noise: ExpertNoise
) -> OutputMoments:
    """Bounds for a SwiGLU expert whose three matrices are noisy.

    Args:
        x: inputs.
        clean: what the expert makes of them (`hetmoe.quantize.bounds.expert.activations`).
        expert: its weights.
        noise: of its weights.

    Raises:
        InputError: for shapes that do not fit, or inputs that are not finite.
    """
    noise.check(expert)
    check_inputs(x, len(expert.gate))
    if clean.gate.shape != (len(x), expert.gate.shape[1]):
        raise InputError(
            f"activations of {list(clean.gate.shape)} are not those of {len(x)} tokens and {expert.gate.shape[1]} "
            "neurons: give activations(x, expert)"
        )
    da_mean, du_mean = np.abs(x @ noise.gate.mean), np.abs(x @ noise.up.mean)
    da_square, du_square = linear_second_moment(x, noise.gate), linear_second_moment(x, noise.up)
    da, du, s, u = np.sqrt(da_square), np.sqrt(du_square), np.abs(silu(clean.gate)), np.abs(clean.up)
    dh = STEEPEST * da * (u + du) + s * du
    ds_mean = np.minimum(np.abs(slope(clean.gate)) * da_mean + MOST_CURVED / 2 * da_square, STEEPEST * da)
    dh_mean = ds_mean * (u + du_mean) + s * du_mean
    return output_moments(clean.hidden, dh_mean, dh, expert.down, noise.down)


def output_moments(
    hidden: Float64[Array, "tokens neurons"],
    moved_mean: Float64[Array, "tokens neurons"],
    moved: Float64[Array, "tokens neurons"],
    down: Float64[Array, "neurons outputs"],
    noise: Moments,
) -> OutputMoments:
    """Bounds for the output of a last layer whose inputs move and whose weights are noisy.

    Args:
        hidden: outputs of the neurons without noise.
        moved_mean: bounds of `|E dh|`.
        moved: bounds of `sqrt(E dh^2)`; neurons move independently of each other and of the last layer.
        down: its weights.
        noise: of its weights.
    """
    size, bias = np.abs(hidden), noise.mean
    mean_kept = _mean_part(moved_mean, down)
    mean_moved = np.linalg.norm(hidden @ bias, axis=1) + _mean_part(moved_mean, bias)
    kept = np.sqrt(np.square(mean_kept) + np.square(moved) @ np.square(down).sum(axis=1))
    all_moved = np.linalg.norm(hidden @ bias, axis=1) + np.sqrt(
        np.square(_mean_part(moved_mean, bias)) + np.square(moved) @ np.square(bias).sum(axis=1)
    )
    spread = np.square(size + moved) @ noise.variance.sum(axis=1)
    return OutputMoments(
        mean=widened(mean_kept + mean_moved), rms=widened(np.sqrt(np.square(kept + all_moved) + spread))
    )  # fmt: skip


def _mean_part(mean: Float64[Array, "tokens inner"], matrix: Float64[Array, "inner hidden"]) -> Array:
    """Bounds `|M^T e|` for every e with `|e_i| <= mean_i`."""
    by_neuron = mean @ np.linalg.norm(matrix, axis=1)
    return np.minimum(by_neuron, np.linalg.norm(mean, axis=1) * spectral_norm(matrix))


def sum_second_moment(
    weights: Float64[Array, "tokens copies"],
    mean: Float64[Array, "tokens copies"],
    rms: Float64[Array, "tokens copies"],
) -> Float64[Array, "tokens"]:
    """Bounds `sqrt(E |sum_e g_e df_e|^2)` of a weighted sum of experts whose noise is independent of each other's.

    `E |Z|^2 = |E Z|^2 + Var Z`, and variances of independent terms add up. An expert whose change is not random has
    the same bound as mean and, in variance, none: give its bound as `mean` and 0 as `rms`.

    Args:
        weights: routing weights.
        mean: bounds of `|E df_e|`.
        rms: bounds of `sqrt(E |df_e|^2)`, which bound the standard deviation.
    """
    weights = np.abs(weights)
    return widened(np.sqrt(np.square(np.sum(weights * mean, axis=1)) + np.sum(np.square(weights * rms), axis=1)))
