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


def gradient_dtype(x: jnp.dtype, w: jnp.dtype, dac_bits: int | None) -> jnp.dtype:
    """Dtype of both factors of the backward matmuls.

    bfloat16 where the forward pass multiplies in it; else float32, also for float16, whose range gradients may leave.
    """
    dtype = operand_dtype(x, w, dac_bits)
    return dtype if dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)


def gradient_parts(grad: Array, dtype: jnp.dtype) -> tuple[Array, ...]:
    """Float32 numbers that add up to a float32 gradient and are multiplied in `dtype`.

    Two for bfloat16, to within 2**-15 of the gradient: two products of the matrix unit, where one in float32 takes six
    on TPU and cannot use the GPU's. The first is cut off by its bits: XLA takes converting forth and back for nothing.
    """
    if dtype == jnp.float32:
        return (grad,)
    bits = jax.lax.bitcast_convert_type(grad, jnp.int32) & -(2**16)
    first = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return first, grad - first


def dot(x: Array, w: Array, dtype: jnp.dtype, contract: tuple[int, int] = (1, 0)) -> Array:
    """Product of two matrices in float32, with factors of `dtype`; `contract` names the axis of each that is summed."""
    return jax.lax.dot_general(
        x.astype(dtype),
        w.astype(dtype),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision(dtype),
        preferred_element_type=jnp.float32,
    )


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Float32 factors would otherwise be cut to TF32 or bfloat16; 2-byte ones are exact as they are."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def dac_codes(x: Array, bound: Array, bits: int) -> Array:
    """Codes of the inputs, whole numbers in float32; times `step_size(bound, bits)` they are the converted inputs."""
    return round_half_even(clip(x.astype(jnp.float32), bound) / step_size(bound, bits))


def passes_dac(x: Array, bound: Array) -> Array:
    """Whether an input is within its DAC's range or at it, and passes its gradient on."""
    return jnp.abs(x.astype(jnp.float32)) <= bound


def passes_adc(y: Array, bound: Array) -> Array:
    """Whether a sum is within its ADC's bound, as int8: what the gradient of the conversion is multiplied by."""
    return (jnp.abs(y) < bound).astype(jnp.int32).astype(jnp.int8)  # a TPU's masks are 32 bits wide


def passed(grad: Array, inside: Array | None) -> Array:
    """The gradient of what an ADC read, before it; `inside` as `passes_adc` found it, None where there is no ADC."""
    # Compared as 32-bit integers: not every TPU compares bytes. Selected, since a NaN times zero would stay.
    return grad if inside is None else jnp.where(inside.astype(jnp.int32) != 0, grad, 0.0)


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
