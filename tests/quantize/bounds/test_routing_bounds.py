"""Sets of experts that cannot change, and routing weights: a search for violations, and radii at which sets change."""

from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.special import expit, logit

from hetmoe.models.params import FeedForward, MoE
from hetmoe.models.routing import route
from hetmoe.quantize.bounds.routing import choose
from hetmoe.quantize.bounds.routing_change import certain_sets, largest_weights, router_norms, weight_change
from tests.models.tiny import tiny_config

GROUPS: dict[str, Any] = {"expert_groups": 4, "groups_per_token": 2, "experts_per_token": 3}
KINDS = {
    "softmax": (tiny_config(), False),
    "softmax, normed": (tiny_config(norm_topk_prob=True, routed_scaling_factor=2.5), False),
    "softmax, bias": (tiny_config(selection_bias=True), True),
    "softmax, best group": (tiny_config(**GROUPS, group_score="best"), False),
    "softmax, best two": (tiny_config(**GROUPS, group_score="best_two"), False),
    "sigmoid": (tiny_config(router_score="sigmoid"), False),
    "sigmoid, bias, best two": (
        tiny_config(
            **GROUPS, group_score="best_two", router_score="sigmoid", selection_bias=True, norm_topk_prob=True,
            routed_scaling_factor=2.5,
        ),
        True,
    ),
    "sigmoid, bias, best group": (
        tiny_config(**GROUPS, group_score="best", router_score="sigmoid", selection_bias=True), True,
    ),
    "all experts": (tiny_config(experts_per_token=8), False),
}  # fmt: skip


def draw(seed, kind, size, tokens=12, hidden=7):
    """A router, its selection bias, and the gain and normed states of the tokens."""
    config, has_bias = KINDS[kind]
    rng = np.random.default_rng(seed)
    router = size * rng.standard_normal((hidden, config.num_experts))
    if rng.random() < 0.3:
        router[:, 1] = router[:, 0]  # ties
    bias = rng.choice([0.01, 0.3]) * rng.standard_normal(config.num_experts) if has_bias else None
    gain = 1 + 0.3 * rng.standard_normal(hidden)
    states = rng.standard_normal((tokens, hidden))
    states *= hidden**0.5 / np.linalg.norm(states, axis=1, keepdims=True)
    return rng, config, gain, gain[:, None] * router, router, bias, states


@pytest.mark.parametrize("kind", KINDS)
def test_choices_are_those_of_the_model(kind):
    _, config, gain, _, router, bias, states = draw(3, kind, 0.5, tokens=40)
    x = np.float32(gain * states)
    router = np.float32(router)
    moe = MoE(
        router=jnp.asarray(router), experts=FeedForward(gate=None, up=None, down=None),
        selection_bias=None if bias is None else jnp.asarray(bias, jnp.float32),
    )  # fmt: skip
    wanted = route(jnp.asarray(x), moe, config)
    found = choose(x.astype(float) @ router, None if bias is None else np.float32(bias).astype(float), config)
    np.testing.assert_array_equal(found.chosen, wanted.chosen)
    np.testing.assert_allclose(found.weights, wanted.weights, rtol=1e-5)  # float32: a few roundings of 7 terms


