"""Decoding with a key-value cache: a pass over new tokens only."""

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
from hetmoe.models.attention import attend, project_out, queries_keys_values, rms_norm, score_scale
from hetmoe.models.config import ModelConfig
from hetmoe.models.hardware import LayerHardware, Probe
from hetmoe.models.params import DenseLayer, Layer, Params
from hetmoe.models.transformer import behind_attention, head_logits, scan_layers
from hetmoe.placement.plan import Plan


@struct.dataclass
class KeyValueCache:
    """Turned keys, and values, of the positions seen so far, all sequences being equally long; latents are expanded."""

    keys: Float[Array, "layers batch capacity kv_heads dim"]  # in model order
    values: Float[Array, "layers batch capacity kv_heads value"]
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
    shape = (config.num_layers, batch, capacity, config.num_kv_heads)
    return KeyValueCache(
        keys=jnp.zeros((*shape, config.head_dim), dtype), values=jnp.zeros((*shape, value_dim), dtype),
        length=jnp.int32(0),
    )  # fmt: skip


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
    if tokens.ndim != 2 or tokens.shape[0] != cache.keys.shape[1] or not 1 <= tokens.shape[1] <= cache.keys.shape[2]:
        raise InputError(
            f"tokens {list(tokens.shape)} must be [batch, new] with the cache's batch of {cache.keys.shape[1]} and at "
            f"most its {cache.keys.shape[2]} positions"
        )
    hardware: dict[bool, LayerHardware] = {}
    if plan is not None and spec is not None and programmed is not None:
        hardware = stacked_hardware(params, config, plan, spec, programmed, calibration, None, implementation)
    by_layer = isinstance(programmed, SeededWeights) and programmed.when == "layer"
    positions = cache.length + jnp.arange(tokens.shape[1])
    numbers = {True: jnp.asarray(config.moe_layers), False: jnp.asarray(config.dense_layers, jnp.int32)}

    def step(carry: Any, scanned: tuple[Layer | DenseLayer, tuple[LayerHardware | None, Array]]) -> tuple[Any, None]:
        x, keys, values = carry
        layer, (layer_hardware, number) = scanned
        if by_layer and layer_hardware is not None:
            layer_hardware = layer_hardware.program(layer)
        probe = Probe(None)
        normed = rms_norm(x, layer.input_norm, config.rms_norm_eps)
        q, k, v = queries_keys_values(normed, layer.attention, config, layer_hardware, probe, positions)
        keys, values = (
            jax.lax.dynamic_update_slice(held, new[None].astype(held.dtype), (number, 0, cache.length, 0, 0))
            for held, new in ((keys, k), (values, v))
        )
        mixed = attend(
            q, keys[number].astype(q.dtype), values[number].astype(q.dtype), scale=score_scale(config),
            window=config.sliding_window, first=cache.length,
        )  # fmt: skip
        x = x + project_out(mixed, layer.attention, layer_hardware, probe)
        return (behind_attention(x, layer, config, layer_hardware, probe, implementation).x, keys, values), None

    extras = {kind: (hardware.get(kind), number) for kind, number in numbers.items()}
    carry: Any = (params.embed[tokens], cache.keys, cache.values)
    (x, keys, values), _ = scan_layers(step, carry, params, config, extras)
    last = rms_norm(x[:, -1], params.final_norm, config.rms_norm_eps)
    logits = head_logits(
        last, params, plan=plan, spec=spec, programmed=programmed, calibration=calibration, read_key=None,
        implementation=implementation,
    )  # fmt: skip
    return logits, KeyValueCache(keys=keys, values=values, length=cache.length + tokens.shape[1])
