"""Rules that score experts; for every rule a higher score means "keep digital"."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.random import require_key
from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.evaluate.run import loss_batches
from hetmoe.models.config import ModelConfig, check_tokens
from hetmoe.models.model import Model
from hetmoe.models.params import MoE, Params
from hetmoe.models.routing import Routing
from hetmoe.models.transformer import hidden_states
from hetmoe.ops.largest import largest
from hetmoe.parallel.model import routing_on
from hetmoe.placement.measured import measure
from hetmoe.placement.module_scores import ModuleScores
from hetmoe.placement.noise_sensitivity import noise_sensitivity
from hetmoe.quantize.mixed import refuse_quantized

DownAxis = Literal["hidden", "output"]
BATCH = 16  # sequences run at once


def max_neuron_norm(moe: MoE, down_axis: DownAxis = "hidden") -> Float[Array, "layers experts"]:
    """MaxNNScore: the product over up, gate and down of the largest l2 norm of a neuron's weights (arXiv 2603.02633).

    A neuron of `up` and `gate` is one hidden unit with the weights that feed it. For `down` there are two views:
    `"hidden"` (default, the two-layer view of the theory): a hidden unit with the weights it sends out;
    `"output"` (the linear-layer view): an output with the weights that feed it.
    """
    check_down_axis(down_axis)

    def largest_norm(w: Array, summed_axis: int) -> Array:
        return largest(jnp.linalg.norm(w.astype(jnp.float32), axis=summed_axis), -1)

    down = largest_norm(moe.experts.down, -1 if down_axis == "hidden" else -2)
    return largest_norm(moe.experts.up, -2) * largest_norm(moe.experts.gate, -2) * down


def check_down_axis(down_axis: str) -> DownAxis:
    """The same name; raises InputError for one that is not one of the two views of `down`'s neurons."""
    if down_axis not in ("hidden", "output"):
        raise InputError(f"down_axis={down_axis!r} must be 'hidden' or 'output'")
    return down_axis


def router_norm(moe: MoE) -> Float[Array, "layers experts"]:
    """The l2 norm of the router's weight vector of each expert."""
    return jnp.linalg.norm(moe.router.astype(jnp.float32), axis=-2)


def activation_frequency(routing: Routing) -> Float[Array, "layers experts"]:
    """Share of tokens that choose each expert (sums to experts-per-token over a layer)."""
    return jnp.mean(jnp.sum(_one_hot(routing), axis=-2), axis=-2)


def activation_weight(routing: Routing) -> Float[Array, "layers experts"]:
    """Mean over all tokens of the routing weight given to each expert, 0 for tokens that do not choose it."""
    return jnp.mean(jnp.sum(_one_hot(routing) * routing.weights[..., None], axis=-2), axis=-2)


def _one_hot(routing: Routing) -> Float[Array, "layers tokens copies experts"]:
    return jax.nn.one_hot(routing.chosen, routing.logits.shape[-1], dtype=jnp.float32)


_FROM_ROUTING: dict[str, Callable[[Routing], Array]] = {
    "activation_frequency": activation_frequency,
    "activation_weight": activation_weight,
}
RANDOM = "random"  # drawn anew for every noise seed where seeds are compared
MEASURED = "measured"  # what other rules stand in for
DEVICE_RULES = ("noise_sensitivity", MEASURED)  # depend on the analog hardware
RULES = ("max_neuron_norm", "activation_frequency", "activation_weight", "router_norm", RANDOM, *DEVICE_RULES)


