"""The decoder as a pure function: tokens and parameters in, logits out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedWeights, SeededWeights
from hetmoe.analog.read_noise import ReadDraw
from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.models.abstract import abstract_params, is_leaf
from hetmoe.models.analog_arguments import check_analog, check_quantized
from hetmoe.models.analog_stack import programmed_head, stacked_hardware
from hetmoe.models.attention import attention_block, rms_norm
from hetmoe.models.config import ModelConfig
from hetmoe.models.hardware import LayerHardware, Observer, Probe
from hetmoe.models.matrices import Matrix
from hetmoe.models.moe import feed_forward, moe_block
from hetmoe.models.params import DenseLayer, Layer, Params
from hetmoe.models.routing import Routing, route
from hetmoe.ops import narrow
from hetmoe.ops.grouped_crossbar.api import matrix_product
from hetmoe.parallel.shard import WHOLE, Shard
from hetmoe.placement.plan import Plan
from hetmoe.quantize.mixed import attach, detach, is_mixed


class LayerResult(NamedTuple):
    """What a decoder layer gives: the residual stream, the input of its feed-forward part, and its routing if any."""

    x: Float[Array, "batch seq hidden"]
    ffn_in: Float[Array, "tokens hidden"]
    routing: Routing | None


def decoder_layer(
    x: Array,
    layer: Layer | DenseLayer,
    config: ModelConfig,
    hardware: LayerHardware | None,
    probe: Probe,
    implementation: str | None,
    shard: Shard = WHOLE,
) -> LayerResult:
    """Attention, then experts or a dense feed-forward network, each behind a norm and beside the residual stream.

    `implementation` is that of the routed experts; dense modules on crossbars have theirs from `hardware`. On a mesh
    `x` and the result are whole on all devices along `tensor`.
    """
    with jax.named_scope("attention"):
        normed = rms_norm(x, layer.input_norm, config.rms_norm_eps)
        x = x + attention_block(normed, layer.attention, config, hardware, probe, shard)
    return behind_attention(x, layer, config, hardware, probe, implementation, shard=shard)


def behind_attention(
    x: Array,
    layer: Layer | DenseLayer,
    config: ModelConfig,
    hardware: LayerHardware | None,
    probe: Probe,
    implementation: str | None,
    first_expert: Array | int = 0,
    shard: Shard = WHOLE,
) -> LayerResult:
    """The second half of `decoder_layer`: experts or a dense feed-forward network; `first_expert` as in `moe_block`."""
    normed = rms_norm(x, layer.ffn_norm, config.rms_norm_eps).reshape(-1, x.shape[-1])
    routing = None
    if isinstance(layer, Layer):
        with jax.named_scope("moe"):
            routing = route(normed, layer.moe, config)
            out = moe_block(normed, layer.moe, routing, hardware, probe, implementation, first_expert, shard)
    else:
        with jax.named_scope("ffn"):
            out = feed_forward(normed, layer.ffn, "ffn", hardware, probe, shard)
    out = shard.gather_columns(out)
    return LayerResult(x + out.reshape(x.shape), normed, routing)


def scan_layers(
    step: Callable[[Any, Any], tuple[Any, Any]],
    x: Any,
    params: Params,
    config: ModelConfig,
    extras: dict[bool, Any],
) -> tuple[Any, dict[bool, Any]]:
    """Runs `step(x, (layer, extra)) -> (x, result)` over all layers in model order; `x` holds the residual stream.

    `extras` and the results have one entry for the layers with experts (True) and one for those without, stacked on a
    leading axis; the result of a kind that the model lacks is None.
    """
    results: dict[bool, list[Any]] = {True: [], False: []}
    for moe, first, end in config.runs:
        part: Any = (params.layers if moe else params.dense_layers, extras.get(moe))
        part, pools = detach(part)  # quantized experts lie in pools that serve all layers
        if end - first < len(config.moe_layers if moe else config.dense_layers):
            # Only models whose kinds of layers alternate; a slice may cost a copy of these layers' weights.
            part = jax.tree.map(lambda leaf, a=first, b=end: leaf[a:b], part)
        x, result = narrow.scan(lambda x, layer, pools=pools: step(x, attach(layer, pools)), x, part)
        results[moe].append(result)
    return x, {kind: _joined(runs) for kind, runs in results.items()}


def _joined(runs: list[Any]) -> Any:
    """Results of several runs of layers as those of one."""
    if len(runs) < 2:
        return runs[0] if runs else None
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *runs)


class LayerHook(NamedTuple):
    """Replaces each layer's weights inside the loop over layers: `change(layer, extra)`.

    `layers` and `dense_layers` hold what each layer gets as `extra`, with a leading axis over the layers of that kind.
    """

    change: Callable[[Layer | DenseLayer, Any], Layer | DenseLayer]
    layers: Any
    dense_layers: Any


def check_arguments(
    params: Params,
    tokens: Array,
    config: ModelConfig,
    plan: Plan | None,
    spec: AnalogSpec | None,
    programmed: ProgrammedWeights | SeededWeights | None,
    calibration: Calibration | None,
    read_key: jax.Array | None,
) -> None:
    """Raises InputError unless the arguments of `forward` are complete and belong together."""
    _check_inputs(params, tokens, config)
    check_analog(config, plan, spec, programmed, calibration, read_key)
    check_quantized(params, plan, programmed)


def _check_inputs(params: Params, tokens: Array, config: ModelConfig) -> None:
    if not isinstance(params, Params) or not isinstance(config, ModelConfig):
        raise InputError(
            f"forward takes model.params, tokens, model.config; got {type(params).__name__} and {type(config).__name__}"
        )
    if getattr(tokens, "ndim", None) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or not tokens.size:
        raise InputError("tokens must be a non-empty integer array [batch, seq]")
    expected = jax.tree.map(lambda leaf: leaf.shape, abstract_params(config), is_leaf=is_leaf)
    if jax.tree.map(lambda leaf: leaf.shape, params, is_leaf=is_mixed) != expected:
        raise InputError("params do not have the shapes of this config: they belong to different models")


def hidden_states(
    params: Params,
    tokens: Int[Array, "batch seq"],
    config: ModelConfig,
    *,
    plan: Plan | None = None,
    spec: AnalogSpec | None = None,
    programmed: ProgrammedWeights | SeededWeights | None = None,
    calibration: Calibration | None = None,
    read_key: jax.Array | None = None,
    implementation: str | None = None,
    observe: Observer | None = None,
    hook: LayerHook | None = None,
    counted: Bool[Array, "batch"] | None = None,
    shard: Shard = WHOLE,
) -> tuple[Float[Array, "batch seq hidden"], Routing, tuple[dict[str, Any], dict[str, Any]]]:
    """Final normed hidden states, the routing of every layer, and what `observe` returned at every matrix input.

    Arguments as in `forward`; `hook` changes every layer before it is used; `counted` says which sequences `observe` is
    to see, and the hidden states of the others mean nothing; on a mesh of several devices (`shard`) the
    program around this has checked the arguments. The routing is that of the layers with experts, on a leading axis;
    the observations are those of the layers with and without experts, by site, likewise stacked.
    """
    if shard == WHOLE:
        check_arguments(params, tokens, config, plan, spec, programmed, calibration, read_key)
    hardware: dict[bool, LayerHardware] = {}
    if plan is not None and spec is not None and programmed is not None:
        hardware = stacked_hardware(
            params, config, plan, spec, programmed, calibration, read_key, implementation, shard
        )
    by_layer = isinstance(programmed, SeededWeights) and programmed.when == "layer"

    def step(x: Array, scanned: tuple[Layer | DenseLayer, tuple[LayerHardware | None, Any]]) -> tuple[Array, Any]:
        layer, (layer_hardware, extra) = scanned
        if hook is not None:
            layer = hook.change(layer, extra)
        if by_layer and layer_hardware is not None:
            layer_hardware = layer_hardware.program(layer)
        probe = Probe(observe, None if counted is None else jnp.repeat(counted, tokens.shape[1]))
        result = decoder_layer(x, layer, config, layer_hardware, probe, implementation, shard)
        return result.x, (result.routing, probe.seen)

    changes = {True: None, False: None} if hook is None else {True: hook.layers, False: hook.dense_layers}
    extras = {kind: (hardware.get(kind), change) for kind, change in changes.items()}
    x, results = scan_layers(step, _embedded(params, tokens, shard), params, config, extras)
    routing, seen = results[True]
    seen_dense = {} if results[False] is None else results[False][1]
    return rms_norm(x, params.final_norm, config.rms_norm_eps), routing, (seen, seen_dense)


def _embedded(params: Params, tokens: Array, shard: Shard) -> Array:
    """Embeddings of tokens; along `tensor` each device holds a part of the vocabulary."""
    if shard.tensor == 1:
        return params.embed[tokens]
    count = params.embed.shape[0]
    here = tokens - shard.first("tensor", count)
    found = params.embed[jnp.clip(here, 0, count - 1)]
    return shard.sum_columns(jnp.where(((here >= 0) & (here < count))[..., None], found, 0))


def head_matrix(params: Params) -> Float[Array, "hidden vocab"]:
    """The matrix from hidden states to logits, tied or not."""
    return params.embed.T if params.lm_head is None else params.lm_head


def head_logits(
    hidden: Float[Array, "tokens hidden"],
    params: Params,
    *,
    plan: Plan | None,
    spec: AnalogSpec | None,
    programmed: ProgrammedWeights | SeededWeights | None,
    calibration: Calibration | None,
    read_key: jax.Array | None,
    implementation: str | None = None,
    first_row: Array | int = 0,
    shard: Shard = WHOLE,
) -> Float[Array, "tokens vocab"]:
    """Float32 logits; `first_row` numbers the first token, which the LM head's read noise follows.

    Of the device's part of the vocabulary, where a mesh axis `tensor` cuts it.
    """
    w = head_matrix(params)
    matrix = programmed_head(programmed, plan)
    if plan is None or plan.lm_head is None or spec is None or matrix is None:
        return jnp.matmul(hidden, w, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    read = None
    if spec.read_noise is not None and read_key is not None:
        rows = jnp.arange(hidden.shape[0], dtype=jnp.uint32) + jnp.asarray(first_row, jnp.uint32)
        key = jax.random.fold_in(jax.random.fold_in(read_key, plan.experts.shape[0]), Matrix.LM_HEAD)
        read = ReadDraw(spec.read_noise, key, rows, shard)
    ranges = None if calibration is None else calibration.lm_head
    return matrix_product(
        hidden,
        w,
        matrix,
        analog=plan.lm_head,
        input_range=ranges,
        spec=spec,
        read=read,
        implementation=implementation,
        shard=shard,
    )


def forward(
    params: Params,
    tokens: Int[Array, "batch seq"],
    config: ModelConfig,
    *,
    plan: Plan | None = None,
    spec: AnalogSpec | None = None,
    programmed: ProgrammedWeights | SeededWeights | None = None,
    calibration: Calibration | None = None,
    read_key: jax.Array | None = None,
    implementation: str | None = None,
    shard: Shard = WHOLE,
) -> Float[Array, "batch seq vocab"]:
    """Logits of every position. Digital when only the first three arguments are given.

    All logits of all positions: for log-likelihoods of long texts or large vocabularies use `choice_log_probs` on
    `hidden_states`, which holds those of a few hundred tokens at a time.

    Args:
        params: weights (`hetmoe.load_model`).
        tokens: int32 token ids, each in [0, vocab_size); ids outside are clamped by XLA, so check them before.
        config: static; pass it as a static argument of `jax.jit`.
        plan: what is analog. With `spec` and `programmed` it selects the analog path.
        spec: device, noise magnitudes and converters.
        programmed: the weights on the crossbars, one noise seed: stored (`hetmoe.program`), or made on the way
            (`hetmoe.seeded_weights`).
        calibration: static DAC input ranges; None = dynamic (`max|x|` per token and row-block).
        read_key: key of the per-product read noise, if `spec.read_noise` is set.
        implementation: of the products of routed experts, digital or analog, and of dense modules on crossbars:
            `"xla"`, `"pallas"` (TPU and NVIDIA GPU, without read noise), `"interpret_tpu"` or `"interpret_cuda"` (those
            kernels, operation by operation on any device, for checks), or None for `"xla"`; static. Lower for one
            platform at a time.
        shard: inside a program for a mesh (`hetmoe.parallel`), which part of everything this device holds.

    Returns:
        float32 logits.

    Raises:
        NotImplementedError: if the named implementation cannot run this.
        InputError: for analog arguments that are incomplete or made for another model.
    """
    analog: dict[str, Any] = {
        "plan": plan, "spec": spec, "programmed": programmed, "calibration": calibration, "read_key": read_key,
        "implementation": implementation,
    }  # fmt: skip
    hidden, _, _ = hidden_states(params, tokens, config, **analog, shard=shard)
    batch, seq, width = hidden.shape
    first = shard.first_token(batch * seq)
    logits = head_logits(hidden.reshape(batch * seq, width), params, **analog, first_row=first, shard=shard)
    return shard.gather_columns(logits).reshape(batch, seq, -1)
