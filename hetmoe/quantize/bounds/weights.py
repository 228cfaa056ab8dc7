"""Weights of a model in float64, one layer or one expert at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.models.params import FeedForward, Layer
from hetmoe.ops.narrow import take
from hetmoe.quantize.bounds.expert import Expert
from hetmoe.quantize.mixed import MixedMatrix
from hetmoe.quantize.packed import Packed, dequantize_packed, take_packed


def wide(tree: Any) -> Any:
    """A tree of arrays in float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), tree)


def layer_weights(stack: Any, index: int) -> Any:
    """One layer of a stack in float64, without its routed experts (`expert_weights`)."""
    if isinstance(stack, Layer):
        stack = dataclasses.replace(stack, moe=dataclasses.replace(stack.moe, experts=None))
    return wide(jax.tree.map(lambda leaf: leaf[index], stack))


def expert_weights(experts: FeedForward, layer: int, expert: int) -> Expert:
    """The matrices of one expert in float64, quantized or not."""
    gate, up, down = (_matrix(stack, layer, expert) for stack in (experts.gate, experts.up, experts.down))
    return Expert(gate, up, down)


def _matrix(stack: Any, layer: int, expert: int) -> np.ndarray:
    if not isinstance(stack, MixedMatrix):
        return wide(stack[layer, expert])
    pool = stack.pools[int(stack.places.pool[layer, expert])]
    return wide(_stored(pool, jnp.asarray(stack.places.slot[layer, expert])))


@jax.jit
def _stored(pool: Packed | jax.Array, slot: jax.Array) -> jax.Array:
    return dequantize_packed(take_packed(pool, slot)) if isinstance(pool, Packed) else take(pool, slot)
