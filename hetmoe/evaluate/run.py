"""Perplexity and next-word accuracy over text, digital or over noise seeds, in one compiled function each."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedWeights, program, seeded_weights
from hetmoe.analog.spec import AnalogSpec
from hetmoe.evaluate.text import Windows
from hetmoe.models.config import ModelConfig
from hetmoe.models.likelihood import choice_log_probs
from hetmoe.models.params import Params
from hetmoe.models.routing import Routing
from hetmoe.models.transformer import head_logits, hidden_states
from hetmoe.parallel.mesh import shard_of
from hetmoe.parallel.rules import WINDOWS, calibration_specs, on_mesh, param_specs, plan_specs, put
from hetmoe.parallel.shard import WHOLE, Shard
from hetmoe.placement.plan import Plan

READ_STREAM = 0x7EAD  # folded into a seed's key for read noise; far from any layer number, which programming folds in


@struct.dataclass
class Batches:
    """Evaluation text on the device, `[batches, batch, ...]`; windows that only fill the last batch have weight 0."""

    tokens: Int[Array, "batches batch context"]
    choices: Int[Array, "batches batch seq choices"]
    asked: Bool[Array, "batches batch seq"]
    weight: Float[Array, "batches batch"]


class Totals(NamedTuple):
    """Sums over the text: negative log-likelihood in nats, and credit for next-word questions (`answer_credit`)."""

    nll: Any
    correct: Any


def make_batches(windows: Windows, choices: np.ndarray, asked: np.ndarray, batch: int) -> Batches:
    """Pads to whole batches and moves to the device."""
    return _batches(windows.tokens, choices, asked, batch)


def chunks(batches: Batches, size: int) -> list[tuple[int, Batches]]:
    """(number of the first batch, batches) of the text in as few equal pieces as have at most `size` batches.

    The last piece is filled up with copies of its first batch of weight 0, so that one program serves all.
    """
    count = batches.tokens.shape[0]
    size = -(-count // -(-count // size))
    found: list[tuple[int, Batches]] = []
    for start in range(0, count, size):
        part: Batches = jax.tree.map(lambda leaf, at=start: leaf[at : at + size], batches)
        if more := size - part.tokens.shape[0]:
            fill: Batches = jax.tree.map(lambda leaf, n=more: jnp.repeat(leaf[:1], n, axis=0), part)
            fill = dataclasses.replace(fill, weight=jnp.zeros_like(fill.weight), asked=jnp.zeros_like(fill.asked))
            part = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), part, fill)
        found.append((start, part))
    return found


def on_devices(batches: Batches, mesh: jax.sharding.Mesh | None) -> Batches:
    """The text where a mesh wants it."""
    return batches if mesh is None else put(batches, jax.tree.map(lambda _: WINDOWS, batches), mesh)


def loss_batches(tokens: Int[np.ndarray, "windows context"], batch: int) -> Batches:
    """Batches of text without next-word questions."""
    return _batches(tokens, tokens[:, 1:, None], np.zeros(tokens[:, 1:].shape, bool), batch)


def _batches(tokens: np.ndarray, choices: np.ndarray, asked: np.ndarray, batch: int) -> Batches:
    count = len(tokens)
    pad = -count % batch

    def shape(values: np.ndarray) -> Array:
        padded = np.concatenate([values, np.repeat(values[:1], pad, axis=0)])
        return jnp.asarray(padded.reshape(-1, batch, *values.shape[1:]))

    weight = np.concatenate([np.ones(count, np.float32), np.zeros(pad, np.float32)])
    return Batches(
        tokens=shape(tokens),
        choices=shape(choices),
        asked=shape(asked),
        weight=jnp.asarray(weight.reshape(-1, batch)),
    )


def _score_batch(
    params: Params, batch: Batches, config: ModelConfig, analog: dict[str, Any], shard: Shard
) -> tuple[Totals, Routing]:
    """Totals of every window of one batch (leaves of `batch` without their first axis), and where its tokens went."""
    hidden, routing, _ = hidden_states(params, batch.tokens[:, :-1], config, **analog, shard=shard)
    rows, seq, width = hidden.shape
    first = shard.first_token(rows * seq).astype(jnp.uint32)

    def logits_of(part: Array, row: Array) -> Array:
        return head_logits(part, params, first_row=first + row, **analog, shard=shard)

    choices = batch.choices.reshape(rows * seq, -1)
    log_probs = choice_log_probs(logits_of, hidden.reshape(rows * seq, width), choices, shard).reshape(rows, seq, -1)
    weight = batch.weight[:, None]
    credit = answer_credit(log_probs) * batch.asked.astype(jnp.float32)
    return Totals(nll=-jnp.sum(log_probs[..., 0] * weight, axis=1), correct=jnp.sum(credit * weight, axis=1)), routing


def _added(windows: Totals, shard: Shard) -> Totals:
    """Sums over the last two axes, batches and windows; on a mesh over those of all devices, in the same order."""

    def add(sums: Array) -> Array:
        if shard.token_axes:
            sums = jax.lax.all_gather(sums, shard.token_axes, axis=sums.ndim - 1, tiled=True)
        return jnp.sum(sums, axis=(-2, -1))

    return jax.tree.map(add, windows)


def answer_credit(log_probs: Float[Array, "*batch choices"]) -> Float[Array, "*batch"]:
    """1 if the first choice is the likeliest; shared out when several are equally likely (coarse ADCs make ties)."""
    best = log_probs == jnp.max(log_probs, axis=-1, keepdims=True)
    return best[..., 0].astype(jnp.float32) / jnp.sum(best.astype(jnp.float32), axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "implementation", "mesh"))
def evaluate_digital(
    params: Params,
    batches: Batches,
    config: ModelConfig,
    implementation: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Totals:
    """Totals of the digital model; arguments as of `evaluate_seeds`."""
    return evaluate_digital_and_load(params, batches, config, implementation, mesh)[0]


@functools.partial(jax.jit, static_argnames=("config", "implementation", "mesh"))
def evaluate_digital_and_load(
    params: Params,
    batches: Batches,
    config: ModelConfig,
    implementation: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Totals, Int[Array, "layers experts"]]:
    """`evaluate_digital`, and how many token copies each expert got."""
    nothing = dict.fromkeys(("plan", "spec", "programmed", "calibration", "read_key"))
    digital = {**nothing, "implementation": implementation}
    shard = WHOLE if mesh is None else shard_of(mesh)

    def run(params: Params, batches: Batches) -> tuple[Totals, Array]:
        def one(load: Array, batch: Batches) -> tuple[Array, Totals]:
            totals, routing = _score_batch(params, batch, config, digital, shard)
            real = jnp.repeat(batch.weight > 0, batch.tokens.shape[1] - 1)
            return load + _copies(routing, real, config), totals

        start = jnp.zeros((len(config.moe_layers), config.num_experts), jnp.int32)
        load, totals = jax.lax.scan(one, start, batches)
        return _added(totals, shard), jax.lax.psum(load, shard.token_axes) if shard.token_axes else load

    if mesh is None:
        return run(params, batches)
    return on_mesh(run, mesh, (param_specs(config), WINDOWS), P())(params, batches)


def _copies(routing: Routing, real: Bool[Array, "tokens"], config: ModelConfig) -> Int[Array, "layers experts"]:
    """Token copies by expert; tokens that are not `real` do not count."""

    def of_layer(chosen: Array) -> Array:
        experts = jnp.arange(config.num_experts, dtype=chosen.dtype)
        went = jnp.any(chosen[:, :, None] == experts[None, None, :], axis=1) & real[:, None]
        return jnp.sum(went.astype(jnp.int32), axis=0)

    return jax.lax.map(of_layer, routing.chosen)


@functools.partial(jax.jit, static_argnames="config")
def evaluate_programmed(
    params: Params,
    programmed: ProgrammedWeights,
    plans: Plan,
    spec: AnalogSpec,
    calibration: Calibration | None,
    batches: Batches,
    config: ModelConfig,
) -> Totals:
    """Totals `[plans]` of plans on a leading axis, on chips that are programmed already (any history of theirs)."""

    def one_plan(plan: Plan) -> Totals:
        analog = {
            "plan": plan, "spec": spec, "programmed": programmed, "calibration": calibration, "read_key": None,
            "implementation": None,
        }  # fmt: skip
        return _added(jax.lax.map(lambda batch: _score_batch(params, batch, config, analog, WHOLE)[0], batches), WHOLE)

    return jax.lax.map(one_plan, plans)


@functools.partial(jax.jit, static_argnames=("config", "weights", "implementation", "mesh"))
def evaluate_seeds(
    params: Params,
    keys: jax.Array,
    plans: Plan,
    spec: AnalogSpec,
    calibration: Calibration | None,
    batches: Batches,
    config: ModelConfig,
    weights: str = "stored",
    implementation: str | None = None,
    *,
    targets: Params | None = None,
    mesh: jax.sharding.Mesh | None = None,
    first_batch: Int[Array, ""] | int = 0,
) -> Totals:
    """Totals `[seeds, placements]`: all placements of a seed run on the same chip.

    Placements therefore share their random numbers, so their differences are free of most of the seeds' spread. They
    run one after the other (`lax.map`), and so do seeds, which would need a copy of the weights each, but where weights
    are made in the kernel: then all seeds run side by side. Numbers do not depend on `weights` but for rounding.
    Compiles once for all noise scales, seeds and placements of one shape.

    Args:
        params: the model; on a mesh, as `hetmoe.parallel.rules.param_shardings` says.
        keys: `[seeds]` noise keys.
        plans: leaves with leading axes `[seeds, placements]`.
        spec: analog hardware.
        calibration: DAC ranges; None = dynamic.
        batches: text.
        config: static.
        weights: `"stored"` (programmed once for all text), `"layer"` or `"kernel"` (`seeded_weights`); static.
        implementation: as in `forward`; static.
        targets: what crossbars are programmed with; None = `params`. For stored weights only: digital experts may then
            be those of a quantized model, as the values that their codes stand for, in one program for all precisions.
        mesh: devices to spread windows, seeds, experts and columns over (`hetmoe.parallel.shard`); None = one; static.
            Numbers do not depend on it but for rounding. Seeds along `seed` run side by side.
        first_batch: number of the first batch in the whole text, which read noise follows.
    """
    shard = WHOLE if mesh is None else shard_of(mesh)
    first = jnp.asarray(first_batch, jnp.int32)

    def run(*arguments: Any) -> Totals:
        totals = _seeds(*arguments, config=config, weights=weights, implementation=implementation, shard=shard)
        return jax.tree.map(shard.gather_seeds, totals)

    if mesh is None:
        return run(params, targets, keys, plans, spec, calibration, batches, first)
    specs = (
        param_specs(config), None if targets is None else param_specs(config), P("seed"),
        plan_specs(plans, "seed", None), P(), calibration_specs(calibration), WINDOWS, P(),
    )  # fmt: skip
    return on_mesh(run, mesh, specs, P())(params, targets, keys, plans, spec, calibration, batches, first)


def _seeds(
    params: Params, targets: Params | None, keys: jax.Array, plans: Plan, spec: AnalogSpec,
    calibration: Calibration | None, batches: Batches, first_batch: Array, *, config: ModelConfig, weights: str,
    implementation: str | None, shard: Shard,
) -> Totals:  # fmt: skip
    """One device's share of `evaluate_seeds`."""
    dense = plans.switches_dense

    def one_seed(seed: tuple[jax.Array, Plan]) -> Totals:
        key, seed_plans = seed
        if weights == "stored":
            programmed = program(key, params if targets is None else targets, spec, dense=dense, shard=shard)
        else:
            programmed = seeded_weights(key, dense=dense, when=weights)  # pyright: ignore[reportArgumentType]

        def one_placement(plan: Plan) -> Totals:
            def one_batch(item: tuple[Array, Batches]) -> Totals:
                index, batch = item
                read_key = None
                if spec.read_noise is not None:
                    read_key = jax.random.fold_in(jax.random.fold_in(key, READ_STREAM), index)
                analog = {
                    "plan": plan, "spec": spec, "programmed": programmed,
                    "calibration": calibration, "read_key": read_key, "implementation": implementation,
                }  # fmt: skip
                return _score_batch(params, batch, config, analog, shard)[0]

            numbers = first_batch + jnp.arange(batches.tokens.shape[0], dtype=jnp.int32)
            return _added(jax.lax.map(one_batch, (numbers, batches)), shard)

        return jax.lax.map(one_placement, seed_plans)

    return jax.vmap(one_seed)((keys, plans)) if weights == "kernel" else jax.lax.map(one_seed, (keys, plans))
