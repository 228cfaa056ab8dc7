"""Which points no other beats, and the points themselves."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetmoe.errors import InputError
from hetmoe.hardware.demand import model_demand
from hetmoe.hardware.deployment import deployment
from hetmoe.hardware.description import open_description
from hetmoe.hardware.estimate import estimate
from hetmoe.hardware.machine import system_of
from hetmoe.hardware.step import decode_step
from hetmoe.placement.plan import all_digital, experts_analog
from hetmoe.technologies.front import non_dominated
from hetmoe.technologies.front_figure import draw_front
from hetmoe.technologies.tried import Point, Tried, front_of, points_of
from tests.models.tiny import tiny_config

CONFIG = tiny_config(num_layers=2, num_experts=4, hidden_size=32, expert_intermediate_size=64)
PARTS = [("a100-80gb", "digital"), ("ibm-3d-cim", "analog"), ("pcie4-x16", "link")]
SYSTEM = system_of(*(open_description(name, kind) for name, kind in PARTS))


@given(seed=st.integers(0, 10_000), count=st.integers(1, 40), levels=st.integers(1, 6), columns=st.integers(1, 4))
def test_the_front_is_that_of_the_definition(seed: int, count: int, levels: int, columns: int) -> None:
    values = np.random.default_rng(seed).integers(0, levels, (count, columns)).astype(float)
    kept = non_dominated(values)
    for index, point in enumerate(values):
        beaten = any(all(other <= point) and any(other < point) for other in values)
        assert kept[index] == (not beaten)


@pytest.mark.parametrize("values", [np.array([[1.0, np.nan]]), np.ones(3)])
def test_what_cannot_be_compared(values: np.ndarray) -> None:
    with pytest.raises(InputError, match="points, objectives"):
        non_dominated(values)


def tried() -> list[Tried]:
    names = {"all digital": (all_digital, [10.0]), "experts analog": (experts_analog, [11.0, 13.0])}
    return [
        Tried(
            name=name, rule=name, bits="16 bits", perplexity=np.array(perplexity), accuracy=None,
            where=deployment(plan(CONFIG), CONFIG),
        )
        for name, (plan, perplexity) in names.items()
    ]  # fmt: skip


def points() -> list[Point]:
    return points_of(CONFIG, tried(), np.full((2, 4), 0.5), [1, 16], 64, SYSTEM, "serial")


def test_points_are_estimates_of_each_deployment_and_batch() -> None:
    found = points()
    assert [(p.tried.name, p.batch) for p in found] == [
        ("all digital", 1), ("all digital", 16), ("experts analog", 1), ("experts analog", 16)
    ]  # fmt: skip
    for point in found:
        step = decode_step(CONFIG, np.full((2, 4), 0.5), point.batch, 64)
        wanted = estimate(CONFIG, model_demand(CONFIG, point.tried.where, step), SYSTEM, "serial")
        for name in ("tokens_per_s", "joules_per_token", "memory_used", "tiles", "chips"):
            np.testing.assert_allclose(getattr(point, name), getattr(wanted, name), rtol=1e-6)
        assert point.bound == wanted.parts._fields[int(wanted.bound)] and point.fits
    assert found[0].tiles == 0 < found[2].tiles
    assert found[0].perplexity_error is None and found[0].accuracy is None
    np.testing.assert_allclose(found[2].perplexity, 12.0)
    np.testing.assert_allclose(found[2].perplexity_error, 1.0)


def test_points_that_do_not_fit_are_on_no_front() -> None:
    found = points()
    best = front_of(found)
    assert best == sorted(best, key=lambda p: p.perplexity) and best
    without = [dataclasses.replace(p, fits=p not in best) for p in found]
    assert not {(p.tried.name, p.batch) for p in front_of(without)} & {(p.tried.name, p.batch) for p in best}
    assert front_of([dataclasses.replace(p, fits=False) for p in found]) == []


def test_the_figure_shows_every_point_that_fits() -> None:
    found = [dataclasses.replace(p, fits=n != 1) for n, p in enumerate(points())]
    figure = draw_front("title", found, front_of(found))
    for axes, field in zip(figure.axes, ("joules_per_token", "tokens_per_s"), strict=True):
        drawn = {
            (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines if len(line.get_xdata())
        }
        assert drawn == {(getattr(p, field), p.perplexity) for p in found if p.fits}
    far = [
        *found,
        dataclasses.replace(found[0], tried=dataclasses.replace(found[0].tried, perplexity=np.array([99.0]))),
    ]
    assert "1 points of more than 20.0 left out" in draw_front("title", far, found).get_suptitle()
