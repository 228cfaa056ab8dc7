"""Plans: how many experts stay digital, which, and that wrong input is refused."""

import dataclasses
import inspect
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.errors import InputError
from hetmoe.placement.plan import (
    Plan,
    all_analog,
    all_digital,
    check_plan,
    digital_count,
    experts_analog,
    place,
    stack_plans,
)
from tests.models.tiny import full_config, tiny_config

CONFIG = tiny_config(num_layers=3, num_experts=4)
FULL = full_config()  # two layers with 8 experts, one dense


def digital(scores: Any, fraction: float) -> list[list[int]]:
    """Indices of the digital experts of every layer."""
    plan = place(jnp.asarray(scores, jnp.float32), fraction)
    assert plan.experts.dtype == jnp.bool_
    assert (plan.attention, plan.lm_head) == (None, None)
    return [np.flatnonzero(~row).tolist() for row in np.asarray(plan.experts)]


@pytest.mark.parametrize(
    ("fraction", "experts", "expected"),
    [
        (0.0, 64, 0), (1.0, 64, 64), (0.125, 64, 8), (0.25, 60, 15), (0.1, 64, 6), (0.3, 64, 19), (0.05, 64, 3),
        (0.5, 1, 1), (0.499, 1, 0), (0.5, 3, 2), (0.5, 5, 3), (0.25, 2, 1), (0.125, 4, 1), (0.124, 4, 0), (0.375, 4, 2),
        (0, 8, 0), (1, 8, 8),
    ],
)  # fmt: skip
def test_digital_count_rounds_half_up(fraction: float, experts: int, expected: int) -> None:
    count = digital_count(fraction, experts)
    assert type(count) is int
    assert count == expected


@given(st.floats(0, 1), st.integers(1, 512))
@settings(deadline=None, derandomize=True)
def test_digital_count_is_the_stated_formula(fraction: float, experts: int) -> None:
    assert digital_count(fraction, experts) == math.floor(fraction * experts + 0.5)
    assert 0 <= digital_count(fraction, experts) <= experts


@pytest.mark.parametrize("fraction", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_fraction_outside_the_unit_interval_is_refused(fraction: float) -> None:
    for refuse in (lambda: digital_count(fraction, 8), lambda: place(jnp.zeros((1, 8)), fraction)):
        with pytest.raises(InputError, match=re.escape(repr(fraction))):
            refuse()


def test_highest_scores_stay_digital() -> None:
    scores = [[0.1, 0.9, -3.0, 0.5], [4.0, 3.0, 2.0, 1.0], [-4.0, -3.0, -2.0, -1.0]]
    assert digital(scores, 0.0) == [[], [], []]
    assert digital(scores, 0.25) == [[1], [0], [3]]
    assert digital(scores, 0.5) == [[1, 3], [0, 1], [2, 3]]
    assert digital(scores, 0.75) == [[0, 1, 3], [0, 1, 2], [1, 2, 3]]
    assert digital(scores, 1.0) == [[0, 1, 2, 3]] * 3


def test_ties_keep_the_lower_index_digital() -> None:
    assert digital([[1.0, 2.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, -0.0, 0.0, -0.0]], 0.5) == [
        [1, 2],
        [0, 1],
        [0, 1],
    ]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_scores_that_are_not_finite_are_refused_by_place(value: float) -> None:
    """They come of weights that are not finite, or overflow: silently they would decide what stays digital."""
    scores = [[0.0, 1.0, 2.0, 3.0], [4.0, value, 5.0, value]]
    with pytest.raises(InputError, match=rf"expert 1 in layer 1 \(of those with experts\) is {value}: its weights"):
        place(jnp.asarray(scores), 0.5)


def test_scores_of_other_dtypes() -> None:
    for dtype in (jnp.bfloat16, jnp.float16):
        assert place(jnp.asarray([[1, 3, 2]], dtype), 1 / 3).experts.tolist() == [[True, False, True]]


@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=3), st.floats(0, 1))
@settings(deadline=None, derandomize=True)
def test_place_by_its_definition(rows: list[list[int]], fraction: float) -> None:
    expected = [sorted(sorted(range(6), key=lambda e: (-row[e], e))[: digital_count(fraction, 6)]) for row in rows]
    assert digital(rows, fraction) == expected


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_scores_must_be_layers_by_experts(shape: tuple[int, ...]) -> None:
    unchecked = inspect.unwrap(place)  # the tests' own check of annotated shapes would come first
    with pytest.raises(InputError, match=re.escape(str(list(shape)))):
        unchecked(jnp.zeros(shape), 0.5)


