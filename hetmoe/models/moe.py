"""Feed-forward networks: the experts of one layer (digital, analog, or both side by side), shared experts, dense."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from hetmoe.models.hardware import LayerHardware, Probe, dense_matmul
from hetmoe.models.params import FeedForward, MoE
from hetmoe.models.routing import Routing
from hetmoe.ops.dispatch import Dispatch, choose_block_size, dispatch, from_blocks, to_blocks
from hetmoe.ops.grouped_crossbar.api import check_implementation, digital_products, expert_products
from hetmoe.ops.grouped_crossbar.block_sizes import BLOCKS_MULTIPLE, rows_per_block
from hetmoe.ops.grouped_matmul.feed_forward import grouped_feed_forward
from hetmoe.ops.grouped_quantized.xla import quantized_feed_forward
from hetmoe.parallel.exchange import through_owners
from hetmoe.parallel.shard import WHOLE, Shard
from hetmoe.quantize.mixed import is_mixed


def moe_block(
    x: Float[Array, "tokens hidden"],
    moe: MoE,
    routing: Routing,
    hardware: LayerHardware | None,
    probe: Probe,
    implementation: str | None,
    first_expert: Array | int = 0,
    shard: Shard = WHOLE,
) -> Float[Array, "tokens columns"]:
    """Runs each token through its experts and the shared ones, and adds the results.

    `implementation` is that of the routed experts. Their results carry the routing weights, that of the shared experts
    the sigmoid of its gate, if it has one. `first_expert` as in `routed_experts`. On a mesh the result has the device's
    own columns.
    """
    out = routed_experts(x, moe.experts, routing, hardware, probe, implementation, first_expert, shard)
    if moe.shared is None:
        return out
    shared = feed_forward(x, moe.shared, "shared", hardware, probe, shard)
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
    shard: Shard = WHOLE,
) -> Float[Array, "tokens columns"]:
    """SwiGLU (Shazeer 2020) of every token; `name` says whose matrices these are.

    On a mesh the result has the device's own columns.
    """
    probe.single(f"{name}_in", x)
    gate = dense_matmul(x, weights.gate, f"{name}_gate", hardware)
    up = dense_matmul(x, weights.up, f"{name}_up", hardware)
    inner = shard.gather_columns((jax.nn.silu(gate) * up).astype(x.dtype))
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
    shard: Shard = WHOLE,
) -> Float[Array, "tokens columns"]:
    """Runs each token through its experts (SwiGLU) and adds the results with the routing weights.

    Every token copy is multiplied once, by the clean weights of a digital expert or the programmed weights of an analog
    one; no token is dropped and no expert sees a token that was not routed to it.

    `first_expert` is where this layer's experts begin in `experts`, which may be a stack of more: the whole model's,
    say, so that no layer is cut out of it (digital experts only). On a mesh the copies go to the devices of their
    experts and back (`hetmoe.parallel.exchange`), and the result has the device's own columns.
    """
    numbers = jnp.arange(routing.chosen.size, dtype=jnp.uint32).reshape(routing.chosen.shape)
    numbers += shard.first_token(routing.chosen.size).astype(jnp.uint32)
    everyone = routing.logits.shape[-1]
    count, chosen = everyone // shard.expert, routing.chosen
    if probe.counted is not None:
        chosen = jnp.where(probe.counted[:, None], chosen, everyone)

    def network(rows: Array, chosen: Array, numbers: Array) -> Array:
        return _through_experts(
            rows, chosen, numbers, count, experts, hardware, probe, implementation, first_expert, shard
        )

    if shard.expert == 1:
        out = network(x, chosen, numbers)
    else:
        out = through_owners(
            network, x, chosen, numbers, experts=count, columns=experts.down.shape[-1], shard=shard,
            one_round=probe.sees,
        )  # fmt: skip
    if probe.counted is not None:
        out = jnp.where(probe.counted[:, None, None], out, 0)
    return jnp.einsum("tkh,tk->th", out, routing.weights).astype(x.dtype)


def _through_experts(
    x: Float[Array, "tokens hidden"],
    chosen: Int[Array, "tokens copies"],
    numbers: UInt32[Array, "tokens copies"],
    count: int,
    experts: FeedForward,
    hardware: LayerHardware | None,
    probe: Probe,
    implementation: str | None,
    first_expert: Array | int,
    shard: Shard,
) -> Float[Array, "tokens copies columns"]:
    """What `count` experts make of the token copies that chose them; of those that chose `count`, it means nothing."""
    is_xla = check_implementation(implementation) == "xla"
    block_size = (choose_block_size if is_xla else rows_per_block)(chosen.size, count)
    plan = dispatch(chosen, count, block_size, multiple=1 if is_xla else BLOCKS_MULTIPLE)
    blocks = to_blocks(x, plan)
    real = (plan.slot_token < x.shape[0]).reshape(blocks.shape[:2])  # padding slots hold no token
    used = real.any(axis=1)
    block_expert = plan.block_expert + first_expert
    seen_by = plan.block_expert + shard.first("expert", count)
    analog = None if hardware is None else hardware.experts

    def multiply(inputs: Array, **weights: Array) -> tuple[Array, ...]:
        """By matrices that share the inputs, and their DACs."""
        if hardware is None or analog is None:
            return digital_products(
                inputs, tuple(weights.values()), block_expert=block_expert, used=used,
                implementation=implementation,
            )  # fmt: skip
        rows = _copy_numbers(plan, numbers).reshape(blocks.shape[:2])
        return expert_products(
            inputs, tuple(weights.values()), tuple(hardware.programmed[name] for name in weights),
            block_expert=plan.block_expert, used=used, analog=analog,
            input_range=hardware.input_range(next(iter(weights))), spec=hardware.spec,
            read=tuple(hardware.read(name, rows) for name in weights), implementation=implementation, shard=shard,
        )  # fmt: skip

    if analog is None and is_xla and not probe.sees and shard.tensor == 1:
        network = quantized_feed_forward if is_mixed(experts.gate) else grouped_feed_forward
        out = network(blocks, experts.gate, experts.up, experts.down, block_expert, used)
    else:
        probe.grouped("experts_in", blocks, real, seen_by)
        gate, up = multiply(blocks, gate=experts.gate, up=experts.up)
        inner = shard.gather_columns((jax.nn.silu(gate) * up).astype(x.dtype))
        probe.grouped("experts_mid", inner, real, seen_by)
        (out,) = multiply(inner, down=experts.down)
    return from_blocks(out, plan)


def _copy_numbers(plan: Dispatch, numbers: UInt32[Array, "tokens copies"]) -> Array:
    """Number of the token copy that a slot holds, so that read noise follows the token and not the block layout."""
    tokens, copies = numbers.shape
    slots = jnp.arange(plan.slot_token.shape[0], dtype=plan.token_slot.dtype)
    token = jnp.minimum(plan.slot_token, tokens - 1)
    copy = jnp.argmax(plan.token_slot[token] == slots[:, None], axis=1).astype(jnp.int32)
    return numbers.reshape(-1)[token * copies + copy]
