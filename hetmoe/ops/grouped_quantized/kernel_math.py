"""Unpacking inside the kernels, in operations that lower for TPU and for NVIDIA GPUs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hetmoe.ops.grouped_quantized.shape import Shape


def unpack(planes: Sequence[Array], position: int, shape: Shape) -> Int[Array, "chunk columns"]:
    """The codes at one position of a chunk of bytes, as int32.

    Args:
        planes: the bytes of each plane as int32, `[chunk * b / b0, columns]` for a plane of b bits, the first of b0.
        position: 0 for the lowest bits of the first plane's bytes.
        shape: of the kernel.
    """
    (first, *others), size = shape.planes, planes[0].shape
    codes, place = (planes[0] >> (position * first)) & (2**first - 1), first
    for bits, plane in zip(others, planes[1:], strict=True):
        # A group has fewer bytes here: `parts` positions of them make one of the first plane's.
        parts, own = first // bits, shape.grid.group * bits // 8
        whole = plane.reshape(-1, 1, own, size[1])
        whole = jnp.broadcast_to(whole, (whole.shape[0], parts, *whole.shape[2:])).reshape(size)
        byte = jax.lax.broadcasted_iota(jnp.int32, size, 0)
        part = jax.lax.div(jax.lax.rem(byte, shape.per_group), own)
        codes |= ((whole >> ((position * parts + part) * bits)) & (2**bits - 1)) << place
        place += bits
    return codes


def dequantize(codes: Array, scale: Array, zero: Array | None, shape: Shape, dtype: jnp.dtype) -> Array:
    """As `hetmoe.quantize.grid.dequantize`, rounded to `dtype`; steps and zeros by row (`per_row`)."""
    middle = shape.grid.largest / 2 if zero is None else zero
    return ((codes.astype(jnp.float32) - middle) * scale).astype(dtype)


def per_row(values: Float[Array, "groups columns"], shape: Shape) -> Float[Array, "bytes columns"]:
    """Values of the groups of a chunk for each of its bytes; of one group they are one row."""
    groups, columns = values.shape
    if groups == 1:
        return values
    spread = jnp.broadcast_to(values[:, None, :], (groups, shape.per_group, columns))
    return spread.reshape(groups * shape.per_group, columns)


def float16_value(bits: Int[Array, "..."]) -> Float[Array, "..."]:
    """The float32 value of a float16 whose bits are given as int32, subnormal numbers, infinities and NaN included.

    TPUs have no vectors of float16, and flush subnormal float32 numbers to zero.
    """
    exponent, rest = (bits >> 10) & 0x1F, (bits & 0x7FFF) << 13
    rebased = rest + jnp.where(exponent == 0x1F, 224 << 23, 112 << 23)  # 15 to 127, and 31 to 255
    normal = jax.lax.bitcast_convert_type(rebased, jnp.float32)
    subnormal = (bits & 0x3FF).astype(jnp.float32) * 2.0**-24
    magnitude = jnp.where(exponent == 0, subnormal, normal)
    return jnp.where((bits & 0x8000) == 0, magnitude, -magnitude)
