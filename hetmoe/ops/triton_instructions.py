"""Instructions of NVIDIA GPUs that Triton kernels have no other way to ask for.

Pallas tells Triton to round products before they are added, and its minimum and maximum drop NaN. Where a kernel is
interpreted, `jax.numpy` computes the same, but for the rounding of a product.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array


def multiply_add(x: Array, y: Array, z: Array, *, interpret: bool) -> Array:
    """`x * y + z` in float32, rounded once."""
    return x * y + z if interpret else _instruction("fma.rn.f32 $0, $1, $2, $3;", x, y, z)


def clip(x: Array, bound: Array, *, interpret: bool) -> Array:
    """`x` within [-bound, bound]; NaN stays NaN."""
    if interpret:
        return jnp.clip(x, -bound, bound)
    return _instruction("min.NaN.f32 $0, $1, $2;", _instruction("max.NaN.f32 $0, $1, $2;", x, -bound), bound)


def _instruction(text: str, *given: Array) -> Array:
    shape = jnp.broadcast_shapes(*(value.shape for value in given))
    (found,) = plgpu.elementwise_inline_asm(
        text,
        args=[jnp.broadcast_to(value, shape) for value in given],
        constraints=",".join(["=f", *("f" for _ in given)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """Some bits of 16-bit words, and where they go."""

    first: int
    bits: int
    at: int


def bfloat16_codes(words: Sequence[Array], fields: Sequence[Field], power: int, *, interpret: bool) -> Array:
    """Codes put together from a field of each of `words`, below a power of two, as bfloat16 numbers.

    A field may go to the bits 0 to 6 of a number, the others are those of `2**power`; a one at bit 0 adds
    `2**(power - 7)`.
    """
    base = (127 + power) << 7
    if interpret:
        found = jnp.full(words[0].shape, base, jnp.uint16)
        for word, field in zip(words, fields, strict=True):
            found |= ((word >> field.first) & (2**field.bits - 1)) << field.at
        return jax.lax.bitcast_convert_type(found, jnp.bfloat16)
    lines = [f".reg .b32 part; mov.b32 $0, {_twice(base)};"]
    for number, field in enumerate(fields, start=1):
        move = field.first - field.at
        lines.append(f"shr.u32 part, ${number}, {move};" if move >= 0 else f"shl.b32 part, ${number}, {-move};")
        lines.append(f"lop3.b32 $0, part, {_twice((2**field.bits - 1) << field.at)}, $0, 0xEA;")  # (part & mask) | $0
    (found,) = plgpu.elementwise_inline_asm(
        f"{{ {' '.join(lines)} }}",
        args=list(words),
        constraints=",".join(["=&r", *("r" for _ in words)]),
        pack=2,  # bits moved from one word into the other are masked
        result_shape_dtypes=[jax.ShapeDtypeStruct(words[0].shape, jnp.bfloat16)],
    )
    return found


def _twice(word: int) -> str:
    return f"{word << 16 | word:#x}"


def float32_pair(words: Array, *, interpret: bool) -> tuple[Array, Array]:
    """The two float16 numbers of 32-bit words, the lower half first, in float32."""
    return _float32_half(words, 0, interpret=interpret), _float32_half(words, 1, interpret=interpret)


def _float32_half(words: Array, number: int, *, interpret: bool) -> Array:
    if interpret:
        half = (words >> 16 * number & 0xFFFF).astype(jnp.uint16)
        return jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32)
    (found,) = plgpu.elementwise_inline_asm(
        f"{{ .reg .b16 half<2>; mov.b32 {{half0, half1}}, $1; cvt.f32.f16 $0, half{number}; }}",
        args=[words],
        constraints="=f,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.float32)],
    )
    return found
