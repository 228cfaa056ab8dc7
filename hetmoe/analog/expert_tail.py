"""What an expert's output error exceeds with at most a given probability, in the devices' normals.

`f(x) = V^T h` with neurons h, `dh` their move, and `df = V^T dh + dV^T h + dV^T dh`. Every term is bounded with a share
of the probability, by the concentration of `hetmoe.analog.error_tail`; shares add up (union bound).

- `|V^T dh| <= ||V|| |dh|` with the spectral norm.
- `dV^T h`: one matrix, a fixed input.
- `dV^T dh`: dV does not depend on dh. Given dh, its root mean square is at most
  `|dh| sqrt(||B||^2 + max_i sum_o v_io)` with dV's mean B and variances v, and its Lipschitz constant `|dh| max L`.

Two-layer ReLU experts: `|dh| <= |da|`, one matrix. And `|V^T dh|` itself has the Lipschitz constant `||V|| L_a` in the
normals, with that of |da|, so that the first term is also at most its root mean square plus what concentration adds.

SwiGLU experts, with SiLU's steepest slope L: `dh = ds u + silu(a) du + ds du`, so that
`|dh| <= L |u da| + |silu(a) du| + L |da| |du|`: matrices whose outputs are weighed by fixed factors, and two norms.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from hetmoe.analog.error_tail import check_delta, draw_slopes, linear_tail
from hetmoe.analog.second_moment import ExpertNoise, Moments
from hetmoe.analog.spec import AnalogSpec
from hetmoe.analog.two_layer import TwoLayer, TwoLayerNoise, two_layer_second_moment
from hetmoe.quantize.bounds.expert import Expert, activations
from hetmoe.quantize.bounds.inputs import check_same_shape
from hetmoe.quantize.bounds.matrix_norms import spectral_norm
from hetmoe.quantize.bounds.rounding import widened
from hetmoe.quantize.bounds.silu import STEEPEST, silu

Array = np.ndarray


class TwoLayerSlopes(NamedTuple):
    """`draw_slopes` of both matrices."""

    up: Float64[Array, "inputs neurons"]
    down: Float64[Array, "neurons outputs"]


class ExpertSlopes(NamedTuple):
    """`draw_slopes` of the three matrices."""

    gate: Float64[Array, "hidden inner"]
    up: Float64[Array, "hidden inner"]
    down: Float64[Array, "inner hidden"]


def two_layer_slopes(expert: TwoLayer, spec: AnalogSpec) -> TwoLayerSlopes:
    """Of an expert on these devices, right after programming."""
    return TwoLayerSlopes(*(draw_slopes(w, spec) for w in (expert.up, expert.down)))


def expert_slopes(expert: Expert, spec: AnalogSpec) -> ExpertSlopes:
    """Likewise."""
    return ExpertSlopes(*(draw_slopes(w, spec) for w in expert.matrices))


def two_layer_tail(
    x: Float64[Array, "tokens inputs"], expert: TwoLayer, noise: TwoLayerNoise, slopes: TwoLayerSlopes, delta: float
) -> Float64[Array, "tokens"]:
    """What |df| of a two-layer ReLU expert exceeds with a probability of at most delta, for each token by itself.

    Raises:
        InputError: unless `0 < delta < 1`; for inputs that are not finite, or shapes that do not fit.
    """
    check_delta(delta)
    each = delta / 4
    still = np.zeros_like(noise.down.mean)
    rms = two_layer_second_moment(x, expert, TwoLayerNoise(noise.up, Moments(still, still))).rms
    moved = linear_tail(x, noise.up, slopes.up, each)
    norm, steepest = spectral_norm(expert.down), np.sqrt(np.max(np.square(x) @ np.square(slopes.up), axis=1))
    kept = np.minimum(norm * moved, rms + _reach(each) * norm * steepest)
    last = _of_last_layer(np.maximum(x @ expert.up, 0), moved, noise.down, slopes.down, each)
    return widened(kept + last)


def expert_tail(
    x: Float64[Array, "tokens hidden"], expert: Expert, noise: ExpertNoise, slopes: ExpertSlopes, delta: float
) -> Float64[Array, "tokens"]:
    """What |df| of a SwiGLU expert exceeds with a probability of at most delta, for each token by itself.

    Raises:
        InputError: as `two_layer_tail`.
    """
    check_delta(delta)
    noise.check(expert)
    each, clean = delta / 6, activations(x, expert)
    gate = linear_tail(x, noise.gate, slopes.gate, each, weights=np.abs(clean.up))
    up = linear_tail(x, noise.up, slopes.up, each, weights=np.abs(silu(clean.gate)))
    both = linear_tail(x, noise.gate, slopes.gate, each) * linear_tail(x, noise.up, slopes.up, each)
    moved = STEEPEST * gate + up + STEEPEST * both
    last = _of_last_layer(clean.hidden, moved, noise.down, slopes.down, each)
    return widened(spectral_norm(expert.down) * moved + last)


def _of_last_layer(hidden: Array, moved: Array, noise: Moments, slopes: Array, each: float) -> Array:
    """Bounds `|dV^T (h + dh)|` with twice the probability `each`, given `|dh| <= moved`."""
    check_same_shape("slopes of the last layer", slopes, "its noise", noise.mean)
    root = math.sqrt(spectral_norm(noise.mean) ** 2 + float(noise.variance.sum(axis=1).max()))
    return linear_tail(hidden, noise, slopes, each) + moved * (root + _reach(each) * float(slopes.max()))


def _reach(delta: float) -> float:
    return math.sqrt(2 * math.log(1 / delta))
