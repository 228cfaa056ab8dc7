"""The policy: what it does when one thing changes, and what it never does whatever is observed."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetmoe.placement.knapsack import knapsack
from hetmoe.runtime.policy import Knowledge, Observation, best_within, initial_state, step
from hetmoe.runtime.probe import Readings
from tests.runtime.small import made_up

SHAPE = (2, 6)


def readings(know: Knowledge, noise: Any = 1.1, scale: Any = 1.0, error: float = 0.01) -> Readings:
    """Of matrices of equal size 1, whose rest is `noise` times that expected right after programming."""
    shape = (*SHAPE, 3)
    full = {
        "scale": np.broadcast_to(np.asarray(scale, np.float32), shape),
        "scale_variance": np.full(shape, error**2),
        "change": np.zeros(shape),
        "rest": np.broadcast_to((np.asarray(noise) * np.asarray(know.fresh_rest))[..., None], shape),
        "size": np.ones(shape),
    }
    return Readings(**{name: jnp.asarray(value, jnp.float32) for name, value in full.items()})


def seen(know: Knowledge, *, time: float, budget: float, age: Any = 0.0, tokens: float = 1e4, **read: Any):
    ages = jnp.asarray(np.broadcast_to(np.asarray(age, np.float32), SHAPE))
    return Observation(
        time_s=jnp.float32(time), age_s=ages, readings=readings(know, **read), budget=jnp.float32(budget),
        tokens=jnp.float32(tokens),
    )  # fmt: skip


def ends(know: Knowledge) -> tuple[float, float]:
    return float(know.analog_energy.sum()), float(know.digital_energy.sum())


decide = jax.jit(step)


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
def test_the_greedy_choice_fits_and_is_within_one_gain_of_the_best(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    gain, extra = rng.exponential(size=SHAPE), rng.integers(1, 20, SHAPE)
    room = float(np.floor(share * extra.sum()))
    taken = np.asarray(best_within(jnp.float32(gain), jnp.float32(extra), jnp.float32(room)))
    assert extra[taken].sum() <= room
    exact = knapsack(gain.ravel(), extra.ravel().astype(np.float64), room)
    best = gain.ravel()[np.asarray(exact, bool)].sum()
    assert best - gain.max() <= gain[taken].sum() + 1e-5 and gain[taken].sum() <= best + 1e-5
    left = room - extra[taken].sum()
    assert (extra[~taken] > left).all()  # nothing more would fit


def test_nothing_is_taken_without_gain_or_room() -> None:
    gain, extra = jnp.asarray([[1.0, 0.0, -1.0]]), jnp.asarray([[1.0, 1.0, 1.0]])
    assert np.asarray(best_within(gain, extra, jnp.float32(10))).tolist() == [[True, False, False]]
    assert not np.asarray(best_within(gain, extra, jnp.float32(-1))).any()


def test_the_first_plan_is_the_best_for_fresh_chips() -> None:
    know = made_up(0)
    base, full = ends(know)
    state = initial_state(know, base + 0.5 * (full - base))
    digital = ~np.asarray(state.analog)
    used = float(np.where(digital, know.digital_energy, know.analog_energy).sum())
    assert base < used <= base + 0.5 * (full - base)
    assert np.asarray(initial_state(know, base).analog).all()
    assert not np.asarray(initial_state(know, full).analog).any()


def test_when_nothing_changes_nothing_is_done() -> None:
    know = made_up(1)
    base, full = ends(know)
    budget = base + 0.4 * (full - base)
    state = initial_state(know, budget - 0.05)  # room for probes and moves
    again, done = decide(know, state, seen(know, time=1e5, age=0.0, budget=budget))
    assert not any(np.asarray(part).any() for part in done[:4])
    np.testing.assert_array_equal(again.analog, state.analog)
    np.testing.assert_allclose(done.energy, 2.0 * 12)  # probing


def test_a_falling_budget_moves_experts_to_analog_at_once() -> None:
    know = made_up(2)
    base, full = ends(know)
    state = initial_state(know, full)
    state = state.replace(moved_s=jnp.full(SHAPE, 999.0))  # moved a second ago
    again, done = decide(know, state, seen(know, time=1000.0, budget=base + 3.0))
    assert np.asarray(done.to_analog).sum() == np.asarray(again.analog).sum() >= 10
    assert float(done.running) <= base + 3.0


def test_a_rising_budget_waits_for_the_dwell_time() -> None:
    know = made_up(2)
    base, full = ends(know)
    state = initial_state(know, base).replace(moved_s=jnp.full(SHAPE, 1000.0))
    early, _ = decide(know, state, seen(know, time=1000.0 + 3599, budget=full + 1))
    assert np.asarray(early.analog).all()
    later, done = decide(know, state, seen(know, time=1000.0 + 3600, budget=full + 1))
    assert not np.asarray(later.analog).any() and np.asarray(done.to_digital).all()
    np.testing.assert_array_equal(later.moved_s, np.full(SHAPE, 4600.0, np.float32))


def test_a_move_must_pay_for_itself() -> None:
    know = made_up(3).replace(joules_per_nat=jnp.float32(1e-3), horizon_tokens=jnp.float32(1.0))
    _, full = ends(know)
    state = initial_state(know, 0.0)
    same, _ = decide(know, state, seen(know, time=1e5, budget=full + 1))
    assert np.asarray(same.analog).all()
    loss = know.noise_loss * 1.1
    price = float(jnp.median(loss)) * 1e-3 * 1e6
    one = know.replace(horizon_tokens=jnp.float32(1e6), move_energy=jnp.float32(price))
    some, _ = decide(one, state, seen(one, time=1e5, budget=full + 1, tokens=1e9))
    np.testing.assert_array_equal(~np.asarray(some.analog), np.asarray(loss > jnp.median(loss)))


def test_experts_that_are_digital_have_a_lead() -> None:
    """Two equal experts, room for one: it changes places only when the other is more than `margin` worse."""
    know = made_up(4)
    flat = jnp.full(SHAPE, 1e-9, jnp.float32).at[0, 0].set(1.0).at[0, 1].set(1.0)
    know = know.replace(
        noise_loss=flat, digital_energy=know.analog_energy + 5, margin=jnp.float32(0.2), move_energy=jnp.float32(1e-9),
        scale_loss=jnp.zeros(SHAPE), stale=jnp.float32(1e9),
    )  # fmt: skip
    base, _ = ends(know)
    state = initial_state(know, base + 5)
    assert not bool(state.analog[0, 0]) and bool(state.analog[0, 1])
    for worse, moves in ((1.15, False), (1.3, True)):
        noise = np.ones(SHAPE)
        noise[0, 1] = worse
        again, done = decide(know, state, seen(know, time=1e5, budget=base + 5.1, noise=noise))
        assert bool(done.to_digital[0, 1]) is moves and bool(again.analog[0, 0]) is moves
        assert (~np.asarray(again.analog)).sum() == 1


def test_scales_are_corrected_beyond_two_standard_errors() -> None:
    know = made_up(5)
    scale = np.ones((*SHAPE, 3))
    scale[0, 0] = [0.97, 0.985, 1.025]  # standard error 0.01
    state = initial_state(know, 0.0).replace(factor=jnp.full((*SHAPE, 3), 2.0))
    again, done = decide(know, state, seen(know, time=1.0, budget=1e3, scale=scale))
    assert np.asarray(done.recompensate[0, 0]).tolist() == [True, False, True]
    assert np.asarray(done.recompensate).sum() == 2
    np.testing.assert_allclose(again.factor[0, 0], [2 / 0.97, 2.0, 2 / 1.025], rtol=1e-6)
    left = (0.01**2 + 0.015**2 + 0.01**2) / 3
    np.testing.assert_allclose(again.scale_error[0, 0], left, rtol=1e-4)


@pytest.mark.parametrize(("age", "noise", "programs"), [(0.0, 2.0, False), (1e5, 2.0, True), (1e5, 1.12, False)])
def test_an_old_noisy_expert_is_programmed_again(age: float, noise: float, programs: bool) -> None:
    """Not one that was just programmed, nor one whose noise is what it would be anew."""
    know = made_up(6)
    ages, values = np.zeros(SHAPE), np.full(SHAPE, 1.1)
    ages[1, 2], values[1, 2] = age, noise
    state = initial_state(know, 0.0).replace(factor=jnp.full((*SHAPE, 3), 1.5))
    again, done = decide(know, state, seen(know, time=1e5, age=ages, noise=values, budget=1e3, tokens=1e9))
    wanted = np.zeros(SHAPE, bool)
    wanted[1, 2] = programs
    np.testing.assert_array_equal(done.reprogram, wanted)
    np.testing.assert_array_equal(np.asarray(again.factor) == 1.0, np.broadcast_to(wanted[..., None], (*SHAPE, 3)))
    np.testing.assert_allclose(again.noise[1, 2], 1.1 if programs else noise, rtol=1e-5)
    np.testing.assert_allclose(done.energy - 2.0 * 12 - 8.0 * np.asarray(done.to_digital).sum(), 64.0 * programs)


@pytest.mark.parametrize(("share", "programs"), [(0.99, True), (1.01, False)])
def test_programming_must_pay_for_itself(share: float, programs: bool) -> None:
    know = made_up(6)
    ages, values = np.zeros(SHAPE), np.full(SHAPE, 1.1)
    ages[1, 2], values[1, 2] = 1e5, 2.0
    saved = 10.0 * 1e3 * float(know.noise_loss[1, 2]) * (2.0 - 1.1)  # J per nat, tokens ahead, nats per token
    know = know.replace(program_energy=jnp.float32(share * saved))
    _, done = decide(
        know, initial_state(know, 0.0), seen(know, time=1e5, age=ages, noise=values, budget=1e6, tokens=1e9)
    )
    assert bool(done.reprogram[1, 2]) == programs and int(np.sum(done.reprogram)) == programs


def test_heat_is_not_mended_by_programming() -> None:
    """All noise doubles at once: chips programmed anew would have it as well."""
    know = made_up(7)
    state = initial_state(know, 0.0).replace(noise=jnp.full(SHAPE, 2.2))
    observed = seen(know, time=1e5, age=1.0, noise=2.2, budget=1e3, tokens=1e9)
    _, done = decide(know, state, observed)
    assert not np.asarray(done.reprogram).any()


def test_programming_takes_at_most_its_share_and_the_most_useful_first() -> None:
    know = made_up(8)
    _, full = ends(know)
    ages, values = np.full(SHAPE, 1e5), np.full(SHAPE, 2.0)
    ages[0, 0], values[0, 0] = 0.0, 1.1
    # Half of the budget of the interval holds three of 64 J, and what running leaves holds them as well.
    budget = 4 * full
    tokens = 2 * 3.5 * 64 / budget
    state = initial_state(know, 0.0).replace(noise=jnp.asarray(values, jnp.float32))
    know = know.replace(
        probe_energy=jnp.float32(0.0), move_energy=jnp.float32(0.0), horizon_tokens=jnp.float32(1e6),
        stale=jnp.float32(0.01),
    )  # fmt: skip
    values = values + 0.0
    values[1] += 1.0  # more than age explains
    _, done = decide(know, state, seen(know, time=1e5, age=ages, noise=values, budget=budget, tokens=tokens))
    anew = np.median(values / np.where(ages > 0, 2.0, 1.1)) * 1.1
    saved = np.asarray(know.noise_loss) * np.where(ages > 0, values - anew, -1)
    wanted = np.zeros(SHAPE, bool)
    wanted.ravel()[np.argsort(-saved.ravel())[:3]] = True
    np.testing.assert_array_equal(done.reprogram, wanted)


def test_an_interval_without_traffic_changes_nothing_but_what_the_budget_forces() -> None:
    """One token cannot pay for the probes; the plan stays within a budget per token that has not changed."""
    know = made_up(9)
    base, full = ends(know)
    half = base + 0.5 * (full - base)
    state = initial_state(know, half)
    ages = {"age": 1e5, "noise": 2.0}
    for tokens in (1.0, 1e-3):
        quiet, done = decide(know, state, seen(know, time=1e5, budget=half, tokens=tokens, **ages))
        np.testing.assert_array_equal(quiet.analog, state.analog)
        assert not np.asarray(done.to_digital | done.to_analog | done.reprogram).any() and float(done.energy) == 24.0
        more, _ = decide(know, state, seen(know, time=1e5, budget=2 * full, tokens=tokens, **ages))
        np.testing.assert_array_equal(more.analog, state.analog)
        less = base + 0.2 * (full - base)
        lower, done = decide(know, state, seen(know, time=1e5, budget=less, tokens=tokens, **ages))
        assert float(done.running) <= less and not np.asarray(done.to_digital).any()
        assert 0 < int(np.sum(~np.asarray(lower.analog))) < int(np.sum(~np.asarray(state.analog)))


@given(seed=st.integers(0, 10_000), data=st.data())
def test_whatever_is_seen(seed: int, data: st.DataObject) -> None:
    """The budget holds, analog experts alone are programmed, moves are consistent, and chance plays no part."""
    rng = np.random.default_rng(seed)
    know = made_up(seed)
    base, full = ends(know)
    tokens = data.draw(st.sampled_from([30.0, 1e3, 1e6]))
    state = initial_state(know, base + rng.random() * (full - base))
    state = state.replace(moved_s=jnp.asarray(rng.uniform(0, 2e4, SHAPE), jnp.float32))
    for time in (1e4, 2e4, 4e4):
        budget = base + rng.uniform(-0.1, 1.5) * (full - base)
        observed = seen(
            know, time=time, budget=budget, age=rng.uniform(0, 1e5, SHAPE), tokens=tokens,
            noise=rng.uniform(0.5, 4, SHAPE), scale=rng.uniform(0.5, 1.1, (*SHAPE, 3)),
        )  # fmt: skip
        again, done = decide(know, state, observed)
        twice, _ = decide(know, state, observed)
        jax.tree.map(np.testing.assert_array_equal, again, twice)
        old, new = np.asarray(state.analog), np.asarray(again.analog)
        to_digital, to_analog = np.asarray(done.to_digital), np.asarray(done.to_analog)
        np.testing.assert_array_equal(to_digital, old & ~new)
        np.testing.assert_array_equal(to_analog, ~old & new)
        assert not (np.asarray(done.reprogram) & ~old).any()
        assert not (np.asarray(done.recompensate) & np.asarray(done.reprogram)[..., None]).any()
        rested = time - np.asarray(state.moved_s) >= 3600
        assert not (to_digital & ~rested).any()
        energy = np.where(new, know.analog_energy, know.digital_energy).sum()
        np.testing.assert_allclose(done.running, energy)
        actions = 2.0 * 12 + 64.0 * np.asarray(done.reprogram).sum() + 8.0 * (to_digital | to_analog).sum()
        np.testing.assert_allclose(done.energy, actions)
        assert energy <= max(budget, base) * (1 + 1e-5)
        if (budget - base) * tokens >= 24 + 8 * 12:  # probes and moves of all experts can be paid
            assert energy * tokens + actions <= budget * tokens * (1 + 1e-5)
        else:
            assert not to_digital.any() and not np.asarray(done.reprogram).any()
        state = again


def test_one_program_serves_all_settings_budgets_and_plans() -> None:
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(step, n=1))
    for number in range(4):
        know = made_up(number)
        base, full = ends(know)
        state = initial_state(know, base + number * 5.0)
        for budget in (base, full, base + 10):
            state, _ = counted(know, state, seen(know, time=1e5 * (number + 1), budget=budget))


def test_an_error_of_scale_that_is_left_counts_as_loss() -> None:
    """Scales that are off by less than the readings' error stay, and cost their square times `scale_loss`."""
    know = made_up(4)
    state = initial_state(know, 0.0)
    scale = np.ones((*SHAPE, 3))
    scale[1, 2] = (1.15, 0.9, 1.0)  # within two standard errors of 0.1
    again, done = decide(know, state, seen(know, time=1.0, budget=0.0, noise=1.1, scale=scale, error=0.1))
    assert not np.asarray(done.recompensate).any() and np.asarray(again.analog).all()
    left = np.zeros(SHAPE)
    left[1, 2] = (0.15**2 + 0.1**2) / 3
    np.testing.assert_allclose(again.scale_error, left, rtol=1e-4, atol=1e-9)
    wanted = np.sum(np.asarray(know.noise_loss) * 1.1 + np.asarray(know.scale_loss) * left)
    np.testing.assert_allclose(done.expected, wanted, rtol=1e-5)
    # Where it makes an expert the one that loses most, that one becomes digital.
    extra = float((know.digital_energy - know.analog_energy)[1, 2])
    know = know.replace(scale_loss=know.scale_loss.at[1, 2].set(1e4))
    room = float(know.analog_energy.sum()) + extra + 0.5
    plain = initial_state(know, 0.0)
    moved, _ = decide(know, plain, seen(know, time=1e5, budget=room, noise=1.1, scale=scale, error=0.1, tokens=1e6))
    assert not np.asarray(moved.analog)[1, 2]
    even, _ = decide(know, plain, seen(know, time=1e5, budget=room, noise=1.1, tokens=1e6))
    assert np.asarray(even.analog)[1, 2]


