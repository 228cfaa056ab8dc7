"""Means over noise seeds and over tasks, with their standard errors."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from hetmoe.evaluate.tasks.names import METRICS, Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One metric of one task, or of the average over tasks."""

    task: str
    metric: str
    digital: float
    digital_sampling: float | None  # lm-eval's standard error: other questions of the same kind
    per_seed: list[float]
    sampling: float | None  # the same on the chips, mean over seeds

    @property
    def mean(self) -> float | None:
        """Over noise seeds; None where nothing ran on a chip."""
        return float(np.mean(self.per_seed)) if self.per_seed else None

    @property
    def standard_error(self) -> float | None:
        """Of that mean over noise seeds: other chips, the same questions. None for fewer than two seeds."""
        count = len(self.per_seed)
        return float(np.std(self.per_seed, ddof=1) / math.sqrt(count)) if count > 1 else None


def summarise(results: dict[str, list[Metrics]]) -> tuple[list[Line], list[Line]]:
    """(a line per task and metric, a line per metric averaged over the tasks that define it).

    The average of every seed is taken first; its spread over seeds gives the standard error, since tasks on one chip
    are not independent. A group of tasks, such as mmlu, counts as one task.

    Args:
        results: of every task, the digital metrics and then those of every seed.
    """
    lines: list[Line] = []
    averages: list[Line] = []
    for metric in METRICS:
        of_metric = [_line(task, metric, found) for task, found in results.items() if metric in found[0]]
        if not of_metric:
            continue
        lines.extend(of_metric)
        averages.append(
            Line(
                task=f"average of {len(of_metric)} tasks",
                metric=metric,
                digital=float(np.mean([line.digital for line in of_metric])),
                digital_sampling=_independent([line.digital_sampling for line in of_metric]),
                per_seed=np.mean([line.per_seed for line in of_metric], axis=0).tolist(),
                sampling=_independent([line.sampling for line in of_metric]),
            )
        )
    order = {task: number for number, task in enumerate(results)}
    return sorted(lines, key=lambda line: order[line.task]), averages


def _line(task: str, metric: str, found: Sequence[Metrics]) -> Line:
    digital, *seeds = found
    errors = [metrics[f"{metric}_stderr"] for metrics in seeds]
    return Line(
        task=task,
        metric=metric,
        digital=digital[metric],
        digital_sampling=digital[f"{metric}_stderr"],
        per_seed=[metrics[metric] for metrics in seeds],
        sampling=float(np.mean(errors)) if errors and None not in errors else None,
    )


def _independent(errors: Sequence[float | None]) -> float | None:
    """Standard error of a mean of independent values: questions of different tasks are different draws."""
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(e**2 for e in known)) / len(known) if known and len(known) == len(errors) else None


def ties_note(results: dict[str, list[Metrics]]) -> str:
    """How many questions had several best answers, for the tasks that have any; empty if none has.

    Args:
        results: as of `summarise`.
    """
    parts: list[str] = []
    for task, (digital, *seeds) in results.items():
        if any(metrics["ties"] for metrics in (digital, *seeds)):
            mean = f", {np.mean([metrics['ties'] for metrics in seeds]):.4g} on chips" if seeds else ""
            parts.append(f"{task} {digital['ties']} digital{mean} of {digital['questions']:,}")
    return f"Questions with tied best answers, of which lm-eval takes the first: {'; '.join(parts)}." if parts else ""
