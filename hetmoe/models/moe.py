"""Routing, and the experts of one layer: digital, analog, or both side by side."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from hetmoe.models.hardware import LayerHardware, Observer
from hetmoe.models.params import Layer
from hetmoe.ops.dispatch import choose_block_size, dispatch, from_blocks, to_blocks
from hetmoe.ops.grouped_crossbar.xla import grouped_crossbar
from hetmoe.ops.grouped_matmul.xla import grouped_matmul


@struct.dataclass
class Routing:
    """What the routers decided; `forward`'s internals stack it over layers."""

    logits: Float[Array, "*layers tokens experts"]
    chosen: Int[Array, "*layers tokens copies"]
    weights: Float[Array, "*layers tokens copies"]


def route(
    x: Float[Array, "tokens hidden"],
    router: Float[Array, "hidden experts"],
    experts_per_token: int,
    norm_topk_prob: bool,
) -> Routing:
    """Softmax over all experts in float32, then the top k; ties go to the lower index.

    The weights of a token sum to 1 only when `norm_topk_prob` is set (OLMoE-1B-7B leaves them as they are).
    """
    logits = jnp.matmul(x, router, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts_per_token)
    if norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(logits=logits, chosen=chosen.astype(jnp.int32), weights=weights)


def moe_block(
    x: Float[Array, "tokens hidden"],
    layer: Layer,
    routing: Routing,
    hardware: LayerHardware | None,
    observe: Observer | None,
) -> tuple[Float[Array, "tokens hidden"], dict[str, Any]]:
    """Runs each token through its experts (SwiGLU) and adds the results with the routing weights.

    Every token copy is multiplied once, by the clean weights of a digital expert or the programmed weights of an analog
    one; no token is dropped and no expert sees a token that was not routed to it.
    """
    experts = layer.router.shape[-1]
    plan = dispatch(routing.chosen, experts, choose_block_size(routing.chosen.size, experts))
    blocks = to_blocks(x, plan)
    real = (plan.slot_token < x.shape[0]).reshape(blocks.shape[:2])  # padding slots hold no token
    seen = {} if observe is None else {"experts_in": observe(blocks, real, plan.block_expert)}

    rows = _copy_numbers(plan.token_slot, plan.slot_token.shape[0]).reshape(blocks.shape[:2])
    if hardware is None:
        gate = grouped_matmul(blocks, layer.gate, plan.block_expert)
        up = grouped_matmul(blocks, layer.up, plan.block_expert)
    else:
        gate = _analog(blocks, layer.gate, "gate", plan.block_expert, rows, hardware)
        up = _analog(blocks, layer.up, "up", plan.block_expert, rows, hardware)
    inner = (jax.nn.silu(gate) * up).astype(x.dtype)
    if observe is not None:
        seen["experts_mid"] = observe(inner, real, plan.block_expert)
    if hardware is None:
        out = grouped_matmul(inner, layer.down, plan.block_expert)
    else:
        out = _analog(inner, layer.down, "down", plan.block_expert, rows, hardware)
    return jnp.einsum("tkh,tk->th", from_blocks(out, plan), routing.weights).astype(x.dtype), seen


def _copy_numbers(token_slot: Int[Array, "tokens copies"], slots: int) -> Array:
    """Number of the token copy that a slot holds, so that read noise follows the token and not the block layout."""
    numbers = jnp.arange(token_slot.size, dtype=jnp.uint32)
    return jnp.zeros((slots,), jnp.uint32).at[token_slot.reshape(-1)].set(numbers, unique_indices=True)


def _analog(x: Array, clean: Array, name: str, block_expert: Array, rows: Array, hardware: LayerHardware) -> Array:
    programmed = getattr(hardware.programmed, name)
    analog = hardware.experts
    # Selected per expert, around one matmul: under vmap a `lax.cond` would compute both sides.
    w = jnp.where(analog[:, None, None], programmed.w, clean)
    spec = hardware.spec
    return grouped_crossbar(
        x, w, block_expert, analog, hardware.input_range(name), spec.adc_bound, programmed.weight_max, spec.options,
        hardware.read(name, rows),
    )  # fmt: skip
