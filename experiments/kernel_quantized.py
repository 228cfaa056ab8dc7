"""Operands and products of the benchmark's quantized experts."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hetmoe.models.params import FeedForward
from hetmoe.ops.grouped_crossbar.api import digital_products
from hetmoe.quantize.grid import Grid
from hetmoe.quantize.mixed import MixedMatrix, Places
from hetmoe.quantize.packed import pack
from hetmoe.quantize.rtn import round_to_nearest
from kernel_work import Sizes

BITS = (8, 4, 3, 2)


def make_grid(sizes: Sizes, bits: int) -> Grid:
    """With zeros; groups of 64 rows, or of 32 if the matrices are smaller."""
    c = sizes.config
    group = 64 if c.hidden_size % 64 == 0 and c.expert_intermediate_size % 64 == 0 else 32
    return Grid(bits=bits, group=group, symmetric=False)


@functools.partial(jax.jit, static_argnames="grid")
def quantize_layer(clean: FeedForward, grid: Grid) -> FeedForward:
    """All experts at one precision."""

    def quantized(w: Array) -> MixedMatrix:
        packed = jax.lax.map(lambda one: pack(round_to_nearest(one, grid)), w)  # float32 copies of one expert at a time
        numbers = jnp.arange(w.shape[0], dtype=jnp.int32)
        return MixedMatrix(pools=(packed,), places=Places(pool=jnp.zeros_like(numbers), slot=numbers))

    return FeedForward(gate=quantized(clean.gate), up=quantized(clean.up), down=quantized(clean.down))


def weight_bytes(weights: FeedForward) -> int:
    """Of the stored matrices."""
    matrices = (weights.gate, weights.up, weights.down)
    stored = [matrix.pools if isinstance(matrix, MixedMatrix) else matrix for matrix in matrices]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))


def quantized_products(
    x: Array, mid: Array, w: FeedForward, block_expert: Array, used: Array, *, implementation: str
) -> tuple[Array, ...]:
    """Gate and up of `x`, down of `mid`."""
    run = functools.partial(digital_products, block_expert=block_expert, used=used, implementation=implementation)
    return (*run(x, (w.gate, w.up)), *run(mid, (w.down,)))
