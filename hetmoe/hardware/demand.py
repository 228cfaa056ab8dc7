"""What a step asks of any hardware: bytes, FLOP, and vectors for analog matrices, for each kind of module."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from hetmoe.hardware.deployment import Deployment
from hetmoe.hardware.routing import largest_load
from hetmoe.hardware.shapes import ModuleShape, cache_shapes, module_shapes
from hetmoe.hardware.step import Step
from hetmoe.models.config import ModelConfig


@struct.dataclass
class Demand:
    """Of one kind of module, in each layer that has it (one entry for the LM head). Expected values; float32."""

    weight_bytes: Float[Array, "*points layers"]  # read from digital memory
    cache_bytes: Float[Array, "*points layers"]  # of the key-value cache, read and written
    activation_bytes: Float[Array, "*points layers"]  # inputs and outputs of digital matrices
    flops: Float[Array, "*points layers"]  # of the digital unit
    analog: Float[Array, "*points layers"]  # modules on chips
    analog_used: Float[Array, "*points layers"]  # of these, needed in the step
    vectors: Float[Array, "*points layers"]  # that pass all matrices of an analog module, one after the other
    queue: Float[Array, "*points layers"]  # of these at the module that gets most
    exchanged_bytes: Float[Array, "*points layers"]  # over the link, both directions together
    transfers: Float[Array, "*points layers"]


@struct.dataclass
class ModelDemand:
    """By kind of module, named as in `Plan`. The embedding and the routers count as attention, which they go with."""

    kinds: dict[str, Demand]
    tokens: Float[Array, "*points"]
    memory: Float[Array, "*points"]  # B of digital weights, embedding and routers included, and key-value cache


@functools.partial(jax.jit, static_argnames="config")
def model_demand(config: ModelConfig, where: Deployment, step: Step) -> ModelDemand:
    """Of one step of one deployment."""
    shapes = module_shapes(config)
    kinds = {
        "attention": _attention(config, shapes["attention"], where, step),
        "experts": _experts(shapes["experts"], where, step),
    }
    for name in ("shared_experts", "dense_ffn"):
        if name in shapes:
            kinds[name] = _dense(shapes[name], getattr(where, name), step.tokens, where)
    kinds["lm_head"] = _dense(shapes["lm_head"], where.lm_head[None], step.logits, where)
    memory = stored_bytes(config, where) + position_bytes(config, where) * step.held
    return ModelDemand(kinds=kinds, tokens=step.tokens, memory=memory)


@functools.partial(jax.jit, static_argnames="config")
def demand_grid(config: ModelConfig, where: Deployment, steps: Step) -> ModelDemand:
    """Every deployment with every step, both with a leading axis: `[deployments, steps, ...]`."""
    of_steps = jax.vmap(lambda where, step: model_demand(config, where, step), (None, 0))
    return jax.vmap(of_steps, (0, None))(where, steps)


def _dense(shape: ModuleShape, analog: Array, tokens: Array, where: Deployment) -> Demand:
    """A module that every token passes."""
    digital = 1 - analog
    return Demand(
        weight_bytes=digital * shape.weights * where.weight_bytes,
        cache_bytes=jnp.zeros_like(analog),
        activation_bytes=digital * shape.ends * tokens * where.element_bytes,
        flops=digital * 2.0 * shape.weights * tokens,
        analog=analog,
        analog_used=analog,
        vectors=analog * tokens,
        queue=analog * tokens,
        exchanged_bytes=analog * shape.exchanged * tokens * where.element_bytes,
        transfers=analog * 2.0 * shape.crossings,
    )


def _attention(config: ModelConfig, shape: ModuleShape, where: Deployment, step: Step) -> Demand:
    """Projections, attention over the cache, routers; the embedding in the first layer."""
    of_projections = _dense(shape, where.attention, step.tokens, where)
    plain, expanded = cache_shapes(config)
    analog, digital = where.attention, 1 - where.attention
    elements = digital * plain.elements + analog * expanded.elements
    mixing = (digital * plain.flops + analog * expanded.flops) * step.attended * step.tokens
    moe = jnp.asarray([float(layer in config.moe_layers) for layer in range(config.num_layers)], jnp.float32)
    router = moe * config.hidden_size * config.num_experts
    embedding = jnp.zeros_like(moe).at[0].set(step.tokens * config.hidden_size)
    ends = moe * (config.hidden_size + config.num_experts) * step.tokens
    return dataclasses.replace(
        of_projections,
        weight_bytes=of_projections.weight_bytes + (router + embedding) * where.weight_bytes,
        cache_bytes=elements * (step.cached + step.tokens) * where.element_bytes,
        activation_bytes=of_projections.activation_bytes + ends * where.element_bytes,
        flops=of_projections.flops + mixing + 2.0 * router * step.tokens,
    )


def _experts(shape: ModuleShape, where: Deployment, step: Step) -> Demand:
    """Routed experts: expected values over the routing of the step."""
    analog, digital, routing = where.experts, 1 - where.experts, step.routing
    on_chips = jnp.sum(analog * routing.copies, axis=-1)
    copies = jnp.sum(digital * routing.copies, axis=-1)
    unused = jnp.sum(analog * jnp.log1p(-jnp.minimum(routing.touched, 1 - 1e-7)), axis=-1)
    return Demand(
        weight_bytes=jnp.sum(digital * routing.touched * where.expert_bytes, axis=-1),
        cache_bytes=jnp.zeros_like(copies),
        activation_bytes=copies * shape.ends * where.element_bytes,
        flops=copies * 2.0 * shape.weights,
        analog=jnp.sum(analog, axis=-1),
        analog_used=jnp.sum(analog * routing.touched, axis=-1),
        vectors=on_chips,
        queue=largest_load(routing, analog),
        # A token's vector goes to the chips once, and comes back once as a weighted sum.
        exchanged_bytes=jnp.minimum(on_chips, step.tokens) * shape.exchanged * where.element_bytes,
        transfers=-jnp.expm1(unused) * 2.0 * shape.crossings,
    )


def stored_bytes(config: ModelConfig, where: Deployment) -> Float[Array, ""]:
    """Of digital weights, embedding and routers included."""
    shapes = module_shapes(config)
    weights = jnp.sum((1 - where.experts) * where.expert_bytes)
    for name in ("attention", "shared_experts", "dense_ffn", "lm_head"):
        if name in shapes and not (name == "lm_head" and config.tie_embeddings):  # then it is the embedding
            weights = weights + jnp.sum(1 - getattr(where, name)) * shapes[name].weights * where.weight_bytes
    router = len(config.moe_layers) * config.hidden_size * config.num_experts
    return weights + (config.vocab_size * config.hidden_size + router) * where.weight_bytes


def position_bytes(config: ModelConfig, where: Deployment) -> Float[Array, ""]:
    """Of the key-value cache, for one position of one sequence."""
    plain, expanded = cache_shapes(config)
    elements = jnp.sum((1 - where.attention) * plain.elements + where.attention * expanded.elements)
    return elements * where.element_bytes