@settings(max_examples=120)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(list(KINDS)),
    size=st.sampled_from([1e-6, 0.1, 1.0, 30.0]),
    radius=st.sampled_from([0.0, 1e-9, 1e-3, 0.03, 0.1, 0.3, 3.0]),
)
def test_no_certain_set_and_no_weight_changes_more(seed, kind, size, radius):
    rng, config, gain, seen, router, bias, states = draw(seed, kind, size)
    norms = router_norms(gain, router)
    routed = choose(states @ seen, bias, config)
    radii = radius * rng.choice([0.3, 1.0], len(states))
    certain = certain_sets(routed, norms, radii, bias, config)
    turned = weight_change(routed, norms, radii, config)
    each, total = largest_weights(routed, norms, radii, config)
    limit = norms.logit_radius(radii)
    pairs = (seen[:, :, None] - seen[:, None, :]).reshape(len(seen), -1)
    directions = np.concatenate([pairs, seen, -seen, rng.standard_normal((len(seen), 20))], axis=1).T
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    for direction in directions / np.where(lengths > 0, lengths, 1):
        moved = choose((states + radii[:, None] * direction) @ seen, bias, config)
        assert (np.abs(moved.logits - routed.logits) <= limit).all()
        assert not (certain & routed.differs(moved)).any()
        assert (moved.weights <= np.take_along_axis(each, moved.chosen, axis=1)).all()
        assert (np.sum(moved.weights, axis=1) <= total).all()
        old, new = np.zeros_like(each), np.zeros_like(each)
        np.put_along_axis(old, routed.chosen, routed.weights, axis=1)
        np.put_along_axis(new, moved.chosen, moved.weights, axis=1)
        change = np.take_along_axis(np.abs(new - old), routed.chosen, axis=1)
        assert (change <= turned)[certain].all()


def certain_at(config, router, bias, state, radius):
    norms, states = router_norms(np.ones(len(router)), router), state[None]
    return bool(certain_sets(choose(states @ router, bias, config), norms, np.array([radius]), bias, config)[0])


def changes_at(config, router, bias, state, radius, direction):
    moved = state + radius * direction / np.linalg.norm(direction)
    return bool(choose(state[None] @ router, bias, config).differs(choose(moved[None] @ router, bias, config))[0])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_two_logits_are_certain_until_they_can_meet(score):
    config = tiny_config(num_experts=2, experts_per_token=1, router_score=score)
    router, state = np.array([[1.0, -0.5], [0.3, 0.7], [0.0, 0.2]]), np.array([1.0, 0.4, 0.5])
    apart = router[:, 0] - router[:, 1]
    meet = float(state @ apart) / np.linalg.norm(apart)
    assert certain_at(config, router, None, state, meet * (1 - 1e-6))
    assert not certain_at(config, router, None, state, meet * (1 + 1e-6))
    assert changes_at(config, router, None, state, meet * (1 + 1e-6), -apart)


@pytest.mark.parametrize(
    ("group_score", "bias", "meeting"),
    [
        (None, [0.05, 0.1, 0.2, 0.2], 0.7 - 0.05),
        ("best", [0.05, 0.1, 0.2, 0.2], 0.7 - 0.05),
        # Sums of two: s + 0.5 + 0.5 + 0.1 against 0.8 + 0.8; the first expert stays above the second until then.
        ("best_two", [0.5, 0.1, 0.3, 0.3], 1.6 - 0.5 - 0.6),
    ],
)
def test_biased_scores_are_certain_until_they_can_meet(group_score, bias, meeting):
    """All experts but the first have logits of 0: the first one's interval is all there is."""
    groups = {} if group_score is None else {"expert_groups": 2, "groups_per_token": 1, "group_score": group_score}
    config = tiny_config(num_experts=4, experts_per_token=1, router_score="sigmoid", selection_bias=True, **groups)
    router, state, bias = np.zeros((3, 4)), np.array([2.0, 0.0, 0.0]), np.array(bias)
    router[0, 0] = 0.5
    meet = (1.0 - logit(meeting)) / 0.5
    assert expit(1.0) > meeting
    assert certain_at(config, router, bias, state, meet * (1 - 1e-6))
    assert not certain_at(config, router, bias, state, meet * (1 + 1e-6))
    assert changes_at(config, router, bias, state, meet * (1 + 1e-6), np.array([-1.0, 0, 0]))


def test_ties_are_uncertain():
    router, state = np.array([[1.0, 1.0, 0.0]]), np.array([2.0])
    assert not certain_at(tiny_config(num_experts=3, experts_per_token=1), router, None, state, 0.0)
    assert certain_at(tiny_config(num_experts=3, experts_per_token=2), router, None, state, 0.0)
