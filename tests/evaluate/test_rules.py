"""Placements by rule: what they are scored on, and by which chips."""

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.analog.spec import analog_spec
from hetmoe.evaluate.rules import SCORE_STREAM, Scorer, scoring_scale
from hetmoe.evaluate.text import Windows
from hetmoe.models.model import Model
from hetmoe.placement.plan import place
from hetmoe.placement.scores import score_experts

SPEC = analog_spec("additive", noise_scale=2.0)


def scorer(tiny: Model, windows: Windows, seed: int = 0) -> Scorer:
    return Scorer(model=tiny, sample=windows, down_axis="output", seed=seed, calibration=None)


def test_rules_get_what_they_need(tiny: Model, windows: Windows) -> None:
    tokens = jnp.asarray(windows.tokens)
    key = jax.random.fold_in(jax.random.key(3), SCORE_STREAM)
    expected = {
        "max_neuron_norm": score_experts(tiny, "max_neuron_norm", down_axis="output"),
        "activation_weight": score_experts(tiny, "activation_weight", tokens=tokens[:, :-1]),
        "noise_sensitivity": score_experts(tiny, "noise_sensitivity", tokens=tokens, key=key, spec=SPEC),
        "measured": score_experts(tiny, "measured", tokens=tokens, key=key, spec=SPEC),
    }
    for rule, scores in expected.items():
        np.testing.assert_array_equal(scorer(tiny, windows, 3).scores(rule, SPEC), scores)
    other = scorer(tiny, windows, 4)
    assert np.any(other.scores("measured", SPEC) != expected["measured"])
    # Not the chips that seed 3 evaluates.
    evaluated = score_experts(tiny, "measured", tokens=tokens, key=jax.random.key(3), spec=SPEC)
    assert np.any(np.asarray(evaluated) != np.asarray(expected["measured"]))


def test_one_plan_for_all_seeds_unless_drawn(tiny: Model, windows: Windows) -> None:
    found = scorer(tiny, windows).placements("router_norm", [0.25, 0.5], 3, SPEC)
    assert [p.name for p in found] == ["router_norm 25.0% digital", "router_norm 50.0% digital"]
    scores = score_experts(tiny, "router_norm")
    for placement, fraction in zip(found, (0.25, 0.5), strict=True):
        (plan,) = placement.plans
        np.testing.assert_array_equal(plan.experts, place(scores, fraction).experts)
    (drawn,) = scorer(tiny, windows).placements("random", [0.25], 3, SPEC)
    assert len(drawn.plans) == 3
    assert any(np.any(np.asarray(drawn.plans[0].experts) != np.asarray(p.experts)) for p in drawn.plans[1:])


def test_scores_are_made_where_the_signal_is() -> None:
    assert scoring_scale([0.0, 5.0, 2.0]) == 5.0
    assert scoring_scale([0.0]) == 1.0
