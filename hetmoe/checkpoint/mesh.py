"""Where the leaves of the parameter tree go on a mesh of devices."""

import jax

from hetmoe.errors import InputError
from hetmoe.models.abstract import Leaf, abstract_params, is_leaf
from hetmoe.models.config import ModelConfig
from hetmoe.models.params import Params


def param_shardings(config: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
    """A mesh axis shards the array axes of the same name (`Leaf.axes`: expert, inner, heads, vocab, ...).

    Axes named `data` shard activations, not parameters; all other names must be axes of some parameter.

    Raises:
        InputError: for a mesh axis that no parameter has, or sizes that do not divide.
    """
    leaves = jax.tree.leaves(abstract_params(config), is_leaf=is_leaf)
    known = {axis for leaf in leaves for axis in leaf.axes}
    if unknown := [a for a in mesh.axis_names if a not in known | {"data"}]:
        raise InputError(
            f"mesh axis {unknown[0]!r} is not an axis of any parameter; use {', '.join(sorted(known))} or data"
        )

    def place(leaf: Leaf) -> jax.sharding.NamedSharding:
        for axis, size in zip(leaf.axes, leaf.shape, strict=True):
            if size % mesh.shape.get(axis, 1):
                raise InputError(
                    f"{leaf.key}: its axis {axis!r} of {size} cannot be cut into the "
                    f"{mesh.shape[axis]} parts of the mesh"
                )
        spec = jax.sharding.PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in leaf.axes))
        return jax.sharding.NamedSharding(mesh, spec)

    return jax.tree.map(place, abstract_params(config), is_leaf=is_leaf)
