"""Parts of a sweep: which share of its groups one machine evaluates, and in which folder."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hetmoe.errors import InputError
from hetmoe.sweep.database import FILE
from hetmoe.sweep.points import SweepPoint

PARTS = "parts"
SLURM = "slurm"
_FOLDER = re.compile(r"(\d+)-of-(\d+)")
_FIX = "run within a job array, such as sbatch --array=0-7, or give --part I/N"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Part `index` of `of`, counted from 0."""

    index: int
    of: int

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    def share(self, groups: Sequence[list[SweepPoint]]) -> list[list[SweepPoint]]:
        """Its groups: every `of`-th, since neighbours are of one program and take about as long as each other."""
        return list(groups[self.index :: self.of])


def parse_part(text: str, environment: Mapping[str, str]) -> Part:
    """The part that "I/N" names, or "slurm" in the environment of a job.

    Raises:
        InputError: for other words, a part that does not exist, or no job array.
    """
    if text == SLURM:
        return _slurm_part(environment)
    found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if found is None:
        raise InputError(f'--part {text}: give I/N, such as 0/4, or "{SLURM}"')
    index, of = map(int, found.groups())
    if of < 1:
        raise InputError(f"--part {text}: there must be at least 1 part")
    if index >= of:
        raise InputError(f"--part {text}: parts are counted from 0, so that the last one is {of - 1}/{of}")
    return Part(index=index, of=of)


def check_count(parts: int, groups: int) -> None:
    """Refuses parts without work.

    Args:
        parts: how many there are to be.
        groups: of points, which parts do not divide further.

    Raises:
        InputError: for more parts than groups, or none.
    """
    if parts < 1:
        raise InputError(f"{parts} parts: there must be at least 1")
    if parts > groups:
        raise InputError(
            f"{parts} parts are more than there are groups of points: the grid has {groups} (points that differ in "
            "placement only are evaluated together); use fewer parts"
        )


def part_directory(directory: Path, part: Part) -> Path:
    """The folder of a part in that of its sweep."""
    return directory / PARTS / f"{part.index}-of-{part.of}"


def found_parts(directory: Path) -> list[Part]:
    """All parts, of whatever N, that have finished a group."""
    names = (_FOLDER.fullmatch(path.parent.name) for path in (directory / PARTS).glob(f"*/{FILE}"))
    parts = [Part(index=int(name[1]), of=int(name[2])) for name in names if name is not None]
    return sorted(parts, key=lambda part: (part.of, part.index))


def _slurm_part(environment: Mapping[str, str]) -> Part:
    """Tasks of an array such as 1-9:2 are numbered by their place in it."""
    task, first, count = (_slurm_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "COUNT"))
    step = _slurm_number({"SLURM_ARRAY_TASK_STEP": "1"} | dict(environment), "SLURM_ARRAY_TASK_STEP")
    index, rest = divmod(task - first, max(step, 1))
    if rest or not 0 <= index < count:
        raise InputError(
            f"--part {SLURM}: task {task} has no place among {count} tasks from {first} in steps of {step}; use an "
            "array without gaps, or give --part I/N"
        )
    return Part(index=index, of=count)


def _slurm_number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name)
    if value is None:
        raise InputError(f"--part {SLURM}: {name} is not set; {_FIX}")
    if not (value.isascii() and value.isdigit()):
        raise InputError(f"--part {SLURM}: {name} is {value!r}, which is no number; {_FIX}")
    return int(value)
