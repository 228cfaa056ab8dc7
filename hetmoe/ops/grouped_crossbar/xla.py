"""Crossbar matmul of token blocks by the weights of their experts, analog or digital block by block."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hetmoe.analog.read_noise import ReadDraw
from hetmoe.ops.crossbar_matmul.base import CrossbarOptions
from hetmoe.ops.crossbar_matmul.xla import tiled_product
from hetmoe.ops.grouped_matmul.xla import grouped_matmul


def grouped_crossbar(
    x: Float[Array, "blocks block K"],
    w: Float[Array, "matrices K N"],
    block_expert: Int[Array, "blocks"],
    used: Bool[Array, "blocks"] | None,
    analog: Bool[Array, "experts"],
    input_range: Float[Array, "experts tiles"] | None,
    adc_bound: Float[Array, ""],
    weight_max: Float[Array, "experts tiles columns"],
    options: CrossbarOptions,
    read: ReadDraw | None,
    *,
    stored: Int[Array, "blocks"],
) -> Float[Array, "blocks block N"]:
    """One matmul per block; converters (and read noise) act on the blocks of analog experts only.

    Args:
        x: token blocks (`hetmoe.ops.dispatch`).
        w: the weights in force: programmed for analog experts, clean for digital ones.
        block_expert: expert of each block.
        used: False for blocks that hold only padding, whose results mean nothing; None = all are used.
        analog: which experts are on crossbars.
        input_range: DAC range per expert and row-block; None = dynamic.
        adc_bound: lambda.
        weight_max: `max |w|` per expert and tile (last axis 1) or column (N).
        options: static crossbar options.
        read: noise of each product, its rows numbered `[blocks, block]`, or None.
        stored: which matrix of `w` each block meets, ascending: that of its expert, if `w` holds those of all experts.
    """

    def matmul(inputs: Array, start: int, size: int, absolute: bool) -> Array:
        tiles = w[:, start : start + size]
        return grouped_matmul(inputs, jnp.abs(tiles) if absolute else tiles, stored, used)

    ranges = None if input_range is None else lambda tile: input_range[:, tile][block_expert].reshape(-1, 1, 1)
    return tiled_product(
        x,
        matmul,
        ranges,
        adc_bound,
        lambda tile: weight_max[:, tile][block_expert][:, None, :],
        analog[block_expert].reshape(-1, 1, 1),
        options,
        read,
    )
