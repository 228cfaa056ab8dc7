"""Which mesh axis cuts which axis of what: parameters, programmed weights, plans, ranges and text."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedMatrix, ProgrammedWeights
from hetmoe.errors import InputError
from hetmoe.models.abstract import Leaf, abstract_params, is_leaf
from hetmoe.models.config import ModelConfig
from hetmoe.models.matrices import MATRICES, crossbar_matrices
from hetmoe.models.params import Params
from hetmoe.parallel.mesh import check_divides, shard_of
from hetmoe.parallel.shard import AXES, TOKENS
from hetmoe.placement.plan import Plan


def leaf_spec(leaf: Leaf) -> P:
    """Where a parameter goes.

    `expert` cuts the experts. `tensor` cuts the columns of every matrix, with its bias, and the vocabulary; routers and
    the gate of shared experts, which have few columns, and norms are on all devices.
    """
    axes: list[str | None] = ["expert" if axis == "expert" else None for axis in leaf.axes]
    is_bias = not leaf.transposed and leaf.init == 0
    if (leaf.transposed or is_bias) and leaf.axes[-1] not in {"score", "one"}:
        axes[-1] = "tensor"
    elif leaf.axes[0] == "vocab":
        axes[0] = "tensor"
    return P(*axes)


def param_specs(config: ModelConfig) -> Params:
    """`leaf_spec` of all parameters."""
    return jax.tree.map(leaf_spec, abstract_params(config), is_leaf=is_leaf)


def param_shardings(config: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
    """Where all parameters go on a mesh, which may lack axes.

    Raises:
        InputError: for a mesh axis of another name, or one whose parts do not divide the model.
    """
    check_divides(shard_of(mesh), config)

    def place(leaf: Leaf) -> NamedSharding:
        axes = (axis if axis in mesh.axis_names else None for axis in leaf_spec(leaf))
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(place, abstract_params(config), is_leaf=is_leaf)


def programmed_specs(config: ModelConfig, *, dense: bool, per_column: bool) -> ProgrammedWeights:
    """Where programmed weights go: as targets do; their maxima with the experts, and columns if `per_column`."""
    leaves = abstract_params(config)

    def of(spec: P) -> ProgrammedMatrix:
        *stack, _, columns = spec
        maxima: Any = P(*stack, None, columns if per_column else None)
        return ProgrammedMatrix(w=spec, weight_max=maxima)

    def of_layer(layer: Any) -> dict[str, ProgrammedMatrix]:
        if layer is None:
            return {}
        return {name: of(leaf_spec(leaf)) for name, leaf in crossbar_matrices(layer, dense=dense).items()}

    head = of(P(None, "tensor")) if dense else None
    return ProgrammedWeights(
        layers=of_layer(leaves.layers), dense_layers=of_layer(leaves.dense_layers), lm_head=head
    )  # fmt: skip


def plan_specs(plans: Plan, *leading: str | None) -> Plan:
    """Where plans go: the axes of experts along `expert`; `leading` are the mesh axes of the axes before a plan's."""
    rest = jax.tree.map(lambda _: P(*leading), plans)
    return rest.replace(experts=P(*leading, None, "expert"))


def calibration_specs(calibration: Calibration | None) -> Calibration | None:
    """Where DAC ranges go: those of experts along `expert`."""
    if calibration is None:
        return None
    sites = {info.site for info in MATRICES.values() if info.module == "experts"}
    whole: Any = P()
    by_expert: Any = P(None, "expert")
    return Calibration(
        layers={site: by_expert if site in sites else whole for site in calibration.layers},
        dense_layers={site: whole for site in calibration.dense_layers},  # noqa: C420 (its type is wider)
        lm_head=whole,
        tokens_seen=by_expert,
        tile_rows=calibration.tile_rows,
    )


WINDOWS = P(None, TOKENS)  # of arrays [batches, batch, ...]


def on_mesh(run: Callable[..., Any], mesh: jax.sharding.Mesh, specs: Any, out: Any) -> Callable[..., Any]:
    """`run` as the program of one device: its arguments are the parts that `specs` say, its results those of `out`.

    Raises:
        InputError: for a mesh without one of the axes.
    """
    if missing := [axis for axis in AXES if axis not in mesh.axis_names]:
        raise InputError(f"the mesh has no axis {missing[0]!r}: make it with hetmoe.make_mesh(hetmoe.parse_mesh(...))")
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)


def put(tree: Any, specs: Any, mesh: jax.sharding.Mesh) -> Any:
    """Arrays that every process has, on the devices of a mesh."""

    def one(leaf: Any, spec: P) -> Any:
        sharding = NamedSharding(mesh, spec)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            words = np.asarray(jax.random.key_data(leaf))
            data = _put(words, NamedSharding(mesh, P(*spec, *(None,) * (leaf.ndim - len(spec)), None)))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return _put(np.asarray(leaf), sharding)

    return jax.tree.map(one, tree, specs)


def _put(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
