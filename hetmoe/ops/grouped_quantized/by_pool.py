"""Token blocks times the weights of their experts at several precisions: one kernel call for each precision."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hetmoe.ops.grouped_crossbar.block_sizes import Platform
from hetmoe.ops.grouped_crossbar.digital import digital_blocks
from hetmoe.ops.grouped_quantized.pallas import packed_products
from hetmoe.ops.grouped_quantized.shape import Operand, Static
from hetmoe.quantize.grid import Grid
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

    A pool's kernel goes over all blocks, and gives zero for those whose expert is in another one. Matrices whose pools
    are alike share its calls.
    """
    if len({_kinds(matrix) for matrix in matrices}) > 1:
        alone = functools.partial(pool_products, block_expert=block_expert, used=used, interpret=interpret)
        return tuple(alone(x, (matrix,))[0] for matrix in matrices)
    results = [list[Array]() for _ in matrices]
    for number in range(len(matrices[0].pools)):
        packed, found = list[Operand](), list[Array]()
        for matrix in matrices:
            stored = matrix.pools[number]
            if stored.shape[0] == 0:
                continue
            own = used & (matrix.places.pool[block_expert] == number)
            slot = jnp.where(own, matrix.places.slot[block_expert], 0)
            if isinstance(stored, Packed):
                packed.append(Operand(own=own, slot=slot, packed=stored))
            else:
                found += digital_blocks(x, (stored,), slot, own, interpret)
        if packed:
            found += packed_products(x, tuple(packed), Static(interpret=interpret))
        for result, y in zip(results, found, strict=False):  # nothing where the pool is empty
            result.append(y)
    return tuple(functools.reduce(jnp.add, parts) for parts in results)


def _kinds(matrix: MixedMatrix) -> tuple[tuple[tuple[int, ...], Grid | None], ...]:
    return tuple((stored.shape, stored.grid if isinstance(stored, Packed) else None) for stored in matrix.pools)
