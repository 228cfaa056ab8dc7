"""Decoding with a key-value cache: a pass over new tokens only.

Layers are unrolled, not scanned: a loop that cuts every layer's weights and cache out of stacks copies them, which
takes longer than a decoding step needs to read them. Experts of all layers stay in one stack and are found by index.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedWeights, SeededWeights
from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.models.analog_arguments import check_analog, check_quantized
from hetmoe.models.analog_stack import stacked_hardware
from hetmoe.models.attention import attend_cached, project_out, queries_keys_values, rms_norm, score_scale
from hetmoe.models.config import ModelConfig
from hetmoe.models.hardware import LayerHardware, Probe
from hetmoe.models.params import DenseLayer, FeedForward, Layer, Params, with_experts
from hetmoe.models.transformer import behind_attention, head_logits
from hetmoe.placement.plan import Plan
from hetmoe.quantize.mixed import attach, detach, is_mixed

MOST_INDEXED = 2**31  # elements of a stack that GPU kernels can index


@struct.dataclass
class KeyValueCache:
    """Turned keys, and values, of the positions seen so far, all sequences being equally long; latents are expanded."""

    keys: tuple[Float[Array, "batch kv_heads capacity dim"], ...]  # of every layer, in model order
    values: tuple[Float[Array, "batch kv_heads capacity value"], ...]
    length: Int[Array, ""]  # positions that are filled


def empty_cache(config: ModelConfig, batch: int, capacity: int, dtype: Any) -> KeyValueCache:
    """Room for `capacity` positions of `batch` sequences.

    Raises:
        InputError: for a capacity that the model's context does not have, or sizes below 1.
    """
    if batch < 1 or not 1 <= capacity <= config.max_position_embeddings:
        raise InputError(
            f"batch={batch} must be at least 1 and capacity={capacity} within the model's context of "
            f"{config.max_position_embeddings}"
        )
    value_dim = config.head_dim if config.latent is None else config.latent.value_dim

    def empty(width: int) -> tuple[Array, ...]:
        return tuple(jnp.zeros((batch, config.num_kv_heads, capacity, width), dtype) for _ in range(config.num_layers))

    return KeyValueCache(keys=empty(config.head_dim), values=empty(value_dim), length=jnp.int32(0))


def extend(
    params: Params,
    tokens: Int[Array, "batch new"],
    cache: KeyValueCache,
    config: ModelConfig,
    *,
    plan: Plan | None = None,
    spec: AnalogSpec | None = None,
    programmed: ProgrammedWeights | SeededWeights | None = None,
    calibration: Calibration | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch vocab"], KeyValueCache]:
    """Logits behind the last of some new tokens, and the cache with them: prefill with many tokens, decoding with one.

    Arguments as in `hetmoe.forward`, of whose logits these are the last ones; per-product read noise is not drawn
    here. Donate the cache to `jax.jit` (`donate_argnames="cache"`), and it is written in place. More tokens than the
    cache has room for overwrite its end: count them (`cache.length` may be traced).

    Returns:
        float32 logits, and the cache.

    Raises:
        InputError: for analog arguments that are incomplete or made for another model, or that draw read noise; for
            tokens and a cache of different batches.
    """
    check_analog(config, plan, spec, programmed, calibration, None)
    check_quantized(params, plan, programmed)
    batch, _, capacity, _ = cache.keys[0].shape
    if tokens.ndim != 2 or tokens.shape[0] != batch or not 1 <= tokens.shape[1] <= capacity:
        raise InputError(
            f"tokens {list(tokens.shape)} must be [batch, new] with the cache's batch of {batch} and at most its "
            f"{capacity} positions"
        )
    hardware: dict[bool, LayerHardware] = {}
    if plan is not None and spec is not None and programmed is not None:
        hardware = stacked_hardware(params, config, plan, spec, programmed, calibration, None, implementation)
    by_layer = isinstance(programmed, SeededWeights) and programmed.when == "layer"
    experts = None if hardware else _one_stack(params)
    if experts is not None:
        params = with_experts(params, FeedForward(gate=None, up=None, down=None))
    positions, probe = cache.length + jnp.arange(tokens.shape[1]), Probe(None)
    x, keys, values = params.embed[tokens], list(cache.keys), list(cache.values)
    counts = {True: 0, False: 0}
    for number in range(config.num_layers):
        moe = number not in config.dense_layers
        index = counts[moe]
        counts[moe] += 1
        layer: Any = _cut(params.layers if moe else params.dense_layers, index)
        of_layer: Any = _cut(hardware.get(moe), index)
        if by_layer and of_layer is not None:
            of_layer = of_layer.program(layer)
        normed = rms_norm(x, layer.input_norm, config.rms_norm_eps)
        q, k, v = queries_keys_values(normed, layer.attention, config, of_layer, probe, positions)
        keys[number], values[number] = (_written(keys[number], k, cache), _written(values[number], v, cache))
        mixed = attend_cached(
            q, keys[number].astype(q.dtype), values[number].astype(q.dtype), scale=score_scale(config),
            window=config.sliding_window, first=cache.length,
        )  # fmt: skip
        x = x + project_out(mixed, layer.attention, of_layer, probe)
        first = 0
        if experts is not None and isinstance(layer, Layer):
            layer, first = (
                dataclasses.replace(layer, moe=dataclasses.replace(layer.moe, experts=experts)),
                index * config.num_experts,
            )
        x = behind_attention(x, layer, config, of_layer, probe, implementation, first).x
    last = rms_norm(x[:, -1], params.final_norm, config.rms_norm_eps)
    logits = head_logits(
        last, params, plan=plan, spec=spec, programmed=programmed, calibration=calibration, read_key=None,
        implementation=implementation,
    )  # fmt: skip
    length = cache.length + tokens.shape[1]
    return logits, KeyValueCache(keys=tuple(keys), values=tuple(values), length=length)


def _one_stack(params: Params) -> FeedForward | None:
    """The experts of all layers in one stack `[layers * experts, ...]`; None where kernels could not index it.

    (Gradients through the stack would be as large as all of it in every layer: this is for decoding.)
    """
    experts = params.layers.moe.experts
    if is_mixed(experts.gate) or experts.gate.size > MOST_INDEXED:
        return None
    return jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), experts)


def _cut(stack: Layer | DenseLayer | LayerHardware | None, index: int) -> Any:
    """One layer of a stack; pools of quantized experts serve all layers."""
    places, pools = detach(stack)
    return attach(jax.tree.map(lambda leaf: leaf[index], places), pools)


def _written(held: Array, new: Array, cache: KeyValueCache) -> Array:
    """A layer's keys or values with those of new positions."""
    by_head = jnp.swapaxes(new, 1, 2).astype(held.dtype)
    return jax.lax.dynamic_update_slice(held, by_head, (0, 0, cache.length, 0))
