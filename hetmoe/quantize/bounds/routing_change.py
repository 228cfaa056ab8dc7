"""Which tokens' experts cannot change, and how far routing weights can.

A router's logits are `l_i = w_i . n` with the RMS-normed state n, its gain part of w. If n moves by at most r, a logit
moves by at most `|w_i| r`, and the difference of two by at most `|w_i - w_j| r` (Cauchy-Schwarz). A set is certain if
every chosen expert stays above every other one that is allowed. Where the order of logits decides (a softmax or sigmoid
without bias), differences are compared; with a selection bias, or groups scored by sums of two, the intervals of scores
are. With groups the chosen ones must be certain first: the lower end of each above the upper ends of all others, where
a group's ends are the best, or the sums of the best two, of its experts' ends. What touches counts as uncertain.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float64
from scipy.special import expit

from hetmoe.models.config import ModelConfig
from hetmoe.quantize.bounds.inputs import check_finite, check_sizes
from hetmoe.quantize.bounds.rounding import rounding, widened
from hetmoe.quantize.bounds.routing import (
    TO_DIVIDE,
    Routed,
    allowed_experts,
    best_of_groups,
    order_keys,
    orders_by_logits,
)

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class RouterNorms:
    """Norms of a router's columns and of their differences, gain included, and the rounding of a logit."""

    single: Float64[Array, "experts"]
    pair: Float64[Array, "experts experts"]
    lost: float

    def logit_radius(self, radius: Float64[Array, "tokens"]) -> Float64[Array, "tokens experts"]:
        """Bounds the change of every logit."""
        return widened(radius[:, None] * self.single + self.lost)

    def margin_radius(self, radius: Float64[Array, "tokens"], expert: Array) -> Array:
        """Bounds the change of the logits of given experts minus those of all, `[*expert.shape, experts]`."""
        spread = radius.reshape(-1, *[1] * expert.ndim)
        return widened(spread * self.pair[expert] + 2 * self.lost)


def router_norms(gain: Float64[Array, "hidden"], router: Float64[Array, "hidden experts"]) -> RouterNorms:
    """Norms of a router behind a norm with this gain."""
    w = gain[:, None] * router
    pair = np.stack([np.linalg.norm(w - column[:, None], axis=0) for column in w.T])
    single = np.linalg.norm(w, axis=0)
    return RouterNorms(single, pair, rounding(len(w), len(w) ** 0.5 * float(single.max())))


def certain_sets(
    routed: Routed, norms: RouterNorms, radius: Float64[Array, "tokens"], bias: Array | None, config: ModelConfig
) -> Bool[Array, "tokens"]:
    """Whether the set of a token's experts is the same for every state within the radius.

    Args:
        routed: decisions of the clean run.
        norms: of the router.
        radius: bound of the change of the normed state, without the norm's gain.
        bias: selection bias, if the router has one.
        config: of the model.

    Raises:
        InputError: for radii that are not float64 `[tokens]` of at least 0, or logits that are not finite.
    """
    check_finite("logits", routed.logits, "tokens experts")
    check_sizes("radius", radius, len(routed.logits))
    logits, keys = routed.logits, order_keys(routed.logits, bias, config)
    by_logits = orders_by_logits(bias, config)
    each = norms.logit_radius(radius)
    low, high = (logits - each, logits + each) if by_logits else score_ends(logits, each, config)
    if bias is not None:
        low, high = low + bias, high + bias
    # The ends round by a few u of what was added.
    slack = rounding(2, np.abs(low) + np.abs(high) + (0 if bias is None else np.abs(bias)))
    low, high = low - slack, high + slack
    certain = _certain_groups(keys, low, high, config)
    rivals = allowed_experts(keys, config)
    np.put_along_axis(rivals, routed.chosen, values=False, axis=1)
    for copy in routed.chosen.T:
        if by_logits:
            margin = np.take_along_axis(logits, copy[:, None], axis=1) - logits
            stays = margin > norms.margin_radius(radius, copy)
        else:
            stays = np.take_along_axis(low, copy[:, None], axis=1) > high
        certain &= np.all(stays | ~rivals, axis=1)
    return certain