def score_experts(
    model: Model,
    rule: str,
    *,
    key: jax.Array | None = None,
    tokens: Int[Array, "sequences seq"] | None = None,
    down_axis: DownAxis = "hidden",
    spec: AnalogSpec | None = None,
    calibration: Calibration | None = None,
    seeds: int = 8,
    jobs: int = 1,
) -> Float[Array, "layers experts"]:
    """Scores every expert of every MoE layer by one of `RULES`.

    Args:
        model: a loaded model. One on a mesh is scored there, but not by the rules that need `spec`.
        rule: name of the rule.
        key: PRNG key, needed by `random` (uniform scores) and the rules that need `spec`.
        tokens: text to route, needed by the activation rules, 16 sequences at a time; for the rules that need `spec`
            each row predicts its tokens from the second on.
        down_axis: what a neuron of `down` is, for `max_neuron_norm`.
        spec: analog hardware, needed by `noise_sensitivity` (expected loss increase, `hetmoe.placement.
            noise_sensitivity`) and `measured` (`hetmoe.placement.measured`), whose scores are nats per token.
        calibration: DAC ranges for `measured`; None = dynamic.
        seeds: noise seeds of `measured`: `jax.random.split(key, seeds)`.
        jobs: threads of `measured`; 2 use two CPU cores better, and no result depends on it.

    Raises:
        InputError: for an unknown rule, a missing key, tokens or spec, or quantized experts under a rule that needs
            their weights as they were, or a rule that needs `spec` for a model on a mesh.
    """
    if rule not in RULES:
        raise InputError(f"unknown rule {rule!r}: use one of {', '.join(RULES)}")
    if rule == "max_neuron_norm":
        refuse_quantized(model.params, f"rule {rule!r} does not score")
    if rule in DEVICE_RULES and model.mesh is not None:
        raise InputError(
            f"rule {rule!r} runs on one device: give a rule of {', '.join(r for r in RULES if r not in DEVICE_RULES)}, "
            "or a plan of 'hetmoe place' (--plan)"
        )
    if rule in DEVICE_RULES:
        found = score_modules(
            model,
            rule,
            key=key,
            tokens=tokens,
            spec=spec,
            calibration=calibration,
            seeds=seeds,
            dense=False,
            jobs=jobs,
        )
        return jnp.asarray(found.experts, jnp.float32)
    moe = model.params.layers.moe
    if rule == "max_neuron_norm" and model.mesh is not None:
        together = jax.sharding.NamedSharding(model.mesh, jax.sharding.PartitionSpec())
        return jax.jit(max_neuron_norm, static_argnums=1, out_shardings=together)(moe, down_axis)
    if rule == "max_neuron_norm":
        return max_neuron_norm(moe, down_axis)
    if rule == "router_norm":
        return router_norm(moe)
    if rule == RANDOM:
        return random_scores(key, model.config)
    if tokens is None or tokens.ndim != 2 or tokens.shape[0] < 1:
        raise InputError(f"rule {rule!r} needs tokens [sequences, seq] of sample text")
    check_tokens(tokens, model.config)
    return _mean_over_batches(model, tokens, _FROM_ROUTING[rule])


def score_modules(
    model: Model,
    rule: str,
    *,
    key: jax.Array | None,
    tokens: Int[Array, "sequences context"] | None,
    spec: AnalogSpec | None,
    calibration: Calibration | None,
    seeds: int,
    dense: bool,
    jobs: int = 1,
    progress: Callable[[int, int], Any] | None = None,
) -> ModuleScores:
    """Loss increase (nats per token) of every module when it alone is analog; with `dense`, of dense modules too.

    Arguments as in `score_experts`; `jobs` and `progress` as in `hetmoe.placement.measured.measure`.
    """
    if rule not in DEVICE_RULES:
        raise InputError(f"rule {rule!r} scores experts only: modules are compared by {' or '.join(DEVICE_RULES)}")
    refuse_quantized(model.params, f"rule {rule!r} does not score")
    if spec is None or key is None:
        raise InputError(f"rule {rule!r} needs spec=hetmoe.analog_spec(...) and key=jax.random.key(seed)")
    require_key(key)
    if tokens is None or tokens.ndim != 2 or tokens.shape[0] < 2 or tokens.shape[1] < 2:
        raise InputError(f"rule {rule!r} needs tokens [sequences, context] of sample text, at least 2 x 2")
    check_tokens(tokens, model.config)
    if rule == "noise_sensitivity":
        return noise_sensitivity(model, tokens, spec, key=key, dense=dense).total
    if seeds < 1:
        raise InputError(f"seeds={seeds} must be at least 1")
    keys = jax.random.split(key, seeds)
    batches = loss_batches(np.asarray(tokens), min(BATCH, tokens.shape[0]))
    return measure(model, spec, calibration, keys, batches, dense=dense, jobs=jobs, progress=progress).mean


def random_scores(key: jax.Array | None, config: ModelConfig) -> Float[Array, "layers experts"]:
    """Uniform scores. Raises InputError without a key."""
    if key is None:
        raise InputError("rule 'random' needs a key: pass key=jax.random.key(seed)")
    require_key(key)
    return jax.random.uniform(key, (len(config.moe_layers), config.num_experts))


def _mean_over_batches(model: Model, tokens: Array, statistic: Callable[[Routing], Array]) -> Array:
    @jax.jit
    def run(params: Params, part: Array) -> Array:
        if model.mesh is not None:
            return statistic(routing_on(model.mesh, params, part, model.config))
        return statistic(hidden_states(params, part, model.config)[1])

    total = jnp.zeros((len(model.config.moe_layers), model.config.num_experts))
    for start in range(0, tokens.shape[0], BATCH):
        part = tokens[start : start + BATCH]
        total = total + run(model.params, part) * part.shape[0]
    return total / tokens.shape[0]
