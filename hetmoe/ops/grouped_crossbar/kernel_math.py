"""Arithmetic inside the kernels, in operations that lower for TPU and for NVIDIA GPUs.

The values are those of `hetmoe.analog.converters`, but for what the compilers offer:

* There is no rounding on the GPU, and adding and subtracting 1.5 * 2**23 is simplified away by XLA: it is put together
  from floors.
* Minimum and maximum of the GPU drop NaN, and a NaN must not become a number: clipping compares instead.
* Division may be a bit off (approximate on GPU), so that an exact tie may go to the other code.
* Codes are multiplied instead of values, where they are exact in the weights' 2-byte dtype, and the step is put on the
  sum: the matrix unit then runs at its full rate, and every product is exact.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hetmoe.analog.converters import steps
from hetmoe.analog.devices import Device, GroupRange, Stream
from hetmoe.analog.random import bits_to_normal, matrix_counter, threefry2x32

_EXACT_CODES = {jnp.dtype(jnp.bfloat16): 2**8, jnp.dtype(jnp.float16): 2**11}  # integers up to these are exact
_TINY = float(np.finfo(np.float32).tiny)


def clip(x: Array, bound: Array | float) -> Array:
    """`x` within [-bound, bound]; NaN stays NaN."""
    return jnp.where(x > bound, bound, jnp.where(x < -bound, -bound, x))


def round_half_even(x: Array) -> Array:
    """To the nearest integer, ties to even; exact below 2**23, where both differences are."""
    below = jnp.floor(x)
    rest = x - below
    is_odd = below - 2.0 * jnp.floor(below * 0.5) > 0.5
    up = (rest > 0.5) | ((rest == 0.5) & is_odd)
    return below + jnp.where(up, 1.0, 0.0)


def step_size(bound: Array, bits: int) -> Array:
    """As `hetmoe.analog.converters.step_size`; NaN for a bound of NaN, so that it reaches the output."""
    step = (2.0 * bound) / np.float32(steps(bits))
    return jnp.where(step < _TINY, 1.0, step)


def operand_dtype(x: jnp.dtype, w: jnp.dtype, dac_bits: int | None) -> jnp.dtype:
    """Dtype of both factors of the matmul: the 2-byte dtype of inputs and weights if it holds them exactly."""
    if x == w and x in _EXACT_CODES and (dac_bits is None or steps(dac_bits) // 2 <= _EXACT_CODES[x]):
        return x
    return jnp.dtype(jnp.float32)


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Float32 factors would otherwise be cut to TF32 or bfloat16; 2-byte ones are exact as they are."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def dac_codes(x: Array, bound: Array, bits: int) -> Array:
    """Codes of the inputs, whole numbers in float32; times `step_size(bound, bits)` they are the converted inputs."""
    return round_half_even(clip(x.astype(jnp.float32), bound) / step_size(bound, bits))


def adc(y: Array, bound: Array, bits: int) -> Array:
    """As `hetmoe.analog.converters.convert_output`."""
    step = step_size(bound, bits)
    # One code beyond the last one is as saturated as any.
    code = round_half_even(clip(y / step, float(steps(bits) // 2 + 1)))
    return clip(code * step, bound)


def programmed_block(
    w: Array,
    device: Device,
    scale: GroupRange,
    *,
    rows: Array,
    columns: Array,
    width: int,
    words: Callable[[Stream], tuple[Array, Array]],
    noise_scale: Array,
    time_s: Array | None,
    factor: Array | None,
) -> Array:
    """A block of clean weights as `hetmoe.analog.programming.program_matrix` programs it, in the dtype of `w`.

    Args:
        w: clean weights.
        device: noise model.
        scale: of its scale group, broadcast against `w`.
        rows: row numbers in the logical matrix, uint32, of w's shape.
        columns: column numbers likewise.
        width: columns of the logical matrix.
        words: the key words of a stream.
        noise_scale: c.
        time_s: seconds since programming, of w's shape; None = programming noise only.
        factor: of drift compensation, or None.
    """
    high, low = matrix_counter(rows, columns, width)

    def draw(stream: Stream) -> Array:
        first, second = threefry2x32(words(stream), high, low)
        return bits_to_normal(first ^ second)

    target = w.astype(jnp.float32)
    result = device.program(target, scale=scale, draw=draw, noise_scale=noise_scale, time_s=time_s).at_time
    return (result if factor is None else result * factor).astype(w.dtype)
