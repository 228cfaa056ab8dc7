"""Copies of a store that is being written."""

import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hetmoe.errors import InputError
from hetmoe.sweep import snapshot
from hetmoe.sweep.database import connect
from hetmoe.sweep.snapshot import read_snapshot

# Two tables always have the same rows, whenever a reader looks; checkpoints are frequent.
WRITER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA wal_autocheckpoint = 3")
number = 0
while True:
    number += 1
    connection.execute("BEGIN")
    connection.execute("INSERT INTO a VALUES (?, zeroblob(3000))", (number,))
    connection.execute("INSERT INTO b VALUES (?, zeroblob(3000))", (number,))
    connection.execute("COMMIT")
"""


def make(path: Path) -> sqlite3.Connection:
    connection = connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    for table in ("a", "b"):
        connection.execute(f"CREATE TABLE {table} (number INTEGER, filler BLOB)")
    return connection


def numbers(path: Path, table: str = "a") -> list[int]:
    with contextlib.closing(read_snapshot(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        return [row["number"] for row in connection.execute(f"SELECT number FROM {table} ORDER BY number")]


def test_what_is_committed_is_seen_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    with contextlib.closing(make(path)) as writer:
        writer.execute("INSERT INTO a VALUES (1, NULL)")  # in the log only
        assert numbers(path) == [1]
        writer.execute("BEGIN")
        writer.execute("INSERT INTO a VALUES (2, NULL)")
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        assert numbers(path) == [1]
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before  # not even a lock in shared memory
        writer.execute("COMMIT")
        assert numbers(path) == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["x.sqlite"] and numbers(path) == [1, 2]


def test_a_copy_is_of_one_moment_while_another_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    make(path).close()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path])
    try:
        seen, end = [0], time.monotonic() + 60
        while len(seen) < 20:
            with contextlib.closing(read_snapshot(path)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
                found = [
                    connection.execute(f"SELECT count(*), coalesce(max(number), 0) FROM {t}").fetchone() for t in "ab"
                ]
            assert tuple(found[0]) == tuple(found[1]) and found[0][0] == found[0][1] >= seen[-1]
            seen += [found[0][0]] if found[0][0] > seen[-1] else []
            assert writer.poll() is None and time.monotonic() < end
    finally:
        writer.kill()
        writer.wait()
    assert numbers(path) == list(range(1, len(numbers(path)) + 1))  # though it was killed


@pytest.mark.parametrize("event", ["checkpoint", "new log", "log removed"])
def test_a_copy_across_a_change_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str) -> None:
    path = tmp_path / "x.sqlite"
    read, events, writer = snapshot._read, [event], make(path)
    writer.execute("INSERT INTO a VALUES (1, zeroblob(9000))")

    def disturb(of: Path) -> tuple[bytes, bool]:
        content = read(of)
        if of == path and events:  # between the file and its log
            events.pop()
            writer.execute("INSERT INTO a VALUES (2, zeroblob(9000))")
            writer.execute(f"PRAGMA wal_checkpoint({'PASSIVE' if event == 'checkpoint' else 'RESTART'})")
            if event != "checkpoint":  # a new log, without the pages of the old one
                writer.execute("INSERT INTO b VALUES (3, zeroblob(9000))")
            if event == "log removed":
                writer.close()
        return content

    monkeypatch.setattr(snapshot, "_read", disturb)
    assert numbers(path) == [1, 2] and not events
    assert numbers(path, "b") == ([] if event == "checkpoint" else [3])
    writer.close()


def test_a_store_that_always_changes_or_is_gone_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.sqlite"
    monkeypatch.setattr(snapshot, "PAUSE", 0.0)
    with pytest.raises(InputError, match="cannot be read"):
        read_snapshot(path)
    make(path).close()
    monkeypatch.setattr(snapshot, "_read", lambda of: (of.read_bytes(), True))
    with pytest.raises(InputError, match="changes faster than it can be read"):
        read_snapshot(path)


def test_a_replaced_file_is_read_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "x.sqlite", tmp_path / "y.sqlite"
    for name, number in ((path, 1), (other, 2)):
        with contextlib.closing(make(name)) as writer:
            writer.execute("INSERT INTO a VALUES (?, NULL)", (number,))
    fstat, calls = os.fstat, []

    def replace(handle: int) -> os.stat_result:
        calls.append(handle)
        if len(calls) == 1:
            other.replace(path)
        return fstat(handle)

    monkeypatch.setattr(os, "fstat", replace)
    assert numbers(path) == [1] and numbers(path) == [2]
