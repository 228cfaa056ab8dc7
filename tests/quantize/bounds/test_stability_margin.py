"""Margins against the distance in closed form, and against the states in between."""

import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.quantize.bounds.routing import Routed, choose
from hetmoe.quantize.bounds.routing_change import certain_sets, router_norms
from hetmoe.quantize.bounds.stability_margin import routing_margin, stability_margin
from tests.models.tiny import tiny_config
from tests.quantize.bounds.test_routing_bounds import KINDS, draw


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_margin_is_the_distance_to_the_nearest_change(score: str) -> None:
    """Of any size: `min (l_i - l_j) / |w_i - w_j|` over chosen i and others j."""
    config = tiny_config(num_experts=5, experts_per_token=2, router_score=score)
    rng = np.random.default_rng(0)
    gain, router = np.exp(rng.normal(size=7)), rng.normal(size=(7, 5))
    states = rng.normal(size=(6, 7)) * 10.0 ** np.arange(-6, 6, 2)[:, None]
    seen = gain[:, None] * router
    routed = choose(states @ seen, None, config)
    found = stability_margin(routed, router_norms(gain, router), None, config)
    for token, (state, chosen) in enumerate(zip(states, routed.chosen, strict=True)):
        nearest, way = min(
            (float(state @ d) / np.linalg.norm(d), tuple(d / np.linalg.norm(d)))
            for d in (seen[:, i] - seen[:, j] for i in chosen for j in set(range(5)) - set(chosen))
        )
        # Roundings of logits, some u of their bounds, are taken off: much where states are small beside the rest.
        assert found[token] <= nearest
        if token >= 3:
            np.testing.assert_allclose(found[token], nearest, rtol=1e-6)
        for radius, changes in ((nearest * (1 + 1e-6), True), (found[token], False)):
            moved = choose((state - radius * np.array(way))[None] @ seen, None, config)
            assert (set(moved.chosen[0]) != set(chosen)) == changes


@pytest.mark.parametrize("kind", KINDS)
def test_the_margin_is_where_certainty_ends(kind: str) -> None:
    _, config, gain, seen, router, bias, states = draw(11, kind, 0.5)
    routed, norms = choose(states @ seen, bias, config), router_norms(gain, router)
    found = stability_margin(routed, norms, bias, config)
    if config.experts_per_token == config.num_experts:
        assert np.isinf(found).all()
        return
    assert np.isfinite(found).all() and (found > 0).any()
    some = found > 0
    assert certain_sets(routed, norms, found, bias, config)[some].all()
    assert not certain_sets(routed, norms, found * (1 + 1e-12) + 1e-300, bias, config).any()


def test_level_experts_have_no_margin() -> None:
    router, states = np.array([[1.0, 1.0, 0.0]]), np.array([[2.0]])
    for taken, wanted in ((1, 0.0), (2, 2.0)):
        config = tiny_config(num_experts=3, experts_per_token=taken)
        found = stability_margin(choose(states @ router, None, config), router_norms(np.ones(1), router), None, config)
        np.testing.assert_allclose(found, [wanted], rtol=1e-8)  # `widened` takes a billionth off


def test_logits_that_are_not_numbers_have_no_margin() -> None:
    config = tiny_config(num_experts=2, experts_per_token=1)
    routed = Routed(np.array([[1.0, 0.0], [np.nan, 0.0]]), np.array([[0], [1]]), np.ones((2, 1)))
    with pytest.raises(InputError, match=r"logits\[1, 0\] is nan"):
        stability_margin(routed, router_norms(np.ones(1), np.ones((1, 2))), None, config)


@pytest.mark.parametrize("taken", [1, 3, 5])
def test_margins_from_arrays_alone(taken: int) -> None:
    rng = np.random.default_rng(taken)
    x, router = rng.normal(size=(8, 7)), rng.normal(size=(7, 5))
    config = tiny_config(num_experts=5, experts_per_token=taken)
    wanted = stability_margin(choose(x @ router, None, config), router_norms(np.ones(7), router), None, config)
    np.testing.assert_allclose(routing_margin(x, router, taken), wanted, rtol=1e-7)
    router[:, 1] = router[:, 0]  # level wherever one of them is chosen and the other is not
    found = routing_margin(x, router, taken)
    order = np.argsort(-(x @ router), axis=1, kind="stable")[:, :taken]
    level = (order == 0).any(axis=1) != (order == 1).any(axis=1)
    assert not found[level].any() and (found[~level] > 0).all()
