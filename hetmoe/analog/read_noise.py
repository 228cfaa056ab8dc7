"""Noise of a single matrix-vector product, drawn anew for every input vector."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, UInt32

from hetmoe.analog.random import rows_normal
from hetmoe.errors import InputError
from hetmoe.parallel.shard import WHOLE, Shard

KINDS = ("additive", "pcm")


@struct.dataclass
class ReadNoise:
    """Per-product noise added to a tile's output before the ADC.

    With weights and inputs normalised by their tile's maximum and by the input range, and z standard normal:

    * `additive`: `y_i += std * ||x||_2 * z_i` (aihwkit `ADDITIVE_CONSTANT`);
    * `pcm`: `y_i += std * sqrt(sum_j |w_ij| x_j^2) * z_i` (aihwkit `PCM_READ`; its benchmark preset uses 0.0175).

    Source: aihwkit, weight-noise types of the inference tile; Rasch et al. 2023.
    """

    std: Float[Array, ""]
    kind: Literal["additive", "pcm"] = struct.field(pytree_node=False)


class ReadDraw(NamedTuple):
    """Read noise of the products with one matrix.

    `rows` number the input vectors in whatever shape they have, so that a draw follows its token; `shard` says which
    columns of the matrix these are.
    """

    noise: ReadNoise
    key: jax.Array
    rows: UInt32[Array, "..."]
    shard: Shard = WHOLE


def make_read_noise(kind: str, std: float) -> ReadNoise:
    """A validated `ReadNoise`.

    Raises:
        InputError: for an unknown kind or a negative or non-finite standard deviation.
    """
    if kind not in KINDS:
        raise InputError(f"read noise {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if not 0 <= std < float("inf"):
        raise InputError(f"read noise std={std!r} must be a finite number of at least 0")
    return ReadNoise(std=jnp.asarray(std, jnp.float32), kind=kind)


def read_noise_std(noise: ReadNoise, inputs: Array, weight_max: Array, abs_product: Array | None) -> Array:
    """Standard deviation of the noise on a tile's outputs, in the unit of the outputs.

    Args:
        noise: kind and magnitude.
        inputs: `[..., K]`, after the DAC.
        weight_max: the tile's `max|w|`, broadcast against the outputs.
        abs_product: `(x * x) @ |w|`, shape of the outputs; needed by the `pcm` kind only.
    """
    if noise.kind == "additive":
        return noise.std * weight_max * _root(jnp.sum(jnp.square(inputs), axis=-1, keepdims=True))
    assert abs_product is not None
    return noise.std * _root(weight_max * abs_product)


def _root(x: Array) -> Array:
    """Square root whose gradient at 0 is 0, not infinite (an input vector of zeros has no noise)."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def read_draws(read: ReadDraw, block: int, width: int) -> Float[Array, "rows width"]:
    """Standard normals of one tile's outputs on `width` columns, for the rows of `read`, flattened."""
    columns = jnp.arange(width, dtype=jnp.uint32) + read.shard.first("tensor", width).astype(jnp.uint32)
    return rows_normal(jax.random.fold_in(read.key, block), read.rows.reshape(-1), width * read.shard.tensor, columns)
