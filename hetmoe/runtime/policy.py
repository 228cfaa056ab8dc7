"""The policy: a pure state machine `(knowledge, state, observation) -> (state, actions)`.

Known beforehand (`Knowledge`): what every expert is expected to lose under the device's noise right after programming
and under an error of scale, how noise grows with age, and what running and acting cost in energy. Observed: probes of
all analog copies, their ages (the drift clock), the energy budget, and the tokens until the next observation.

Decisions compare joules: a nat per token is worth `joules_per_nat`, and what an action saves counts for
`horizon_tokens`.

- *Recompensate*: outputs are divided by the scale that was read, where it is off by more than two standard errors of
  the reading. It costs nothing beside the probing.
- *Reprogram* an analog expert whose noise is more than `stale` above what it would be anew, where the difference is
  worth more than programming costs, but none that was programmed less than `dwell_s` ago; those that gain most first,
  within `action_share` of the interval's budget. What noise would be anew follows from the chips' condition
  (temperature): the median over experts of what is read over what age explains.
- *Move* experts between analog and digital: digital are those of the largest expected loss per extra joule, as many as
  the budget leaves room for. Experts that are digital have a lead of `margin`; one that was moved stays for `dwell_s`,
  and moves to digital must pay for themselves. A budget that falls moves experts to analog at once.

The energy budget holds for running and actions together, unless all experts on analog and their probes exceed it. Where
an interval has too few tokens to pay for probes and moves, the budget holds for running alone: the plan stays, but for
experts that a lower budget sends to analog.
Both copies of every expert are resident, so that a move changes one boolean of a plan, and nothing is compiled again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from hetmoe.runtime.probe import Readings


@struct.dataclass
class Knowledge:
    """Known beforehand, and thresholds; all traced, so that one program serves every setting."""

    noise_loss: Float[Array, "layers experts"]  # nats per token, right after programming
    scale_loss: Float[Array, "layers experts"]  # nats per token, per squared relative error of scale
    fresh_rest: Float[Array, "layers experts"]  # expected |rest|^2 / |W|^2 right after programming
    ages: Float[Array, "ages"]  # s, ascending
    growth: Float[Array, "ages"]  # |rest|^2 at these ages over that right after programming
    digital_energy: Float[Array, "layers experts"]  # J per token
    analog_energy: Float[Array, "layers experts"]
    move_energy: Float[Array, ""]  # J of moving one expert
    program_energy: Float[Array, ""]  # J of programming one expert
    probe_energy: Float[Array, ""]  # J of probing one expert
    joules_per_nat: Float[Array, ""]
    horizon_tokens: Float[Array, ""]
    action_share: Float[Array, ""]  # of an interval's energy budget that programming may take
    margin: Float[Array, ""]  # lead of experts that are digital
    stale: Float[Array, ""]  # relative growth of noise from which an expert may be programmed again
    dwell_s: Float[Array, ""]
    memory: Float[Array, ""]  # weight of the newest reading in the running mean, in (0, 1]


@struct.dataclass
class State:
    """What the policy remembers."""

    analog: Bool[Array, "layers experts"]  # the plan
    noise: Float[Array, "layers experts"]  # |rest|^2 over that expected right after programming, running mean
    factor: Float[Array, "layers experts matrices"]  # that outputs are multiplied by
    scale_error: Float[Array, "layers experts"]  # squared relative error of scale that is left
    moved_s: Float[Array, "layers experts"]  # time of the last move


@struct.dataclass
class Observation:
    """What is seen at one time."""

    time_s: Float[Array, ""]
    age_s: Float[Array, "layers experts"]  # since programming
    readings: Readings  # of all analog copies with their factors, `[layers, experts, matrices]`
    budget: Float[Array, ""]  # J per token for all experts, actions included
    tokens: Float[Array, ""]  # until the next observation


class Actions(NamedTuple):
    """What is to be done; the plan is `State.analog`."""

    to_digital: Bool[Array, "layers experts"]
    to_analog: Bool[Array, "layers experts"]
    reprogram: Bool[Array, "layers experts"]
    recompensate: Bool[Array, "layers experts matrices"]
    energy: Float[Array, ""]  # J of these actions, probing included
    running: Float[Array, ""]  # J per token of the plan
    expected: Float[Array, ""]  # nats per token that the plan loses, as the policy sees it


def initial_state(knowledge: Knowledge, budget: Float[Array, ""] | float) -> State:
    """Fresh chips, and the plan for them within a budget."""
    shape = knowledge.noise_loss.shape
    room = jnp.float32(budget) - jnp.sum(knowledge.analog_energy)
    return State(
        analog=~best_within(knowledge.noise_loss, _extra(knowledge), room),
        noise=jnp.ones(shape, jnp.float32),
        factor=jnp.ones((*shape, 3), jnp.float32),
        scale_error=jnp.zeros(shape, jnp.float32),
        moved_s=jnp.full(shape, -jnp.inf, jnp.float32),
    )


def _extra(knowledge: Knowledge) -> Array:
    """J per token that an expert takes more when it is digital."""
    return jnp.maximum(knowledge.digital_energy - knowledge.analog_energy, 0.0)


def best_within(
    gain: Float[Array, "layers experts"], extra: Float[Array, "layers experts"], room: Float[Array, ""]
) -> Bool[Array, "layers experts"]:
    """Experts by falling gain per extra joule, each that still fits; none without gain.

    A greedy knapsack: within the largest single gain of the best choice, and jittable.
    """
    flat, cost = gain.reshape(-1), extra.reshape(-1)
    density = jnp.where(flat > 0, flat / jnp.maximum(cost, 1e-30), -jnp.inf)
    order = jnp.argsort(-density, stable=True)

    def take(left: Array, item: Array) -> tuple[Array, Array]:
        fits = (cost[item] <= left) & (flat[item] > 0)
        return left - jnp.where(fits, cost[item], 0.0), fits

    _, taken = jax.lax.scan(take, room, order)
    return jnp.zeros(flat.shape, bool).at[order].set(taken).reshape(gain.shape)


class _Seen(NamedTuple):
    """What probes say of the analog copies."""

    noise: Array
    scale_error: Array  # squared, before compensation
    left: Array  # squared, after it: the readings' own error
    off: Array  # which matrices are off


def _perceive(know: Knowledge, state: State, readings: Readings) -> _Seen:
    size = jnp.sum(readings.size, axis=-1)
    rest = jnp.maximum(jnp.sum(readings.rest, axis=-1), 0.0) / size / know.fresh_rest
    error = jnp.square(readings.scale - 1)
    off = error > 4 * readings.scale_variance
    return _Seen(
        noise=state.noise + know.memory * (rest - state.noise),
        scale_error=jnp.sum(error * readings.size, axis=-1) / size,
        left=jnp.sum(jnp.where(off, readings.scale_variance, error) * readings.size, axis=-1) / size,
        off=off,
    )


def step(knowledge: Knowledge, state: State, seen: Observation) -> tuple[State, Actions]:
    """One decision; pure and jittable."""
    know = knowledge
    found = _perceive(know, state, seen.readings)
    factor = jnp.where(found.off, state.factor / seen.readings.scale, state.factor)

    aged = jnp.interp(seen.age_s, know.ages, know.growth)
    anew = jnp.median(found.noise / aged) * know.growth[0]
    worth = know.joules_per_nat * know.horizon_tokens
    saved = worth * know.noise_loss * (found.noise - anew)
    # All probes, and a move of every expert, whether or not any moves: the budget then holds whatever is decided.
    reserved = (know.probe_energy + know.move_energy) * found.noise.size
    free = (seen.budget - jnp.sum(know.analog_energy)) * seen.tokens - reserved
    pays = free >= 0  # the interval, for probes and for any moves
    allowed = jnp.floor(jnp.minimum(know.action_share * seen.budget * seen.tokens, free) / know.program_energy)
    old = (found.noise > (1 + know.stale) * anew) & (seen.age_s >= know.dwell_s)
    useful = jnp.where(state.analog & old & (saved > know.program_energy), saved, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-useful.reshape(-1), stable=True), stable=True).reshape(useful.shape)
    reprogram = jnp.isfinite(useful) & (rank.astype(jnp.float32) < allowed)
    noise = jnp.where(reprogram, anew, found.noise)
    scale_error = jnp.where(reprogram, 0.0, found.left)
    factor = jnp.where(reprogram[..., None], 1.0, factor)

    programming = know.program_energy * jnp.sum(reprogram, dtype=jnp.float32)
    loss = know.noise_loss * noise + know.scale_loss * scale_error
    room = jnp.where(pays, (free - programming) / seen.tokens, seen.budget - jnp.sum(know.analog_energy))
    to_digital, to_analog = _moves(know, state, seen, jnp.where(pays | ~state.analog, loss, 0.0), room, worth)
    analog = (state.analog & ~to_digital) | to_analog
    moved = to_digital | to_analog
    new = State(
        analog=analog, noise=noise, factor=factor, scale_error=scale_error,
        moved_s=jnp.where(moved, seen.time_s, state.moved_s),
    )  # fmt: skip
    return new, Actions(
        to_digital=to_digital, to_analog=to_analog, reprogram=reprogram,
        recompensate=found.off & ~reprogram[..., None],
        energy=know.probe_energy * reprogram.size + programming + know.move_energy * jnp.sum(moved, dtype=jnp.float32),
        running=jnp.sum(jnp.where(analog, know.analog_energy, know.digital_energy)),
        expected=jnp.sum(jnp.where(analog, loss, 0.0)),
    )  # fmt: skip


def _moves(
    know: Knowledge, state: State, seen: Observation, loss: Array, room: Array, worth: Array
) -> tuple[Array, Array]:
    """(experts that become digital, experts that become analog)."""
    extra, digital = _extra(know), ~state.analog
    wanted = best_within(loss * jnp.where(digital, 1.0 + know.margin, 1.0), extra, room)
    rested = seen.time_s - state.moved_s >= know.dwell_s
    to_digital = wanted & state.analog & rested & (worth * loss > know.move_energy)
    # Experts that lost their place keep it where those that come leave room.
    used = jnp.sum(jnp.where((wanted & digital) | to_digital, extra, 0.0))
    kept = best_within(jnp.where(digital & ~wanted, loss, 0.0), extra, room - used)
    return to_digital, digital & ~wanted & ~kept
