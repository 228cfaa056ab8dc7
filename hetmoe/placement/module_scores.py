"""One number for every module that a plan can move: scores, costs or sensitivities."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from hetmoe.models.abstract import abstract_params
from hetmoe.models.config import ModelConfig
from hetmoe.models.matrices import MATRICES, crossbar_matrices
from hetmoe.placement.plan import plan_shapes


@struct.dataclass
class ModuleScores:
    """Fields as in `Plan`; None for modules that were not scored or that the model does not have."""

    experts: Float[Array, "moe_layers experts"]
    attention: Float[Array, "layers"] | None = None
    shared_experts: Float[Array, "moe_layers"] | None = None
    dense_ffn: Float[Array, "dense_layers"] | None = None
    lm_head: Float[Array, ""] | None = None


def empty_scores(config: ModelConfig, *, dense: bool, last: tuple[int, ...] = ()) -> ModuleScores:
    """Zeros for every module, or for the routed experts alone; `last` are further trailing axes."""
    shapes = plan_shapes(config)
    wanted = shapes if dense else {"experts": shapes["experts"]}
    return ModuleScores(**{name: jnp.zeros(shape + last) for name, shape in wanted.items()})


def in_model_order(attention: tuple[Any, Any], config: ModelConfig) -> Any:
    """Joins values of the layers with and without experts (None if there are none) into those of all layers."""
    moe, dense = attention
    if dense is None:
        return moe
    order = np.argsort(np.concatenate([config.moe_layers, config.dense_layers]))
    return jnp.concatenate([moe, dense])[order]


def module_parameters(config: ModelConfig) -> ModuleScores:
    """Number of weights on crossbars of every module (float64 on the host; counts are exact below 2**53)."""
    leaves = abstract_params(config)

    def count(layer: Any, module: str) -> int:
        found = crossbar_matrices(layer)
        sizes = [math.prod(leaf.shape[1:]) for name, leaf in found.items() if MATRICES[name].module == module]
        return sum(sizes)

    shapes = plan_shapes(config)
    experts = count(leaves.layers, "experts") // config.num_experts
    attention = np.zeros(config.num_layers)
    attention[list(config.moe_layers)] = count(leaves.layers, "attention")
    if config.dense_layers:
        attention[list(config.dense_layers)] = count(leaves.dense_layers, "attention")
    values: dict[str, Any] = {"experts": np.full(shapes["experts"], float(experts)), "attention": attention}
    if "shared_experts" in shapes:
        values["shared_experts"] = np.full(shapes["shared_experts"], float(count(leaves.layers, "shared_experts")))
    if "dense_ffn" in shapes:
        values["dense_ffn"] = np.full(shapes["dense_ffn"], float(count(leaves.dense_layers, "dense_ffn")))
    values["lm_head"] = np.float64(config.hidden_size * config.vocab_size)
    return ModuleScores(**values)
