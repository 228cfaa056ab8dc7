"""Programming and running a model that is spread over a mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedWeights, SeededWeights, program
from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.models.params import Params
from hetmoe.models.routing import Routing
from hetmoe.models.transformer import check_arguments, forward, hidden_states
from hetmoe.parallel.mesh import shard_of
from hetmoe.parallel.rules import calibration_specs, on_mesh, param_specs, plan_specs, programmed_specs
from hetmoe.parallel.shard import TOKENS
from hetmoe.placement.plan import Plan


@functools.partial(jax.jit, static_argnames=("config", "dense", "mesh"))
def program_on(
    mesh: jax.sharding.Mesh, key: jax.Array, params: Params, config: ModelConfig, spec: AnalogSpec, *, dense: bool
) -> ProgrammedWeights:
    """`hetmoe.program` on a mesh: every device programs its own experts and columns, with the same weights.

    Args:
        mesh: devices; axes as `hetmoe.parallel.shard.AXES`.
        key: the noise seed.
        params: the model, loaded onto the mesh.
        config: static.
        spec: device and magnitudes.
        dense: also program what is outside the routed experts.
    """
    shard, per_column = shard_of(mesh), spec.options.bound_axis == "column"

    def run(key: jax.Array, params: Params, spec: AnalogSpec) -> ProgrammedWeights:
        return program(key, params, spec, dense=dense, shard=shard)

    out = programmed_specs(config, dense=dense, per_column=per_column)
    return on_mesh(run, mesh, (P(), param_specs(config), P()), out)(key, params, spec)


@functools.partial(jax.jit, static_argnames=("config", "implementation", "mesh"))
def forward_on(
    mesh: jax.sharding.Mesh,
    params: Params,
    tokens: Int[Array, "batch seq"],
    config: ModelConfig,
    *,
    plan: Plan | None = None,
    spec: AnalogSpec | None = None,
    programmed: ProgrammedWeights | SeededWeights | None = None,
    calibration: Calibration | None = None,
    read_key: jax.Array | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch seq vocab"]:
    """`hetmoe.forward` on a mesh. Numbers do not depend on the mesh but for rounding, which may flip converter steps.

    Args:
        mesh: devices; axes as `hetmoe.parallel.shard.AXES`. Tokens are cut along `data` and `expert`.
        params: the model, loaded onto the mesh.
        tokens: token ids.
        config: static.
        plan: as in `forward`, like all that follow.
        spec: hardware.
        programmed: made by `program_on`, or `hetmoe.seeded_weights`.
        calibration: DAC ranges.
        read_key: key of read noise.
        implementation: of products; static.

    Raises:
        InputError: as `forward`, or if `data` and `expert` do not divide the batch.
    """
    check_arguments(params, tokens, config, plan, spec, programmed, calibration, read_key)
    shard = shard_of(mesh)
    if tokens.shape[0] % (shard.data * shard.expert):
        raise InputError(
            f"a batch of {tokens.shape[0]} sequences cannot be cut into {shard.data} x {shard.expert} parts (data x "
            "expert)"
        )
    analog = {
        "plan": plan, "spec": spec, "programmed": programmed, "calibration": calibration, "read_key": read_key
    }  # fmt: skip
    of_programmed: Any = P()
    if isinstance(programmed, ProgrammedWeights):
        per_column = spec is not None and spec.options.bound_axis == "column"
        of_programmed = programmed_specs(config, dense=programmed.lm_head is not None, per_column=per_column)
    specs = {
        "plan": None if plan is None else plan_specs(plan), "spec": P(), "programmed": of_programmed,
        "calibration": calibration_specs(calibration), "read_key": P(),
    }  # fmt: skip

    def run(params: Params, tokens: Array, analog: dict[str, Any]) -> Array:
        return forward(params, tokens, config, **analog, implementation=implementation, shard=shard)

    return on_mesh(run, mesh, (param_specs(config), P(TOKENS), specs), P(TOKENS))(params, tokens, analog)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def routing_on(
    mesh: jax.sharding.Mesh, params: Params, tokens: Int[Array, "sequences seq"], config: ModelConfig
) -> Routing:
    """The routing of every layer in a digital pass, on all devices.

    Sequences are filled up to what `data` and `expert` divide, and the added ones left out of the result.
    """
    shard = shard_of(mesh)
    padded = pad_sequences(tokens, shard.data * shard.expert)

    def run(params: Params, part: Array) -> Routing:
        routing = hidden_states(params, part, config, shard=shard)[1]
        return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, TOKENS, axis=1, tiled=True), routing)

    found = on_mesh(run, mesh, (param_specs(config), P(TOKENS)), P())(params, padded)
    return jax.tree.map(lambda leaf: leaf[:, : tokens.size], found)


def pad_sequences(tokens: Int[Array, "sequences seq"], multiple: int) -> Int[Array, "padded seq"]:
    """With as many copies of the first sequence at the end as make their number a multiple."""
    more = -tokens.shape[0] % multiple
    return jnp.concatenate([tokens, jnp.repeat(tokens[:1], more, axis=0)])
