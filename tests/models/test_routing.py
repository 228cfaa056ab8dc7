"""The choice of experts by sigmoid scores, selection bias and groups against plain loops."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.models.config import ModelConfig
from hetmoe.models.params import MoE
from hetmoe.models.routing import Routing, route
from tests.models import numpy_model
from tests.models.tiny import tiny_config

UNIT = 2.0**-24  # unit roundoff of float32
TOKENS, HIDDEN, EXPERTS = 300, 23, 12
GROUPED = {"expert_groups": 4, "groups_per_token": 2}

_route = jax.jit(route, static_argnames="config")


def config_of(**changes: Any) -> ModelConfig:
    return tiny_config(**{"num_experts": EXPERTS, "experts_per_token": 3, **changes})


def draw(config: ModelConfig, seed: int, bias: tuple[float, float]) -> tuple[np.ndarray, MoE]:
    """(tokens, a layer with a router and, if the config has one, a selection bias uniform between two numbers)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    router = (rng.standard_normal((HIDDEN, EXPERTS)) * HIDDEN**-0.5).astype(np.float32)
    drawn = rng.uniform(*bias, EXPERTS).astype(np.float32)
    return x, MoE(router=router, experts=None, selection_bias=drawn if config.selection_bias else None)


def routed(x: np.ndarray, moe: MoE, config: ModelConfig) -> Routing:
    return _route(jnp.asarray(x), jax.tree.map(jnp.asarray, moe), config)


def check(config: ModelConfig, seed: int = 0, bias: tuple[float, float] = (-0.3, 0.3)) -> tuple[np.ndarray, np.ndarray]:
    """Compares with the loops of `numpy_model`; returns (experts chosen, weights)."""
    x, moe = draw(config, seed, bias)
    actual = routed(x, moe, config)
    wide: Any = jax.tree.map(lambda leaf: leaf.astype(np.float64), moe)
    chosen, weights = numpy_model.route(x.astype(np.float64), wide, config)
    np.testing.assert_array_equal(actual.chosen, chosen)
    # A score is off by a few units of a logit below 5 and its own rounding; the sum of three divides it.
    np.testing.assert_allclose(actual.weights, weights, rtol=32 * UNIT, atol=0)
    np.testing.assert_allclose(actual.logits, x.astype(np.float64) @ wide.router, rtol=0, atol=32 * UNIT)
    assert (actual.chosen.dtype, actual.weights.dtype, actual.logits.dtype) == (jnp.int32, jnp.float32, jnp.float32)
    return np.asarray(actual.chosen), np.asarray(actual.weights)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("group_score", [None, "best", "best_two"])
