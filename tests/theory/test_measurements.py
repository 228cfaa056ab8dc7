"""Claims of runs that are made up, so that every value is known."""

import dataclasses

import numpy as np
import pytest

from theory.claims import NOT_DERIVED, Claim, Finding
from theory.experiment import STOPS, Hardware, Measured, Plan, stops
from theory.measurements import all_claims
from theory.model import ModelSpec
from theory.report import tolerance_rows
from theory.statistics import Estimate
from theory.train import Look

GAMMAS, SEEDS, LOOKS, EXPERTS = np.array([0.4, 0.1, 0.025]), 8, 6, 8
FIRST, SECOND = Hardware("proportional", False), Hardware("pcm", True)
HOLDER = [0, 2, 1, 3]  # of every pattern: class 0 frequent, rare, class 1 frequent, rare
TOO_FAST = np.array([1.05, 0.7])  # growth of the levels, by what is predicted


@pytest.fixture(scope="module")
def measured() -> Measured:
    """Experts 0 and 1 serve frequent patterns and 2 and 3 rare ones; the last seed never learns at the last gamma."""
    plan = Plan(gammas=tuple(GAMMAS), seeds=SEEDS, hardware=(FIRST, SECOND), digital=2)
    probability = np.stack([1 - GAMMAS, GAMMAS], axis=-1)  # [gammas, levels]
    runs, levels = (3, SEEDS), 2
    weight, chosen = np.zeros((*runs, LOOKS, EXPERTS, 4)), np.zeros((*runs, LOOKS, EXPERTS, 4))
    along = np.zeros((*runs, LOOKS, EXPERTS, 8, 4))
    times = plan.train.times[:LOOKS]
    for pattern, expert in enumerate(HOLDER):
        weight[..., expert, pattern], chosen[..., expert, pattern] = 0.5, 1.0
        each = plan.train.expert_rate * 0.5 * probability[:, pattern % 2] / 2 * TOO_FAST[pattern % 2]
        along[..., expert, 3, pattern] = 0.1 + each[:, None, None] * times
    chosen[:, 0, :, 3, 3] = 0.5  # of seed 0 no expert always takes pattern 3
    weight[:, 0, :, 5, 2], chosen[:, 1, :, 0, 1], chosen[:, 1, :, 2, 1] = 0.1, 1.0, 0.0  # of seed 1 they share expert 0
    along[:, 1, :, 0, 3, 1] = 0.01
    active = np.ones((*runs, LOOKS, levels))
    active[:, :, 4:, 0] = 0.0  # frequent patterns leave the linear regime after the fourth look
    margin = 0.5 + np.sqrt(probability)[:, None, None, :] * np.arange(LOOKS)[:, None]  # from chance on
    accuracy = np.zeros((*runs, LOOKS, levels))
    for row, look in enumerate((1, 2, 4)):
        accuracy[row, :, look:] = 1.0
    accuracy[2, -1] = 0.0
    looks = Look(
        accuracy=accuracy, margin=np.broadcast_to(margin, accuracy.shape),
        active=active, along=along, norm=np.linalg.norm(along, axis=-1), weight=weight, chosen=chosen,
    )  # fmt: skip
    able = {stop: np.ones(runs, bool) for stop in STOPS}
    for stop in STOPS:
        able[stop][2, -1] = False
    served = np.zeros((*runs, EXPERTS))
    for pattern, expert in enumerate(HOLDER):
        served[..., expert] = 0.25 * probability[:, [pattern % 2]]
    scores = {"early": served + 0.01 * GAMMAS[:, None, None], "together": served**0.5 + 1e-3, "saturated": -served}
    c = np.stack([GAMMAS**1.5, GAMMAS**0.25, GAMMAS**0.25 / 2], axis=-1)[:, None] * np.ones((1, SEEDS, 1))
    odd = c.copy()
    odd[0, 0, 0], odd[2, 1, 1], odd[1, 3, :2] = 0.0, np.inf, np.inf
    tolerances, errors = {}, {}
    for stop in STOPS:
        tolerances[stop, FIRST], tolerances[stop, SECOND] = c, odd
        errors[stop, FIRST], errors[stop, SECOND] = served**2, 1 - served
    return Measured(
        plan=plan, looks=looks, stopped=stops(accuracy), learned=able, scores=scores, tolerances=tolerances,
        errors=errors,
    )  # fmt: skip


