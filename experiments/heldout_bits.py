"""Held-out bits per byte of a model on the embedded text, in separate windows and with a sliding window.

    python experiments/heldout_bits.py reference

Separate windows are what hetmoe evaluates everywhere (each token predicted once, a window's first tokens have little
context). The sliding window steps half a context at a time and counts only tokens with at least half a context behind
them (all tokens of the first window). A last partial window is dropped. Cost: 20 seconds on two CPU cores.
"""

import functools
import math
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from hetmoe.checkpoint.load import load_model
from hetmoe.evaluate.text import SEPARATOR, Document, heldout_files, read_text, tokenize
from hetmoe.models.config import ModelConfig
from hetmoe.models.likelihood import choice_log_probs
from hetmoe.models.model import Model
from hetmoe.models.params import Params
from hetmoe.models.transformer import head_matrix, hidden_states


@functools.partial(jax.jit, static_argnames="config")
def _log_probs(params: Params, windows: jax.Array, config: ModelConfig) -> jax.Array:
    """Log-probability of every predicted token of windows [batch, context + 1]."""
    hidden, _, _ = hidden_states(params, windows[:, :-1], config)
    head, flat = head_matrix(params), hidden.reshape(-1, config.hidden_size)
    return choice_log_probs(lambda rows, _: rows @ head, flat, windows[:, 1:].reshape(-1, 1)).reshape(
        windows.shape[0], -1
    )


def token_log_probs(model: Model, ids: np.ndarray, stride: int, batch: int = 16) -> np.ndarray:
    """Log-probabilities of tokens 1, 2, ... of a stream, each predicted in the first window that reaches it."""
    context = model.config.max_position_embeddings
    starts = np.arange(0, len(ids) - context, stride)
    padded = np.concatenate([starts, np.repeat(starts[:1], -len(starts) % batch)])
    rows = [
        np.asarray(_log_probs(model.params, jnp.asarray(ids[part[:, None] + np.arange(context + 1)]), model.config))
        for part in padded.reshape(-1, batch)
    ]
    found = np.concatenate(rows)[: len(starts)].astype(np.float64)
    return np.concatenate([found[0], found[1:, context - stride :].ravel()])


def measure(model: Model, files: list[Path]) -> dict[str, dict[str, Any]]:
    """Bits per byte (separate and sliding windows) and perplexity (separate) of every file, and of all."""
    assert model.tokenizer is not None
    results, sums, context = {}, np.zeros(5), model.config.max_position_embeddings
    for file in files:
        documents: list[Document] = [
            tokenize(part, model.tokenizer, model.start_token_id, model.config.vocab_size)
            for part in read_text(file).split(SEPARATOR)
        ]
        ids, sizes = (np.concatenate([getattr(d, name) for d in documents]) for name in ("ids", "byte_count"))
        row = []
        for stride in (context, context // 2):
            log_probs = token_log_probs(model, ids, stride)
            row += [-log_probs.sum(), sizes[1 : len(log_probs) + 1].sum()]
        row.append((len(ids) - 1) // context * context)
        sums += row
        results[file.stem] = _summary(np.array(row))
    return results | {"all": _summary(sums)}


def _summary(row: np.ndarray) -> dict[str, Any]:
    nll, size, sliding_nll, sliding_size, tokens = row
    return {
        "bits_per_byte": round(float(nll) / math.log(2) / size, 4),
        "perplexity": round(math.exp(nll / tokens), 2),
        "bits_per_byte_sliding": round(float(sliding_nll) / math.log(2) / sliding_size, 4),
        "tokens": int(tokens),
        "bytes": int(size),
    }


def main(model: Annotated[str, typer.Argument(help="Model directory, or 'reference'.")] = "reference") -> None:
    """Print one line per source."""
    for name, row in measure(load_model(model, "float32"), heldout_files()).items():
        typer.echo(f"{name:12} " + ", ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    typer.run(main)
