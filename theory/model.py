"""A mixture of two-layer experts: `F(x) = sum_e sum_j G_je f_e(x_j)` over the tokens j of a sequence.

An expert is `f_e(x) = V_e^T relu(W_e^T x)`, or with a gate `V_e^T (silu(U_e^T x) * W_e^T x)`. In the analysed case V is
fixed: all neurons of an expert vote for its class. Routing is by expert choice (every expert takes the `taken` tokens
of the sequence with its largest logits, and weighs them by the softmax of these logits) or by token choice (every token
takes its `taken` experts of the largest probability, and weighs them by it).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hetmoe.analog.random import matrix_normal
from hetmoe.errors import InputError
from theory.data import Tokens

ROUTINGS = ("expert_choice", "token_choice")
VOTES = ("expert", "neuron")
# inputs [inputs, K] and one expert's matrix [K, N] -> products [inputs, N]
Product = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Structure of a mixture.

    Attributes:
        dim: of a token.
        classes: that it tells apart; two have one output, the margin of the second.
        experts: number.
        neurons: of an expert.
        routing: who chooses.
        taken: tokens of an expert (`expert_choice`) or experts of a token (`token_choice`).
        gated: whether experts have a gate.
        trained_output: whether V is trained, from the same signs.
        votes: whether all neurons of an expert vote for one class (`expert`), or they take turns (`neuron`).

    Raises:
        InputError: for values out of range.
    """

    dim: int = 32
    classes: int = 2
    experts: int = 8
    neurons: int = 8
    routing: Literal["expert_choice", "token_choice"] = "expert_choice"
    taken: int = 2
    gated: bool = False
    trained_output: bool = False
    votes: Literal["expert", "neuron"] = "expert"

    def __post_init__(self) -> None:
        for name, least in (("dim", 1), ("classes", 2), ("experts", 1), ("neurons", 1), ("taken", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.routing not in ROUTINGS:
            raise InputError(f"routing={self.routing!r} must be one of {', '.join(ROUTINGS)}")
        if self.votes not in VOTES:
            raise InputError(f"votes={self.votes!r} must be one of {', '.join(VOTES)}")
        if self.routing == "token_choice" and self.taken > self.experts:
            raise InputError(f"taken={self.taken} is more than the {self.experts} experts")

    @property
    def outputs(self) -> int:
        """Of an expert."""
        return 1 if self.classes == 2 else self.classes


@struct.dataclass
class Mixture:
    """Weights; matrices are input x output."""

    router: Float[Array, "dim experts"]
    gate: Float[Array, "experts dim neurons"] | None
    up: Float[Array, "experts dim neurons"]
    down: Float[Array, "experts neurons outputs"]


def fixed_votes(spec: ModelSpec) -> Float[np.ndarray, "experts neurons outputs"]:
    """Signs of two classes, -1 and 1; of more, 1 for a neuron's class and -1 shared by the others."""
    place = np.arange(spec.experts)[:, None] + np.zeros((1, spec.neurons), int)
    if spec.votes == "neuron":
        place = place + np.arange(spec.neurons)
    chosen = place % spec.classes
    if spec.classes == 2:
        return (2.0 * chosen - 1)[..., None].astype(np.float32)
    others = -1.0 / (spec.classes - 1)
    return np.where(chosen[..., None] == np.arange(spec.classes), 1.0, others).astype(np.float32)


def init_mixture(key: jax.Array, spec: ModelSpec, std: float) -> Mixture:
    """Gaussian routers, gates and first layers of this standard deviation; the second layer is `fixed_votes`."""
    keys = jax.random.split(key, 3)

    def drawn(key: jax.Array) -> Array:
        flat = matrix_normal(key, (spec.experts * spec.dim, spec.neurons))
        return std * flat.reshape(spec.experts, spec.dim, spec.neurons)

    return Mixture(
        router=std * matrix_normal(keys[0], (spec.dim, spec.experts)),
        gate=drawn(keys[1]) if spec.gated else None,
        up=drawn(keys[2]),
        down=jnp.asarray(fixed_votes(spec)),
    )


def route(logits: Float[Array, "*batch sequence experts"], spec: ModelSpec) -> Float[Array, "*batch sequence experts"]:
    """The weight of every token in every expert; 0 where it is not chosen. Ties go to the lower index."""
    if spec.routing == "expert_choice":
        chosen = jnp.swapaxes(_largest(jnp.swapaxes(logits, -1, -2), spec.taken), -1, -2)
        return jax.nn.softmax(jnp.where(chosen, logits, -jnp.inf), axis=-2)
    return jnp.where(_largest(logits, spec.taken), jax.nn.softmax(logits, axis=-1), 0.0)


def _largest(values: Float[Array, "*batch n"], count: int) -> Bool[Array, "*batch n"]:
    """Marks the `count` largest of the last axis one after the other: no sort, for a few of them."""
    chosen = jnp.zeros(values.shape, bool)
    for _ in range(count):
        best = jnp.argmax(jnp.where(chosen, -jnp.inf, values), axis=-1)
        chosen = chosen | jax.nn.one_hot(best, values.shape[-1], dtype=bool)
    return chosen


def routing_weights(
    router: Float[Array, "dim experts"], tokens: Tokens, spec: ModelSpec
) -> Float[Array, "*batch sequence experts"]:
    """`route` of sequences."""
    logits = jnp.matmul(tokens.inputs, router, precision=jax.lax.Precision.HIGHEST)
    return route(lookup(logits, tokens.ids), spec)


def lookup(values: Array, ids: Int[Array, "*batch sequence"] | None) -> Array:
    """What belongs to every token, of what was calculated for every different one; as is if all are (ids None).

    A product with one-hot rows, whose gradient is one too: XLA's scatter on CPU is slow.
    """
    if ids is None:
        return values
    rows = jax.nn.one_hot(ids.reshape(-1), values.shape[0], dtype=values.dtype)
    found = jnp.matmul(rows, values.reshape(values.shape[0], -1), precision=jax.lax.Precision.HIGHEST)
    return found.reshape(*ids.shape, *values.shape[1:])


def expert_outputs(
    mixture: Mixture, tokens: Float[Array, "inputs dim"], spec: ModelSpec, product: Product | None = None
) -> Float[Array, "inputs experts outputs"]:
    """What every expert makes of every input.

    `product` is used for every matrix that is trained, expert by expert: fixed votes are signs, which are added
    digitally. None: all products are digital.
    """

    def times(x: Array, w: Array, product: Product | None) -> Array:
        """Products of inputs `[inputs, K]`, or each expert's own `[inputs, experts, K]`, with every expert's matrix."""
        own = x.ndim == 3
        if product is None:
            subscripts = "xek,ekn->xen" if own else "xk,ekn->xen"
            return jnp.einsum(subscripts, x, w, precision=jax.lax.Precision.HIGHEST)
        return jax.vmap(product, in_axes=(1 if own else None, 0), out_axes=1)(x, w)

    up = times(tokens, mixture.up, product)
    gate = None if mixture.gate is None else times(tokens, mixture.gate, product)
    hidden = jax.nn.relu(up) if gate is None else jax.nn.silu(gate) * up
    return times(hidden, mixture.down, product if spec.trained_output else None)


def forward(mixture: Mixture, tokens: Tokens, spec: ModelSpec) -> Float[Array, "*batch outputs"]:
    """Outputs of sequences, all digital."""
    inputs = tokens.inputs
    made = expert_outputs(mixture, inputs.reshape(-1, inputs.shape[-1]), spec)
    made = lookup(made.reshape(*inputs.shape[:-1], *made.shape[1:]), tokens.ids)
    return jnp.einsum("...je,...jeo->...o", routing_weights(mixture.router, tokens, spec), made)


def margins(outputs: Float[Array, "*batch outputs"], label: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """By how much the label's output is above the largest other one; of two classes the signed output."""
    if outputs.shape[-1] == 1:
        return outputs[..., 0] * (2 * label - 1).astype(outputs.dtype)
    own = jax.nn.one_hot(label, outputs.shape[-1], dtype=bool)
    return jnp.max(jnp.where(own, outputs, -jnp.inf), -1) - jnp.max(jnp.where(own, -jnp.inf, outputs), -1)


def neuron_norm_scores(mixture: Mixture) -> Float[Array, "experts"]:
    """MaxNNScore: the product over an expert's matrices of the largest norm of a neuron (arXiv 2603.02633).

    Neurons of the second layer are hidden units with the weights that they send out, as in
    `hetmoe.placement.scores.max_neuron_norm`.
    """
    score = jnp.max(jnp.linalg.norm(mixture.up, axis=-2), -1) * jnp.max(jnp.linalg.norm(mixture.down, axis=-1), -1)
    return score if mixture.gate is None else score * jnp.max(jnp.linalg.norm(mixture.gate, axis=-2), -1)