def named(claims: list[Claim], name: str) -> Claim:
    return next(claim for claim in claims if claim.name.startswith(name))


def value(claim: Claim, row: str, column: str) -> tuple[Finding, Estimate]:
    found = next(f for f in claim.findings if (f.row, f.column) == (row, column))
    assert found.estimate is not None
    return found, found.estimate


def test_specialisation(measured: Measured) -> None:
    claims = all_claims(measured)
    for name, wanted in (("1a", 7 / 8), ("1b", 6 / 8)):
        finding, found = value(named(claims, name), "gamma 0.4", "early")
        assert found.value == wanted and finding.excluded == 0 and found.runs == SEEDS
    finding, found = value(named(claims, "1b"), "gamma 0.025", "saturated")
    assert found.value == 5 / 7 and finding.excluded == 1


def test_growth(measured: Measured) -> None:
    """The last seed counts here: learning is not needed for it."""
    claims = all_claims(measured)
    for level, wanted in zip(("frequent", "rare"), TOO_FAST, strict=True):
        finding, found = value(named(claims, "2a"), "gamma 0.1", level)
        np.testing.assert_allclose([found.value, found.low, found.high], wanted, rtol=1e-6)
        assert finding.excluded == 0 and found.runs == SEEDS
    assert {f.column for f in named(claims, "2b").findings} == {"rare"}
    np.testing.assert_allclose(value(named(claims, "2b"), "all gammas", "rare")[1].value, 1.0, rtol=1e-6)
    np.testing.assert_allclose(value(named(claims, "2c"), "all gammas", "rare")[1].value, 0.5, rtol=1e-6)


def test_growth_is_over_the_levels_own_linear_regime(measured: Measured) -> None:
    """After it, frequent neurons may do what they like, and rare ones count for all looks."""
    along = measured.looks.along.copy()
    along[:, :, 4:, 0, 3, 0] = 99.0
    claims = all_claims(dataclasses.replace(measured, looks=measured.looks._replace(along=along)))
    np.testing.assert_allclose(value(named(claims, "2a"), "gamma 0.1", "frequent")[1].value, 1.05, rtol=1e-6)
    along[:, :, 5, 3, 3, 3] += 99.0
    claims = all_claims(dataclasses.replace(measured, looks=measured.looks._replace(along=along)))
    assert value(named(claims, "2a"), "gamma 0.1", "rare")[1].value > 100
    # One time for all levels, that of frequent patterns.
    np.testing.assert_allclose(value(named(claims, "2b"), "all gammas", "rare")[1].value, 1.0, rtol=1e-6)


def test_what_leaves_the_linear_regime_at_once_does_not_count(measured: Measured) -> None:
    """Of seed 3, at one frequency: no growth there, and no time that all its frequencies have in common."""
    active = np.asarray(measured.looks.active).copy()
    active[1, 3, 1:, 0] = 0.0
    claims = all_claims(dataclasses.replace(measured, looks=measured.looks._replace(active=active)))
    for name in ("2a", "2d"):
        assert value(named(claims, name), "gamma 0.1", "frequent")[0].excluded == 1
        assert value(named(claims, name), "gamma 0.1", "rare")[0].excluded == 0
    for name in ("2b", "2c"):
        assert value(named(claims, name), "all gammas", "rare")[0].excluded == len(GAMMAS)


