"""Policies through a small scenario on a small model: what is compared, and that nothing is compiled twice."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.programming import ProgrammedWeights
from hetmoe.errors import InputError
from hetmoe.evaluate.run import evaluate_digital, evaluate_programmed, loss_batches
from hetmoe.models.matrices import crossbar_matrices
from hetmoe.models.transformer import forward
from hetmoe.placement.plan import Plan
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.runtime.deploy import deployed_weights, fresh_chips
from hetmoe.runtime.scenario import Moment, Scenario, Simulator, inverse_scales
from tests.models.tiny import random_tokens
from tests.runtime.small import CONFIG, SPEC, knowledge, model

TEXT = np.asarray(random_tokens(CONFIG, 7, (6, 13)))
KEY = jax.random.key(11)


def simulator() -> Simulator:
    return Simulator(model(), knowledge(), SPEC, None, loss_batches(TEXT, 3), probes=16)


def scenario() -> Scenario:
    know = knowledge()
    base = float(know.analog_energy.sum())
    extra = float(know.digital_energy.sum()) - base
    return Scenario(
        times_s=(60.0, 40_000.0, 80_000.0, 120_000.0), noise=(1.0, 1.0, 2.0, 1.0),
        budget=tuple(base + share * extra for share in (0.6, 0.6, 0.2, 1.2)), tokens=(1e9,) * 4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def moments() -> list[Moment]:
    return simulator().adaptive(KEY, scenario())


def test_the_policy_follows_the_budget(moments: list[Moment]) -> None:
    for moment, budget, tokens in zip(moments, scenario().budget, scenario().tokens, strict=True):
        assert moment.running + moment.actions / tokens <= budget * (1 + 1e-5)
    assert [m.digital for m in moments][2] < moments[1].digital <= moments[0].digital < moments[3].digital == 8
    assert moments[2].moved > 0 and moments[3].moved > 0
    digital = float(evaluate_digital(model().params, loss_batches(TEXT, 3), CONFIG).nll) / (6 * 12)
    np.testing.assert_allclose(moments[3].loss, digital, rtol=1e-5)  # with room for all, nothing is lost
    assert abs(moments[1].loss - digital) > 1e-4


def test_a_run_is_repeated_exactly(moments: list[Moment]) -> None:
    assert simulator().adaptive(KEY, scenario()) == moments
    assert simulator().adaptive(jax.random.key(12), scenario()) != moments


def test_nothing_is_compiled_while_plans_change(moments: list[Moment]) -> None:
    """Experts moved and were programmed again in `moments`; all of it ran in programs that were there."""
    assert sum(m.moved for m in moments) > 0 and sum(m.recompensated for m in moments) > 0
    before = evaluate_programmed._cache_size(), deployed_weights._cache_size()
    simulator().adaptive(jax.random.key(13), scenario())
    assert (evaluate_programmed._cache_size(), deployed_weights._cache_size()) == before


def test_a_switch_is_an_argument_of_a_compiled_model() -> None:
    traces = 0

    @jax.jit
    def run(analog: jax.Array, held: ProgrammedWeights) -> Any:
        nonlocal traces
        traces += 1
        return forward(
            model().params, jnp.asarray(TEXT[:2, :-1]), CONFIG, plan=Plan(experts=analog), spec=SPEC, programmed=held
        )

    held = deployed_weights(KEY, model().params, SPEC, fresh_chips(2, 4))
    switches = np.eye(8, dtype=bool).reshape(8, 2, 4)
    outputs = [np.asarray(jax.tree.leaves(run(jnp.asarray(analog), held))[0]) for analog in switches]
    assert traces == 1
    assert len({output.tobytes() for output in outputs}) == 8  # every switch counts


def test_static_plans_do_not_change_and_compensation_is_exact() -> None:
    plan = np.ones((2, 4), bool)
    plain, other = simulator().fixed(KEY, scenario(), [plan, ~plan], compensated=False)
    (exact,) = simulator().fixed(KEY, scenario(), [plan], compensated=True)
    digital = float(evaluate_digital(model().params, loss_batches(TEXT, 3), CONFIG).nll) / (6 * 12)
    assert {m.digital for m in plain} == {0} and {m.digital for m in other} == {8}
    np.testing.assert_allclose([m.loss for m in other], digital, rtol=1e-5)
    assert not any(m.actions or m.moved or m.reprogrammed or m.recompensated for m in plain + exact)
    know = knowledge()
    np.testing.assert_allclose([m.running for m in plain], float(know.analog_energy.sum()), rtol=1e-6)
    np.testing.assert_allclose([m.running for m in other], float(know.digital_energy.sum()), rtol=1e-6)
    assert [m.loss for m in exact] != [m.loss for m in plain]


def test_inverse_scales_set_every_matrix_right() -> None:
    params = model().params
    chips = fresh_chips(2, 4).replace(age=jnp.full((2, 4), 1e5))
    factor = inverse_scales(params, deployed_weights(KEY, params, SPEC, chips))
    held = deployed_weights(KEY, params, SPEC, chips.replace(factor=factor)).layers
    targets = crossbar_matrices(params.layers, dense=False)
    for name in EXPERT_MATRICES:
        w = np.asarray(targets[name], np.float64)
        np.testing.assert_allclose((w * np.asarray(held[name].w)).sum((-2, -1)), (w * w).sum((-2, -1)), rtol=1e-5)
    assert (np.asarray(factor) > 1.02).all()  # it drifted


def test_the_oracle_keeps_the_budget() -> None:
    found = simulator().oracle(KEY, scenario())
    for moment, budget in zip(found, scenario().budget, strict=True):
        assert moment.running <= budget * (1 + 1e-6) and moment.actions == 0
    assert found[3].digital == 8 and found[2].digital < found[0].digital


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise": (1.0,)}, "one length"),
        ({"times_s": (0.0, 0.0, 1.0, 2.0)}, "ascend"),
        ({"times_s": (-1.0, 0.0, 1.0, 2.0)}, "ascend"),
        ({"noise": (1.0, 0.0, 1.0, 1.0)}, "noise"),
        ({"budget": (1.0, float("nan"), 1.0, 1.0)}, "budget"),
        ({"tokens": (1.0, -1.0, 1.0, 1.0)}, "tokens"),
        (dict.fromkeys(("times_s", "noise", "budget", "tokens"), ()), "at least 1"),
    ],
)
def test_impossible_scenarios(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        dataclasses.replace(scenario(), **changes)
