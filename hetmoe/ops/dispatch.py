"""Sorting token copies by expert into blocks that each belong to one expert, and back.

A token routed to k experts has k copies. Copies are ordered by expert, and every expert's group is
padded to whole blocks, so a block is multiplied by exactly one expert's weights and no token is
dropped whatever the load. Both directions are gathers, forward and backward: XLA's scatter on CPU is
a serial loop over rows.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Int

_NO_SLOT = 2**30  # past all slots
ANY_LOAD = 16  # slots of a block where the number of copies is open; see `choose_block_size`


@struct.dataclass
class Dispatch:
    """Where each token copy goes. `tokens` T, copies per token k, `blocks` B of `block_size` S slots."""

    slot_token: Int[Array, "slots"]  # token held by a slot; T (one past the last) for padding
    token_slot: Int[Array, "tokens copies"]  # slot that holds a token's j-th copy
    block_expert: Int[Array, "blocks"]  # expert whose weights a block is multiplied by
    block_size: int = struct.field(pytree_node=False)


def choose_block_size(copies: int, experts: int) -> int:
    """Power of two near a quarter of the mean load, between 8 and 128; 1 where that load is one copy at most.

    Padding wastes about half a block per expert; a matmul of fewer than 64 rows wastes the core. Measured on two CPU
    cores at 128 x 128 matrices (`experiments/bench_cpu.py`): 16 to 64 are within 5 %, 256 takes 1.4 times as long. A
    decoding step reads an expert for a row or two: single rows take the path of matrix times vector, which reads
    weights 2 to 4 times as fast as a matmul of 8 rows does (OLMoE's 64 experts, 1 and 8 tokens, two cores). In a
    program for any number of tokens (`jax.export` with symbolic dimensions) it is `ANY_LOAD`.
    """
    if is_symbolic_dim(copies):
        return ANY_LOAD
    if copies <= experts:
        return 1
    size = 8
    while size < 128 and size * 4 * experts < copies:
        size *= 2
    return size


def dispatch(experts: Int[Array, "tokens copies"], num_experts: int, block_size: int, *, multiple: int = 1) -> Dispatch:
    """Assigns every token copy a slot, grouped by expert.

    Args:
        experts: int32, the experts of each token's copies, each in [0, num_experts]; `num_experts` itself stands for no
            expert: such a copy gets no slot, and what `from_blocks` reads for it means nothing. (Derivatives are right
            where there are no such copies.)
        num_experts: E.
        block_size: slots per block.
        multiple: of which the number of blocks is one.

    Returns:
        A `Dispatch` with the most blocks that any load needs: with n copies, m = min(n, num_experts) experts get one
        at least, and every other `block_size` copies may open another block; then blocks of padding up to `multiple`.
        (Where n is symbolic, m = num_experts: not fewer blocks, since they do not become fewer with m.)
    """
    tokens, copies = experts.shape
    flat = experts.reshape(-1)
    busy = num_experts if is_symbolic_dim(flat.size) else min(num_experts, flat.size)
    blocks = busy + (flat.size - busy) // block_size
    blocks = -(-blocks // multiple) * multiple
    one_hot = flat[:, None] == jnp.arange(num_experts, dtype=flat.dtype)[None, :]
    running = jnp.cumsum(one_hot.astype(jnp.int32), axis=0)
    own = jnp.minimum(flat, num_experts - 1)
    rank = jnp.take_along_axis(running, own[:, None], axis=1)[:, 0] - 1  # position inside the expert's group
    expert_blocks = (running[-1] + (block_size - 1)) // block_size
    block_end = jnp.cumsum(expert_blocks)
    slot = (block_end - expert_blocks)[own] * block_size + rank
    order = jnp.arange(flat.size, dtype=jnp.int32)
    has_slot = flat < num_experts
    filled = jnp.where(has_slot, slot, _NO_SLOT + order)  # all different
    slot_token = jnp.full((blocks * block_size,), tokens, jnp.int32)
    slot_token = slot_token.at[filled].set(order // copies, mode="drop", unique_indices=True)
    # Blocks past the last used one fall to the last expert: they hold only padding.
    block_expert = jnp.searchsorted(block_end, jnp.arange(blocks, dtype=jnp.int32), side="right", method="compare_all")
    return Dispatch(
        slot_token=slot_token,
        token_slot=jnp.where(has_slot, slot, 0).reshape(tokens, copies),
        block_expert=jnp.minimum(block_expert, num_experts - 1).astype(jnp.int32),
        block_size=block_size,
    )


def _pad_row(x: Array) -> Array:
    return jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])


@jax.custom_vjp
def _gather_slots(x: Array, slot_token: Array, token_slot: Array) -> Array:
    del token_slot  # used by the backward pass only
    return _pad_row(x)[slot_token]


def _gather_slots_fwd(x: Array, slot_token: Array, token_slot: Array) -> tuple[Array, Array]:
    return _gather_slots(x, slot_token, token_slot), token_slot


def _gather_slots_bwd(token_slot: Array, grad: Array) -> tuple[Array, None, None]:
    return functools.reduce(jnp.add, (grad[token_slot[:, j]] for j in range(token_slot.shape[1]))), None, None


_gather_slots.defvjp(_gather_slots_fwd, _gather_slots_bwd)


@jax.custom_vjp
def _gather_tokens(y: Array, slot_token: Array, token_slot: Array) -> Array:
    del slot_token  # used by the backward pass only
    return y[token_slot]


def _gather_tokens_fwd(y: Array, slot_token: Array, token_slot: Array) -> tuple[Array, tuple[Array, Array]]:
    return _gather_tokens(y, slot_token, token_slot), (slot_token, token_slot)


def _gather_tokens_bwd(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, None, None]:
    slot_token, token_slot = residuals
    tokens, copies, width = grad.shape
    slots = jnp.arange(slot_token.shape[0], dtype=token_slot.dtype)
    rows = jnp.minimum(slot_token, tokens - 1)
    copy = jnp.argmax(token_slot[rows] == slots[:, None], axis=1)
    grads = _pad_row(grad.reshape(tokens * copies, width))
    source = jnp.where(slot_token < tokens, rows * copies + copy.astype(jnp.int32), tokens * copies)
    return grads[source], None, None


_gather_tokens.defvjp(_gather_tokens_fwd, _gather_tokens_bwd)


def to_blocks(x: Float[Array, "tokens width"], plan: Dispatch) -> Float[Array, "blocks block width"]:
    """Copies token rows into their slots; padding slots are zero."""
    return _gather_slots(x, plan.slot_token, plan.token_slot).reshape(-1, plan.block_size, x.shape[1])


def from_blocks(y: Float[Array, "blocks block width"], plan: Dispatch) -> Float[Array, "tokens copies width"]:
    """Reads every token's copies back from their slots."""
    return _gather_tokens(y.reshape(-1, y.shape[-1]), plan.slot_token, plan.token_slot)