def _certain_groups(keys: Array, low: Array, high: Array, config: ModelConfig) -> Array:
    """Whether each token's groups cannot change."""
    if config.expert_groups is None or config.groups_per_token in (None, config.expert_groups):
        return np.ones(len(keys), bool)
    taken = allowed_experts(keys, config).reshape(len(keys), config.expert_groups, -1)[..., 0]
    least = np.min(np.where(taken, best_of_groups(low, config), np.inf), axis=1)
    most = np.max(np.where(taken, -np.inf, best_of_groups(high, config)), axis=1)
    return least > most + rounding(2, np.abs(least) + np.abs(most))


def score_ends(logits: Array, each: Array, config: ModelConfig) -> tuple[Array, Array]:
    """Lower and upper ends of scores if logits move by at most `each`.

    A sigmoid rises; a softmax's element is least if its own logit falls and all others rise.
    """
    if config.router_score == "sigmoid":
        return expit(logits - each), expit(logits + each)

    # Sums of powers are kept as logarithms, off by a few u of the largest after each addition.
    largest = np.max(np.abs(logits), axis=1, keepdims=True)
    each = each + rounding(logits.shape[1], largest + each + 1)

    def softmax_of(own: Array, others: Array) -> Array:
        """`1 / (1 + sum_j e^(others_j - own_i))` over j other than i: the sums before and behind i."""
        least = np.full_like(others[:, :1], -np.inf)
        before = np.logaddexp.accumulate(np.concatenate([least, others[:, :-1]], axis=1), axis=1)
        behind = np.logaddexp.accumulate(np.concatenate([least, others[:, :0:-1]], axis=1), axis=1)[:, ::-1]
        return expit(own - np.logaddexp(before, behind))

    return softmax_of(logits - each, logits + each), softmax_of(logits + each, logits - each)


def weight_change(
    routed: Routed, norms: RouterNorms, radius: Float64[Array, "tokens"], config: ModelConfig
) -> Float64[Array, "tokens copies"]:
    """Bounds the change of routing weights of tokens whose set is certain.

    A softmax's element is `1 / sum_j e^(l_j - l_i)`, over all experts or, if the weights are divided by their sum, over
    the chosen ones: it moves with differences of logits only. Sigmoids are taken at their ends.
    """
    each = norms.logit_radius(radius)
    chosen = routed.chosen
    own = np.take_along_axis(routed.logits, chosen, axis=1)
    if config.router_score == "softmax":
        apart = routed.logits[:, None, :] - own[:, :, None]
        moved = norms.margin_radius(radius, chosen)
        counted = np.ones(apart.shape, bool)
        if config.norm_topk_prob:
            counted[:] = False
            np.put_along_axis(counted, np.broadcast_to(chosen[:, None, :], (*chosen.shape, chosen.shape[1])), True, 2)
        least, most = (
            1 / np.sum(np.where(counted, np.exp(np.minimum(apart + sign * moved, 700)), 0), axis=2) for sign in (1, -1)
        )
    else:
        reach = np.take_along_axis(each, chosen, axis=1)
        least, most = expit(own - reach), expit(own + reach)
        if config.norm_topk_prob:
            low, high = least, most
            least = low / (low + np.sum(high, axis=1, keepdims=True) - high + TO_DIVIDE)
            most = high / (high + np.sum(low, axis=1, keepdims=True) - low + TO_DIVIDE)
    scale = config.routed_scaling_factor
    change = np.maximum(most * scale - routed.weights, routed.weights - least * scale)
    return widened(np.maximum(change, 0)) + rounding(routed.logits.shape[1], scale)


def largest_weights(
    routed: Routed, norms: RouterNorms, radius: Float64[Array, "tokens"], config: ModelConfig
) -> tuple[Float64[Array, "tokens experts"], float]:
    """What each expert's weight may become if it is chosen, and what the weights of a token may sum up to."""
    scale = config.routed_scaling_factor
    _, high = score_ends(routed.logits, norms.logit_radius(radius), config)
    if config.norm_topk_prob:
        high = np.ones_like(high)
    total = 1.0 if config.router_score == "softmax" or config.norm_topk_prob else config.experts_per_token
    return widened(np.minimum(high, 1) * scale), widened(total * scale)
