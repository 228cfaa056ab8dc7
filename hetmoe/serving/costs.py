"""Time and energy of every step that a server may take with one plan, looked up in tables of estimates."""

import dataclasses
from bisect import bisect_right

import numpy as np

from hetmoe.errors import InputError
from hetmoe.hardware.demand import position_bytes, stored_bytes
from hetmoe.hardware.deployment import Deployment, stack_deployments
from hetmoe.hardware.estimate import Estimate, estimate_grid
from hetmoe.hardware.machine import System, stack_systems
from hetmoe.hardware.parts import Schedule
from hetmoe.hardware.step import Step, decode_steps, prefill_step, stack_steps
from hetmoe.models.config import ModelConfig

EVERY_BATCH = 16  # up to this batch each has its own estimates
POINTS = 17  # contexts and prompts that are estimated


@dataclasses.dataclass(frozen=True)
class StepTables:
    """What steps are asked for, whatever the plan: made once.

    Attributes:
        batches: of decoding steps that are estimated, ascending.
        contexts: of decoding steps, and prompts of prefills, ascending.
        decode: leaves `[batches * contexts]`.
        prefill: of one prompt each, leaves `[contexts]`.
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    decode: Step
    prefill: Step


def step_tables(config: ModelConfig, frequency: np.ndarray, max_batch: int) -> StepTables:
    """Estimated are all small batches and some large ones, and lengths from 1 to the model's context.

    Raises:
        InputError: for a batch below 1.
    """
    if max_batch < 1:
        raise InputError(f"max_batch={max_batch!r} must be at least 1")
    larger = np.geomspace(EVERY_BATCH, max(max_batch, EVERY_BATCH), 13).round().astype(int)
    batches = sorted({*range(1, min(max_batch, EVERY_BATCH) + 1), *(b for b in larger.tolist() if b <= max_batch)})
    lengths = np.geomspace(1, config.max_position_embeddings, POINTS).round().astype(int).tolist()
    window = min(config.sliding_window or 1, config.max_position_embeddings)  # costs have a kink there
    contexts = sorted({*lengths, window})
    return StepTables(
        batches=tuple(batches), contexts=tuple(contexts), decode=decode_steps(config, frequency, batches, contexts),
        prefill=stack_steps([prefill_step(config, frequency, 1, prompt) for prompt in contexts]),
    )  # fmt: skip


class StepCosts:
    """Of one plan on one system.

    Between estimated lengths and batches costs are linear: a step's bytes and FLOP are, but for the different experts
    that a batch needs, whose number is concave.

    Attributes:
        idle_power: W, of the digital unit and the chips.
        room: bytes of digital memory for the key-value cache.
        position_bytes: of the cache, for each position of a sequence.
    """

    def __init__(
        self, config: ModelConfig, where: Deployment, tables: StepTables, system: System, schedule: Schedule,
        *, stored: float | None = None,
    ) -> None:  # fmt: skip
        """`stored` is how many bytes of digital weights are resident; None = those of the plan."""
        of, on = stack_deployments([where]), stack_systems([system])
        decode = estimate_grid(config, of, tables.decode, on, schedule)
        prefill = estimate_grid(config, of, tables.prefill, on, schedule)
        if not bool(decode.fits_chips.all()):
            raise InputError("the plan's analog weights do not fit the chips: see 'hetmoe hardware' with the same plan")
        self._contexts = list(tables.contexts)
        self._decode = [self._by_batch(tables, decode, name) for name in ("step_time", "step_energy")]
        self._prefill = [_values(prefill, name).tolist() for name in ("step_time", "step_energy")]
        self.position_bytes = float(position_bytes(config, where))
        self.room = float(system.digital.capacity) - (float(stored_bytes(config, where)) if stored is None else stored)
        self.idle_power = float(system.digital.idle_power) + float(decode.chips.max() * system.analog.static_power)

    def decode(self, batch: int, context: float) -> tuple[float, float]:
        """(s, J) of a step that gives each of `batch` sequences one token, behind `context` positions on average."""
        time, energy = (table[batch - 1] for table in self._decode)
        return self._between(time, context), self._between(energy, context)

    def prefill(self, prompt: int) -> tuple[float, float]:
        """(s, J) of a prompt's first pass, which gives its first token."""
        time, energy = self._prefill
        return self._between(time, prompt), self._between(energy, prompt)

    def _between(self, values: list[float], length: float) -> float:
        upper = min(max(bisect_right(self._contexts, length), 1), len(self._contexts) - 1)
        if upper < 1:
            return values[0]
        low, high = self._contexts[upper - 1], self._contexts[upper]
        return values[upper - 1] + (values[upper] - values[upper - 1]) * (length - low) / (high - low)

    @staticmethod
    def _by_batch(tables: StepTables, found: Estimate, name: str) -> list[list[float]]:
        """One list over contexts for every batch from 1 on."""
        values = _values(found, name).reshape(len(tables.batches), -1)
        wanted = np.arange(1, tables.batches[-1] + 1)
        return np.stack([np.interp(wanted, tables.batches, column) for column in values.T], axis=1).tolist()


def _values(found: Estimate, name: str) -> np.ndarray:
    return np.asarray(getattr(found, name), np.float64).reshape(-1)
