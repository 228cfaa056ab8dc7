"""Routing in float64."""

import dataclasses

import numpy as np
from jaxtyping import Float64, Int
from scipy.special import expit

from hetmoe.models.config import ModelConfig

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Routed:
    """Decisions of one router."""

    logits: Float64[Array, "tokens experts"]
    chosen: Int[Array, "tokens copies"]  # best first; ties go to the lower index
    weights: Float64[Array, "tokens copies"]

    def differs(self, other: "Routed") -> Array:
        """Of which tokens another set of experts is chosen, boolean `[tokens]`."""
        return np.any(np.sort(self.chosen, axis=1) != np.sort(other.chosen, axis=1), axis=1)


def orders_by_logits(bias: Array | None, config: ModelConfig) -> bool:
    """Whether scores, which rise with the logits of a token, enter the choice only by their order."""
    return bias is None and config.group_score in (None, "best")


def scores_of(logits: Float64[Array, "tokens experts"], config: ModelConfig) -> Float64[Array, "tokens experts"]:
    """Softmax or sigmoids of logits."""
    if config.router_score == "sigmoid":
        return expit(logits)
    powers = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    return powers / np.sum(powers, axis=-1, keepdims=True)


def order_keys(logits: Float64[Array, "tokens experts"], bias: Array | None, config: ModelConfig) -> Array:
    """What experts are ordered by: scores with their bias, or logits if these put them in the same order."""
    if orders_by_logits(bias, config):
        return logits
    scores = scores_of(logits, config)
    return scores if bias is None else scores + bias


def best_of_groups(keys: Float64[Array, "tokens experts"], config: ModelConfig) -> Array:
    """What groups are ordered by, `[tokens, groups]`: the largest, or the sum of the two largest keys."""
    grouped = np.sort(keys.reshape(len(keys), config.expert_groups or 1, -1), axis=-1)
    return grouped[..., -1] if config.group_score == "best" else grouped[..., -1] + grouped[..., -2]


def largest(keys: Array, count: int) -> Array:
    """Numbers of the largest on the last axis, the largest first; ties go to the lower number."""
    return np.argsort(-keys, axis=-1, kind="stable")[..., :count]


def allowed_experts(keys: Float64[Array, "tokens experts"], config: ModelConfig) -> Array:
    """Experts of the groups that a token may use, boolean `[tokens, experts]`; all without groups."""
    if config.expert_groups is None or config.groups_per_token is None:
        return np.ones(keys.shape, bool)
    taken = largest(best_of_groups(keys, config), config.groups_per_token)
    groups = np.zeros((len(keys), config.expert_groups), bool)
    np.put_along_axis(groups, taken, values=True, axis=1)
    return np.repeat(groups, keys.shape[1] // config.expert_groups, axis=1)


def choose(logits: Float64[Array, "tokens experts"], bias: Array | None, config: ModelConfig) -> Routed:
    """The experts of each token and their weights (`hetmoe.models.routing.route`)."""
    keys = order_keys(logits, bias, config)
    chosen = largest(np.where(allowed_experts(keys, config), keys, -np.inf), config.experts_per_token)
    weights = np.take_along_axis(scores_of(logits, config), chosen, axis=1)
    if config.norm_topk_prob:
        weights = weights / (np.sum(weights, axis=1, keepdims=True) + TO_DIVIDE)
    return Routed(logits, chosen, weights * config.routed_scaling_factor)


TO_DIVIDE = 1e-20  # sigmoids may all be 0
