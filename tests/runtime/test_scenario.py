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
from hetmoe.placement.plan import Plan, stack_plans
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.runtime.deploy import Chips, deployed_weights, fresh_chips
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


def by_hand(chips: Chips, analog: np.ndarray, *, compensated: bool) -> float:
    """Loss of a plan on chips in this state, with scales set right in float64."""
    params = model().params
    held = deployed_weights(KEY, params, SPEC, chips)
    if compensated:
        targets, factors = crossbar_matrices(params.layers, dense=False), []
        for name in EXPERT_MATRICES:
            w, w2 = np.asarray(targets[name], np.float64), np.asarray(held.layers[name].w, np.float64)
            factors.append((w * w).sum((-2, -1)) / (w * w2).sum((-2, -1)))
        chips = chips.replace(factor=jnp.asarray(np.stack(factors, axis=-1), jnp.float32))
        held = deployed_weights(KEY, params, SPEC, chips)
    plans = stack_plans([Plan(experts=jnp.asarray(analog))])
    found = evaluate_programmed(params, held, plans, SPEC, None, loss_batches(TEXT, 3), CONFIG)
    return float(found.nll[0]) / (6 * 12)


def test_what_the_references_meet() -> None:
    """A static plan meets chips of that age and heat; the oracle meets new ones in the same heat, with exact scales."""
    plan = np.ones((2, 4), bool)
    (plain,) = simulator().fixed(KEY, scenario(), [plan], compensated=False)
    (exact,) = simulator().fixed(KEY, scenario(), [plan], compensated=True)
    know = knowledge()
    poor = dataclasses.replace(scenario(), budget=(float(know.analog_energy.sum()),) * 4)  # no expert is digital
    oracle = simulator().oracle(KEY, poor)
    assert {m.digital for m in oracle} == {0}
    for index, (time, noise) in enumerate(zip(scenario().times_s, scenario().noise, strict=True)):
        old = fresh_chips(2, 4).replace(age=jnp.full((2, 4), time, jnp.float32), noise=jnp.float32(noise))
        new = fresh_chips(2, 4).replace(epoch=jnp.full((2, 4), index), noise=jnp.float32(noise))
        np.testing.assert_allclose(plain[index].loss, by_hand(old, plan, compensated=False), rtol=1e-6)
        np.testing.assert_allclose(exact[index].loss, by_hand(old, plan, compensated=True), rtol=1e-5)
        np.testing.assert_allclose(oracle[index].loss, by_hand(new, plan, compensated=True), rtol=1e-5)
    # What tells these apart is at least twice the tolerances.
    losses = [plain[2].loss, exact[2].loss, oracle[2].loss, plain[1].loss, exact[1].loss, oracle[1].loss]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 2e-5 * losses[0]


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
