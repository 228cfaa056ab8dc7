"""The steps and zeros that round-to-nearest needs and other quantisers start from, and the codes nearest to weights.

Weights come in groups, `[..., groups, group, N]` in float32 (`grouped`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Float16, UInt8

from hetmoe.errors import InputError
from hetmoe.quantize.grid import Grid, zero_or_middle

# No grid needs a step above twice the largest magnitude, and float16 ends at 65,504.
LARGEST_WEIGHT = 32752.0


def check_weights(w: Array, grid: Grid, name: str) -> None:
    """Refuses weights that cannot be quantized; values only where they are known, not while JAX traces.

    Args:
        w: weights, `[..., K, N]`.
        grid: whose groups must divide K.
        name: of the matrix, for messages.

    Raises:
        InputError: for fewer than two axes, another dtype than a float, K that the group does not divide, values that
            are NaN, infinite, or beyond 32,752, whose steps float16 may not hold.
    """
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise InputError(f"{name} is {w.dtype}{list(w.shape)}: weights must be floats of shape [..., inputs, outputs]")
    try:
        grid.groups_of(w.shape[-2])
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if isinstance(w, Tracer) or w.size == 0:
        return
    with jax.ensure_compile_time_eval():  # also for a known array in a function that is being traced
        # Not by the maximum: on CPU some vectorised forms of it lose NaN.
        usable = bool(jnp.all(jnp.abs(w) <= LARGEST_WEIGHT))
    if not usable:
        where = np.argwhere(~(np.abs(np.asarray(w, np.float32)) <= LARGEST_WEIGHT))
        first = ", ".join(map(str, where[0]))
        raise InputError(
            f"{name} has {len(where)} weights that are NaN, infinite or beyond {LARGEST_WEIGHT:,.0f} "
            f"(the first at [{first}]): repair the checkpoint"
        )


def grouped(w: Float[Array, "*lead K N"], grid: Grid) -> Float[Array, "*lead groups group N"]:
    """The rows of every column in groups, float32."""
    *lead, rows, columns = w.shape
    return w.astype(jnp.float32).reshape(*lead, grid.groups_of(rows), grid.group, columns)


def smallest_step(
    groups: Float[Array, "*lead groups group N"], grid: Grid
) -> tuple[Float16[Array, "*lead groups N"], Float16[Array, "*lead groups N"] | None]:
    """The smallest step of every group, with its zero, for which no weight (nor 0) is beyond half a step of a level.

    Levels and half a step on either side cover `2**bits` steps. Symmetric: from -2**(bits - 1) to 2**(bits - 1) steps.
    Asymmetric, with a whole zero z: from -(z + 1/2) to 2**bits - z - 1/2 steps, with the z that needs the smallest
    step. So the outermost weights lie half a step outside the outermost levels, where a step of (largest - smallest) /
    (2**bits - 1) would put them on these; that step is larger, with the same bound of half of it.

    Steps are rounded up to float16, also to its subnormal numbers (multiples of 2**-24): a group of weights so small
    is coded more coarsely, but within half of the step that is stored. The step is 0 where all weights are.

    Returns:
        Steps, and zeros between 0 and 2**bits - 1, or None for a symmetric grid.
    """
    low = jnp.minimum(jnp.min(groups, axis=-2), 0)
    high = jnp.maximum(jnp.max(groups, axis=-2), 0)
    if grid.symmetric:
        return _round_up(jnp.maximum(-low, high) / 2 ** (grid.bits - 1)), None
    span = jnp.where(high > low, high - low, 1)
    below = jnp.floor(2**grid.bits * (-low / span) - 0.5)  # the best z if it need not be whole, rounded down

    def step(zero: Array) -> Array:
        return jnp.maximum(-low / (zero + 0.5), high / (2**grid.bits - zero - 0.5))

    zeros = [jnp.clip(below, 0, grid.largest), jnp.clip(below + 1, 0, grid.largest)]
    zero = jnp.where(step(zeros[0]) <= step(zeros[1]), *zeros)
    return _round_up(step(zero)), zero.astype(jnp.float16)


def nearest_codes(
    groups: Float[Array, "*lead groups group N"],
    scale: Float16[Array, "*lead groups N"],
    zero: Float16[Array, "*lead groups N"] | None,
    grid: Grid,
) -> UInt8[Array, "*lead groups group N"]:
    """The codes nearest to weights for the stored steps and zeros."""
    return round_codes(groups, scale[..., None, :], zero_or_middle(scale, zero, grid)[..., None, :], grid)


def round_codes(w: Array, scale: Array, zero: Array, grid: Grid) -> Array:
    """The codes nearest to weights, elementwise; zeros in float32."""
    return jnp.clip(jnp.round(w / divisor(scale) + zero), 0, grid.largest).astype(jnp.uint8)


def divisor(scale: Array) -> Array:
    """Steps in float32 to divide by: 1 instead of 0, where all weights of the group are 0."""
    return jnp.where(scale > 0, scale, 1).astype(jnp.float32)


def _round_up(step: Array) -> Array:
    rounded = step.astype(jnp.float16)
    return jnp.where(rounded.astype(jnp.float32) < step, jnp.nextafter(rounded, jnp.float16(jnp.inf)), rounded)
