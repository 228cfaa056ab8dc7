"""The routing stability margin: how far a token's state can move before its set of experts can change."""

import numpy as np
from jaxtyping import Float64

from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.quantize.bounds.inputs import check_finite, check_inputs
from hetmoe.quantize.bounds.rounding import MARGIN, UNIT
from hetmoe.quantize.bounds.routing import Routed, largest
from hetmoe.quantize.bounds.routing_change import RouterNorms, certain_sets, router_norms

SMALLEST, LARGEST = -200.0, 100.0  # exponents of 2 between which radii are searched
HALVINGS = 60  # of that interval: to the last bit


def stability_margin(
    routed: Routed, norms: RouterNorms, bias: np.ndarray | None, config: ModelConfig
) -> Float64[np.ndarray, "tokens"]:
    """A radius within which `certain_sets` keeps the set of each token, the largest one up to rounding.

    Where logits decide it is `min (l_i - l_j) / |w_i - w_j|` over chosen i and others j: the distance to the nearest
    state at which two experts change places, so that no larger radius is certain. With a selection bias, or groups
    scored by two experts, it may be smaller than that distance.

    A state that noise moves by e with `sqrt(E |e|^2) = rms` leaves it with a probability of at most
    `(rms / margin)^2` (Markov's inequality).

    Args:
        routed: decisions of the clean run.
        norms: of the router.
        bias: selection bias, if the router has one.
        config: of the model.

    Returns:
        Radii of the normed state without the norm's gain: 0 where two experts are level, infinite where nothing
        changes (all experts are chosen).

    Raises:
        InputError: for logits that are not finite.
    """
    tokens = len(routed.logits)
    least, most = np.full(tokens, SMALLEST), np.full(tokens, LARGEST)

    def certain(exponent: np.ndarray) -> np.ndarray:
        return certain_sets(routed, norms, np.exp2(exponent), bias, config)

    never, endless = ~certain(least), certain(most)
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        stays = certain(middle)
        least, most = np.where(stays, middle, least), np.where(stays, most, middle)
    return np.where(endless, np.inf, np.where(never, 0.0, np.exp2(least)))


def routing_margin(
    x: Float64[np.ndarray, "tokens hidden"], router: Float64[np.ndarray, "hidden experts"], experts_per_token: int
) -> Float64[np.ndarray, "tokens"]:
    """`stability_margin` of a router that takes the largest logits of `x @ router`, from arrays alone.

    Args:
        x: the router's inputs; moves are of these.
        router: its weights.
        experts_per_token: how many experts are chosen.

    Raises:
        InputError: for arrays that are not finite float64 or do not fit, or a number of experts that there are not.
    """
    check_finite("router", router, "hidden experts")
    check_inputs(x, len(router))
    experts = router.shape[1]
    if not 1 <= experts_per_token <= experts:
        raise InputError(
            f"experts_per_token={experts_per_token} must be from 1 to {experts}, the experts of the router"
        )
    norms, logits = router_norms(np.ones(len(router)), router), x @ router
    order = largest(logits, experts)
    chosen, others = order[:, :experts_per_token], order[:, experts_per_token:]
    apart = np.take_along_axis(logits, chosen, 1)[:, :, None] - np.take_along_axis(logits, others, 1)[:, None, :]
    lost = norms.logit_radius(np.linalg.norm(x, axis=1) * UNIT * 2 * len(router))  # rounding of the logits themselves
    lost = 2 * lost.max(axis=1)[:, None, None]
    between = np.maximum(norms.pair[chosen[:, :, None], others[:, None, :]], np.finfo(np.float64).tiny)
    margins = np.maximum(apart - lost, 0) / between / MARGIN
    return margins.reshape(len(x), -1).min(axis=1, initial=np.inf)
