"""Routing statistics of a model on a text: measured, and on disk."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int

from hetmoe.errors import InputError
from hetmoe.files import write_text
from hetmoe.hardware.routing import check_frequency, counted_experts
from hetmoe.models.config import ModelConfig, check_tokens
from hetmoe.models.hf_fields import read_json
from hetmoe.models.model import Model
from hetmoe.models.params import Params
from hetmoe.models.transformer import hidden_states

FORMAT = "hetmoe-routing-1"
BATCH = 16  # windows run at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
    """What steps of a real text needed, means over steps, in each layer with experts (`counted_experts`)."""

    batch: int
    distinct: tuple[float, ...]
    busiest: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingStatistics:
    """How often a text chooses each expert, and what its steps needed.

    Attributes:
        frequency: share of tokens.
        tokens: of the text.
        counted: by batch, ascending.
    """

    frequency: Float64[np.ndarray, "moe_layers experts"]
    tokens: int
    counted: tuple[Counted, ...]


def observe_routing(model: Model, tokens: Int[np.ndarray, "windows seq"]) -> RoutingStatistics:
    """Runs a text through the digital model and counts.

    Args:
        model: with its weights.
        tokens: windows of text; steps that are counted take one token from each of 1, 2, 4, ... of them.

    Raises:
        InputError: for tokens outside the vocabulary, or no text.
    """
    if tokens.ndim != 2 or not tokens.size:
        raise InputError(f"tokens {list(tokens.shape)} must be windows [windows, seq] of text")
    check_tokens(tokens, model.config)
    parts = [
        np.asarray(_chosen(model.params, jnp.asarray(tokens[start : start + BATCH]), model.config))
        for start in range(0, len(tokens), BATCH)
    ]
    chosen = np.concatenate(parts, axis=1)  # [layers, windows, seq, copies]
    counts = np.stack([np.bincount(layer.ravel(), minlength=model.config.num_experts) for layer in chosen])
    batches = [2**n for n in range(len(tokens).bit_length())]
    found = [(batch, counted_experts(chosen, batch)) for batch in batches]
    return RoutingStatistics(
        frequency=counts / tokens.size,
        tokens=int(tokens.size),
        counted=tuple(
            Counted(batch=batch, distinct=tuple(distinct.tolist()), busiest=tuple(busiest.tolist()))
            for batch, (distinct, busiest) in found
        ),
    )


@jax.jit(static_argnames="config")
def _chosen(params: Params, tokens: Array, config: ModelConfig) -> Array:
    routing = hidden_states(params, tokens, config)[1]
    return routing.chosen.reshape(routing.chosen.shape[0], *tokens.shape, -1)


def save_routing(path: Path, statistics: RoutingStatistics, *, name: str, identity: str, text: str) -> None:
    """Writes statistics of a model (its name and fingerprint) on a text (its name)."""
    record = {
        "format": FORMAT,
        "model": {"name": name, "fingerprint": identity},
        "text": {"name": text, "tokens": statistics.tokens},
        "frequency": [[float(f"{value:.7g}") for value in row] for row in statistics.frequency],
        "counted": [dataclasses.asdict(counted) for counted in statistics.counted],
    }
    write_text(path, json.dumps(record, indent=1) + "\n")


def load_routing(path: Path, config: ModelConfig, identity: str | None) -> RoutingStatistics:
    """Reads statistics made for a model; without its `identity`, of any model of this shape.

    Raises:
        InputError: if the file is absent or malformed, or was made for another model.
    """
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{path}: not a file of routing statistics; make one with 'hetmoe hardware --save-routing'")
    try:
        made_for = record["model"]
        if identity is not None and made_for["fingerprint"] != identity:
            raise InputError(f"{path}: routing of {made_for['name']!r} ({made_for['fingerprint']}), not of this model")
        counted = tuple(_counted(entry, config) for entry in record["counted"])
        frequency, tokens = np.array(record["frequency"], np.float64), int(record["text"]["tokens"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: malformed ({type(error).__name__}: {error})") from None
    try:
        return RoutingStatistics(frequency=check_frequency(frequency, config), tokens=tokens, counted=counted)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _counted(entry: Any, config: ModelConfig) -> Counted:
    found = Counted(batch=int(entry["batch"]), distinct=tuple(entry["distinct"]), busiest=tuple(entry["busiest"]))
    if not len(found.distinct) == len(found.busiest) == len(config.moe_layers):
        raise ValueError(f"counted at batch {found.batch} must have a number for each layer with experts")
    return found
