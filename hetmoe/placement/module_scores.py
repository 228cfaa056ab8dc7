"""One number for every module that a plan can move: scores, costs or sensitivities."""

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from hetmoe.models.config import ModelConfig
from hetmoe.placement.parameters import switch_sizes
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


def module_parameters(config: ModelConfig) -> ModuleScores:
    """Number of weights that every module has on crossbars when analog; float64, exact below 2**53."""
    sizes, shapes = switch_sizes(config), plan_shapes(config)
    return ModuleScores(**{name: np.full(shape, float(sizes[name])) for name, shape in shapes.items()})  # pyright: ignore[reportArgumentType]