@pytest.mark.parametrize(("normed", "scaling"), [(False, 1.0), (True, 2.5)])
def test_every_combination(score: str, biased: bool, group_score: str | None, normed: bool, scaling: float) -> None:
    options: dict[str, Any] = {} if group_score is None else GROUPED | {"group_score": group_score}
    options |= {"router_score": score, "selection_bias": biased}
    chosen, weights = check(config_of(**options, norm_topk_prob=normed, routed_scaling_factor=scaling))
    groups = [len(set(row // 3)) for row in chosen]
    assert max(groups) == (3 if group_score is None else 2)  # so the limit binds
    if normed:
        np.testing.assert_allclose(weights.sum(axis=1), scaling, rtol=16 * UNIT)
    if not biased:
        assert np.all(np.diff(weights, axis=1) <= 0)  # best first


def test_options_change_what_they_should() -> None:
    """Groups and bias the choice, norm and factor the weights: otherwise the comparisons above would say little."""
    base = config_of(router_score="sigmoid")
    plain, plain_weights = check(base)
    for changes in ({"selection_bias": True}, GROUPED | {"group_score": "best"}, GROUPED | {"group_score": "best_two"}):
        other, _ = check(dataclasses.replace(base, **changes))
        assert 0.1 < np.mean(np.any(np.sort(other) != np.sort(plain), axis=1)) < 1
    best, _ = check(dataclasses.replace(base, **GROUPED, group_score="best"))
    best_two, _ = check(dataclasses.replace(base, **GROUPED, group_score="best_two"))
    assert np.mean(np.any(np.sort(best) != np.sort(best_two), axis=1)) > 0.1
    for changes in ({"norm_topk_prob": True}, {"routed_scaling_factor": 2.5}):
        same, weights = check(dataclasses.replace(base, **changes))
        np.testing.assert_array_equal(same, plain)
        assert np.abs(weights - plain_weights).min() > 0.01


@pytest.mark.parametrize("group_score", ["best", "best_two"])
def test_negative_scores_of_chosen_groups_beat_excluded_groups(group_score: str) -> None:
    """A mask of 0 in place of -inf would prefer the experts of excluded groups as soon as biased scores are below 0."""
    options: dict[str, Any] = GROUPED | {"group_score": group_score, "router_score": "sigmoid", "selection_bias": True}
    config = config_of(**options, experts_per_token=5)
    x, moe = draw(config, 1, (-3.0, -1.5))
    assert np.all(numpy_model.sigmoid(x @ moe.router) + moe.selection_bias < 0)
    chosen, weights = check(config, 1, (-3.0, -1.5))
    assert all(len(set(row // 3)) == 2 for row in chosen)
    assert np.all(weights > 0)  # the weights know nothing of the bias


def test_known_numbers() -> None:
    """Scores 1/2, 1/3, 2/3, 1/4 in two groups; the bias lifts the last expert into the choice, not the weights."""
    router = np.zeros((HIDDEN, 4), np.float32)
    router[0] = np.log([1, 1 / 2, 2, 1 / 3])
    x = jnp.eye(1, HIDDEN)
    bias = jnp.asarray([0.0, 0.0, 0.0, 0.5])
    options: dict[str, Any] = {"num_experts": 4, "experts_per_token": 2, "router_score": "sigmoid"}
    plain = _route(x, MoE(router=router, experts=None), tiny_config(**options))
    assert plain.chosen.tolist() == [[2, 0]]
    np.testing.assert_allclose(plain.weights[0], [2 / 3, 1 / 2], rtol=8 * UNIT)
    biased = _route(
        x, MoE(router=router, experts=None, selection_bias=bias), tiny_config(**options, selection_bias=True)
    )
    assert biased.chosen.tolist() == [[3, 2]]
    np.testing.assert_allclose(biased.weights[0], [1 / 4, 2 / 3], rtol=8 * UNIT)
    grouped: dict[str, Any] = options | {"expert_groups": 2, "groups_per_token": 1}
    for score, wanted in (("best", [[2, 3]]), ("best_two", [[2, 3]])):  # 2/3 against 1/2; 11/12 against 5/6
        result = _route(x, MoE(router=router, experts=None), tiny_config(**grouped, group_score=score))
        assert result.chosen.tolist() == wanted
    normed = tiny_config(**options, norm_topk_prob=True, routed_scaling_factor=3.5)
    result = _route(x, MoE(router=router, experts=None), normed)
    np.testing.assert_allclose(result.weights[0], [2.0, 1.5], rtol=8 * UNIT)  # (4/7, 3/7) * 3.5


def test_ties_between_groups_go_to_the_lower_index() -> None:
    config = config_of(**GROUPED, group_score="best_two", router_score="sigmoid", experts_per_token=4)
    result = _route(jnp.ones((1, HIDDEN)), MoE(router=jnp.zeros((HIDDEN, EXPERTS)), experts=None), config)
    assert result.chosen.tolist() == [[0, 1, 2, 3]]
    assert result.weights.tolist() == [[0.5] * 4]


def test_vanishing_scores_give_no_nan() -> None:
    """Sigmoids of very negative logits are all 0: their norm divides by almost 0 and must stay 0."""
    config = config_of(router_score="sigmoid", norm_topk_prob=True)
    result = _route(jnp.ones((2, HIDDEN)), MoE(router=jnp.full((HIDDEN, EXPERTS), -100.0), experts=None), config)
    assert not np.any(result.weights)


def test_bias_stays_float32_beside_bfloat16_weights() -> None:
    """In bfloat16 two biases next to each other would be equal, and the lower index would win."""
    config = config_of(router_score="sigmoid", selection_bias=True, experts_per_token=1)
    bias = np.zeros(EXPERTS, np.float32)
    bias[[4, 7]] = [7.001, 7.002]
    moe = MoE(router=jnp.zeros((HIDDEN, EXPERTS), jnp.bfloat16), experts=None, selection_bias=jnp.asarray(bias))
    result = route(jnp.ones((1, HIDDEN), jnp.bfloat16), moe, config)  # not compiled, as XLA may skip roundings
    assert result.chosen.tolist() == [[7]]
    assert result.weights.dtype == jnp.float32
