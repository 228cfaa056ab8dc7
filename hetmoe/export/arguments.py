"""Trees of weights as flat dicts of arrays under readable names, which need no class of hetmoe to be passed."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves under the paths to them, such as `params/layers/moe/experts/gate/pools/0/planes/0`, and the structure.

    PRNG keys become their two words, uint32 `[2]`. The order is that of the leaves.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(map(_part, path)): _plain(leaf) for path, leaf in leaves}, structure


def unflatten(arguments: dict[str, Any], structure: Any, keys: frozenset[str]) -> Any:
    """The inverse of `flatten`; `keys` are the names of PRNG keys."""
    leaves = [
        jax.random.wrap_key_data(value, impl="threefry2x32") if name in keys else value
        for name, value in arguments.items()
    ]
    return jax.tree.unflatten(structure, leaves)


def key_names(tree: Any) -> frozenset[str]:
    """Names of the leaves that are PRNG keys."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return frozenset("/".join(map(_part, path)) for path, leaf in leaves if _is_key(leaf))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _part(entry: Any) -> str:
    """One step of a path."""
    if isinstance(entry, GetAttrKey):
        return entry.name
    if isinstance(entry, DictKey | FlattenedIndexKey):
        return str(entry.key)
    assert isinstance(entry, SequenceKey)
    return str(entry.idx)
