"""The policy: a pure state machine `(knowledge, state, observation) -> (state, actions)`.

What is known beforehand (`Knowledge`): the expected loss increase of every expert under the device's noise right after
programming, and under a change of scale; how noise grows with age; energies of experts on either technology and of
actions. What is observed: probes of all analog copies, the time since each was programmed, and the energy budget.

Every decision is a comparison of joules: a nat of loss per token is worth `joules_per_nat`, and what an action saves
counts for the tokens until the next one (`horizon_tokens`).

- *Recompensate* an expert's outputs by the scale that was read, if that is expected to save more than the probing
  costs, and the reading is surer than what it corrects.
- *Reprogram* an analog expert if its noise has grown past what it would be anew, by more than that costs.
- *Move* experts between analog and digital: digital are those whose expected loss per extra joule is largest, as many as
  the budget allows. An expert is moved only if that pays for the move, and not again before `dwell_s`; experts that run
  digitally keep their place against others that are better by less than `margin`. A budget that falls below what runs
  moves experts to analog whatever they cost.

Both copies of every expert are resident, so that a move changes one boolean of a plan (nothing is compiled again).
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
    scale_loss: Float[Array, "layers experts"]  # nats per token per squared relative error of scale
    fresh_change: Float[Array, "layers experts"]  # expected |W' - W|^2 / |W|^2 of an expert right after programming
    ages: Float[Array, "ages"]  # s, ascending
    growth: Float[Array, "ages"]  # |rest|^2 at these ages over that right after programming
    digital_energy: Float[Array, "layers experts"]  # J per token
    analog_energy: Float[Array, "layers experts"]
    move_energy: Float[Array, ""]  # J of moving one expert to the digital unit or back
    program_energy: Float[Array, ""]  # J of programming one expert
    probe_energy: Float[Array, ""]  # J of probing one expert
    joules_per_nat: Float[Array, ""]  # what a nat per token is worth
    horizon_tokens: Float[Array, ""]  # tokens that an action counts for
    margin: Float[Array, ""]  # relative lead that a newcomer needs
    dwell_s: Float[Array, ""]  # s between moves of one expert
    memory: Float[Array, ""]  # weight of the newest reading in the running mean, in (0, 1]


@struct.dataclass
class State:
    """What the policy remembers."""

    analog: Bool[Array, "layers experts"]
    noise: Float[Array, "layers experts"]  # |rest|^2 over that expected right after programming, running mean
    factor: Float[Array, "layers experts matrices"]  # that outputs are multiplied by
    scale_error: Float[Array, "layers experts"]  # squared relative error of scale that is left, as read
    moved_s: Float[Array, "layers experts"]  # time of the last move


@struct.dataclass
class Observation:
    """What is seen at one time."""

    time_s: Float[Array, ""]
    age_s: Float[Array, "layers experts"]  # since programming
    readings: Readings  # of all analog copies, `[layers, experts, matrices]`
    budget: Float[Array, ""]  # J per token for the experts
    tokens: Float[Array, ""]  # until the next observation


class Actions(NamedTuple):
    """What is to be done; the plan is `State.analog`."""

    to_digital: Bool[Array, "layers experts"]
    to_analog: Bool[Array, "layers experts"]
    reprogram: Bool[Array, "layers experts"]
    recompensate: Bool[Array, "layers experts matrices"]
    energy: Float[Array, ""]  # J of these actions, probing included
    running: Float[Array, ""]  # J per token of the plan
    expected: Float[Array, ""]  # nats per token of the plan, as the policy sees it


def initial_state(knowledge: Knowledge, budget: float) -> State:
    """Fresh chips, and the best plan for them within a budget."""
    shape = knowledge.noise_loss.shape
    return State(
        analog=~_within(knowledge.noise_loss, _extra(knowledge), _room(knowledge, jnp.float32(budget))),
        noise=jnp.ones(shape, jnp.float32),
        factor=jnp.ones((*shape, 3), jnp.float32),
        scale_error=jnp.zeros(shape, jnp.float32),
        moved_s=jnp.full(shape, -jnp.inf, jnp.float32),
    )


def _extra(knowledge: Knowledge) -> Array:
    """J per token that an expert takes more when it is digital."""
    return jnp.maximum(knowledge.digital_energy - knowledge.analog_energy, 0.0)


def _room(knowledge: Knowledge, budget: Array) -> Array:
    return budget - jnp.sum(knowledge.analog_energy)


def _within(gain: Array, extra: Array, room: Array) -> Bool[Array, "layers experts"]:
    """Experts taken by falling gain per extra joule, each that still fits; none whose gain is not positive."""
    flat, cost = gain.reshape(-1), extra.reshape(-1)
    density = jnp.where(flat > 0, flat / jnp.maximum(cost, 1e-30), -jnp.inf)
    order = jnp.argsort(-density, stable=True)

    def take(left: Array, item: Array) -> tuple[Array, Array]:
        fits = (cost[item] <= left) & (flat[item] > 0)
        return left - jnp.where(fits, cost[item], 0.0), fits

    _, taken = jax.lax.scan(take, room, order)
    return jnp.zeros(flat.shape, bool).at[order].set(taken).reshape(gain.shape)


def step(knowledge: Knowledge, state: State, seen: Observation) -> tuple[State, Actions]:
    """One decision; pure, and jittable."""
    readings, know = seen.readings, knowledge
    size = jnp.sum(readings.size, axis=-1)
    horizon = jnp.minimum(know.horizon_tokens, seen.tokens)
    # What the probes say of every analog copy, whether it runs or not.
    rest = jnp.maximum(jnp.sum(readings.rest, axis=-1), 0.0) / size / know.fresh_change
    noise = state.noise + know.memory * (rest - state.noise)
    off = jnp.sum(jnp.square(readings.scale - 1) * readings.size, axis=-1) / size

    def worth(nats: Array) -> Array:
        return nats * know.joules_per_nat * horizon

    # Compensation: probing is paid for anyway, a new factor costs nothing beside it.
    helps = (jnp.abs(readings.scale - 1) > 1e-4) & (worth(know.scale_loss * off) > 0)[..., None]
    factor = jnp.where(helps, state.factor / readings.scale, state.factor)
    scale_error = jnp.where(jnp.any(helps, axis=-1), 0.0, off)

    # Noise beyond what programming anew would give: the chips' own condition (temperature) is the median over experts
    # of what is seen over what their age explains.
    aged = jnp.interp(seen.age_s, know.ages, know.growth)
    condition = jnp.median(noise / aged)
    anew = condition * know.growth[0]
    saved = know.noise_loss * jnp.maximum(noise - anew, 0.0)
    reprogram = state.analog & (worth(saved) > know.program_energy)
    noise = jnp.where(reprogram, anew, noise)
    scale_error = jnp.where(reprogram, 0.0, scale_error)
    factor = jnp.where(reprogram[..., None], 1.0, factor)

    # Placement: what runs digitally has a lead.
    loss = know.noise_loss * noise + know.scale_loss * scale_error
    extra, room = _extra(know), _room(know, seen.budget)
    lead = jnp.where(state.analog, 1.0, 1.0 + know.margin)
    wanted = _within(loss * lead, extra, room)  # digital
    rested = seen.time_s - state.moved_s >= know.dwell_s
    pays = worth(loss) - extra * horizon * 0 > know.move_energy
    to_digital = wanted & state.analog & rested & pays
    # Experts that lose their place make room for those that come; others stay where they are if they fit.
    leaving = ~wanted & ~state.analog
    staying = ~state.analog & ~leaving
    used = jnp.sum(jnp.where(staying | to_digital, extra, 0.0))
    kept = leaving & _within(jnp.where(leaving, loss, 0.0), extra, room - used)
    to_analog = leaving & ~kept
    analog = (state.analog & ~to_digital) | to_analog
    moved = to_digital | to_analog

    spent = (
        know.probe_energy * analog.size + know.move_energy * jnp.sum(moved) + know.program_energy * jnp.sum(reprogram)
    )
    new = State(
        analog=analog, noise=noise, factor=factor, scale_error=scale_error,
        moved_s=jnp.where(moved, seen.time_s, state.moved_s),
    )  # fmt: skip
    running = jnp.sum(jnp.where(analog, know.analog_energy, know.digital_energy))
    actions = Actions(
        to_digital=to_digital, to_analog=to_analog, reprogram=reprogram, recompensate=helps & ~reprogram[..., None],
        energy=spent, running=running, expected=jnp.sum(jnp.where(analog, loss, 0.0)),
    )  # fmt: skip
    return new, actions
