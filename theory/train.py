"""Training by stochastic gradient descent: one `lax.scan`, vmapped over seeds and frequencies.

Every step draws a new batch. After each of the first steps, and from then on every `chunk` steps, the mixture is kept
and looked at: its clean accuracy on fixed test sequences, each level by itself, and what the claims about growth need.
"""

import dataclasses
from collections.abc import Hashable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hetmoe.errors import InputError
from theory.data import DataSpec, Sequences, Tokens, draw_sequences, embed, level_probabilities, make_dictionary
from theory.model import Mixture, ModelSpec, forward, init_mixture, margins, routing_weights

LEARNED = 0.99  # accuracy, on every level by itself
LOGISTIC_LINEAR = 0.2  # margins, of either sign, up to which the slope of the logistic loss is that at 0 to a tenth


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How mixtures are trained.

    Attributes:
        data: what they are trained on.
        model: their structure.
        loss: `hinge` or `logistic`.
        batch: sequences of a step.
        single: first steps, after each of which there is a look.
        chunk: steps between looks behind them.
        chunks: looks behind them.
        expert_rate: learning rate of experts.
        router_rate: learning rate of routers.
        std: of initial weights.
        tests: sequences of each level that accuracy is measured on.

    Raises:
        InputError: for values out of range.
    """

    data: DataSpec = dataclasses.field(default_factory=DataSpec)
    model: ModelSpec = dataclasses.field(default_factory=ModelSpec)
    loss: Literal["hinge", "logistic"] = "hinge"
    batch: int = 256
    single: int = 100
    chunk: int = 5
    chunks: int = 180
    expert_rate: float = 0.1
    router_rate: float = 0.1
    std: float = 0.02
    tests: int = 128

    def __post_init__(self) -> None:
        if self.loss not in ("hinge", "logistic"):
            raise InputError(f"loss={self.loss!r} must be hinge or logistic")
        for name in ("batch", "single", "chunk", "chunks", "tests"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("expert_rate", "router_rate", "std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)!r} must be positive and finite")
        if self.model.dim != self.data.patterns or self.model.classes != self.data.classes:
            raise InputError(
                f"a model of {self.model.dim} dimensions and {self.model.classes} classes does not fit data of "
                f"{self.data.patterns} and {self.data.classes}"
            )

    @property
    def times(self) -> Int[np.ndarray, "looks"]:
        """Steps before every look; the first is before training."""
        return np.concatenate([np.arange(self.single), self.single + self.chunk * np.arange(self.chunks + 1)])


class Test(NamedTuple):
    """Fixed sequences, as many of each level."""

    tokens: Tokens  # [levels, ...]
    drawn: Sequences  # [levels, count, ...]


class Look(NamedTuple):
    """What is seen of a mixture, at one time."""

    accuracy: Float[Array, "levels"]
    margin: Float[Array, "levels"]  # mean
    active: Float[Array, "levels"]  # share of sequences whose margin is in the linear part of the loss
    along: Float[Array, "experts neurons relevant"]  # inner products of first layers with relevant patterns
    norm: Float[Array, "experts neurons"]  # of first layers
    weight: Float[Array, "experts relevant"]  # mean weight of a relevant token in each expert, 0 where not chosen
    chosen: Float[Array, "experts relevant"]  # how often an expert takes it


@struct.dataclass
class Trained:
    """Of one seed and frequency, before training and at every look."""

    dictionary: Float[Array, "patterns dim"]
    test: Test
    mixtures: Mixture  # stacked
    looks: Look  # stacked


def make_test(key: jax.Array, dictionary: Array, spec: TrainSpec) -> Test:
    """Sequences of every level."""
    levels = spec.data.levels

    def one(key: jax.Array, level: Array) -> Test:
        first, second = jax.random.split(key)
        drawn = draw_sequences(first, spec.data, jax.nn.one_hot(level, levels), spec.tests)
        return Test(embed(second, dictionary, drawn.ids, spec.data), drawn)

    return jax.vmap(one)(jax.random.split(key, levels), jnp.arange(levels))


def losses(outputs: Float[Array, "*b outputs"], label: Int[Array, "*b"], loss: str) -> Float[Array, "*b"]:
    """Hinge loss of the margin, or the negative log-likelihood of the label."""
    if loss == "hinge":
        return optax.hinge_loss(margins(outputs, label), jnp.ones(label.shape, jnp.float32))
    if outputs.shape[-1] == 1:
        return optax.sigmoid_binary_cross_entropy(outputs[..., 0], label.astype(jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(outputs, label)


def in_linear_part(margin: Float[Array, "*b"], loss: str) -> Bool[Array, "*b"]:
    """Whether the loss is linear there: the hinge loss below a margin of 1, the logistic one about 0."""
    return margin < 1.0 if loss == "hinge" else jnp.abs(margin) < LOGISTIC_LINEAR


def look_at(mixture: Mixture, dictionary: Array, test: Test, spec: TrainSpec) -> Look:
    """See `Look`."""
    outputs = jax.vmap(lambda tokens: forward(mixture, tokens, spec.model))(test.tokens)
    margin = margins(outputs, test.drawn.label)
    weights = jax.vmap(lambda tokens: routing_weights(mixture.router, tokens, spec.model))(test.tokens)  # of all tokens
    is_relevant = jax.nn.one_hot(test.drawn.ids, spec.data.relevant)  # 0 for all others
    present = jnp.maximum(jnp.sum(is_relevant, axis=(0, 1, 2)), 1.0)
    of_pattern = partial(jnp.einsum, "lbje,lbjr->er", precision=jax.lax.Precision.HIGHEST)
    return Look(
        accuracy=jnp.mean(margin > 0, axis=1, dtype=jnp.float32),
        margin=jnp.mean(margin, axis=1),
        active=jnp.mean(in_linear_part(margin, spec.loss), axis=1, dtype=jnp.float32),
        along=jnp.einsum("edm,rd->emr", mixture.up, dictionary[: spec.data.relevant]),
        norm=jnp.linalg.norm(mixture.up, axis=1),
        weight=of_pattern(weights, is_relevant) / present[None],
        chosen=of_pattern((weights > 0).astype(jnp.float32), is_relevant) / present[None],
    )


def optimiser(spec: TrainSpec) -> optax.GradientTransformation:
    """Gradient descent with rates of their own for experts and routers; fixed votes stay as they are."""
    kinds = Mixture(
        router="router",  # pyright: ignore[reportArgumentType]
        gate="experts" if spec.model.gated else None,  # pyright: ignore[reportArgumentType]
        up="experts",  # pyright: ignore[reportArgumentType]
        down="experts" if spec.model.trained_output else "fixed",  # pyright: ignore[reportArgumentType]
    )
    rules: dict[Hashable, optax.GradientTransformation] = {
        "router": optax.sgd(spec.router_rate), "experts": optax.sgd(spec.expert_rate), "fixed": optax.set_to_zero(),
    }  # fmt: skip
    return optax.partition(rules, kinds)


def train_one(key: jax.Array, gamma: Float[Array, ""], spec: TrainSpec) -> Trained:
    """Trains one mixture. Dictionary, tests, initial weights and batches all follow from the key; gamma is traced."""
    keys = jax.random.split(key, 4)
    dictionary = make_dictionary(keys[0], spec.data)
    test = make_test(keys[1], dictionary, spec)
    probabilities = level_probabilities(gamma, spec.data.levels)
    descent, start = optimiser(spec), init_mixture(keys[2], spec.model, spec.std)

    def loss(mixture: Mixture, batch_key: jax.Array) -> Array:
        first, second = jax.random.split(batch_key)
        drawn = draw_sequences(first, spec.data, probabilities, spec.batch)
        tokens = embed(second, dictionary, drawn.ids, spec.data)
        return jnp.mean(losses(forward(mixture, tokens, spec.model), drawn.label, spec.loss))

    def step(state: tuple[Mixture, Any], number: Array) -> tuple[Mixture, Any]:
        mixture, memory = state
        slopes = jax.grad(loss)(mixture, jax.random.fold_in(keys[3], number))
        with jax.numpy_dtype_promotion("standard"):
            updates, memory = descent.update(slopes, memory, mixture)  # pyright: ignore[reportArgumentType]
            return optax.apply_updates(mixture, updates), memory  # pyright: ignore[reportReturnType, reportArgumentType]

    def look(state: tuple[Mixture, Any], steps: Array) -> tuple[tuple[Mixture, Any], tuple[Mixture, Look]]:
        """Looks, and trains until the next look."""
        seen = state[0], look_at(state[0], dictionary, test, spec)
        return jax.lax.fori_loop(steps[0], steps[1], lambda number, now: step(now, number), state), seen

    # The last look is behind the last step: it is followed by none, and `look_at` is compiled once.
    state = start, descent.init(start)  # pyright: ignore[reportArgumentType]
    ends = np.stack([spec.times, np.append(spec.times[1:], spec.times[-1])], axis=1)
    _, (mixtures, looks) = jax.lax.scan(look, state, jnp.asarray(ends, jnp.int32))
    return Trained(dictionary=dictionary, test=test, mixtures=mixtures, looks=looks)


def learned(accuracy: Float[Array, "*batch levels"]) -> Bool[Array, "*batch"]:
    """Whether every level is classified well."""
    return jnp.all(accuracy >= LEARNED, axis=-1)


@partial(jax.jit, static_argnames="spec")
def train(keys: jax.Array, gammas: Float[Array, "gammas"], spec: TrainSpec) -> Trained:
    """Trains a mixture for every frequency and seed; leaves `[gammas, seeds, ...]`.

    Args:
        keys: one for each seed; a seed has the same dictionary, tests and initial weights at every frequency.
        gammas: probabilities of the rare pattern.
        spec: everything else.
    """
    each = jax.vmap(lambda key, gamma: train_one(key, gamma, spec))
    runs = each(jnp.tile(keys, len(gammas)), jnp.repeat(gammas, len(keys)))
    return jax.tree.map(lambda leaf: leaf.reshape(len(gammas), len(keys), *leaf.shape[1:]), runs)