def test_the_named_plans() -> None:
    shape = (3, 4)
    assert not np.any(all_digital(CONFIG).experts)
    for plan in (experts_analog(CONFIG), all_analog(CONFIG)):
        assert np.all(plan.experts)
    for plan in (all_digital(CONFIG), experts_analog(CONFIG)):
        assert (plan.attention, plan.lm_head) == (None, None)
    for plan in (all_digital(FULL), experts_analog(FULL)):
        dense = (plan.attention, plan.shared_experts, plan.dense_ffn, plan.lm_head)
        assert dense == (None, None, None, None) and not plan.switches_dense
    everything = all_analog(FULL)
    assert {name: np.asarray(flags).tolist() for name, flags in vars(everything).items()} == {
        "experts": [[True] * 8] * 2, "attention": [True] * 3, "shared_experts": [True] * 2, "dense_ffn": [True],
        "lm_head": True,
    }  # fmt: skip
    check_plan(everything, FULL)
    full = all_analog(CONFIG)
    assert (full.shared_experts, full.dense_ffn) == (None, None)  # the model has none
    assert full.attention is not None
    assert full.lm_head is not None
    assert full.attention.tolist() == [True] * 3
    assert full.lm_head.tolist() is True
    for plan in (all_digital(CONFIG), experts_analog(CONFIG), full):
        assert (plan.experts.shape, plan.experts.dtype) == (shape, jnp.bool_)
        check_plan(plan, CONFIG)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts": jnp.ones((3, 5), bool)}, "experts has shape [3, 5], this model needs [3, 4]"),
        ({"experts": jnp.ones((4, 3), bool)}, "experts has shape [4, 3], this model needs [3, 4]"),
        ({"experts": jnp.ones((4,), bool)}, "experts has shape [4], this model needs [3, 4]"),
        ({"experts": jnp.ones((2, 3, 4), bool)}, "experts has shape [2, 3, 4], this model needs [3, 4]"),
        ({"attention": jnp.ones((4,), bool)}, "attention has shape [4], this model needs [3]"),
        ({"attention": jnp.ones((), bool)}, "attention has shape [], this model needs [3]"),
        ({"lm_head": jnp.ones((1,), bool)}, "lm_head has shape [1], this model needs []"),
        ({"experts": None}, "experts"),
        ({"experts": jnp.full((3, 4), 0.5)}, "experts"),
        ({"experts": jnp.ones((3, 4), jnp.int32)}, "experts"),
    ],
)
def test_plan_of_another_shape_or_kind_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        check_plan(dataclasses.replace(all_analog(CONFIG), **changes), CONFIG)


@pytest.mark.parametrize("name", ["attention", "shared_experts", "dense_ffn", "lm_head"])
def test_any_dense_module_may_be_left_out(name: str) -> None:
    """By itself it makes the plan one that switches dense modules; of a wrong shape, or too much, it is refused."""
    alone = dataclasses.replace(all_digital(FULL), **{name: getattr(all_analog(FULL), name)})
    assert alone.switches_dense
    for plan in (alone, dataclasses.replace(all_analog(FULL), **{name: None})):
        check_plan(plan, FULL)
    with pytest.raises(InputError, match=f"plan: {name} has shape"):
        check_plan(dataclasses.replace(alone, **{name: jnp.ones((4,), bool)}), FULL)
    with pytest.raises(InputError, match=f"plan: {name} has dtype float32"):
        check_plan(jax.tree.map(lambda f: f.astype(jnp.float32), alone).replace(experts=alone.experts), FULL)
    if name in ("shared_experts", "dense_ffn"):
        changed = {name: getattr(all_analog(FULL), name)}
        with pytest.raises(InputError, match=f"plan: {name} is set, but this model has none"):
            check_plan(dataclasses.replace(all_digital(CONFIG), **changed), CONFIG)


def test_stacked_plans_map_back_to_themselves() -> None:
    scores = jax.random.normal(jax.random.key(0), (3, 4))
    plans = [place(scores, fraction) for fraction in (0.0, 0.25, 0.5, 1.0)]
    stacked = stack_plans(plans)
    assert (stacked.experts.shape, stacked.attention, stacked.lm_head) == ((4, 3, 4), None, None)
    for index, plan in enumerate(plans):
        np.testing.assert_array_equal(stacked.experts[index], plan.experts)
    full = stack_plans([all_analog(CONFIG), dataclasses.replace(all_analog(CONFIG), lm_head=jnp.zeros((), bool))])
    assert full.attention is not None
    assert full.lm_head is not None
    assert (full.attention.shape, full.lm_head.tolist()) == ((2, 3), [True, False])
    counts = jax.vmap(lambda plan: jnp.sum(plan.experts))(stacked)
    assert counts.tolist() == [12, 9, 6, 0]


def test_plans_of_different_structure_do_not_stack() -> None:
    for plans in ([all_analog(CONFIG), all_digital(CONFIG)], [all_digital(CONFIG), all_analog(CONFIG)]):
        with pytest.raises((ValueError, TypeError)):
            stack_plans(plans)


def test_a_plan_is_traced_not_compiled_in() -> None:
    leaves = jax.tree.leaves(all_analog(CONFIG))
    assert len(leaves) == 3
    assert isinstance(jax.tree.map(lambda leaf: leaf, all_analog(CONFIG)), Plan)
