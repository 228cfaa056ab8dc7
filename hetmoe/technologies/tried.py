"""Deployments with their measured quality, on hardware: points, and which of them no other beats."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from hetmoe.hardware.deployment import Deployment, stack_deployments
from hetmoe.hardware.estimate import Estimate, estimate_grid
from hetmoe.hardware.machine import System, stack_systems
from hetmoe.hardware.parts import Schedule
from hetmoe.hardware.step import decode_step, stack_steps
from hetmoe.models.config import ModelConfig
from hetmoe.technologies.front import non_dominated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
    """A deployment with its measured quality.

    Attributes:
        name: for tables.
        rule: that made it.
        bits: of digital experts, in words.
        perplexity: per noise seed; one value where nothing is random.
        accuracy: of next-word questions, likewise; None where there are none.
        where: what runs where.
    """

    name: str
    rule: str
    bits: str
    perplexity: np.ndarray
    accuracy: np.ndarray | None
    where: Deployment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A deployment decoding at one batch."""

    tried: Tried
    batch: int
    tokens_per_s: float
    joules_per_token: float
    memory_used: float  # B
    tiles: float
    chips: float
    bound: str
    fits: bool

    @property
    def perplexity(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.tried.perplexity))

    @property
    def perplexity_error(self) -> float | None:
        """Standard error of that mean; None for a single value."""
        values = self.tried.perplexity
        return None if len(values) < 2 else float(np.std(values, ddof=1) / np.sqrt(len(values)))

    @property
    def accuracy(self) -> float | None:
        """Mean over seeds."""
        return None if self.tried.accuracy is None else float(np.mean(self.tried.accuracy))

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "deployment": self.tried.name, "rule": self.tried.rule, "bits": self.tried.bits, "batch": self.batch,
            "perplexity": self.perplexity, "perplexity_error": self.perplexity_error, "accuracy": self.accuracy,
            "tokens_per_s": self.tokens_per_s, "joules_per_token": self.joules_per_token,
            "memory_used": self.memory_used, "tiles": self.tiles, "chips": self.chips, "bound": self.bound,
            "fits": self.fits,
        }  # fmt: skip


def points_of(
    config: ModelConfig, tried: Sequence[Tried], frequency: np.ndarray, batches: Sequence[int], context: int,
    system: System, schedule: Schedule,
) -> list[Point]:  # fmt: skip
    """Every deployment at every batch, decoding behind `context` positions."""
    steps = stack_steps([decode_step(config, frequency, batch, context) for batch in batches])
    wheres = stack_deployments([one.where for one in tried])
    found: Estimate = estimate_grid(config, wheres, steps, stack_systems([system]), schedule)
    bound = np.asarray(found.bound)
    values = {
        name: np.asarray(getattr(found, name), np.float64)
        for name in ("tokens_per_s", "joules_per_token", "memory_used", "tiles", "chips")
    }
    fits = np.asarray(found.fits_memory & found.fits_chips)
    return [
        Point(
            tried=one, batch=batch, bound=found.parts._fields[int(bound[i, j, 0])], fits=bool(fits[i, j, 0]),
            **{name: float(value[i, j, 0]) for name, value in values.items()},
        )
        for i, one in enumerate(tried)
        for j, batch in enumerate(batches)
    ]  # fmt: skip


def front_of(points: Sequence[Point]) -> list[Point]:
    """Points that fit the hardware and that no other beats in perplexity, energy and throughput, by perplexity."""
    fitting = [point for point in points if point.fits]
    if not fitting:
        return []
    values = np.array([[p.perplexity, p.joules_per_token, -p.tokens_per_s] for p in fitting])
    best = [point for point, kept in zip(fitting, non_dominated(values), strict=True) if kept]
    return sorted(best, key=lambda point: (point.perplexity, point.joules_per_token))
