"""Greedy continuation of a prompt, to see with one's own eyes what a model learned."""

import jax
import jax.numpy as jnp

from hetmoe.errors import InputError
from hetmoe.models.model import Model
from hetmoe.models.transformer import head_matrix, hidden_states


def greedy(model: Model, prompt: str, tokens: int) -> str:
    """The most likely continuation, token by token; digital, and without a key-value cache.

    Every step runs the whole window, which is padded to a fixed length so that one compile serves all steps.

    Raises:
        InputError: if the model has no tokenizer, or prompt and continuation exceed its context.
    """
    if model.tokenizer is None:
        raise InputError(f"model {model.name!r} has no tokenizer.json")
    start = [] if model.start_token_id is None else [model.start_token_id]
    ids = start + model.tokenizer.encode(prompt, add_special_tokens=False).ids
    length = len(ids) + tokens
    if not ids or tokens < 1 or length > model.config.max_position_embeddings:
        raise InputError(
            f"prompt of {len(ids)} tokens and {tokens} more must be at least one each and fit the context of "
            f"{model.config.max_position_embeddings}"
        )

    @jax.jit
    def next_token(params: object, window: jax.Array, last: jax.Array) -> jax.Array:
        hidden, _, _ = hidden_states(params, window, model.config)  # pyright: ignore[reportArgumentType]
        return jnp.argmax(hidden[0, last] @ head_matrix(params))  # pyright: ignore[reportArgumentType]

    window = jnp.zeros((1, length), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
    for position in range(len(ids), length):
        window = window.at[0, position].set(next_token(model.params, window, jnp.asarray(position - 1)))
    return model.tokenizer.decode([int(t) for t in window[0, len(ids) :]])
