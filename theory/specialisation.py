"""Which experts take which patterns, and which pattern an expert has learned."""

import numpy as np
from jaxtyping import Bool, Float, Int

from theory.model import ModelSpec, fixed_votes

ALWAYS = 0.9  # an expert takes a pattern if it is chosen in this share of the sequences that hold it


def for_class(spec: ModelSpec, levels: int) -> Bool[np.ndarray, "experts relevant"]:
    """Whether some neuron of an expert votes for a pattern's class, by the fixed votes."""
    votes = fixed_votes(spec)
    signed = votes if spec.classes > 2 else np.concatenate([-votes, votes], axis=-1)
    return np.repeat((signed > 0).any(axis=1), levels, axis=1)


def holders(
    along: Float[np.ndarray, "runs experts neurons relevant"],
    chosen: Float[np.ndarray, "runs experts relevant"],
    spec: ModelSpec,
    levels: int,
) -> Int[np.ndarray, "runs relevant"]:
    """The expert that holds each pattern; -1 where there is none.

    Of the experts that vote for its class and always take it, the one whose first layer has the largest component
    along it.
    """
    able = for_class(spec, levels) & (chosen >= ALWAYS)
    strength = np.where(able, along.max(axis=2), -np.inf)
    return np.where(able.any(axis=1), strength.argmax(axis=1), -1)


def all_held(holder: Int[np.ndarray, "runs relevant"]) -> Bool[np.ndarray, "runs"]:
    """Whether every pattern has a holder."""
    return np.all(holder >= 0, axis=1)


def held_apart(holder: Int[np.ndarray, "runs relevant"], levels: int) -> Bool[np.ndarray, "runs"]:
    """Whether every pattern has a holder, and those of different levels never share one."""
    level = np.arange(holder.shape[1]) % levels
    other = level[:, None] != level[None, :]
    shared = (holder[:, :, None] == holder[:, None, :]) & other
    return all_held(holder) & ~shared.any(axis=(1, 2))


def served_frequency(
    weight: Float[np.ndarray, "runs experts relevant"], frequency: Float[np.ndarray, "runs relevant"]
) -> Float[np.ndarray, "runs experts"]:
    """How much of a sequence's weight an expert gives to relevant tokens, on average over sequences."""
    return np.einsum("xer,xr->xe", weight, frequency)
