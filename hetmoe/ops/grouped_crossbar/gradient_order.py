"""Which blocks add to the gradient of which matrix, in the order of the matrices.

Blocks of one matrix are apart where mapped axes were folded (`blocks.fold`), and where elements of a mapped axis share
a matrix, each needs a gradient of its own: blocks name the slot of the result that they add to, and are sorted by it.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from hetmoe.ops.grouped_crossbar.blocks import EMPTY


@struct.dataclass
class Ranges:
    """Blocks `order[first[slot]:first[slot + 1]]` add to a slot."""

    order: Int[Array, "blocks"]
    first: Int[Array, "slots+1"]


@struct.dataclass
class Steps:
    """One step for each block and one that adds nothing for each slot, which zeroes those without a block."""

    block: Int[Array, "steps"]
    slot: Int[Array, "steps"]  # never descends
    mode: Int[Array, "steps"]  # of the block; EMPTY for steps that add nothing


def make_ranges(mode: Int[Array, "blocks"], slot: Int[Array, "blocks"], slots: int) -> Ranges:
    """The order for a kernel that loops over the blocks of a slot; empty blocks belong to none."""
    key = jnp.where(mode == EMPTY, slots, slot)
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    first = jnp.searchsorted(key[order], jnp.arange(slots + 1, dtype=key.dtype))
    return Ranges(order=order, first=first.astype(jnp.int32))


def make_steps(mode: Int[Array, "blocks"], slot: Int[Array, "blocks"], slots: int) -> Steps:
    """The order for a grid that goes through all slots; empty blocks come last and add nothing to the last one."""
    blocks = mode.shape[0]
    key = jnp.concatenate([jnp.where(mode == EMPTY, slots, slot), jnp.arange(slots, dtype=slot.dtype)])
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    is_block = order < blocks
    block = jnp.where(is_block, order, 0)
    return Steps(
        block=block,
        slot=jnp.minimum(key[order], slots - 1).astype(jnp.int32),
        mode=jnp.where(is_block, mode[block], EMPTY),
    )
