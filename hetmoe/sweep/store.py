"""The results of a sweep, as they are read."""

import contextlib
import dataclasses
import json
import sqlite3
from pathlib import Path
from typing import Any

from hetmoe.errors import InputError
from hetmoe.sweep.database import FILE, connect_to_read, is_empty, one_line, read_meta
from hetmoe.sweep.lock import is_alive
from hetmoe.sweep.parts import PARTS, found_parts
from hetmoe.sweep.points import SweepPoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What the evaluation of a point gave."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A point whose evaluation gave no number."""

    point: SweepPoint
    error: str  # one line


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResult(Measurement):
    """One finished point."""

    provenance: dict[str, Any]  # how, where and when it was evaluated


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """A store as a whole."""

    config: dict[str, Any]  # the parsed CONFIG with defaults filled in
    model: dict[str, Any]  # name, fingerprint, config
    code: dict[str, Any]  # package version, digest of the package's source, jax version
    scores: dict[str, Any]  # by `score_name`: [layers][experts] floats
    frequencies: Any  # activation frequency [layers][experts] on the calibration windows, or None
    points: int  # how many points the grid has
    results: list[SweepResult]
    failures: list[Failure]


MEASURED = tuple(f.name for f in dataclasses.fields(Measurement) if f.name != "point")
POINT = tuple(f.name for f in dataclasses.fields(SweepPoint))
_JSON = ("command", "versions", "key_words", "text")
_PROVENANCE = (
    "worker", "started_utc", "ended_utc", "seconds", "evaluated_together", "key_words", "run_started_utc", "command",
    "git_revision", "code_digest", "versions", "platform", "machine", "device_platform", "device_kind", "device_count",
    "text", "fingerprint", "weights_sha256", "calibration_sha256",
)  # fmt: skip


def read_sweep(directory: Path) -> SweepRecord:
    """Reads a store, finished or not.

    Raises:
        InputError: if the directory holds no store, one of a newer version, or a damaged one.
    """
    path = directory / FILE
    if not path.is_file():
        if found_parts(directory):
            raise InputError(
                f"{directory}: holds parts of a sweep ({PARTS}) that are not collected: run hetmoe sweep CONFIG "
                f"-o {directory} --collect first"
            )
        raise InputError(f"{directory}: holds no sweep ({FILE} is not there); run hetmoe sweep first")
    with one_line(path), contextlib.closing(connect_to_read(path)) as connection:
        if is_empty(connection):
            raise InputError(f"{directory}: holds a sweep that never began; run hetmoe sweep first")
        connection.execute("BEGIN")  # all that is read is of one moment
        meta = read_meta(connection, path)
        order = "device, time_s, bits, placement, fraction, noise_scale, seed_index"
        rows = connection.execute(f"SELECT * FROM results ORDER BY {order}").fetchall()
        scores = connection.execute("SELECT rule, scores FROM scores ORDER BY rule").fetchall()
    return SweepRecord(
        config=meta["config"],
        model=meta["model"],
        code=meta["code"],
        scores={row["rule"]: json.loads(row["scores"]) for row in scores},
        frequencies=meta.get("frequencies"),
        points=meta["points"],
        results=[_result(row) for row in rows if row["error"] is None],
        failures=[Failure(point=row_point(row), error=row["error"]) for row in rows if row["error"] is not None],
    )


def finished_points(connection: sqlite3.Connection) -> set[str]:
    """Points with a result, or that failed."""
    return {row["point_id"] for row in connection.execute("SELECT point_id FROM finished")}


def failed_points(connection: sqlite3.Connection) -> set[str]:
    """Points that failed."""
    return {row["point_id"] for row in connection.execute("SELECT point_id FROM finished WHERE error IS NOT NULL")}


def claimed_points(connection: sqlite3.Connection, directory: Path) -> set[str]:
    """Points that are not finished and that a living worker has claimed."""
    rows = connection.execute(
        "SELECT worker, point_id FROM claims WHERE point_id NOT IN (SELECT point_id FROM finished)"
    ).fetchall()
    living = {worker for worker in {row["worker"] for row in rows} if is_alive(directory, worker)}
    return {row["point_id"] for row in rows if row["worker"] in living}


def row_point(row: sqlite3.Row) -> SweepPoint:
    """The point of a row."""
    return SweepPoint(**{name: row[name] for name in POINT})


def _result(row: sqlite3.Row) -> SweepResult:
    provenance = {name: json.loads(row[name]) if name in _JSON else row[name] for name in _PROVENANCE}
    return SweepResult(
        point=row_point(row),
        **{name: row[name] for name in MEASURED},
        provenance=provenance,
    )
