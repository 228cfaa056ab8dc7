"""The order in which the experts of a layer get bits: first = most.

Orders are lists of expert indices, one per layer, made on the host in float64. Ties go to the lower index, so that an
order is the same on every machine. The published rule (arXiv 2604.06515) is `by_router_change`, or `by_router_norm`
where no initial model is known, followed by `promote`.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hetmoe.analog.random import require_key
from hetmoe.errors import InputError
from hetmoe.ops.largest import largest

Order = Int[np.ndarray, "*layers experts"]


def by_router_change(final: Float[Array, "*layers hidden experts"], initial: Float[Array, "..."]) -> Order:
    """Ascending growth of the router's l2 norm over training, `||w_s(final)|| - ||w_s(initial)||`, per expert s.

    Experts of small change hold features that are rare but matter, so they come first (arXiv 2604.06515).

    Args:
        final: the router of the model that is quantized; w_s is a column.
        initial: the same router before training, or before fine-tuning.

    Raises:
        InputError: for routers of different shapes, or norms that are not finite.
    """
    if final.shape != initial.shape:
        raise InputError(
            f"the initial router has the shape {list(initial.shape)}, the final one {list(final.shape)}: "
            "give two checkpoints of one model"
        )
    return _ascending(_norms(final) - _norms(initial), "changes of router norms")


def by_router_norm(final: Float[Array, "*layers hidden experts"]) -> Order:
    """Ascending l2 norm of the router's column of each expert: the change, if all started from equal norms.

    The paper's proxy where the initial model is unknown (arXiv 2604.06515, Mixtral).

    Raises:
        InputError: for norms that are not finite.
    """
    return _ascending(_norms(final), "router norms")


def by_activation_frequency(
    frequency: Float[Array, "*layers experts"], *, more_bits: Literal["rare", "frequent"] = "rare"
) -> Order:
    """Experts by the share of tokens that choose them (`hetmoe.placement.scores.activation_frequency`).

    By the paper's argument it is the experts of rare features that are sensitive, and routers grow with the frequency
    of what they learn: so the least frequent come first, as they do by router change. `"frequent"` is the opposite
    direction, that of rules which protect what is used most.

    Raises:
        InputError: for frequencies that are not finite, or another `more_bits`.
    """
    if more_bits not in ("rare", "frequent"):
        raise InputError(f"more_bits={more_bits!r} must be 'rare' or 'frequent'")
    values = np.asarray(frequency, np.float64)
    return _ascending(values if more_bits == "rare" else -values, "activation frequencies")


def random_order(key: jax.Array, layers: int, experts: int) -> Int[np.ndarray, "layers experts"]:
    """An order drawn for every layer, the baseline of all rules."""
    every = jnp.broadcast_to(jnp.arange(experts), (layers, experts))
    drawn = jax.random.permutation(require_key(key), every, axis=1, independent=True)
    return np.asarray(drawn, np.int64)


@functools.partial(jax.jit, static_argnames="how")  # one pass over stored weights, without a copy in float32
def max_variance(
    first: Float[Array, "*lead hidden inner"], how: Literal["highest_norm", "all"] = "highest_norm"
) -> Float[Array, "*lead"]:
    """MaxVar of every expert: variance of the weights within one neuron of its first layer (arXiv 2604.06515).

    A neuron is a hidden unit with the weights that feed it, a column of `first`. The first layer of a gated expert is
    `gate`, as in the paper: Mixtral's `w1` is what its activation function is applied to, and loads as `gate`.

    Args:
        first: `gate` of the experts, `[..., hidden, inner]`.
        how: the neuron of largest l2 norm, ties to the lower index (`"highest_norm"`, used for Mixtral), or the
            largest variance of all neurons (`"all"`, used for Switch).

    Returns:
        float32, the mean square deviation from the mean; dividing by one less would change no comparison of experts.

    Raises:
        InputError: for another `how`.
    """
    if how not in ("highest_norm", "all"):
        raise InputError(f"how={how!r} must be 'highest_norm' or 'all'")
    w = first.astype(jnp.float32)
    variance = jnp.var(w, axis=-2)
    if how == "all":
        return largest(variance, -1)
    neuron = jnp.argmax(jnp.sum(jnp.square(w), axis=-2), axis=-1, keepdims=True)
    return jnp.take_along_axis(variance, neuron, axis=-1)[..., 0]


def promote(order: Order, variance: Float[Array, "*layers experts"], zeta: float = 3.0) -> Order:
    """Moves experts of large MaxVar ahead of experts of small MaxVar (arXiv 2604.06515).

    Experts are taken in the reverse of `order`. Each is compared with a working copy of the list: it moves to the first
    position whose expert's MaxVar times `zeta` is below its own, unless it already stands at or before that position.
    Later experts see the list as earlier moves left it; who is taken next follows from `order` alone.

    Args:
        order: most bits first.
        variance: MaxVar by expert index, at least 0.
        zeta: how many times as large a MaxVar must be; the paper uses 3.

    Raises:
        InputError: for a `zeta` below 1 or not finite, MaxVar that is negative or not finite, or shapes that differ.
    """
    if not 1 <= zeta < np.inf:
        raise InputError(f"zeta={zeta!r} must be finite and at least 1: an expert moves ahead of smaller MaxVar only")
    values = np.asarray(variance, np.float64)
    if values.shape != order.shape:
        raise InputError(f"MaxVar has the shape {list(values.shape)}, the order {list(order.shape)}: they must agree")
    if not np.isfinite(values).all() or (values < 0).any():
        raise InputError("MaxVar must be finite and at least 0: are there NaN or infinite weights?")
    experts = order.shape[-1]
    rows = zip(order.reshape(-1, experts), values.reshape(-1, experts), strict=True)
    return np.array([_promoted(row.tolist(), of.tolist(), zeta) for row, of in rows], np.int64).reshape(order.shape)


def _promoted(order: list[int], variance: list[float], zeta: float) -> list[int]:
    working = list(order)
    for expert in reversed(order):
        ahead = working[: working.index(expert)]  # a first such position at or behind its own moves nothing
        target = next((i for i, other in enumerate(ahead) if variance[other] * zeta < variance[expert]), None)
        if target is not None:
            working.remove(expert)
            working.insert(target, expert)
    return working


def _norms(router: Array) -> Float[np.ndarray, "*layers experts"]:
    return np.sqrt(np.sum(np.square(np.asarray(router, np.float64)), axis=-2))


def _ascending(values: np.ndarray, what: str) -> Order:
    if not np.isfinite(values).all():
        raise InputError(f"{what} are not finite: are there NaN or infinite weights?")
    return np.argsort(values, axis=-1, kind="stable")
