"""The decoder as a pure function: tokens and parameters in, logits out."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import Matrix, ProgrammedWeights
from hetmoe.analog.spec import AnalogSpec
from hetmoe.models.analog_arguments import check_analog
from hetmoe.models.attention import attend, rms_norm
from hetmoe.models.config import ModelConfig
from hetmoe.models.hardware import LayerHardware, Observer, crossbar_or_digital, dense_matmul
from hetmoe.models.moe import Routing, moe_block, route
from hetmoe.models.params import Layer, Params
from hetmoe.placement.plan import Plan


def _decoder_layer(
    x: Array, layer: Layer, config: ModelConfig, hardware: LayerHardware | None, observe: Observer | None
) -> tuple[Array, Routing, dict[str, Any]]:
    batch, seq, hidden = x.shape
    eps = config.rms_norm_eps

    def note(inputs: Array) -> Any:
        assert observe is not None
        return observe(inputs[None], jnp.ones((1, inputs.shape[0]), bool), jnp.zeros((1,), jnp.int32))

    with jax.named_scope("attention"):
        normed = rms_norm(x, layer.input_norm, eps).reshape(batch * seq, hidden)
        seen = {} if observe is None else {"attention_in": note(normed)}
        q = rms_norm(dense_matmul(normed, layer.q, "q", hardware), layer.q_norm, eps)
        k = rms_norm(dense_matmul(normed, layer.k, "k", hardware), layer.k_norm, eps)
        v = dense_matmul(normed, layer.v, "v", hardware)
        if config.clip_qkv is not None:
            q, k, v = (jnp.clip(t, -config.clip_qkv, config.clip_qkv) for t in (q, k, v))
        q, k, v = (t.reshape(batch, seq, -1) for t in (q, k, v))
        mixed = attend(q, k, v, config).reshape(batch * seq, -1)
        if observe is not None:
            seen["attention_out"] = note(mixed)
        x = x + dense_matmul(mixed, layer.o, "o", hardware).reshape(x.shape)
    with jax.named_scope("moe"):
        normed = rms_norm(x, layer.moe_norm, eps).reshape(batch * seq, hidden)
        routing = route(normed, layer.router, config.experts_per_token, config.norm_topk_prob)
        out, seen_by_experts = moe_block(normed, layer, routing, hardware, observe)
        x = x + out.reshape(x.shape)
    return x, routing, seen | seen_by_experts


def _layer_hardware(
    plan: Plan,
    spec: AnalogSpec,
    programmed: ProgrammedWeights,
    calibration: Calibration | None,
    read_key: jax.Array | None,
) -> LayerHardware:
    """The analog side of all layers, every leaf with a leading layer axis."""
    layers = plan.experts.shape[0]
    keys = None
    if read_key is not None:
        keys = jax.vmap(lambda layer: jax.random.fold_in(read_key, layer))(jnp.arange(layers))
    return LayerHardware(
        experts=plan.experts,
        attention=plan.attention,
        programmed=programmed.layers,
        ranges=None if calibration is None else calibration.layers,
        read_key=keys,
        spec=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (layers, *leaf.shape)), spec),
    )


def hidden_states(
    params: Params,
    tokens: Int[Array, "batch seq"],
    config: ModelConfig,
    *,
    plan: Plan | None = None,
    spec: AnalogSpec | None = None,
    programmed: ProgrammedWeights | None = None,
    calibration: Calibration | None = None,
    read_key: jax.Array | None = None,
    observe: Observer | None = None,
) -> tuple[Float[Array, "batch seq hidden"], Routing, dict[str, Any]]:
    """Final normed hidden states, the routing of every layer, and what `observe` returned at every matrix input.

    Arguments as in `forward`; the last two results have a leading layer axis.
    """
    check_analog(config, plan, spec, programmed, calibration, read_key)
    hardware = None
    if plan is not None and spec is not None and programmed is not None:
        hardware = _layer_hardware(plan, spec, programmed, calibration, read_key)

    def step(x: Array, scanned: tuple[Layer, LayerHardware | None]) -> tuple[Array, tuple[Routing, dict[str, Any]]]:
        layer, layer_hardware = scanned
        x, routing, seen = _decoder_layer(x, layer, config, layer_hardware, observe)
        return x, (routing, seen)

    x, (routing, seen) = jax.lax.scan(step, params.embed[tokens], (params.layers, hardware))
    return rms_norm(x, params.final_norm, config.rms_norm_eps), routing, seen


def head_matrix(params: Params) -> Float[Array, "hidden vocab"]:
    """The matrix from hidden states to logits, tied or not."""
    return params.embed.T if params.lm_head is None else params.lm_head


def head_logits(
    hidden: Float[Array, "tokens hidden"],
    params: Params,
    *,
    plan: Plan | None,
    spec: AnalogSpec | None,
    programmed: ProgrammedWeights | None,
    calibration: Calibration | None,
    read_key: jax.Array | None,
    first_row: Array | int = 0,
) -> Float[Array, "tokens vocab"]:
    """Float32 logits; `first_row` numbers the first token, which the LM head's read noise follows."""
    w = head_matrix(params)
    if plan is None or plan.lm_head is None or spec is None or programmed is None or programmed.lm_head is None:
        return jnp.matmul(hidden, w, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    read = None
    if spec.read_noise is not None and read_key is not None:
        rows = jnp.arange(hidden.shape[0], dtype=jnp.uint32) + jnp.asarray(first_row, jnp.uint32)
        key = jax.random.fold_in(jax.random.fold_in(read_key, plan.experts.shape[0]), Matrix.LM_HEAD)
        read = (spec.read_noise, key, rows)
    ranges = None if calibration is None else calibration.lm_head
    return crossbar_or_digital(hidden, w, programmed.lm_head, plan.lm_head, ranges, spec, read)


def forward(
    params: Params,
    tokens: Int[Array, "batch seq"],
    config: ModelConfig,
    *,
    plan: Plan | None = None,
    spec: AnalogSpec | None = None,
    programmed: ProgrammedWeights | None = None,
    calibration: Calibration | None = None,
    read_key: jax.Array | None = None,
) -> Float[Array, "batch seq vocab"]:
    """Logits of every position. Digital when only the first three arguments are given.

    Args:
        params: weights (`hetmoe.load_model`).
        tokens: int32 token ids, each in [0, vocab_size); ids outside are clamped by XLA, so check them before.
        config: static; pass it as a static argument of `jax.jit`.
        plan: what is analog. With `spec` and `programmed` it selects the analog path.
        spec: device, noise magnitudes and converters.
        programmed: the weights on the crossbars (`hetmoe.program`), one noise seed.
        calibration: static DAC input ranges; None = dynamic (`max|x|` per token and row-block).
        read_key: key of the per-product read noise, if `spec.read_noise` is set.

    Returns:
        float32 logits.

    Raises:
        InputError: for analog arguments that are incomplete or made for another model.
    """
    analog: dict[str, Any] = {
        "plan": plan, "spec": spec, "programmed": programmed, "calibration": calibration, "read_key": read_key
    }  # fmt: skip
    hidden, _, _ = hidden_states(params, tokens, config, **analog)
    batch, seq, width = hidden.shape
    return head_logits(hidden.reshape(batch * seq, width), params, **analog).reshape(batch, seq, -1)
