"""Where every module of a model runs and how many bytes its weights take, as numbers that may be mapped over."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float64, Int

from hetmoe.errors import InputError
from hetmoe.hardware.shapes import module_shapes
from hetmoe.models.config import ModelConfig
from hetmoe.placement.plan import Plan, check_plan, plan_shapes
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.quantize.budget import expert_bytes as expert_bytes_of
from hetmoe.quantize.layout import QuantizedLayout
from hetmoe.quantize.recipe import Recipe


@struct.dataclass
class Deployment:
    """Leading axes are other deployments. Modules that the model lacks have empty fields. float32.

    Fields named as in `Plan` are 1 where the module is analog and 0 where it is digital.
    """

    experts: Float[Array, "*plans moe_layers experts"]
    attention: Float[Array, "*plans layers"]
    shared_experts: Float[Array, "*plans shared_layers"]
    dense_ffn: Float[Array, "*plans dense_layers"]
    lm_head: Float[Array, "*plans"]
    expert_bytes: Float[Array, "*plans moe_layers experts"]  # of an expert's weights where it is digital
    weight_bytes: Float[Array, "*plans"]  # of every other weight
    element_bytes: Float[Array, "*plans"]  # of an element of activations and of the key-value cache


def deployment(
    plan: Plan,
    config: ModelConfig,
    *,
    expert_bytes: Float[np.ndarray, "moe_layers experts"] | None = None,
    weight_bytes: float = 2.0,
    element_bytes: float = 2.0,
) -> Deployment:
    """A plan with the precision of its digital weights.

    Args:
        plan: what is analog.
        config: the model's.
        expert_bytes: of every expert where it is digital (`bytes_of_bits`, `bytes_of_layout`); None = no expert is
            quantized. Those of analog experts do not matter.
        weight_bytes: of a weight that is not quantized.
        element_bytes: of an element of activations, of the key-value cache, and of vectors that cross the link.

    Raises:
        InputError: for a plan or bytes of another model, or sizes that are not positive.
    """
    check_plan(plan, config)
    shape = plan_shapes(config)["experts"]
    sizes = np.full(shape, module_shapes(config)["experts"].weights * weight_bytes)
    if expert_bytes is not None:
        sizes = np.asarray(expert_bytes, np.float64)
        if sizes.shape != shape:
            raise InputError(f"expert_bytes {list(sizes.shape)} must be {list(shape)} for this model")
    for name, size in (("weight_bytes", weight_bytes), ("element_bytes", element_bytes), ("expert_bytes", sizes)):
        if not ((np.asarray(size) > 0) & np.isfinite(size)).all():
            raise InputError(f"{name} must be positive and finite, got {np.min(size):g}")

    def flags(name: str) -> Array:
        value = getattr(plan, name)
        absent = jnp.zeros(plan_shapes(config).get(name, (0,)), jnp.float32)
        return absent if value is None else jnp.asarray(value, jnp.float32)

    return Deployment(
        experts=flags("experts"),
        attention=flags("attention"),
        shared_experts=flags("shared_experts"),
        dense_ffn=flags("dense_ffn"),
        lm_head=flags("lm_head"),
        expert_bytes=jnp.asarray(sizes, jnp.float32),
        weight_bytes=jnp.asarray(weight_bytes, jnp.float32),
        element_bytes=jnp.asarray(element_bytes, jnp.float32),
    )


def stack_deployments(deployments: list[Deployment]) -> Deployment:
    """Deployments of one model along a new leading axis, to map over."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *deployments)


def bytes_of_bits(
    config: ModelConfig,
    bits: Int[np.ndarray, "layers experts matrices"],
    recipe: Recipe,
    weight_bytes: float = 2.0,
) -> Float64[np.ndarray, "layers experts"]:
    """Bytes of every expert with its matrices at these bits (0 = not quantized), steps and zeros included.

    Raises:
        InputError: for bits that do not exist or fit the model, or groups that do not divide a matrix's rows.
    """
    shape = (*plan_shapes(config)["experts"], len(EXPERT_MATRICES))
    if bits.shape != shape:
        raise InputError(f"bits {list(bits.shape)} must be {list(shape)} for this model")
    plain = module_shapes(config)["experts"].weights / len(EXPERT_MATRICES) * weight_bytes
    found = np.full(shape, plain)
    for level in sorted({int(b) for b in np.unique(bits)} - {0}):
        sizes = expert_bytes_of(config, [recipe.grid(level)])[:, 0]  # by matrix
        found = np.where(bits == level, sizes, found)
    return found.sum(axis=-1)


def bytes_of_layout(
    config: ModelConfig, layout: QuantizedLayout, weight_bytes: float = 2.0
) -> Float64[np.ndarray, "layers experts"]:
    """Bytes of every expert of a model with quantized experts."""
    plain = module_shapes(config)["experts"].weights / len(EXPERT_MATRICES) * weight_bytes
    total = np.zeros(plan_shapes(config)["experts"])
    for column, name in enumerate(EXPERT_MATRICES):
        of_grid = [int(expert_bytes_of(config, [grid])[column, 0]) for grid in layout.grids]
        total += np.array([*of_grid, plain])[layout.table(name)]  # `AS_IT_WAS` is -1: the last
    return total
