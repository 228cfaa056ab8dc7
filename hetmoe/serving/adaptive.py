"""Plans of the runtime policy while requests are served."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from hetmoe.errors import InputError
from hetmoe.runtime.policy import Knowledge
from hetmoe.runtime.watch import Watch
from hetmoe.serving.costs import StepCosts
from hetmoe.serving.loop import Plan


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A value that changes at given times."""

    times_s: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, time_s: float) -> float:
        """The value from the last change on."""
        return self.values[int(np.searchsorted(self.times_s, time_s, side="right")) - 1]


def parse_schedule(name: str, said: Sequence[str], *, least: float, most: float) -> Schedule:
    """From texts `SECONDS=VALUE`, by time; the first at 0.

    Raises:
        InputError: naming the text that is none, out of range, or out of order.
    """
    times: list[float] = []
    values: list[float] = []
    for text in said:
        parts = text.split("=")
        try:
            time, value = (float(part) for part in parts)
        except ValueError:
            raise InputError(f"{name} {text!r} must be SECONDS=VALUE, like 0=0.25") from None
        if not (math.isfinite(time) and least <= value <= most):
            raise InputError(f"{name} {text!r}: the value must be from {least:g} to {most:g}, at a finite time")
        if time != 0 if not times else time <= times[-1]:
            raise InputError(f"{name} {text!r}: times must begin with 0 and ascend")
        times.append(time)
        values.append(value)
    if not times:
        raise InputError(f"{name} must be given at least once, as SECONDS=VALUE")
    return Schedule(tuple(times), tuple(values))


@dataclasses.dataclass(frozen=True)
class Look:
    """What the policy did at one time."""

    time_s: float
    budget: float  # J per token
    running: float  # J per token that its plan takes
    action_j: float
    digital: int
    moved: int
    reprogrammed: int
    recompensated: int
    expected_loss: float


class Adaptive:
    """A controller by `hetmoe.runtime.policy`.

    Budgets are shares of the way from the energy of all experts analog to that of all digital. The tokens until the
    next look are taken to be those since the last one. An expert that is programmed is meanwhile served by its digital
    copy; that takes no time here.
    """

    def __init__(
        self, watch: Watch, knowledge: Knowledge, budget: Schedule, noise: Schedule, *, every_s: float,
        tokens_per_s: float, costs_of: Callable[[np.ndarray], StepCosts],
    ) -> None:  # fmt: skip
        if not (math.isfinite(every_s) and every_s > 0):
            raise InputError(f"every_s={every_s!r} must be positive and finite")
        self.every_s, self.looks = every_s, list[Look]()
        self._watch, self._budget, self._noise = watch, budget, noise
        self._first, self._costs_of = tokens_per_s * every_s, costs_of
        self._base, self._extra = energy_ends(knowledge)
        self._made: dict[bytes, StepCosts] = {}

    def look(self, time_s: float, tokens: int) -> Plan:
        """See `Controller`."""
        budget = self._base + self._budget.at(time_s) * self._extra
        expected = max(float(tokens) if self.looks else self._first, 1.0)
        done = self._watch.observe(time_s, noise=self._noise.at(time_s), budget=budget, tokens=expected)
        analog = self._watch.analog
        if (key := analog.tobytes()) not in self._made:
            self._made[key] = self._costs_of(analog)
        counts = [int(np.sum(part)) for part in (done.to_digital | done.to_analog, done.reprogram, done.recompensate)]
        self.looks.append(
            Look(time_s, budget, float(done.running), float(done.energy), int((~analog).sum()), *counts,
                 expected_loss=float(done.expected))
        )  # fmt: skip
        return Plan(self._made[key], float((~analog).mean()), float(done.expected), float(done.energy))


def energy_ends(knowledge: Knowledge) -> tuple[float, float]:
    """(J per token with all experts analog, J more with all digital)."""
    base = float(np.sum(np.asarray(knowledge.analog_energy)))
    return base, float(np.sum(np.asarray(knowledge.digital_energy))) - base
