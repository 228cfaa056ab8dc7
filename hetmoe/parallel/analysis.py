"""What an evaluation takes on a mesh, from the program compiled for it: no weights and no such devices are needed."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.evaluate.run import Batches, evaluate_digital, evaluate_seeds
from hetmoe.models.abstract import abstract_params, is_leaf
from hetmoe.models.config import ModelConfig
from hetmoe.parallel.memory import Workload
from hetmoe.parallel.mesh import make_mesh
from hetmoe.parallel.program_costs import ProgramCosts, program_costs
from hetmoe.parallel.rules import WINDOWS, leaf_spec, plan_specs
from hetmoe.parallel.shard import Shard
from hetmoe.placement.plan import all_analog, experts_analog


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """Of one device, for one batch of windows.

    Attributes:
        arguments: bytes of weights and inputs.
        results: bytes of results that are no arguments' memory.
        temporaries: bytes beside both while it runs.
        costs: FLOPs and communication.
    """

    arguments: int
    results: int
    temporaries: int
    costs: ProgramCosts

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.arguments + self.results + self.temporaries


def analyze(
    config: ModelConfig, shard: Shard, run: Workload, devices: Sequence[Any], spec: AnalogSpec | None
) -> Analysis:
    """Compiles the evaluation of one batch, and reads its memory and costs.

    Args:
        config: of the model.
        shard: the mesh.
        run: the batch. With `spec`, one seed along every part of the axis `seed`, and what `weights` says.
        devices: to compile for (`hetmoe.parallel.topology.described_devices`).
        spec: crossbars of all modules, or with `run.dense` False of the experts; None = all digital.

    Raises:
        InputError: for too few devices, or a program that does not fit their memory, with the compiler's words.
    """
    mesh = make_mesh(shard, devices)

    def there(shape: tuple[int, ...], dtype: Any, where: P) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, where))

    def like(tree: Any, specs: Any) -> Any:
        return jax.tree.map(lambda leaf, where: there(leaf.shape, leaf.dtype, where), tree, specs)

    params = jax.tree.map(
        lambda leaf: there(leaf.shape, leaf.dtype(run.dtype), leaf_spec(leaf)), abstract_params(config), is_leaf=is_leaf
    )
    windows = (1, run.batch)
    batches = Batches(
        tokens=there((*windows, run.seq + 1), jnp.int32, WINDOWS),
        choices=there((*windows, run.seq, 1), jnp.int32, WINDOWS),
        asked=there((*windows, run.seq), jnp.bool_, WINDOWS),
        weight=there(windows, jnp.float32, WINDOWS),
    )
    if spec is None:
        lowered = evaluate_digital.lower(params, batches, config, None, mesh)
    else:
        plan = (all_analog if run.dense else experts_analog)(config)
        plans = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (shard.seed, 1, *leaf.shape)), plan)
        keys = there((shard.seed,), jax.eval_shape(lambda: jax.random.key(0)).dtype, P("seed"))
        lowered = evaluate_seeds.lower(
            params, keys, like(plans, plan_specs(plan, "seed", None)), like(spec, jax.tree.map(lambda _: P(), spec)),
            None, batches, config, run.weights, None, mesh=mesh, first_batch=0,
        )  # fmt: skip
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = " ".join(str(error).split())
        raise InputError(f"the program does not fit the memory of its devices: {said[:300]}") from None
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # they are None on platforms of which nothing is known
    return Analysis(
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        costs=program_costs(text),
    )


def tokens_per_device(shard: Shard, run: Workload) -> int:
    """Tokens of a batch that a device works on."""
    return math.ceil(run.batch / (shard.data * shard.expert)) * run.seq
