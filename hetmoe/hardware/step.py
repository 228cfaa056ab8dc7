"""One pass of a model over the new tokens of some sequences: a decoding step, or the prefill of prompts."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float64

from hetmoe.errors import InputError
from hetmoe.hardware.routing import StepRouting, stack_routings, step_routing
from hetmoe.models.config import ModelConfig


@struct.dataclass
class Step:
    """Leading axes are other steps. float32."""

    tokens: Float[Array, "*steps"]  # new ones, of all sequences
    logits: Float[Array, "*steps"]  # of them whose logits are wanted: the last one of each sequence
    attended: Float[Array, "*steps"]  # positions that a new token attends to, on average
    cached: Float[Array, "*steps"]  # positions of the key-value cache that are read, of all sequences
    held: Float[Array, "*steps"]  # positions that the cache holds in the end, of all sequences
    routing: StepRouting


def decode_step(
    config: ModelConfig, frequency: Float64[np.ndarray, "layers experts"], batch: int, context: int
) -> Step:
    """One new token for each of `batch` sequences of `context` positions, the new one among them.

    Raises:
        InputError: for a batch or context below 1, or a context that the model does not have.
    """
    _check("context", context, config, batch)
    seen = min(context, config.sliding_window or context)
    return _step(batch, batch, seen, batch * seen, batch * seen, step_routing(frequency, batch))


def decode_steps(
    config: ModelConfig,
    frequency: Float64[np.ndarray, "layers experts"],
    batches: Sequence[int],
    contexts: Sequence[int],
) -> Step:
    """`decode_step` of every batch behind every context: leaves `[batches * contexts]`, contexts fastest.

    Raises:
        InputError: as `decode_step`.
    """
    for batch in batches:
        for context in contexts:
            _check("context", context, config, batch)
    routing = stack_routings([step_routing(frequency, batch) for batch in batches])
    seen = np.minimum(contexts, config.sliding_window or max(contexts))
    tokens, attended = (np.ravel(part) for part in np.meshgrid(batches, seen, indexing="ij"))

    def number(values: np.ndarray) -> Array:
        return jnp.asarray(values, jnp.float32)

    cached = number(tokens * attended)
    return Step(
        tokens=number(tokens), logits=number(tokens), attended=number(attended), cached=cached, held=cached,
        routing=jax.tree.map(lambda leaf: jnp.repeat(leaf, len(contexts), axis=0), routing),
    )  # fmt: skip


def prefill_step(
    config: ModelConfig, frequency: Float64[np.ndarray, "layers experts"], batch: int, prompt: int
) -> Step:
    """The first pass over `batch` prompts of `prompt` tokens each.

    Their tokens are taken as independent: texts that keep to a few experts need fewer (`counted_experts`).

    Raises:
        InputError: as `decode_step`.
    """
    _check("prompt", prompt, config, batch)
    window = min(config.sliding_window or prompt, prompt)
    # Position i attends to min(i + 1, window) positions.
    attended = (window * (window + 1) / 2 + (prompt - window) * window) / prompt
    routing = step_routing(frequency, batch * prompt)
    return _step(batch, batch * prompt, attended, batch * prompt, batch * window, routing)


def _check(name: str, positions: int, config: ModelConfig, batch: int) -> None:
    if batch < 1 or batch != int(batch):
        raise InputError(f"batch={batch!r} must be a whole number of at least 1")
    if not 1 <= positions <= config.max_position_embeddings or positions != int(positions):
        raise InputError(
            f"{name}={positions!r} must be a whole number from 1 to the model's context of "
            f"{config.max_position_embeddings}"
        )


def _step(batch: float, tokens: float, attended: float, cached: float, held: float, routing: StepRouting) -> Step:
    number = jnp.float32
    return Step(
        tokens=number(tokens), logits=number(batch), attended=number(attended), cached=number(cached),
        held=number(held), routing=routing,
    )  # fmt: skip


def stack_steps(steps: list[Step]) -> Step:
    """Steps along a new leading axis, to map over."""
    routing = stack_routings([step.routing for step in steps])
    names = ("tokens", "logits", "attended", "cached", "held")
    return Step(**{name: jnp.stack([getattr(step, name) for step in steps]) for name in names}, routing=routing)
