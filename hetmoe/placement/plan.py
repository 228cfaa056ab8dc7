"""Which modules run on analog tiles, as arrays that may change without recompiling."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig


@struct.dataclass
class Plan:
    """True = analog. Router, norms and embedding are always digital.

    `attention` (all four projections of a layer) and `lm_head` may be None: digital by structure, so that the compiled
    program holds no analog path for them at all.
    """

    experts: Bool[Array, "layers experts"]
    attention: Bool[Array, "layers"] | None
    lm_head: Bool[Array, ""] | None


def all_digital(config: ModelConfig) -> Plan:
    """Nothing analog; dense modules are digital by structure."""
    return Plan(experts=jnp.zeros((config.num_layers, config.num_experts), bool), attention=None, lm_head=None)


def experts_analog(config: ModelConfig) -> Plan:
    """Every expert analog, dense modules digital by structure."""
    return Plan(experts=jnp.ones((config.num_layers, config.num_experts), bool), attention=None, lm_head=None)


def all_analog(config: ModelConfig) -> Plan:
    """Everything analog that may be: experts, attention projections, LM head."""
    experts = jnp.ones((config.num_layers, config.num_experts), bool)
    return Plan(experts=experts, attention=jnp.ones((config.num_layers,), bool), lm_head=jnp.ones((), bool))


def digital_count(fraction: float, experts: int) -> int:
    """`floor(fraction * experts + 0.5)` experts of each layer are digital.

    Raises:
        InputError: for a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise InputError(f"digital fraction {fraction!r} must be within [0, 1]")
    return int(np.floor(fraction * experts + 0.5))


def place(scores: Float[Array, "layers experts"], fraction: float) -> Plan:
    """Keeps the highest-scoring experts of each layer digital (ties to the lower index), the rest analog.

    Raises:
        InputError: for a fraction outside [0, 1], or a score that is not a number.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 2 or np.isnan(values).any():
        raise InputError(f"scores {list(values.shape)} must be [layers, experts] without NaN")
    digital = digital_count(fraction, values.shape[1])
    order = np.argsort(-values, axis=1, kind="stable")
    experts = np.ones(values.shape, bool)
    np.put_along_axis(experts, order[:, :digital], False, axis=1)
    return Plan(experts=jnp.asarray(experts), attention=None, lm_head=None)


def check_plan(plan: Plan, config: ModelConfig) -> None:
    """Raises InputError when the plan's shapes are not those of the model."""
    wanted = {"experts": (config.num_layers, config.num_experts), "attention": (config.num_layers,), "lm_head": ()}
    for name, shape in wanted.items():
        value = getattr(plan, name)
        if value is None and name == "experts":
            raise InputError("plan: experts is None; only attention and lm_head may be digital by structure")
        if value is not None and value.dtype != jnp.bool_:
            raise InputError(f"plan: {name} has dtype {value.dtype}, it must be a boolean array (True = analog)")
        if value is not None and value.shape != shape:
            raise InputError(f"plan: {name} has shape {list(value.shape)}, this model needs {list(shape)}")


def stack_plans(plans: list[Plan]) -> Plan:
    """Stacks plans of one structure along a new leading axis, to map over."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *plans)
