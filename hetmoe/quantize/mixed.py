"""One matrix of every expert of a model, each expert at its own precision."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hetmoe.errors import InputError
from hetmoe.ops.narrow import take
from hetmoe.quantize.grid import Grid
from hetmoe.quantize.packed import Packed, dequantize_packed, take_packed


@struct.dataclass
class Places:
    """Where each expert's matrix is stored."""

    pool: Int[Array, "*layers experts"]
    slot: Int[Array, "*layers experts"]  # on the pool's leading axis


@struct.dataclass
class MixedMatrix:
    """Matrices in pools of one precision each, in the order of layers and experts.

    Pools serve all layers, so every layer may have its own number of experts at each precision; in a loop over layers
    only `places` is cut into layers (`detach`, `attach`).
    """

    pools: tuple[Packed | Float[Array, "matrices K N"], ...]  # packed, or as they were
    places: Places

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices, as if they were one array."""
        return (*self.places.pool.shape, *self.pools[0].shape[1:])

    @property
    def dtype(self) -> Any:
        """Of the matrices that are not quantized; float32 if all are."""
        return next((pool.dtype for pool in self.pools if not isinstance(pool, Packed)), jnp.dtype(jnp.float32))


def make_mixed(pools: Sequence[Packed | Array], pool: np.ndarray) -> MixedMatrix:
    """From pools and the pool of every expert `[layers, experts]`, whose matrices are stored in that order.

    Raises:
        InputError: if a pool does not hold as many matrices as there are experts in it, if all are not of one shape,
            or if two pools are not quantized.
    """
    if sum(not isinstance(part, Packed) for part in pools) > 1:
        raise InputError("two pools are not quantized: put these experts into one")
    counts = [int(np.sum(pool == number)) for number in range(len(pools))]
    held = [int(part.shape[0]) for part in pools]
    if counts != held or sum(counts) != pool.size:
        raise InputError(f"pools hold {held} matrices, and {counts} of {pool.size} experts are placed in them")
    if len({part.shape[1:] for part in pools}) != 1:
        raise InputError(f"matrices of one kind must have one shape, not {[part.shape[1:] for part in pools]}")
    slot = np.zeros(pool.shape, np.int32)
    for number in range(len(pools)):
        slot[pool == number] = np.arange(counts[number])
    places = Places(pool=jnp.asarray(pool, jnp.int32), slot=jnp.asarray(slot))
    return MixedMatrix(pools=tuple(pools), places=places)


def arranged(mixed: MixedMatrix, pools: Sequence[tuple[Grid | None, np.ndarray]]) -> MixedMatrix:
    """The same matrices in other pools: the grid of each (None = as it was), and the experts `[n, 2]` in it."""
    number, slot = np.asarray(mixed.places.pool), np.asarray(mixed.places.slot)
    taken: list[Any] = []
    pool_of = np.empty(number.shape, np.int64)
    for new, (grid, where) in enumerate(pools):
        at = tuple(where.T)
        pool_of[at] = new
        sources = [n for n, pool in enumerate(mixed.pools) if (pool.grid if isinstance(pool, Packed) else None) == grid]
        first = np.zeros(len(mixed.pools), np.int64)
        first[sources] = np.cumsum([0] + [mixed.pools[n].shape[0] for n in sources])[:-1]
        rows = first[number[at]] + slot[at]
        parts = [mixed.pools[n] for n in sources]
        taken.append(jax.tree.map(lambda *leaves, rows=rows: jnp.concatenate(leaves)[rows], *parts))
    return make_mixed(taken, pool_of)


def unquantized(mixed: MixedMatrix) -> tuple[Array | None, Bool[Array, "*layers experts"]]:
    """(the pool that is not quantized, or None if no expert is in it; which experts are)."""
    for number, pool in enumerate(mixed.pools):
        if not isinstance(pool, Packed) and pool.shape[0]:
            return pool, mixed.places.pool == number
    return None, jnp.zeros(mixed.places.pool.shape, bool)


def dense(mixed: MixedMatrix, dtype: Any) -> Float[Array, "*layers experts K N"]:
    """All matrices in one array."""
    parts = [dequantize_packed(pool) if isinstance(pool, Packed) else pool for pool in mixed.pools]
    counts = np.cumsum([0] + [part.shape[0] for part in parts])
    together = jnp.concatenate([part.astype(dtype) for part in parts])
    return together[jnp.asarray(counts[:-1], jnp.int32)[mixed.places.pool] + mixed.places.slot]


def expert_weights(mixed: MixedMatrix, expert: Int[Array, ""], dtype: Any) -> Float[Array, "K N"]:
    """The matrix of one expert of a layer (`places` without layers); only the pool that holds it is read."""
    slot = mixed.places.slot[expert]

    def branch(pool: Packed | Array) -> Any:
        if isinstance(pool, Packed):
            return lambda slot: dequantize_packed(take_packed(pool, slot)).astype(dtype)
        return lambda slot: take(pool, slot).astype(dtype)

    filled = [(number, pool) for number, pool in enumerate(mixed.pools) if pool.shape[0]]
    branches = [branch(pool) for _, pool in filled]
    if len(branches) == 1:
        return branches[0](slot)
    numbers = np.zeros(len(mixed.pools), np.int32)
    numbers[[number for number, _ in filled]] = np.arange(len(filled))
    return jax.lax.switch(jnp.asarray(numbers)[mixed.places.pool[expert]], branches, slot)


def refuse_quantized(tree: Any, what: str) -> None:
    """Raises InputError if some matrices of a model are quantized; `what` cannot be done with them."""
    if any(is_mixed(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_mixed)):
        raise InputError(f"{what} a model with quantized experts: use the one that it was made from")


def is_mixed(leaf: Any) -> bool:
    """Whether a leaf of a parameter tree is in several precisions."""
    return isinstance(leaf, MixedMatrix)


def detach(tree: Any) -> tuple[Any, list[tuple[Any, ...]]]:
    """A tree of layers with `Places` instead of its `MixedMatrix`es, and their pools."""
    found = [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_mixed) if is_mixed(leaf)]
    places = jax.tree.map(lambda leaf: leaf.places if is_mixed(leaf) else leaf, tree, is_leaf=is_mixed)
    return places, [mixed.pools for mixed in found]


def attach(tree: Any, pools: list[tuple[Any, ...]]) -> Any:
    """The inverse of `detach`, for any slice of its tree."""
    rest = iter(pools)

    def join(leaf: Any) -> Any:
        return MixedMatrix(pools=next(rest), places=leaf) if isinstance(leaf, Places) else leaf

    return jax.tree.map(join, tree, is_leaf=lambda leaf: isinstance(leaf, Places))
