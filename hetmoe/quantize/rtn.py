"""Round-to-nearest."""

import functools

import jax
from jaxtyping import Array, Float

from hetmoe.quantize.grid import Grid, Quantized
from hetmoe.quantize.steps import check_weights, grouped, nearest_codes, smallest_step


def round_to_nearest(w: Float[Array, "*lead K N"], grid: Grid, *, name: str = "w") -> Quantized:
    """Every weight as the nearest level of its group, whose step is the smallest that covers it (`smallest_step`).

    No weight moves by more than half of its group's step, up to rounding in float32 (at most `2**(bits - 22)` of a
    step, and weights below `2**bits` of float32's smallest normal number, 1.2e-38, may count as 0); weights of 0 in
    asymmetric grids, and groups in which all are 0, stay exactly 0.

    Args:
        w: weights, any float dtype.
        grid: what to quantize to.
        name: of the matrix, for messages.

    Raises:
        InputError: as `check_weights`.
    """
    check_weights(w, grid, name)
    return _round_to_nearest(w, grid)


@functools.partial(jax.jit, static_argnames="grid")
def _round_to_nearest(w: Array, grid: Grid) -> Quantized:
    groups = grouped(w, grid)
    scale, zero = smallest_step(groups, grid)
    codes = nearest_codes(groups, scale, zero, grid).reshape(w.shape)
    return Quantized(codes=codes, scale=scale, zero=zero, grid=grid)