def test_experts_that_lost_their_place_keep_it_where_there_is_room() -> None:
    """Nothing else may move (it moved just now), so an expert that is no longer wanted stays digital."""
    know = made_up(5).replace(margin=jnp.float32(0.0))
    extra = np.asarray(know.digital_energy - know.analog_energy)
    base, _ = ends(know)
    best = np.unravel_index(np.argmax(extra), SHAPE)
    other = next(p for p in np.ndindex(SHAPE) if p != best)
    know = know.replace(noise_loss=know.noise_loss.at[best].set(1e5))
    room = float(extra.max()) + 0.5  # for the best alone, or for the other
    analog = np.ones(SHAPE, bool)
    analog[other] = False
    state = initial_state(know, 0.0).replace(
        analog=jnp.asarray(analog), moved_s=jnp.full(SHAPE, 999.0, jnp.float32)
    )  # fmt: skip
    held, done = decide(know, state, seen(know, time=1000.0, budget=base + room, tokens=1e6))
    np.testing.assert_array_equal(held.analog, analog)
    assert not np.asarray(done.to_analog).any()
    less = base + float(extra[other]) - 0.5  # no room for it: it leaves
    gone, done = decide(know, state, seen(know, time=1000.0, budget=less, tokens=1e6))
    assert np.asarray(gone.analog).all() and np.asarray(done.to_analog)[other]


def test_a_running_mean_of_readings() -> None:
    know = made_up(9).replace(memory=jnp.float32(0.25))
    state = initial_state(know, 0.0)
    again, _ = decide(know, state, seen(know, time=1.0, budget=0.0, noise=3.0))
    np.testing.assert_allclose(again.noise, np.full(SHAPE, 1.0 + 0.25 * 2.0), rtol=1e-5)
