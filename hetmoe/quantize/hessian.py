"""Second moments of the inputs of experts, which GPTQ takes as the Hessian of its error."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from hetmoe.errors import InputError


@struct.dataclass
class Hessians:
    """The inputs x that reached each expert of a layer.

    `e^T total e` is the squared change of an output column's values, summed over tokens, if its weights change by e.
    (GPTQ's paper writes 2 x x^T, and its code averages; no factor changes what GPTQ chooses.)
    """

    total: Float[Array, "experts K K"]  # sum of x x^T
    tokens: Int[Array, "experts"]  # how many x


def no_inputs(experts: int, rows: int, dtype: DTypeLike = jnp.float32) -> Hessians:
    """Nothing seen yet by matrices with `rows` inputs; sums are kept in `dtype`."""
    return Hessians(total=jnp.zeros((experts, rows, rows), dtype), tokens=jnp.zeros((experts,), jnp.int32))


def add_inputs(
    hessians: Hessians,
    x: Float[Array, "blocks block K"],
    real: Bool[Array, "blocks block"],
    block_expert: Int[Array, "blocks"],
) -> Hessians:
    """With the inputs of one batch, in blocks of tokens of one expert each (`hetmoe.ops.dispatch`).

    Args:
        hessians: of earlier batches.
        x: inputs, any float dtype; products and sums are in the dtype of `hessians.total`.
        real: False for padding, which is left out whatever it holds.
        block_expert: expert of each block.
    """

    def add(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        rows, real, expert = block
        rows = jnp.where(real[:, None], rows, 0).astype(total.dtype)
        return total.at[expert].add(jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)), None

    total, _ = jax.lax.scan(add, hessians.total, (x, real, block_expert))
    return Hessians(total=total, tokens=hessians.tokens.at[block_expert].add(jnp.sum(real, axis=1, dtype=jnp.int32)))


def mean_hessian(hessians: Hessians) -> Float[Array, "K K"]:
    """The mean of x x^T over the tokens of all experts; 0 without any."""
    tokens = jnp.maximum(jnp.sum(hessians.tokens.astype(jnp.float32)), 1)
    return jnp.sum(hessians.total, axis=0) / tokens.astype(hessians.total.dtype)


def check_calibration(tokens: int, rows: int, name: str) -> None:
    """Refuses calibration text with fewer tokens than a matrix has inputs.

    The mean Hessian of a layer is then singular whatever the text, and what GPTQ makes of the directions without data
    is an artefact of the damping. (An expert may see fewer: `GptqOptions.prior`.)

    Args:
        tokens: different tokens of the text that reach the layer.
        rows: inputs of the matrix.
        name: of the matrix, for the message.

    Raises:
        InputError: if there are too few.
    """
    if tokens < rows:
        raise InputError(
            f"calibration text of {tokens:,} tokens is too short for GPTQ: {name} has {rows:,} inputs and needs at "
            "least as many tokens; give more text, or quantize with rtn or hqq, which need none"
        )
