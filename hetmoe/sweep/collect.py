"""Gathering what parts have finished into the main store, with all that is known of every row.

A point may have been evaluated twice, if a part still ran elsewhere, or the main store's own process did. Where both
numbers are the same to the last bit, that is all. Where they differ, the first to be collected stays, and the
difference is reported each time: machines of different kinds round differently, and refusing to collect would hold back
all other points for that. A point that failed in one store and has a number in another has the number.
"""

import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hetmoe.sweep.database import FILE, connect, one_line, read_meta, transaction, write_meta
from hetmoe.sweep.ledger import prepare_store
from hetmoe.sweep.lock import opening_lock
from hetmoe.sweep.parts import Part, part_directory
from hetmoe.sweep.points import SweepPoint
from hetmoe.sweep.snapshot import read_snapshot
from hetmoe.sweep.store import MEASURED, claimed_points, failed_points, finished_points, row_point
from hetmoe.sweep.survey import make_survey

_ROWS = "SELECT finished.*, device_kind, platform FROM finished JOIN runs USING (worker)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collection:
    """What collecting did."""

    parts: int  # how many there are
    added: int  # points that the main store did not have
    differences: list[str]  # one line each


def collect(directory: Path, identity: dict[str, Any], points: Sequence[SweepPoint], *, extend: bool) -> Collection:
    """Copies rows that the main store lacks, part by part, each all or nothing. Once or often is the same.

    A point that a process works at for the main store is left to it.

    Args:
        directory: of the sweep; the main store is made if need be.
        identity: `config`, `text`, `code` and, where it is known, `model`; else it is that of the stores.
        points: all points of the grid.
        extend: see `check_identity`.

    Raises:
        InputError: if a store is of other settings, or cannot be read or written.
    """
    survey = make_survey(directory)
    survey.check(identity, extend=extend)
    if not survey.parts:
        return Collection(parts=0, added=0, differences=[])
    path, added, differences = directory / FILE, 0, list[str]()
    with contextlib.ExitStack() as stack:
        with opening_lock(directory), one_line(path):
            main = stack.enter_context(contextlib.closing(connect(path)))
            prepare_store(
                main, directory, survey.with_model(identity), len(points), extend=extend, journal="WAL"
            )  # fmt: skip
        for part in survey.parts:
            folder = part_directory(directory, part)
            with contextlib.closing(read_snapshot(folder / FILE)) as store, one_line(path), transaction(main):
                differences += _copy_scores(part, store, main)
                differences += _differences(part, store, main)
                added += _copy_rows(store, main, directory)
                _copy_frequencies(read_meta(store, folder / FILE), read_meta(main, path), main)
    return Collection(parts=len(survey.parts), added=added, differences=differences)


def _copy_rows(store: sqlite3.Connection, main: sqlite3.Connection, directory: Path) -> int:
    """The number of points that are new, or now have a number."""
    failed = failed_points(main)
    there = (finished_points(main) - failed) | claimed_points(main, directory)
    rows = [
        row
        for row in store.execute("SELECT * FROM finished").fetchall()
        if row["point_id"] not in there and (row["error"] is None or row["point_id"] not in failed)
    ]
    workers = {row["worker"] for row in rows}
    runs = [row for row in store.execute("SELECT * FROM runs").fetchall() if row["worker"] in workers]
    _insert(main, "runs", [run for run in runs if not _has_run(main, run["worker"])])
    main.executemany("DELETE FROM finished WHERE point_id = ?", [(row["point_id"],) for row in rows])  # failures
    _insert(main, "finished", rows)
    return len(rows)


def _has_run(connection: sqlite3.Connection, worker: str) -> bool:
    return connection.execute("SELECT 1 FROM runs WHERE worker = ?", (worker,)).fetchone() is not None


def _insert(connection: sqlite3.Connection, table: str, rows: Sequence[sqlite3.Row]) -> None:
    if rows:
        names = rows[0].keys()
        marks = ", ".join("?" * len(names))
        connection.executemany(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", [tuple(r) for r in rows])


def _differences(part: Part, store: sqlite3.Connection, main: sqlite3.Connection) -> list[str]:
    """A line for each point that has other numbers in the main store."""
    where = "WHERE error IS NULL"
    stored = {row["point_id"]: row for row in main.execute(f"{_ROWS} {where}")}
    lines: list[str] = []
    for row in store.execute(f"{_ROWS} {where}"):
        old = stored.get(row["point_id"])
        names = [] if old is None else [name for name in MEASURED if old[name] != row[name]]
        if old is not None and names:
            name = names[0]
            lines.append(
                f"{row_point(row).describe()}: {name} is {row[name]!r} in part {part} ({_hardware(row)}), but "
                f"{old[name]!r} in the main store ({_hardware(old)}), which is kept"
            )
    return lines


def _hardware(row: sqlite3.Row) -> str:
    return f"{row['device_kind']}, {row['platform']}"


def _copy_scores(part: Part, store: sqlite3.Connection, main: sqlite3.Connection) -> list[str]:
    """Copies scores of rules that are new; a line for each rule that has others: it may place other experts."""
    stored = dict(main.execute("SELECT rule, scores FROM scores").fetchall())
    found = dict(store.execute("SELECT rule, scores FROM scores").fetchall())
    new = [(rule, scores) for rule, scores in found.items() if rule not in stored]
    main.executemany("INSERT INTO scores VALUES (?, ?)", new)
    return [
        f"scores of {rule}: those of part {part} are not those in the main store, which are kept; it may have "
        "placed other experts"
        for rule, scores in found.items()
        if json.loads(stored.get(rule, scores)) != json.loads(scores)
    ]


def _copy_frequencies(found: dict[str, Any], stored: dict[str, Any], main: sqlite3.Connection) -> None:
    if stored.get("frequencies") is None and found.get("frequencies") is not None:
        write_meta(main, "frequencies", found["frequencies"])
