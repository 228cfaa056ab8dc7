"""Log-likelihoods without ever holding the logits of the whole text."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hetmoe.parallel.shard import WHOLE, Shard

CHUNK = 256  # tokens whose logits are held at once: with a vocabulary of 4096 they fit in cache, twice as fast on CPU


def choice_log_probs(
    logits_of: Callable[[Array, Array], Array],
    hidden: Float[Array, "tokens hidden"],
    choices: Int[Array, "tokens choices"],
    shard: Shard = WHOLE,
) -> Float[Array, "tokens choices"]:
    """Log-probabilities (nats, float32) of some next tokens at every position.

    Args:
        logits_of: (hidden states of a chunk, number of its first token) -> logits.
        hidden: final hidden states.
        choices: token ids whose log-probability is wanted, for instance the true next token alone.
        shard: which part of the vocabulary, a mesh axis `tensor` cuts it, the logits are of.
    """
    return _by_chunk(logits_of, hidden, choices, lambda logits, ids: _log_probs(logits, ids, shard))


def choice_log_probs_and_best(
    logits_of: Callable[[Array, Array], Array],
    hidden: Float[Array, "tokens hidden"],
    choices: Int[Array, "tokens choices"],
) -> tuple[Float[Array, "tokens choices"], Int[Array, "tokens"]]:
    """`choice_log_probs`, and the likeliest next token at every position (the first of equals)."""
    return _by_chunk(
        logits_of, hidden, choices, lambda logits, ids: (_log_probs(logits, ids, WHOLE), jnp.argmax(logits, axis=-1))
    )


def _log_probs(logits: Array, ids: Array, shard: Shard) -> Array:
    if shard.tensor == 1:
        return jnp.take_along_axis(logits, ids, axis=1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    count = logits.shape[1]
    here = ids - shard.first("tensor", count)
    found = jnp.take_along_axis(logits, jnp.clip(here, 0, count - 1), axis=1)
    chosen = shard.sum_columns(jnp.where((here >= 0) & (here < count), found, 0))  # one device has it
    largest = shard.largest_column(jnp.max(logits, axis=-1, keepdims=True))
    return chosen - largest - jnp.log(shard.sum_columns(jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True)))


def _by_chunk(
    logits_of: Callable[[Array, Array], Array], hidden: Array, choices: Array, take: Callable[[Array, Array], Any]
) -> Any:
    """What `take` makes of the logits and choices of every token, chunk by chunk."""
    count = hidden.shape[0]
    chunk = max(1, min(CHUNK, count))
    pad = -count % chunk
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    wanted = jnp.pad(choices, ((0, pad), (0, 0))).reshape(-1, chunk, choices.shape[1])

    @jax.checkpoint  # the backward pass recomputes a chunk's logits instead of storing all of them
    def one(part: tuple[Array, Array, Array]) -> Any:
        rows, ids, first = part
        return take(logits_of(rows, first), ids)

    first_rows = jnp.arange(hidden.shape[0], dtype=jnp.uint32) * chunk
    chunks = jax.lax.map(one, (hidden, wanted, first_rows))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], chunks)
