"""Token blocks times the weights of their experts at several precisions: one kernel call for each precision."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hetmoe.ops.grouped_crossbar.block_sizes import Platform
from hetmoe.ops.grouped_crossbar.digital import digital_blocks
from hetmoe.ops.grouped_quantized.pallas import packed_blocks
from hetmoe.ops.grouped_quantized.shape import Static
from hetmoe.quantize.mixed import MixedMatrix
from hetmoe.quantize.packed import Packed


def pool_products(
    x: Float[Array, "blocks block K"],
    matrices: tuple[MixedMatrix, ...],
    block_expert: Int[Array, "blocks"],
    used: Bool[Array, "blocks"],
    interpret: Platform | None,
) -> tuple[Float[Array, "blocks block N"], ...]:
    """As `xla.quantized_products`, by the kernels of the platform; `interpret` as in `Static`.

    A pool's kernel goes over all blocks, and gives zero for those whose expert is in another one.
    """
    return tuple(_product(x, matrix, block_expert, used, interpret) for matrix in matrices)


def _product(x: Array, matrix: MixedMatrix, block_expert: Array, used: Array, interpret: Platform | None) -> Array:
    pool, slot = matrix.places.pool[block_expert], matrix.places.slot[block_expert]
    results: list[Array] = []
    for number, stored in enumerate(matrix.pools):
        if stored.shape[0] == 0:
            continue
        own = used & (pool == number)
        at = jnp.where(own, slot, 0)
        if isinstance(stored, Packed):
            results.append(packed_blocks(x, own, at, stored, Static(interpret=interpret)))
        else:
            results += digital_blocks(x, (stored,), at, own, interpret)
    return functools.reduce(jnp.add, results)
