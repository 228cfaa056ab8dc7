"""The grid that quantized weights lie on: codes, and a step and a zero for every group of rows of a column."""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float16, UInt8

from hetmoe.errors import InputError

BITS = (1, 2, 3, 4, 8)
GROUPS = (32, 64, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """How the weights of a matrix are quantized; static.

    Attributes:
        bits: of a code, 0 to 2**bits - 1.
        group: consecutive rows (inputs) of a column that share a step and a zero.
        symmetric: the zero is (2**bits - 1) / 2 everywhere, half-way between two codes, and is not stored.

    Raises:
        InputError: for bits or groups that do not exist.
    """

    bits: int
    group: int
    symmetric: bool

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"bits={self.bits!r} must be one of {', '.join(map(str, BITS))}")
        if self.group not in GROUPS:
            raise InputError(f"group={self.group!r} must be one of {', '.join(map(str, GROUPS))}")

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def bits_per_weight(self) -> float:
        """Bits of a stored weight with its share of the group's step, and zero if it has one, in float16."""
        return self.bits + (16 if self.symmetric else 32) / self.group

    def groups_of(self, rows: int) -> int:
        """Groups of a column with `rows` rows.

        Raises:
            InputError: if the group does not divide them.
        """
        if rows % self.group != 0:
            fitting = ", ".join(str(group) for group in GROUPS if rows % group == 0) or "none of 32, 64, 128"
            raise InputError(f"group={self.group} does not divide the {rows} rows of a matrix; these do: {fitting}")
        return rows // self.group


@struct.dataclass
class Quantized:
    """Codes of weights `[K, N]`, with leading axes of experts or layers; `(code - zero) * scale` is a weight."""

    codes: UInt8[Array, "*lead K N"]
    scale: Float16[Array, "*lead groups N"]  # the step, at least 0
    zero: Float16[Array, "*lead groups N"] | None  # None: symmetric
    grid: Grid = struct.field(pytree_node=False)


def dequantize(quantized: Quantized) -> Float[Array, "*lead K N"]:
    """The weights that codes stand for, `(code - zero) * scale` in float32."""
    grid = quantized.grid
    *lead, rows, columns = quantized.codes.shape
    grouped = quantized.codes.reshape(*lead, rows // grid.group, grid.group, columns).astype(jnp.float32)
    scale = quantized.scale.astype(jnp.float32)[..., None, :]
    zero = zero_or_middle(quantized.scale, quantized.zero, grid)[..., None, :]
    return ((grouped - zero) * scale).reshape(*lead, rows, columns)


def zero_or_middle(scale: Array, zero: Array | None, grid: Grid) -> Array:
    """The zeros as float32; without any (symmetric), the middle of the codes for every step."""
    return jnp.full(scale.shape, grid.largest / 2, jnp.float32) if zero is None else zero.astype(jnp.float32)
