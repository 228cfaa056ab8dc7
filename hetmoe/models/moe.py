"""Feed-forward networks: the experts of one layer (digital, analog, or both side by side), shared experts, dense."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hetmoe.models.hardware import LayerHardware, Probe, dense_matmul
from hetmoe.models.params import FeedForward, MoE
from hetmoe.models.routing import Routing
from hetmoe.ops.dispatch import choose_block_size, dispatch, from_blocks, to_blocks
from hetmoe.ops.grouped_crossbar.api import check_implementation, digital_products, expert_products
from hetmoe.ops.grouped_crossbar.block_sizes import BLOCKS_MULTIPLE, rows_per_block
from hetmoe.ops.grouped_matmul.feed_forward import grouped_feed_forward
from hetmoe.ops.grouped_quantized.xla import quantized_feed_forward
from hetmoe.quantize.mixed import is_mixed


def moe_block(
    x: Float[Array, "tokens hidden"],
    moe: MoE,
    routing: Routing,
    hardware: LayerHardware | None,
    probe: Probe,
    implementation: str | None,
    first_expert: Array | int = 0,
) -> Float[Array, "tokens hidden"]:
    """Runs each token through its experts and the shared ones, and adds the results.

    `implementation` is that of the routed experts. Their results carry the routing weights, that of the shared experts
    the sigmoid of its gate, if it has one. `first_expert` as in `routed_experts`.
    """
    out = routed_experts(x, moe.experts, routing, hardware, probe, implementation, first_expert)
    if moe.shared is None:
        return out
    shared = feed_forward(x, moe.shared, "shared", hardware, probe)
    if moe.shared_gate is not None:
        gate = jnp.matmul(x, moe.shared_gate, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        shared = (jax.nn.sigmoid(gate) * shared).astype(x.dtype)
    return out + shared


def feed_forward(
    x: Float[Array, "tokens hidden"],
    weights: FeedForward,
    name: Literal["shared", "ffn"],
    hardware: LayerHardware | None,
    probe: Probe,
) -> Float[Array, "tokens hidden"]:
    """SwiGLU (Shazeer 2020) of every token; `name` says whose matrices these are."""
    probe.single(f"{name}_in", x)
    gate = dense_matmul(x, weights.gate, f"{name}_gate", hardware)
    up = dense_matmul(x, weights.up, f"{name}_up", hardware)
    inner = (jax.nn.silu(gate) * up).astype(x.dtype)
    probe.single(f"{name}_mid", inner)
    return dense_matmul(inner, weights.down, f"{name}_down", hardware)


def routed_experts(
    x: Float[Array, "tokens hidden"],
    experts: FeedForward,
    routing: Routing,
    hardware: LayerHardware | None,
    probe: Probe,
    implementation: str | None,
    first_expert: Array | int = 0,
) -> Float[Array, "tokens hidden"]:
    """Runs each token through its experts (SwiGLU) and adds the results with the routing weights.

    Every token copy is multiplied once, by the clean weights of a digital expert or the programmed weights of an analog
    one; no token is dropped and no expert sees a token that was not routed to it.

    `first_expert` is where this layer's experts begin in `experts`, which may be a stack of more: the whole model's,
    say, so that no layer is cut out of it (digital experts only).
    """
    count, is_xla = routing.logits.shape[-1], check_implementation(implementation) == "xla"
    block_size = (choose_block_size if is_xla else rows_per_block)(routing.chosen.size, count)
    plan = dispatch(routing.chosen, count, block_size, multiple=1 if is_xla else BLOCKS_MULTIPLE)
    blocks = to_blocks(x, plan)
    real = (plan.slot_token < x.shape[0]).reshape(blocks.shape[:2])  # padding slots hold no token
    used = real.any(axis=1)
    block_expert = plan.block_expert + first_expert
    analog = None if hardware is None else hardware.experts

    def multiply(inputs: Array, **weights: Array) -> tuple[Array, ...]:
        """By matrices that share the inputs, and their DACs."""
        if hardware is None or analog is None:
            return digital_products(
                inputs, tuple(weights.values()), block_expert=block_expert, used=used,
                implementation=implementation,
            )  # fmt: skip
        rows = _copy_numbers(plan.token_slot, plan.slot_token.shape[0]).reshape(blocks.shape[:2])
        return expert_products(
            inputs, tuple(weights.values()), tuple(hardware.programmed[name] for name in weights),
            block_expert=plan.block_expert, used=used, analog=analog,
            input_range=hardware.input_range(next(iter(weights))), spec=hardware.spec,
            read=tuple(hardware.read(name, rows) for name in weights), implementation=implementation,
        )  # fmt: skip

    if analog is None and is_xla and not probe.sees:
        network = quantized_feed_forward if is_mixed(experts.gate) else grouped_feed_forward
        out = network(blocks, experts.gate, experts.up, experts.down, block_expert, used)
    else:
        probe.grouped("experts_in", blocks, real, plan.block_expert)
        gate, up = multiply(blocks, gate=experts.gate, up=experts.up)
        inner = (jax.nn.silu(gate) * up).astype(x.dtype)
        probe.grouped("experts_mid", inner, real, plan.block_expert)
        (out,) = multiply(inner, down=experts.down)
    return jnp.einsum("tkh,tk->th", from_blocks(out, plan), routing.weights).astype(x.dtype)


def _copy_numbers(token_slot: Int[Array, "tokens copies"], slots: int) -> Array:
    """Number of the token copy that a slot holds, so that read noise follows the token and not the block layout."""
    numbers = jnp.arange(token_slot.size, dtype=jnp.uint32)
    return jnp.zeros((slots,), jnp.uint32).at[token_slot.reshape(-1)].set(numbers, unique_indices=True)
