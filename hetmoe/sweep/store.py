"""The results of a sweep, as they are read."""

import dataclasses
from pathlib import Path
from typing import Any

from hetmoe.sweep.points import SweepPoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResult:
    """One finished point."""

    point: SweepPoint
    nll: float  # summed negative log-likelihood, nats
    correct: float  # summed credit of next-word questions
    tokens: int  # what the sums are divided by
    bytes: int
    questions: int
    perplexity: float
    bits_per_byte: float
    accuracy: float | None
    digital_parameters: int  # parameters of crossbar-capable modules that the plan keeps digital
    crossbar_parameters: int  # all parameters of such modules
    provenance: dict[str, Any]  # how, where and when it was evaluated


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """A store as a whole."""

    config: dict[str, Any]  # the parsed CONFIG with defaults filled in
    model: dict[str, Any]  # name, fingerprint, config
    code: dict[str, Any]  # package version, digest of the package's source, jax version
    scores: dict[str, Any]  # per rule that does not depend on the device: [layers][experts] floats
    frequencies: Any  # activation frequency [layers][experts] on the calibration windows, or None
    points: int  # how many points the grid has
    results: list[SweepResult]


def read_sweep(directory: Path) -> SweepRecord:
    """Reads a store, finished or not.

    Raises:
        InputError: if the directory holds no store, one of a newer version, or a damaged one.
    """
    raise NotImplementedError
