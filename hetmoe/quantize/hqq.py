"""Half-quadratic quantization, which needs no calibration data."""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from hetmoe.quantize.grid import Grid, Quantized, zero_or_middle
from hetmoe.quantize.steps import check_weights, divisor, grouped, nearest_codes, smallest_step

# The defaults of the authors' implementation (github.com/mobiusml/hqq, `hqq/core/optimize.py`).
LP_NORM, BETA, KAPPA, ITERATIONS = 0.7, 10.0, 1.01, 20


def half_quadratic(w: Float[Array, "*lead K N"], grid: Grid, *, name: str = "w") -> Quantized:
    """Zeros (or steps) that lower the sum of `|w - dequantized|**0.7` in each group.

    Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023,
    mobiusml.github.io/hqq_blog). With the codes of the current zero z and step s, and the errors r that they leave,
    outliers are split off the errors, `e = sign(r) max(0, |r| - |r|**(p - 1) / beta)`, and the zero becomes the mean
    over the group of `code - (w - e) / s`; beta grows by 1.01 in each of at most 20 rounds. With the published beta of
    10, errors below 0.17 (all of an ordinary language model) are no outliers: e is 0.

    What differs from the authors' code:
    - It starts from round-to-nearest's step and zero (`smallest_step`), not from the group's smallest and largest
      weight, and a round that does not lower a group's error is undone and ends that group. (There the mean of `|r|`
      over the whole tensor decides.) So no group's error is above round-to-nearest's, and groups do not depend on
      each other.
    - Zeros are rounded to float16 before codes are chosen for them.
    - A symmetric grid has no zero to improve. Its steps are improved instead, with the same split: s becomes the least
      squares solution of `(code - middle) s = w - e`.

    Asymmetric steps stay round-to-nearest's, as in the source; at 1 bit, where one level is 0 and the other lies beyond
    all weights of a group with both signs, a symmetric grid is much better.

    Args:
        w: weights, any float dtype.
        grid: what to quantize to.
        name: of the matrix, for messages.

    Raises:
        InputError: as `check_weights`.
    """
    check_weights(w, grid, name)
    return _half_quadratic(w, grid)


@struct.dataclass
class _State:
    """Steps and zeros so far, their errors, and which groups go on, each `[..., groups, N]`."""

    round: Array
    scale: Array
    zero: Array | None
    error: Array
    active: Array


@functools.partial(jax.jit, static_argnames="grid")
def _half_quadratic(w: Array, grid: Grid) -> Quantized:
    groups = grouped(w, grid)
    scale, zero = smallest_step(groups, grid)
    error = _error(groups, scale, zero, grid)
    first = _State(
        round=jnp.zeros((), jnp.int32), scale=scale, zero=zero, error=error, active=jnp.ones(error.shape, bool)
    )

    def goes_on(state: _State) -> Array:
        return (state.round < ITERATIONS) & jnp.any(state.active)

    def one_round(state: _State) -> _State:
        scale, zero = _improved(groups, state, grid)
        error = _error(groups, scale, zero, grid)
        better = state.active & (error < state.error)

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(better, new, old)

        return _State(
            round=state.round + 1,
            scale=keep(scale, state.scale),
            zero=None if zero is None or state.zero is None else keep(zero, state.zero),
            error=keep(error, state.error),
            active=better,
        )

    last = jax.lax.while_loop(goes_on, one_round, first)
    codes = nearest_codes(groups, last.scale, last.zero, grid).reshape(w.shape)
    return Quantized(codes=codes, scale=last.scale, zero=last.zero, grid=grid)


def _improved(groups: Array, state: _State, grid: Grid) -> tuple[Array, Array | None]:
    """Steps and zeros after one more round."""
    codes, rest = _codes_and_rest(groups, state.scale, state.zero, grid)
    beta = BETA * KAPPA ** state.round.astype(jnp.float32)
    outlier = jnp.sign(rest) * jnp.maximum(jnp.abs(rest) - jnp.abs(rest) ** (LP_NORM - 1) / beta, 0)
    target = groups - outlier
    if state.zero is None:
        level = codes - grid.largest / 2  # never 0
        scale = jnp.sum(level * target, axis=-2) / jnp.sum(jnp.square(level), axis=-2)
        return scale.astype(jnp.float16), None
    zero = jnp.mean(codes - target / divisor(state.scale)[..., None, :], axis=-2)
    return state.scale, zero.astype(jnp.float16)


def _error(groups: Array, scale: Array, zero: Array | None, grid: Grid) -> Array:
    """Sum of `|w - dequantized|**0.7` over each group."""
    return jnp.sum(jnp.abs(_codes_and_rest(groups, scale, zero, grid)[1]) ** LP_NORM, axis=-2)


def _codes_and_rest(groups: Array, scale: Array, zero: Array | None, grid: Grid) -> tuple[Array, Array]:
    """Codes in float32, and what weights are more than their levels."""
    codes = nearest_codes(groups, scale, zero, grid).astype(jnp.float32)
    levels = (codes - zero_or_middle(scale, zero, grid)[..., None, :]) * scale.astype(jnp.float32)[..., None, :]
    return codes, groups - levels
