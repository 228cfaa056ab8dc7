"""Specialisation and growth, on numbers made by hand."""

import dataclasses

import numpy as np
import pytest

from theory.data import DataSpec
from theory.growth import growth, linear_looks, loss_slope, pattern_frequency
from theory.model import ModelSpec
from theory.specialisation import all_held, for_class, held_apart, holders, served_frequency
from theory.train import TrainSpec

# Looks after 0, 1, 2, 12, 22 ... steps.
SPEC = TrainSpec(model=ModelSpec(experts=4, neurons=3), single=2, chunk=10, expert_rate=0.2)


def test_experts_of_a_class() -> None:
    able = for_class(SPEC.model, 2)  # patterns: class 0 frequent, rare, class 1 frequent, rare
    np.testing.assert_array_equal(able, [[True, True, False, False], [False, False, True, True]] * 2)
    assert for_class(dataclasses.replace(SPEC.model, votes="neuron"), 2).all()
    three = for_class(ModelSpec(experts=3, classes=3), 1)
    np.testing.assert_array_equal(three, np.eye(3, dtype=bool))


def test_who_holds_what() -> None:
    along, chosen = np.zeros((1, 4, 3, 4)), np.zeros((1, 4, 4))
    chosen[0, 0, 0], along[0, 0, 1, 0] = 1.0, 0.5
    chosen[0, 2, 0], along[0, 2, 0, 0] = 0.95, 0.7  # the larger component
    along[0, 0, :, 0] = 0.5  # and the smaller sum
    chosen[0, 0, 1] = 0.9
    chosen[0, 1, :], along[0, 1, 0, 2:] = 1.0, 0.3  # votes for the other class: patterns 2 and 3 only
    chosen[0, 3, 3], along[0, 3, 1, 3] = 0.89, 9.0  # not always
    holder = holders(along, chosen, SPEC.model, 2)
    assert holder.tolist() == [[2, 0, 1, 1]]
    assert all_held(holder).tolist() == [True] and held_apart(holder, 2).tolist() == [False]
    assert held_apart(np.array([[2, 0, 1, 3], [2, 0, 1, -1], [0, 2, 0, 2]]), 2).tolist() == [True, False, True]
    chosen[0, 1, 2] = 0.5
    assert holders(along, chosen, SPEC.model, 2).tolist() == [[2, 0, -1, 1]]


def test_served() -> None:
    weight = np.zeros((1, 2, 4))
    weight[0, 0] = (0.5, 0.25, 0, 0)
    frequency = pattern_frequency(np.array([[0.9, 0.1]]), 2)
    np.testing.assert_allclose(frequency, [[0.45, 0.05, 0.45, 0.05]])
    np.testing.assert_allclose(served_frequency(weight, frequency), [[0.45 * 0.5 + 0.05 * 0.25, 0]])


def test_the_linear_regime() -> None:
    active = np.ones((3, 5, 2))
    active[0, 3:, 0] = 0.5
    active[1, 1, :] = 0.9
    active[2, 0, 1] = 0.98
    assert linear_looks(active).tolist() == [[2, 4], [0, 0], [4, 0]]


@pytest.mark.parametrize(
    ("loss", "classes", "slope"), [("hinge", 2, 1), ("logistic", 2, 0.5), ("hinge", 3, 1.5), ("logistic", 5, 1)]
)
def test_slopes_of_losses(loss: str, classes: int, slope: float) -> None:
    """Against differences of the loss itself, at outputs of zero (the maximum of other outputs is one of them)."""
    spec = TrainSpec(data=DataSpec(classes=classes), model=ModelSpec(classes=classes), loss=loss)
    assert loss_slope(spec) == slope
    from tests.theory.test_train import by_hand
    from theory.model import fixed_votes

    votes = fixed_votes(spec.model)[1, 0].astype(np.float64)  # of class 1
    step = 1e-6 if loss == "logistic" else 1e-3
    ends = [by_hand(scale * votes[None], np.array([1]), loss)[0] for scale in (-step, step)]
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-5)


def test_growth_by_hand() -> None:
    """One run, four looks; the expert of the largest weight, and its active neuron of the right vote."""
    spec = dataclasses.replace(SPEC, model=dataclasses.replace(SPEC.model, votes="neuron"))  # 0, 1, 0 of expert 2
    along, weight, norm = np.zeros((1, 4, 4, 3, 4)), np.zeros((1, 4, 4, 4)), np.ones((1, 4, 4, 3))
    weight[0, :, 0, 0], weight[0, :, 2, 0] = (0.2, 0.3, 0.9, 0.9), (0.4, 0.6, 0.8, 0.1)
    along[0, :, 2, 0, 0] = (0.05, 0.2, 0.6, 0.8)
    along[0, :, 2, 1, 0] = (0.3, 0.9, 0.9, 0.9)  # votes for the other class
    along[0, :, 2, 2, 0] = (0.01, 0.9, 0.9, 0.9)  # smaller at the start
    along[0, :, 0, :, 0] = 0.7
    norm[0, :, 2, 0] = (0.1, 0.3, 0.7, 0.9)
    weight[0, :, 2, 1] = 0.5
    along[0, :, 2, 0, 1], along[0, :, 2, 2, 1] = (-0.1, 0.3, 0.5, 0.6), (-0.2, 1, 1, 1)  # none is active on pattern 1
    frequency = np.array([[0.45, 0.05, 0.45, 0.05]])
    found = growth(along, norm, weight, frequency, np.array([[3, 1]]), spec)
    np.testing.assert_allclose(found.measured[0, 0], 0.8 - 0.05)
    # Steps 0, 1, 2 and 12: weights of trapezia.
    steps = 0.5 * (0.4 + 0.6) + 0.5 * (0.6 + 0.8) + 10 * 0.5 * (0.8 + 0.1)
    np.testing.assert_allclose(found.predicted[0, 0], 0.2 * 1.0 * 0.45 * steps)
    np.testing.assert_allclose(found.square[0, 0], 0.9**2 - 0.1**2)
    grown = found.predicted[0, 0]
    np.testing.assert_allclose(found.square_predicted[0, 0], (0.05 + grown) ** 2 - 0.05**2)
    for values in (found.measured, found.predicted, found.square, found.square_predicted):
        assert np.isnan(values[0, 1:]).all()
    earlier = growth(along, norm, weight, frequency, np.array([[1, 1]]), spec)
    np.testing.assert_allclose(earlier.measured[0, 0], 0.15)
    assert np.isnan(growth(along, norm, weight, frequency, np.array([[0, 1]]), spec).measured).all()
