"""Stores of parts: killed, run twice, on disks that fail, and read while they are written."""

import contextlib
import fcntl
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from hetmoe.errors import InputError
from hetmoe.sweep import ledger as ledger_module
from hetmoe.sweep.collect import collect
from hetmoe.sweep.database import FILE
from hetmoe.sweep.lock import part_lock
from hetmoe.sweep.part_store import open_part
from hetmoe.sweep.parts import Part, found_parts, part_directory
from hetmoe.sweep.points import point_id
from hetmoe.sweep.store import read_sweep
from tests.sweep import fake_parts
from tests.sweep.fake_parts import EARLY, POINTS
from tests.sweep.fake_workers import FACTS, IDENTITY, TIMING, grid, measure


@pytest.fixture(autouse=True)
def facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "provenance", lambda: FACTS)


def open_first(directory: Path):
    """The store of a part that has all groups."""
    return open_part(directory, IDENTITY, grid(), total=len(POINTS), extend=False)


def test_parts_killed_at_random_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    directory, script, kills = tmp_path / "out", Path(fake_parts.__file__), 20
    subprocess.run(
        [sys.executable, script, directory, str(kills), "7"], check=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(script.parents[2])},
    )  # fmt: skip
    assert len(found_parts(directory)) == 5
    collect(directory, EARLY, POINTS, extend=False)
    results = read_sweep(directory).results
    assert sorted(point_id(r.point) for r in results) == sorted(map(point_id, POINTS))
    for result in results:  # to the last bit
        expected = measure(result.point)
        assert (result.nll, result.correct, result.perplexity) == (expected.nll, expected.correct, expected.perplexity)

    # The log of what parts did: nothing was claimed once it was written, whatever N was.
    written: set[str] = set()
    claimed: Counter[str] = Counter()
    for line in (directory / "log").read_text().splitlines():
        deed, number = line.split()
        assert number not in written, line
        if deed == "wrote":
            written.add(number)
        else:
            claimed[number] += 1
    assert max(claimed.values()) > 1  # some were killed at work
    assert claimed.total() <= len(POINTS) + 3 * (kills + 3)  # each lost one group of three points at most
    stored = Counter(
        number
        for part in found_parts(directory)
        for (number,) in rows(part_directory(directory, part), "SELECT point_id FROM finished")
    )
    assert set(stored.values()) == {1}


def rows(directory: Path, statement: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(directory / FILE)) as connection:
        return connection.execute(statement).fetchall()


def test_a_store_is_there_once_a_group_is_and_is_always_whole(tmp_path: Path) -> None:
    folder = part_directory(tmp_path, Part(index=0, of=2))
    folder.mkdir(parents=True)
    with open_first(folder) as ledger:
        points = ledger.claim()
        assert list(folder.iterdir()) == []
        ledger.write([measure(p) for p in points], TIMING)
        assert [path.name for path in folder.iterdir()] == [FILE]  # no journal, no log
        first = (folder / FILE).read_bytes()
        with (folder / FILE).open("rb") as reader:  # opened before the next group
            points = ledger.claim()
            ledger.write([measure(p) for p in points], TIMING)
            assert reader.read() == first
    assert len(rows(folder, "SELECT * FROM finished")) == 6
    assert rows(folder, "PRAGMA integrity_check") == [("ok",)] and rows(folder, "PRAGMA journal_mode") == [("delete",)]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f"{FILE}.0.tmp").write_text("half a st")
    with open_first(tmp_path) as ledger:
        ledger.write([measure(p) for p in ledger.claim()], TIMING)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_part_runs_once_at_a_time(tmp_path: Path) -> None:
    with (
        part_lock(tmp_path),
        pytest.raises(InputError, match="another process works at this part"),
        part_lock(tmp_path),
    ):
        pass
    with part_lock(tmp_path):
        pass


def test_without_locks_the_second_to_write_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with part_lock(tmp_path), open_first(tmp_path) as one, part_lock(tmp_path), open_first(tmp_path) as other:
        one.write([measure(p) for p in one.claim()], TIMING)
        points = other.claim()
        with pytest.raises(InputError, match="has finished a group meanwhile"):
            other.write([measure(p) for p in points], TIMING)
        one.write([measure(p) for p in one.claim()], TIMING)  # who was first goes on
    assert len(rows(tmp_path, "SELECT * FROM finished")) == 6


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    with open_first(tmp_path) as ledger:
        ledger.write([measure(p) for p in ledger.claim()], TIMING)
        points = ledger.claim()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(InputError, match="No space left on device"):
                ledger.write([measure(p) for p in points], TIMING)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    with open_first(tmp_path) as ledger:
        assert ledger.finished_count() == 3 and ledger.claim() == points


def test_other_settings_are_refused(tmp_path: Path) -> None:
    with open_first(tmp_path) as ledger:
        ledger.write([measure(p) for p in ledger.claim()], TIMING)
    other = IDENTITY | {"code": IDENTITY["code"] | {"source_digest": "e"}}
    with (
        pytest.raises(InputError, match=r'code\.source_digest was "d", is "e"'),
        open_part(tmp_path, other, grid(), total=150, extend=False),
    ):
        pass
