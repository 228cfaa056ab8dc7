"""A bound of what converters do to a product, given the weights that the crossbar holds.

Of one row-block with DAC range r and step s: an input is off by at most `s / 2`, and by what it exceeds r. So the
tile's output j is off by at most `d_j = sum_i e_i |w_ij|`. Its ADC of bound b and step t adds at most `t / 2`, and what
the output, which is at most `|y_j| + d_j`, exceeds b. Blocks add up.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hetmoe.analog.converters import steps
from hetmoe.analog.tiles import row_blocks
from hetmoe.errors import InputError
from hetmoe.ops.crossbar_matmul.base import CrossbarOptions

SINGLE = 2.0**-24  # unit roundoff of float32, in which crossbars are simulated


def converter_error_bound(
    x: Float[Array, "tokens K"],
    w: Float[Array, "rows N"],
    *,
    input_range: Float[Array, "blocks"] | None,
    adc_bound: float,
    options: CrossbarOptions,
) -> np.ndarray:
    """Bounds `|crossbar_matmul(x, w) - x @ w|`, output by output; float64 `[tokens, N]`.

    Args:
        x: inputs.
        w: weights as programmed.
        input_range: DAC range of every row-block; None = `max|x|` of each token and row-block.
        adc_bound: lambda.
        options: converters and tiles; one that is None is ideal.

    Holds where steps are normal float32 numbers (of ranges above 1e-35).

    Raises:
        InputError: for shapes that do not fit, values that are not finite, ranges that are negative, or a lambda that
            is not positive.
    """
    wide, weights, ranges = _checked(x, w, input_range, options)
    adc_bound = float(adc_bound)
    if not 0 < adc_bound < float("inf"):
        raise InputError(f"adc_bound={adc_bound!r} must be positive and finite")
    blocks = row_blocks(weights.shape[0], options.tile_rows)
    total = np.zeros((wide.shape[0], weights.shape[1]))
    for block, (start, size) in enumerate(blocks):
        part, tile = wide[:, start : start + size], weights[start : start + size]
        largest = np.abs(part).max(axis=1, keepdims=True)
        reach = largest if ranges is None else np.full_like(largest, ranges[block])
        size_of = np.abs(tile)
        moved = np.zeros((len(part), tile.shape[1]))
        if options.dac_bits is not None:
            each = np.minimum(reach / steps(options.dac_bits), np.abs(part)) + np.maximum(np.abs(part) - reach, 0)
            # An input within half a step of 0 becomes 0: it moves by no more than itself, or half a step.
            moved = np.where(reach > 0, each, np.abs(part)) @ size_of
        # Products and steps are those of float32: n terms and a handful of operations.
        rounding = (size + 16) * 2 * SINGLE * (np.abs(part) @ size_of + moved)
        if options.adc_bits is not None:
            axis = None if options.bound_axis == "tile" else 0
            bound = reach * adc_bound * size_of.max(axis=axis, keepdims=True)
            high = np.abs(part @ tile) + moved
            moved = moved + bound / steps(options.adc_bits) + np.maximum(high - bound, 0)
            rounding = rounding + 16 * SINGLE * bound
        total += moved + rounding
    return total


def _checked(
    x: Any, w: Any, input_range: Any, options: CrossbarOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(inputs, weights, ranges) in float64."""
    for name, values in (("x", x), ("w", w)):
        if np.asarray(values).dtype.kind not in "fiu" and np.asarray(values).dtype != jnp.bfloat16:
            raise InputError(f"{name} is {np.asarray(values).dtype}: it must be real numbers")
    if not isinstance(options, CrossbarOptions):
        raise InputError(f"options={options!r} must be CrossbarOptions, such as analog_spec(...).options")
    wide, weights = np.asarray(x, np.float64), np.asarray(w, np.float64)
    if wide.ndim != 2 or weights.ndim != 2 or wide.shape[1] != weights.shape[0]:
        raise InputError(
            f"x{list(wide.shape)} @ w{list(weights.shape)}: the last axis of x must equal the first of w[K, N]"
        )
    ranges = None if input_range is None else np.asarray(input_range, np.float64)
    blocks = row_blocks(weights.shape[0], options.tile_rows)
    if ranges is not None and ranges.shape != (len(blocks),):
        raise InputError(f"input_range has shape {list(ranges.shape)}: one range per row-block is [{len(blocks)}]")
    for name, values in (("x", wide), ("w", weights), ("input_range", ranges)):
        if values is not None and not np.isfinite(values).all():
            raise InputError(f"{name} has values that are not finite: nothing bounds what they become")
    if ranges is not None and (ranges < 0).any():
        raise InputError(f"input_range has a negative value, {ranges.min()}")
    return wide, weights, ranges
