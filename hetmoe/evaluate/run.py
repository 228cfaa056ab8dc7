"""Perplexity and next-word accuracy over text, digital or over noise seeds, in one compiled function each."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedWeights, program, seeded_weights
from hetmoe.analog.spec import AnalogSpec
from hetmoe.evaluate.text import Windows
from hetmoe.models.config import ModelConfig
from hetmoe.models.likelihood import choice_log_probs
from hetmoe.models.params import Params
from hetmoe.models.transformer import head_logits, hidden_states
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


def _score_batch(params: Params, batch: Batches, config: ModelConfig, analog: dict[str, Any]) -> Totals:
    """Totals of one batch (leaves of `batch` without their first axis)."""
    hidden, _, _ = hidden_states(params, batch.tokens[:, :-1], config, **analog)
    rows, seq, width = hidden.shape

    def logits_of(part: Array, first: Array) -> Array:
        return head_logits(part, params, first_row=first, **analog)

    choices = batch.choices.reshape(rows * seq, -1)
    log_probs = choice_log_probs(logits_of, hidden.reshape(rows * seq, width), choices).reshape(rows, seq, -1)
    weight = batch.weight[:, None]
    credit = answer_credit(log_probs) * batch.asked.astype(jnp.float32)
    return Totals(nll=-jnp.sum(log_probs[..., 0] * weight), correct=jnp.sum(credit * weight))


def answer_credit(log_probs: Float[Array, "*batch choices"]) -> Float[Array, "*batch"]:
    """1 if the first choice is the likeliest; shared out when several are equally likely (coarse ADCs make ties)."""
    best = log_probs == jnp.max(log_probs, axis=-1, keepdims=True)
    return best[..., 0].astype(jnp.float32) / jnp.sum(best.astype(jnp.float32), axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def evaluate_digital(
    params: Params, batches: Batches, config: ModelConfig, implementation: str | None = None
) -> Totals:
    """Totals of the digital model; `implementation` as in `forward`, static."""
    nothing = dict.fromkeys(("plan", "spec", "programmed", "calibration", "read_key"))
    digital = {**nothing, "implementation": implementation}
    per_batch = jax.lax.map(lambda batch: _score_batch(params, batch, config, digital), batches)
    return jax.tree.map(jnp.sum, per_batch)


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
        per_batch = jax.lax.map(lambda batch: _score_batch(params, batch, config, analog), batches)
        return jax.tree.map(jnp.sum, per_batch)

    return jax.lax.map(one_plan, plans)


@functools.partial(jax.jit, static_argnames=("config", "weights", "implementation"))
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
    targets: Params | None = None,
) -> Totals:
    """Totals `[seeds, placements]`: all placements of a seed run on the same chip.

    Placements therefore share their random numbers, so their differences are free of most of the seeds' spread. They
    run one after the other (`lax.map`), and so do seeds, which would need a copy of the weights each, but where weights
    are made in the kernel: then all seeds run side by side. Numbers do not depend on `weights` but for rounding.
    Compiles once for all noise scales, seeds and placements of one shape.

    Args:
        params: the model.
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
    """
    dense = plans.switches_dense

    def one_seed(seed: tuple[jax.Array, Plan]) -> Totals:
        key, seed_plans = seed
        if weights == "stored":
            programmed = program(key, params if targets is None else targets, spec, dense=dense)
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
                return _score_batch(params, batch, config, analog)

            per_batch = jax.lax.map(one_batch, (jnp.arange(batches.tokens.shape[0]), batches))
            return jax.tree.map(jnp.sum, per_batch)

        return jax.lax.map(one_placement, seed_plans)

    return jax.vmap(one_seed)((keys, plans)) if weights == "kernel" else jax.lax.map(one_seed, (keys, plans))
