"""The routing stability margin: how far a token's state can move before its set of experts can change."""

import numpy as np
from jaxtyping import Float64

from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.quantize.bounds.routing import Routed
from hetmoe.quantize.bounds.routing_change import RouterNorms, certain_sets

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
    if not np.isfinite(routed.logits).all():
        bad = int(np.argmin(np.isfinite(routed.logits).all(axis=1)))
        raise InputError(f"token {bad} has logits that are not finite: no margin keeps its experts")
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