def test_norms(measured: Measured) -> None:
    """Of neurons that have nothing but components along their patterns, which grow as predicted times a factor."""
    _, found = value(named(all_claims(measured), "2d"), "gamma 0.1", "rare")
    rate = measured.plan.train.expert_rate * 0.5 * 0.05
    moved = rate * measured.plan.train.times[LOOKS - 1]
    np.testing.assert_allclose(found.value, ((0.1 + 0.7 * moved) ** 2 - 0.01) / ((0.1 + moved) ** 2 - 0.01), rtol=1e-2)


def test_steps_that_are_not_derived_for_gated_experts(measured: Measured) -> None:
    gated = dataclasses.replace(measured.plan.train, model=ModelSpec(gated=True))
    claims = all_claims(dataclasses.replace(measured, plan=dataclasses.replace(measured.plan, train=gated)))
    of = {claim.name[:2]: claim.verdict for claim in claims}
    assert [name for name, verdict in of.items() if verdict == NOT_DERIVED] == ["2a", "2b", "2d"]


def test_orders(measured: Measured) -> None:
    claims = all_claims(measured)
    for stop, wanted in (("early", 1.0), ("saturated", -1.0)):
        finding, found = value(named(claims, "2e"), "gamma 0.025", stop)
        assert finding.excluded == 1 and found.runs == SEEDS - 1
        # Of seed 1 expert 5 serves some of pattern 2, which its score does not know.
        assert abs(found.value) > 0.85 and np.sign(found.value) == wanted
    for hardware, wanted in ((FIRST, 1.0), (SECOND, -1.0)):
        finding, found = value(named(claims, "3"), hardware.name, "early")
        np.testing.assert_allclose(found.value, wanted)
        assert finding.excluded == 1 and found.runs == 3 * SEEDS - 1


def test_what_stays_analog(measured: Measured) -> None:
    """Two experts are digital: the third largest score is that of a rare pattern's expert."""
    claim = named(all_claims(measured), "2f")
    np.testing.assert_allclose(value(claim, "all gammas", "early")[1].value, 1.0, rtol=1e-6)
    left = np.log(0.5 * GAMMAS**0.5 + 1e-3)
    slope = np.polyfit(np.log(GAMMAS), left, 1)[0]
    np.testing.assert_allclose(value(claim, "all gammas", "together")[1].value, slope, rtol=1e-6)


def test_tolerances(measured: Measured) -> None:
    claims = all_claims(measured)
    for name, wanted in (("4a", 1.5), ("4b", GAMMAS[1] ** -1.25), ("4c", 1.25), ("4d", 2.0)):
        finding, found = value(named(claims, name), FIRST.name, "together")
        np.testing.assert_allclose(found.value, wanted, rtol=1e-6)
        assert (finding.excluded, found.runs) == (1, 23)
    # Zeros and infinities count by their sign, and where both are infinite nothing is known of the gain.
    for name, wanted, excluded in (("4a", 1.5, 1), ("4b", GAMMAS[1] ** -1.25, 2), ("4c", 1.25, 2), ("4d", 2.0, 1)):
        finding, found = value(named(claims, name), SECOND.name, "together")
        np.testing.assert_allclose(found.value, wanted, rtol=1e-6)
        assert finding.excluded == excluded


def test_recorded_tolerances(measured: Measured) -> None:
    rows = tolerance_rows(measured, "early", SECOND)
    assert [row["gamma"] for row in rows] == list(GAMMAS)
    assert rows[0]["learned"] == list(range(8)) and rows[2]["learned"] == list(range(7))
    analog, high, _ = rows[0]["placements"].values()
    assert analog["seeds"] == [0.0, *[0.253] * 7] and analog["fail_at_the_first_scale"] == 1
    assert high["bear_every_scale"] == 0 and high["median"] == 0.7953
    _, endless, _ = rows[2]["placements"].values()
    assert endless["seeds"][1] is None and endless["bear_every_scale"] == 1 and endless["median"] == 0.3976
    many = dataclasses.replace(measured, tolerances={("early", FIRST): np.full((3, SEEDS, 3), np.inf)})
    assert tolerance_rows(many, "early", FIRST)[0]["placements"]["all analog"]["median"] is None
