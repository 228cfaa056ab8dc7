"""From the analog arguments of a forward pass to what each of its layers needs, stacked for the scan over layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedMatrix, ProgrammedWeights, SeededMatrix, SeededWeights, matrix_key
from hetmoe.analog.spec import AnalogSpec
from hetmoe.models.config import ModelConfig
from hetmoe.models.hardware import LayerHardware
from hetmoe.models.matrices import crossbar_matrices
from hetmoe.models.params import DenseLayer, Layer, Params
from hetmoe.parallel.shard import WHOLE, Shard
from hetmoe.placement.plan import Plan


def _hardware_of(
    numbers: tuple[int, ...],
    layers: Layer | DenseLayer,
    stack: dict[str, Any] | SeededWeights,
    first_key: int,
    plan: Plan,
    spec: AnalogSpec,
    ranges: dict[str, Array] | None,
    read_key: jax.Array | None,
    *,
    moe: bool,
    implementation: str | None,
    shard: Shard,
) -> LayerHardware:
    """The analog side of all layers of one kind, every leaf with a leading layer axis."""
    count = len(numbers)
    keys = None
    if read_key is not None:
        keys = jax.vmap(lambda layer: jax.random.fold_in(read_key, layer))(first_key + jnp.arange(count))
    dense = {"shared_experts": plan.shared_experts} if moe else {"dense_ffn": plan.dense_ffn}
    if plan.attention is not None:
        dense["attention"] = plan.attention[np.asarray(numbers)]
    return LayerHardware(
        experts=plan.experts if moe else None,
        dense={name: flags for name, flags in dense.items() if flags is not None},
        programmed=_seeded(stack, layers, first_key, count) if isinstance(stack, SeededWeights) else stack,
        ranges=ranges,
        read_key=keys,
        spec=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), spec),
        implementation=implementation,
        shard=shard,
    )


def _seeded(weights: SeededWeights, layers: Layer | DenseLayer, first_key: int, count: int) -> dict[str, SeededMatrix]:
    """Keys of all matrices that are programmed, stacked over layers."""
    numbers = first_key + jnp.arange(count)
    return {
        name: SeededMatrix(key=jax.vmap(lambda number, name=name: matrix_key(weights.key, name, number))(numbers))
        for name in crossbar_matrices(layers, dense=weights.dense)
    }


def stacked_hardware(
    params: Params,
    config: ModelConfig,
    plan: Plan,
    spec: AnalogSpec,
    programmed: ProgrammedWeights | SeededWeights,
    calibration: Calibration | None,
    read_key: jax.Array | None,
    implementation: str | None,
    shard: Shard = WHOLE,
) -> dict[bool, LayerHardware]:
    """The analog side of the layers with (True) and without (False) experts."""
    ranges = (None, None) if calibration is None else (calibration.layers, calibration.dense_layers)
    stored = isinstance(programmed, ProgrammedWeights)
    stacks = (programmed.layers, programmed.dense_layers) if stored else (programmed, programmed)
    moe = config.moe_layers
    found = {
        True: _hardware_of(
            moe,
            params.layers,
            stacks[0],
            0,
            plan,
            spec,
            ranges[0],
            read_key,
            moe=True,
            implementation=implementation,
            shard=shard,
        )
    }
    if params.dense_layers is not None:
        found[False] = _hardware_of(
            config.dense_layers, params.dense_layers, stacks[1], len(moe) + 1, plan, spec, ranges[1], read_key,
            moe=False, implementation=implementation, shard=shard,
        )  # fmt: skip
    return found


def programmed_head(
    programmed: ProgrammedWeights | SeededWeights | None, plan: Plan | None
) -> ProgrammedMatrix | SeededMatrix | None:
    """The LM head's analog side, or None if it has none."""
    if not isinstance(programmed, SeededWeights):
        return None if programmed is None else programmed.lm_head
    if plan is None or not programmed.dense:
        return None
    return SeededMatrix(key=matrix_key(programmed.key, "lm_head", plan.experts.shape[0]))
