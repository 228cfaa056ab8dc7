"""Claiming points and writing results: what several processes on one store agree through."""

import contextlib
import dataclasses
import datetime
import json
import platform
import sqlite3
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from hetmoe.evaluate.provenance import provenance
from hetmoe.sweep.database import (
    FILE,
    connect,
    create_tables,
    is_empty,
    one_line,
    read_meta,
    transaction,
    write_meta,
)  # fmt: skip
from hetmoe.sweep.identity import check_identity, plain
from hetmoe.sweep.lock import opening_lock, worker_lock
from hetmoe.sweep.points import SweepPoint, point_id
from hetmoe.sweep.store import MEASURED, POINT, Failure, Measurement, claimed_points, finished_points


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """When and with which noise key the points of a group were evaluated."""

    started_utc: str
    ended_utc: str
    seconds: float
    key_words: list[int]


class Ledger:
    """One worker's access to the store. Made by `open_ledger`."""

    def __init__(
        self, directory: Path, connection: sqlite3.Connection, worker: str, groups: Sequence[Sequence[SweepPoint]]
    ) -> None:
        self._directory, self._connection, self._worker = directory, connection, worker
        self._path = directory / FILE
        self._groups = [{point_id(point): point for point in group} for group in groups]
        self._ids = frozenset[str]().union(*self._groups)

    @property
    def total(self) -> int:
        """How many points there are."""
        return len(self._ids)

    def claim(self) -> list[SweepPoint]:
        """Claims what is left of the first group with unclaimed points; empty if there is none.

        Raises:
            InputError: if the store cannot be written.
        """
        with self._writing() as connection:
            taken = finished_points(connection) | claimed_points(connection, self._directory)
            for group in self._groups:
                left = {number: point for number, point in group.items() if number not in taken}
                if left:
                    claims = [(number, self._worker, now_utc()) for number in left]
                    connection.executemany(
                        "INSERT INTO claims (point_id, worker, claimed_utc) VALUES (?, ?, ?)", claims
                    )
                    return list(left.values())
        return []

    def write(self, outcomes: Sequence[Measurement | Failure], timing: Timing) -> None:
        """Writes what the evaluation of a group gave, all or nothing.

        Raises:
            InputError: if the store cannot be written, or a point is finished already.
        """
        columns = ("point_id", *POINT, *MEASURED, "error", "worker", "evaluated_together", *dataclasses.asdict(timing))
        common = dataclasses.asdict(timing) | {"key_words": json.dumps(timing.key_words)}
        rows = [
            (
                point_id(outcome.point),
                *(getattr(outcome.point, name) for name in POINT),
                *(getattr(outcome, name, None) for name in (*MEASURED, "error")),
                self._worker, len(outcomes), *common.values(),
            )
            for outcome in outcomes
        ]  # fmt: skip
        marks = ", ".join("?" * len(columns))
        with self._writing() as connection:
            connection.executemany(f"INSERT INTO finished ({', '.join(columns)}) VALUES ({marks})", rows)

    def write_scores(self, scores: dict[str, Any], frequencies: Any) -> None:
        """Writes the scores of rules, and how often each expert was chosen, if they are not there yet.

        Raises:
            InputError: if the store cannot be written.
        """
        with self._writing() as connection:
            rows = [(rule, json.dumps(values)) for rule, values in scores.items()]
            connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?)", rows)
            write_meta(connection, "frequencies", frequencies)

    def retry_failed(self) -> None:
        """Forgets that points failed. Their claims go too: their workers may still run, and would seem to be at work.

        Raises:
            InputError: if the store cannot be written.
        """
        with self._writing() as connection:
            connection.execute(
                "DELETE FROM claims WHERE point_id IN (SELECT point_id FROM finished WHERE error IS NOT NULL)"
            )
            connection.execute("DELETE FROM finished WHERE error IS NOT NULL")

    def finished_count(self) -> int:
        """How many of its points are finished, by any worker, failed ones included.

        Raises:
            InputError: if the store cannot be read.
        """
        with one_line(self._path):
            return len(self._ids & finished_points(self._connection))

    @contextlib.contextmanager
    def _writing(self) -> Generator[sqlite3.Connection]:
        with one_line(self._path), transaction(self._connection):
            yield self._connection


@contextlib.contextmanager
def open_ledger(
    directory: Path, identity: dict[str, Any], groups: Sequence[Sequence[SweepPoint]], *, extend: bool
) -> Generator[Ledger]:
    """Opens the store of a directory as a new worker, and creates it if it is not there.

    Args:
        directory: made if need be.
        identity: `config`, `text`, `model` and `code` of this run.
        groups: all points of the grid (`group_points`).
        extend: see `check_identity`.

    Raises:
        InputError: for another store, one of other settings, or a directory that cannot be written.
    """
    path = directory / FILE
    with worker_lock(directory) as worker, contextlib.ExitStack() as stack:
        with opening_lock(directory), one_line(path):
            connection = stack.enter_context(contextlib.closing(connect(path)))
            total = sum(len(group) for group in groups)
            prepare_store(connection, directory, identity, total, extend=extend, journal="WAL")
            register(connection, worker, identity["code"]["source_digest"])
        yield Ledger(directory, connection, worker, groups)


def prepare_store(
    connection: sqlite3.Connection, directory: Path, identity: dict[str, Any], points: int, *, extend: bool,
    journal: str,
) -> None:  # fmt: skip
    """Makes an empty file a store, or checks what is there; then both know the grid of this run.

    Args:
        connection: to the file. Call within `one_line`.
        directory: for messages.
        identity: `config`, `text`, `model` and `code` of this run.
        points: how many the grid has.
        extend: see `check_identity`.
        journal: SQLite's journal mode of a new store.

    Raises:
        InputError: for another store, or one of other settings.
    """
    new = is_empty(connection)
    if new:
        connection.execute(f"PRAGMA journal_mode = {journal}")
    else:
        check_identity(directory, read_meta(connection, directory / FILE), identity, extend=extend)
    with transaction(connection):
        if new:
            create_tables(connection)
        for key, value in plain(identity).items():
            write_meta(connection, key, value)
        write_meta(connection, "points", points)


def register(connection: sqlite3.Connection, worker: str, digest: str) -> None:
    """Notes what a worker's rows have in common. Call within `one_line`."""
    facts = provenance()
    device = facts["device"]
    row = (
        worker, facts["time_utc"], json.dumps(facts["command"]), facts["git_revision"], digest,
        json.dumps(facts["versions"]), platform.platform(), facts["machine"], device["platform"], device["kind"],
        device["count"],
    )  # fmt: skip
    connection.execute(f"INSERT INTO runs VALUES ({', '.join('?' * len(row))})", row)


def now_utc() -> str:
    """The time for records."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
