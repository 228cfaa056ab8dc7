"""Synthetic sequences: irrelevant tokens around one that decides the label, and that is frequent or rare in its class.

Patterns are the rows of a dictionary. The first `classes * levels` are relevant: pattern `class * levels + level`. A
sequence has a class and a level; its relevant pattern stands at a random position, and all other positions hold
irrelevant patterns, drawn independently.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hetmoe.analog.random import matrix_normal, matrix_uniform
from hetmoe.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What is drawn.

    Attributes:
        patterns: of the dictionary, and dimension of a token.
        sequence: tokens of a sequence.
        classes: that labels tell apart.
        levels: of frequency within a class.
        zipf: exponent of the irrelevant patterns' frequencies, rank**-zipf; 0 = all alike.
        overlap: length of the random part that is added to every pattern before it is scaled to length 1; 0 =
            orthonormal. Two patterns then have an inner product of standard deviation about
            `sqrt((2 overlap**2 + overlap**4) / patterns) / (1 + overlap**2)`.
        token_noise: length (root mean square) of the Gaussian noise of every token.

    Raises:
        InputError: for values out of range.
    """

    patterns: int = 32
    sequence: int = 8
    classes: int = 2
    levels: int = 2
    zipf: float = 0.0
    overlap: float = 0.0
    token_noise: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("sequence", 2), ("classes", 2), ("levels", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.levels > 3:
            raise InputError(f"levels={self.levels} must be at most 3: frequent, rare and rarest")
        if self.patterns <= self.relevant:
            raise InputError(
                f"patterns={self.patterns} must be more than the {self.relevant} relevant ones: others surround them"
            )
        for name in ("zipf", "overlap", "token_noise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name}={value!r} must be a finite number of at least 0")

    @property
    def relevant(self) -> int:
        """Number of relevant patterns."""
        return self.classes * self.levels


class Tokens(NamedTuple):
    """Embedded sequences: different tokens with the place of each in the sequences, or (ids None) all tokens."""

    inputs: Float[Array, "*inputs dim"]
    ids: Int[Array, "*batch sequence"] | None


class Sequences(NamedTuple):
    """Drawn sequences."""

    ids: Int[Array, "count sequence"]  # pattern of every token
    label: Int[Array, "count"]
    level: Int[Array, "count"]


def level_probabilities(gamma: Float[Array, ""] | float, levels: int) -> Float[Array, "levels"]:
    """Of two levels `(1 - gamma, gamma)`; of more, each is gamma times as probable as the one before but for the last.

    `p_l = (1 - gamma) gamma**l`, and the last is what is left, `gamma**(levels - 1)`.
    """
    powers = jnp.asarray(gamma, jnp.float32) ** jnp.arange(levels, dtype=jnp.float32)
    return powers * jnp.where(jnp.arange(levels) < levels - 1, 1 - jnp.asarray(gamma, jnp.float32), 1.0)


def make_dictionary(key: jax.Array, spec: DataSpec) -> Float[Array, "patterns dim"]:
    """Rows of length 1: of a random orthogonal matrix, with random parts added if `overlap` is not 0."""
    first, second = jax.random.split(key)
    rows = jax.random.orthogonal(first, spec.patterns, dtype=jnp.float32)
    if spec.overlap:
        shape = (spec.patterns, spec.patterns)
        rows = rows + spec.overlap / np.sqrt(spec.patterns) * jax.random.normal(second, shape, jnp.float32)
        rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def irrelevant_probabilities(spec: DataSpec) -> np.ndarray:
    """Of the irrelevant patterns, in their order."""
    ranks = np.arange(1, spec.patterns - spec.relevant + 1, dtype=np.float64)
    return ranks**-spec.zipf / np.sum(ranks**-spec.zipf)


def draw_sequences(key: jax.Array, spec: DataSpec, probabilities: Float[Array, "levels"], count: int) -> Sequences:
    """Independent sequences; classes are equally probable.

    Args:
        key: of all draws.
        spec: what is drawn.
        probabilities: of the levels.
        count: sequences.
    """
    # All draws at once, by the inverses of distribution functions.
    uniform = matrix_uniform(key, (count, spec.sequence + 3))
    label = _by_inverse(uniform[:, 0], np.full(spec.classes, 1 / spec.classes))
    level = _by_inverse(uniform[:, 1], probabilities)
    position = _by_inverse(uniform[:, 2], np.full(spec.sequence, 1 / spec.sequence))
    others = _by_inverse(uniform[:, 3:], irrelevant_probabilities(spec))
    here = jnp.arange(spec.sequence)[None, :] == position[:, None]
    ids = jnp.where(here, (label * spec.levels + level)[:, None], spec.relevant + others)
    return Sequences(ids=ids, label=label, level=level)


def _by_inverse(uniform: Float[Array, "*draws"], probabilities: Any) -> Int[Array, "*draws"]:
    """Numbers of these probabilities from uniform draws."""
    edges = jnp.cumsum(jnp.asarray(probabilities, jnp.float32))[:-1]
    beyond = uniform[..., None] >= edges.reshape((1,) * uniform.ndim + (-1,))
    return jnp.sum(beyond, axis=-1, dtype=jnp.int32)


def embed(
    key: jax.Array, dictionary: Float[Array, "patterns dim"], ids: Int[Array, "count sequence"], spec: DataSpec
) -> Tokens:
    """Tokens: patterns, each once for all sequences; or, if `token_noise` is not 0, every token with its own noise."""
    if not spec.token_noise:
        return Tokens(dictionary, ids)
    count, dim = ids.size, dictionary.shape[1]
    noise = matrix_normal(key, (count, dim)).reshape(*ids.shape, dim)
    return Tokens(dictionary[ids] + spec.token_noise / np.sqrt(dim) * noise, None)
