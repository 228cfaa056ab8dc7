"""Days in the life of a deployment, and what policies make of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedWeights
from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.evaluate.run import Batches, evaluate_programmed
from hetmoe.models.matrices import crossbar_matrices
from hetmoe.models.model import Model
from hetmoe.models.params import Params
from hetmoe.placement.plan import Plan, stack_plans
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.runtime.deploy import Chips, deployed_weights, fresh_chips
from hetmoe.runtime.policy import Knowledge, best_within
from hetmoe.runtime.watch import Watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    """What happens, at ascending times; all lists are of one length.

    Attributes:
        times_s: of observations, the first at least 0.
        noise: multiplies the noise scale from that time on (temperature).
        budget: J per token for all experts.
        tokens: served from that time to the next.
    """

    times_s: tuple[float, ...]
    noise: tuple[float, ...]
    budget: tuple[float, ...]
    tokens: tuple[float, ...]

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in dataclasses.asdict(self).items()}
        if len(set(lengths.values())) != 1 or not self.times_s:
            raise InputError(f"a scenario's lists must be of one length, at least 1: {lengths}")
        if any(b <= a for a, b in zip(self.times_s, self.times_s[1:], strict=False)) or self.times_s[0] < 0:
            raise InputError("a scenario's times must ascend from at least 0")
        for name in ("noise", "budget", "tokens"):
            if not all(0 < value < float("inf") for value in getattr(self, name)):
                raise InputError(f"a scenario's {name} must be positive and finite")


class Moment(NamedTuple):
    """What one policy did at one time, and what it lost."""

    loss: float  # mean nats per token
    running: float  # J per token of the plan
    actions: float  # J of moves, programming and probing
    digital: int  # experts
    moved: int
    reprogrammed: int
    recompensated: int  # matrices


class Simulator:
    """Runs policies on one chip (a key) through a scenario; everything is compiled once."""

    def __init__(
        self, model: Model, knowledge: Knowledge, spec: AnalogSpec, calibration: Calibration | None, batches: Batches,
        *, probes: int,
    ) -> None:  # fmt: skip
        self.model, self.knowledge, self.spec = model, knowledge, spec
        self.calibration, self.batches, self.probes = calibration, batches, probes
        self.tokens = float(np.sum(np.asarray(batches.weight))) * (batches.tokens.shape[2] - 1)

    def losses(self, programmed: ProgrammedWeights, plans: Sequence[Any]) -> list[float]:
        """Mean nats per token of plans on the same chips."""
        stacked = stack_plans([Plan(experts=jnp.asarray(analog)) for analog in plans])
        totals = evaluate_programmed(
            self.model.params, programmed, stacked, self.spec, self.calibration, self.batches, self.model.config
        )
        return (np.asarray(totals.nll, np.float64) / self.tokens).tolist()

    def adaptive(self, key: jax.Array, scenario: Scenario) -> list[Moment]:
        """The policy of `hetmoe.runtime.policy`: it probes, decides, acts, and serves."""
        watch = Watch(key, self.model.params, self.spec, self.knowledge, probes=self.probes, budget=scenario.budget[0])
        found: list[Moment] = []
        for time, noise, budget, tokens in zip(*dataclasses.astuple(scenario), strict=True):
            done = watch.observe(time, noise=noise, budget=budget, tokens=tokens)
            found.append(
                Moment(
                    loss=self.losses(watch.held(), [watch.analog])[0],
                    running=float(done.running), actions=float(done.energy), digital=int((~watch.analog).sum()),
                    moved=int(jnp.sum(done.to_digital | done.to_analog)), reprogrammed=int(jnp.sum(done.reprogram)),
                    recompensated=int(jnp.sum(done.recompensate)),
                )
            )  # fmt: skip
        return found

    def fixed(
        self, key: jax.Array, scenario: Scenario, plans: Sequence[np.ndarray], *, compensated: bool
    ) -> list[list[Moment]]:
        """Plans (True = analog) that never change, on one chip that is never programmed again: a list for each plan.

        Compensated: the scale of every matrix is set exactly right at every time, for free.
        """
        params, found = self.model.params, [list[Moment]() for _ in plans]
        for index, time in enumerate(scenario.times_s):
            chips = self._aged(time, scenario.noise[index])
            held = deployed_weights(key, params, self.spec, chips)
            if compensated:
                held = deployed_weights(
                    key, params, self.spec, dataclasses.replace(chips, factor=inverse_scales(params, held))
                )
            losses = self.losses(held, plans)
            for moments, analog, loss in zip(found, plans, losses, strict=True):
                moments.append(Moment(loss, self._running(analog), 0.0, int((~analog).sum()), 0, 0, 0))
        return found

    def oracle(self, key: jax.Array, scenario: Scenario) -> list[Moment]:
        """What no policy is expected to beat, all for free.

        At every time chips that were just programmed, scales that are exactly right, and the plan of the least expected
        loss within the budget.
        """
        params, know, found = self.model.params, self.knowledge, list[Moment]()
        extra = jnp.maximum(know.digital_energy - know.analog_energy, 0.0)
        for index, budget in enumerate(scenario.budget):
            analog = ~np.asarray(best_within(know.noise_loss, extra, jnp.float32(budget) - jnp.sum(know.analog_energy)))
            chips = self._aged(0.0, scenario.noise[index])
            chips = dataclasses.replace(chips, epoch=chips.epoch + index)
            held = deployed_weights(key, params, self.spec, chips)
            held = deployed_weights(
                key, params, self.spec, dataclasses.replace(chips, factor=inverse_scales(params, held))
            )
            loss = self.losses(held, [analog])[0]
            found.append(Moment(loss, self._running(analog), 0.0, int((~analog).sum()), 0, 0, 0))
        return found

    def _aged(self, age: float, noise: float) -> Chips:
        chips = fresh_chips(*self.knowledge.noise_loss.shape)
        return dataclasses.replace(chips, age=jnp.full_like(chips.age, age), noise=jnp.float32(noise))

    def _running(self, analog: np.ndarray) -> float:
        know = self.knowledge
        return float(jnp.sum(jnp.where(jnp.asarray(analog), know.analog_energy, know.digital_energy)))


@jax.jit
def inverse_scales(params: Params, held: ProgrammedWeights) -> Float[Array, "layers experts matrices"]:
    """What sets the scale of every matrix right: `|W|^2 / <W', W>`."""
    targets, parts = crossbar_matrices(params.layers, dense=False), list[Array]()
    for name in EXPERT_MATRICES:
        w, found = (values.astype(jnp.float32) for values in (targets[name], held.layers[name].w))
        along = jnp.sum(w * found, axis=(-2, -1))
        parts.append(jnp.sum(jnp.square(w), axis=(-2, -1)) / along)
    return jnp.stack(parts, axis=-1)
