"""Greedy continuation of a prompt, to see with one's own eyes what a model learned."""

import jax
import jax.numpy as jnp

from hetmoe.errors import InputError
from hetmoe.models.decode import empty_cache, extend
from hetmoe.models.model import Model


def greedy(model: Model, prompt: str, tokens: int) -> str:
    """The most likely continuation, token by token; digital.

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
    run = jax.jit(extend, static_argnames="config", donate_argnames="cache")
    cache = empty_cache(model.config, 1, length, model.params.embed.dtype)
    logits, cache = run(model.params, jnp.asarray([ids], jnp.int32), cache, model.config)
    found: list[int] = []
    for left in range(tokens, 0, -1):
        found.append(int(jnp.argmax(logits[0])))
        if left > 1:
            logits, cache = run(model.params, jnp.asarray([found[-1:]], jnp.int32), cache, model.config)
    return model.tokenizer.decode(found)
