"""The runtime policy as the server's controller, on a small model's chips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.hardware.deployment import deployment
from hetmoe.hardware.machine import System, system_of
from hetmoe.placement.plan import Plan
from hetmoe.runtime import watch as watch_module
from hetmoe.runtime.deploy import deployed_weights
from hetmoe.runtime.watch import Watch
from hetmoe.serving.adaptive import Adaptive, Schedule, energy_ends, parse_schedule
from hetmoe.serving.costs import StepCosts, step_tables
from hetmoe.serving.figure import draw_run
from hetmoe.serving.loop import Run, serve
from hetmoe.serving.requests import poisson_requests
from tests.runtime.small import CONFIG, DESCRIBED, SPEC, frequency, knowledge, model

SYSTEM: System = system_of(DESCRIBED["digital"], DESCRIBED["analog"], DESCRIBED["link"])
RATE, DURATION = 4000.0, 3.0
BUDGET = Schedule((0.0, 1.0, 2.0), (0.5, 0.0, 1.2))


def costs_of(analog: np.ndarray) -> StepCosts:
    tables = step_tables(CONFIG, frequency(), 4)
    return StepCosts(CONFIG, deployment(Plan(experts=jnp.asarray(analog)), CONFIG), tables, SYSTEM, "serial")


def controller(budget: Schedule = BUDGET) -> Adaptive:
    base, extra = energy_ends(knowledge())
    first = base + budget.values[0] * extra
    watch = Watch(jax.random.key(3), model().params, SPEC, knowledge(), probes=8, budget=first)
    noise = Schedule((0.0, 1.5), (1.0, 2.0))
    return Adaptive(watch, knowledge(), budget, noise, every_s=0.25, tokens_per_s=1e4, costs_of=costs_of)


def served(by: Adaptive) -> Run:
    requests = poisson_requests(0, rate=RATE / 8, duration_s=DURATION, prompt=4.0, output=8.0, context=16)
    return serve(requests, by, max_batch=4, span_s=0.25)


@pytest.fixture(scope="module")
def both() -> tuple[Adaptive, Run]:
    by = controller()
    return by, served(by)


def test_plans_follow_the_budget(both: tuple[Adaptive, Run]) -> None:
    by, _ = both
    base, extra = energy_ends(knowledge())
    assert [look.time_s for look in by.looks[:5]] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0], abs=0.01)
    for look in by.looks:
        assert look.budget == pytest.approx(base + BUDGET.at(look.time_s) * extra, rel=1e-6)
        assert look.running <= look.budget * (1 + 1e-5)
    at = {time: next(look for look in by.looks if look.time_s >= time) for time in (0.0, 1.0, 2.0)}
    assert at[1.0].digital == 0 < at[0.0].digital < at[2.0].digital
    assert at[1.0].moved == at[0.0].digital and at[2.0].moved == at[2.0].digital
    # The noise doubles at 1.5 s; the plan between 1.25 and 1.75 s is the same.
    assert by.looks[7].expected_loss > 1.5 * by.looks[5].expected_loss and by.looks[7].digital == by.looks[5].digital
    before = next(look for look in reversed(by.looks) if look.time_s < 2.0)
    assert at[2.0].expected_loss < before.expected_loss and at[0.0].expected_loss < at[1.0].expected_loss


def test_the_run_carries_what_was_decided(both: tuple[Adaptive, Run]) -> None:
    by, run = both
    assert sum(s.action_j for s in run.spans) == pytest.approx(sum(look.action_j for look in by.looks))
    assert sum(look.action_j for look in by.looks) > 0
    late = next(s for s in run.spans if s.start_s >= 1.25)
    assert late.digital == 0.0 and run.spans[1].digital == by.looks[1].digital / 8
    assert late.expected_loss == pytest.approx(by.looks[5].expected_loss)
    digital, analog = (costs_of(np.full((2, 4), flag)) for flag in (False, True))
    assert digital.decode(4, 8.0)[0] != analog.decode(4, 8.0)[0]


def test_it_is_repeated_exactly_and_compiles_nothing_more(both: tuple[Adaptive, Run]) -> None:
    by, run = both
    before = watch_module._decide._cache_size(), deployed_weights._cache_size()
    again = controller()
    assert served(again) == run and again.looks == by.looks
    assert (watch_module._decide._cache_size(), deployed_weights._cache_size()) == before
    assert sum(look.moved for look in by.looks) > 0


def test_a_run_is_drawn_with_and_without_looks(both: tuple[Adaptive, Run]) -> None:
    by, run = both
    figure = draw_run("tiny", run, by.looks)
    assert len(figure.axes) == 6
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels[:3] == ["tokens per second", "requests", "power (W)"] and labels[-1] == "experts"
    drawn = figure.axes[0].patches[0].get_data()
    np.testing.assert_allclose(drawn.values, [s.tokens / s.seconds for s in run.spans])
    assert len(draw_run("tiny", run, []).axes) == 3


def test_schedules() -> None:
    found = parse_schedule("--budget", ["0=0.25", "1e1=0", "20=1"], least=0, most=1)
    assert found == Schedule((0.0, 10.0, 20.0), (0.25, 0.0, 1.0))
    assert [found.at(t) for t in (0.0, 9.999, 10.0, 19.0, 20.0, 1e9)] == [0.25, 0.25, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([], "--budget must be given at least once"),
        (["0.25"], "--budget '0.25' must be SECONDS=VALUE"),
        (["0=1=2"], "'0=1=2' must be SECONDS=VALUE"),
        (["0=x"], "'0=x' must be SECONDS=VALUE"),
        (["0=1.5"], "'0=1.5': the value must be from 0 to 1"),
        (["0=nan"], "'0=nan': the value must be"),
        (["nan=1"], "'nan=1': the value must be .* at a finite time"),
        (["1=1"], "'1=1': times must begin with 0 and ascend"),
        (["0=1", "5=1", "5=0"], "'5=0': times must begin"),
    ],
)
def test_bad_schedules(said: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_schedule("--budget", said, least=0, most=1)


def test_looks_need_an_interval() -> None:
    with pytest.raises(InputError, match=r"every_s=0\.0 must be positive"):
        Adaptive(None, knowledge(), BUDGET, BUDGET, every_s=0.0, tokens_per_s=1.0, costs_of=costs_of)  # pyright: ignore[reportArgumentType]
