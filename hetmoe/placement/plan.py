"""Which modules run on analog tiles, as arrays that may change without recompiling."""

import dataclasses

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

    All but `experts` may be None: digital by structure (or absent from the model), so that the compiled program holds
    no analog path for them at all.
    """

    experts: Bool[Array, "moe_layers experts"]
    attention: Bool[Array, "layers"] | None = None  # all projections of a layer, in model order
    shared_experts: Bool[Array, "moe_layers"] | None = None
    dense_ffn: Bool[Array, "dense_layers"] | None = None  # feed-forward networks of the layers without experts
    lm_head: Bool[Array, ""] | None = None

    @property
    def switches_dense(self) -> bool:
        """Whether any module outside the routed experts has an analog path."""
        dense = (self.attention, self.shared_experts, self.dense_ffn, self.lm_head)
        return any(part is not None for part in dense)


def plan_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the fields of a plan for this model, of those that the model has."""
    moe, dense = len(config.moe_layers), len(config.dense_layers)
    shapes: dict[str, tuple[int, ...]] = {"experts": (moe, config.num_experts), "attention": (config.num_layers,)}
    if config.shared_intermediate_size is not None:
        shapes["shared_experts"] = (moe,)
    if dense:
        shapes["dense_ffn"] = (dense,)
    return shapes | {"lm_head": ()}


def all_digital(config: ModelConfig) -> Plan:
    """Nothing analog; dense modules are digital by structure."""
    return Plan(experts=jnp.zeros(plan_shapes(config)["experts"], bool))


def experts_analog(config: ModelConfig) -> Plan:
    """Every routed expert analog, dense modules (shared experts among them) digital by structure."""
    return Plan(experts=jnp.ones(plan_shapes(config)["experts"], bool))


def all_analog(config: ModelConfig) -> Plan:
    """Everything analog that may be: experts, shared experts, dense layers, attention projections, LM head."""
    return Plan(**{name: jnp.ones(shape, bool) for name, shape in plan_shapes(config).items()})


# Placements that need no scores, by the names that `hetmoe tasks --placement` and a sweep's config give them.
PLACEMENTS = {"all_digital": all_digital, "experts_analog": experts_analog, "all_analog": all_analog}


def digital_count(fraction: float, experts: int) -> int:
    """`floor(fraction * experts + 0.5)` experts of each layer are digital.

    Raises:
        InputError: for a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise InputError(f"digital fraction {fraction!r} must be within [0, 1]")
    return int(np.floor(fraction * experts + 0.5))


def place(scores: Float[Array, "layers experts"] | np.ndarray, fraction: float) -> Plan:
    """Keeps the highest-scoring experts of each layer digital (ties to the lower index), the rest analog.

    Raises:
        InputError: for a fraction outside [0, 1], or a score that is not finite.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 2:
        raise InputError(f"scores {list(values.shape)} must be [layers, experts]")
    if not np.isfinite(values).all():
        layer, expert = np.argwhere(~np.isfinite(values))[0]
        raise InputError(
            f"the score of expert {expert} in layer {layer} (of those with experts) is {values[layer, expert]}: its "
            "weights hold NaN or infinity, or overflow"
        )
    digital = digital_count(fraction, values.shape[1])
    order = np.argsort(-values, axis=1, kind="stable")
    experts = np.ones(values.shape, bool)
    np.put_along_axis(experts, order[:, :digital], False, axis=1)
    return Plan(experts=jnp.asarray(experts))


def check_plan(plan: Plan, config: ModelConfig) -> None:
    """Raises InputError when the plan's shapes are not those of the model."""
    shapes = plan_shapes(config)
    for field in dataclasses.fields(plan):
        name, value = field.name, getattr(plan, field.name)
        if value is None:
            if name == "experts":
                raise InputError("plan: experts is None; only dense modules may be digital by structure")
            continue
        if name not in shapes:
            raise InputError(f"plan: {name} is set, but this model has none")
        if value.dtype != jnp.bool_:
            raise InputError(f"plan: {name} has dtype {value.dtype}, it must be a boolean array (True = analog)")
        if value.shape != shapes[name]:
            raise InputError(f"plan: {name} has shape {list(value.shape)}, this model needs {list(shapes[name])}")


def stack_plans(plans: list[Plan]) -> Plan:
    """Stacks plans of one structure along a new leading axis, to map over."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *plans)
