"""Digital-to-analog and analog-to-digital converters: symmetric, uniform, half-to-even, straight-through.

The arithmetic is that of aihwkit-lightning 2.x (`inp_res=254, out_res=254` for 8 bits): `2**bits - 2` steps over
[-range, range], so 8 bits have the codes -127 ... 127.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hetmoe.errors import InputError


def steps(bits: int) -> int:
    """Number of converter steps over the whole range, `2**bits - 2`.

    Raises:
        InputError: for bits that are not a whole number from 2 to 16.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise InputError(f"converter bits={bits!r} must be a whole number from 2 to 16, or None for an ideal converter")
    return 2**bits - 2


@jax.custom_jvp
def round_half_even(x: Array) -> Array:
    """Rounds to the nearest integer, ties to even; its derivative is that of the identity (straight-through)."""
    return jax.lax.round(x, jax.lax.RoundingMethod.TO_NEAREST_EVEN)


@round_half_even.defjvp
def _round_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return round_half_even(primals[0]), tangents[0]


def step_size(bound: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    """`2 * bound / steps`, correctly rounded; 1 where that is zero or subnormal (values are then clipped to zero)."""
    step = divide(2.0 * bound, jnp.float32(steps(bits)))
    return jnp.where(step >= np.finfo(np.float32).tiny, step, 1.0)


def convert(x: Float[Array, "..."], bound: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    """DAC: clips to [-bound, bound], then rounds to the nearest level; `bound` (the range) broadcasts against `x`."""
    step = step_size(bound, bits)
    return round_half_even(divide(jnp.clip(x, -bound, bound), step)) * step


def convert_output(y: Float[Array, "..."], bound: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    """ADC: rounds to the nearest level, then clips to [-bound, bound].

    The order matters in the last bit: `steps / 2` times the step may differ from the bound by a rounding error, and a
    saturated output is the bound itself.
    """
    step = step_size(bound, bits)
    return _saturate(round_half_even(divide(y, step)) * step, y, jnp.broadcast_to(bound, y.shape))


@jax.custom_jvp
def _saturate(level: Array, y: Array, bound: Array) -> Array:
    """Clips a level to its bound; straight-through where `y` is inside, also if its level is the bound itself."""
    del y
    return jnp.clip(level, -bound, bound)


@_saturate.defjvp
def _saturate_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    level, y, bound = primals
    inside = jnp.abs(y) < bound
    return _saturate(level, y, bound), jnp.where(inside, tangents[0], jnp.sign(y) * tangents[2])


def divide(x: Array, step: Array) -> Array:
    """`x / step`, correctly rounded on every backend.

    XLA on CPU turns division by a broadcast value into multiplication by its reciprocal, which is one bit off in 41 %
    of quotients and flips half of the exact ties; a barrier on the broadcast divisor prevents it.
    """
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(step, x.shape))
