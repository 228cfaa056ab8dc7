"""Log-likelihoods of continuations on the digital model or on a programmed chip."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedWeights
from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.evaluate.tasks.batching import Request, make_batches
from hetmoe.models.config import ModelConfig
from hetmoe.models.likelihood import choice_log_probs_and_best
from hetmoe.models.model import Model
from hetmoe.models.params import Params
from hetmoe.models.transformer import head_logits, hidden_states
from hetmoe.placement.plan import Plan


@struct.dataclass
class Chip:
    """The analog arguments of `hetmoe.forward`; all None is the digital model. All but the last are traced."""

    plan: Plan | None = None
    spec: AnalogSpec | None = None
    programmed: ProgrammedWeights | None = None
    calibration: Calibration | None = None
    read_key: jax.Array | None = None
    implementation: str | None = struct.field(pytree_node=False, default=None)


class Score(NamedTuple):
    """What lm-eval wants to know of a request."""

    log_prob: float  # nats, of the whole continuation
    is_greedy: bool  # whether every token of it is the likeliest one


@functools.partial(jax.jit, static_argnames="config")
def score_batch(
    params: Params,
    tokens: Int[Array, "rows length"],
    targets: Int[Array, "rows length"],
    scored: Bool[Array, "rows length"],
    chip: Chip,
    batch: Array,
    config: ModelConfig,
) -> tuple[Float[Array, "rows"], Bool[Array, "rows"]]:
    """(log-likelihood, whether greedy) of every row's scored targets.

    Padding is on the right, where causal attention does not see it from the tokens that are scored. Compiles once per
    shape and structure of the chip: seeds, noise scales and plans of one structure share a program.

    Args:
        params: the model.
        tokens: inputs.
        targets: the token after each of them.
        scored: which targets count.
        chip: where the model runs.
        batch: number of this batch, which read noise follows.
        config: static.
    """
    analog: dict[str, Any] = {
        "plan": chip.plan, "spec": chip.spec, "programmed": chip.programmed, "calibration": chip.calibration,
        "read_key": None if chip.read_key is None else jax.random.fold_in(chip.read_key, batch),
        "implementation": chip.implementation,
    }  # fmt: skip
    hidden, _, _ = hidden_states(params, tokens, config, **analog)
    rows, length, width = hidden.shape

    def logits_of(part: Array, first: Array) -> Array:
        return head_logits(part, params, first_row=first, **analog)

    log_probs, best = choice_log_probs_and_best(
        logits_of, hidden.reshape(rows * length, width), targets.reshape(rows * length, 1)
    )
    total = jnp.sum(jnp.where(scored, log_probs.reshape(rows, length), 0.0), axis=-1)
    return total, jnp.all(~scored | (best.reshape(rows, length) == targets), axis=-1)


def score_requests(model: Model, requests: Sequence[Request], chip: Chip, tokens_per_batch: int) -> list[Score]:
    """Scores requests in their order.

    Raises:
        InputError: for a request that cannot be scored, or a log-likelihood that is not a number.
    """
    scores: list[Score | None] = [None] * len(requests)
    for number, batch in enumerate(make_batches(requests, model.config.max_position_embeddings, tokens_per_batch)):
        totals, greedy = score_batch(
            model.params, jnp.asarray(batch.tokens), jnp.asarray(batch.targets), jnp.asarray(batch.scored), chip,
            jnp.asarray(number, jnp.uint32), model.config,
        )  # fmt: skip
        found = zip(batch.index, np.asarray(totals).tolist(), np.asarray(greedy).tolist(), strict=False)
        for i, log_prob, is_greedy in found:
            if not np.isfinite(log_prob):
                raise InputError(
                    f"the log-likelihood of a continuation is {log_prob}; weights or activations are NaN or overflow, "
                    "in 16 bits perhaps for lack of range"
                )
            scores[i] = Score(log_prob=log_prob, is_greedy=is_greedy)
    return [score for score in scores if score is not None]
