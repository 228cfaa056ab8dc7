"""Block-wise FP8 weights (DeepSeek-V3, arXiv 2412.19437, 3.3): one float32 scale per block of the stored matrix."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SUFFIX = "_scale_inv"  # of the key that holds the scales; a weight is its FP8 value times the scale


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a tensor `[..., rows, columns]`; blocks at the edges may be partial."""
    return (*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))


def dequantize(values: np.ndarray, scales: np.ndarray, block: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """`values * scale`, in float32 and then rounded to `dtype`.

    Args:
        values: float8_e4m3fn `[rows, columns]`.
        scales: float32 or bfloat16 `[row blocks, column blocks]`.
        block: rows and columns of a block.
        dtype: of the result.
    """
    wide = np.repeat(scales.astype(np.float32), block[1], axis=1)[:, : values.shape[1]]
    return np.asarray(_multiply(values.view(np.uint8), wide, block[0], np.dtype(dtype)))


@functools.partial(jax.jit, static_argnames=("rows", "dtype"))
def _multiply(codes: jax.Array, scales: jax.Array, rows: int, dtype: Any) -> jax.Array:
    # From bits (1 sign, 4 exponent with bias 7, 3 mantissa; 0x7f is NaN): XLA's own conversion is slower on CPU.
    bits = codes.astype(jnp.uint32)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    normal = jax.lax.bitcast_convert_type(((exponent + 120) << 23) | (mantissa << 20), jnp.float32)
    magnitude = jnp.where(exponent == 0, mantissa.astype(jnp.float32) * jnp.float32(2.0**-9), normal)
    magnitude = jnp.where((bits & 127) == 127, jnp.float32(jnp.nan), magnitude)
    value = jnp.where(bits >= 128, -magnitude, magnitude)
    return (value * scales[jnp.arange(codes.shape[0]) // rows]).astype(dtype)
