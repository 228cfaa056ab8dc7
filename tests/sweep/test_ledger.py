"""Claims and results: killed workers, several workers, other settings, disks that fail."""

import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hetmoe.errors import InputError
from hetmoe.sweep import ledger as ledger_module
from hetmoe.sweep.database import FILE, SCHEMA
from hetmoe.sweep.ledger import open_ledger
from hetmoe.sweep.lock import FOLDER, is_alive, worker_lock
from hetmoe.sweep.points import SweepPoint, point_id
from hetmoe.sweep.store import Failure, read_sweep
from hetmoe.sweep.survey import read_status
from tests.sweep import fake_workers
from tests.sweep.fake_workers import FACTS, IDENTITY, TIMING, grid, measure, point

Groups = list[list[SweepPoint]]


@pytest.fixture(autouse=True)
def facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "provenance", lambda: FACTS)


def fill(
    directory: Path, groups: Groups, count: int | None = None, identity: dict[str, Any] = IDENTITY, **options: bool
) -> None:
    """Finishes `count` groups."""
    with open_ledger(directory, identity, groups, **({"extend": False} | options)) as ledger:
        for _ in groups[:count]:
            points = ledger.claim()
            ledger.write([measure(p) for p in points], TIMING)


def query(directory: Path, statement: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(directory / FILE)) as connection:
        return connection.execute(statement).fetchall()


def test_workers_killed_at_random_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    script = Path(fake_workers.__file__)
    subprocess.run(
        [sys.executable, script, directory, "40", "7"], check=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(script.parents[2])},
    )  # fmt: skip
    points = [p for group in grid() for p in group]
    results = read_sweep(directory).results
    assert sorted(point_id(r.point) for r in results) == sorted(map(point_id, points))
    for result in results:  # to the last bit
        expected = measure(result.point)
        assert (result.nll, result.correct, result.perplexity) == (expected.nll, expected.correct, expected.perplexity)

    # The log of what workers did: nothing was claimed once it was written, and nothing was written twice.
    written: set[str] = set()
    for line in (directory / "log").read_text().splitlines():
        deed, number = line.split()
        assert number not in written, line
        if deed == "wrote":
            written.add(number)
    claims = query(directory, "SELECT point_id, worker FROM claims ORDER BY number")
    finisher = dict(query(directory, "SELECT point_id, worker FROM finished"))
    assert dict(claims) == finisher  # the last to claim a point finished it
    repeated = Counter(number for number, _ in claims)
    assert max(repeated.values()) > 1  # some were killed at work
    assert len(set(finisher.values())) > 5
    per_worker = Counter(worker for number, worker in claims if finisher[number] != worker)
    assert max(per_worker.values()) <= 3  # a killed worker leaves one group at most


def test_a_claim_holds_as_long_as_its_worker(tmp_path: Path) -> None:
    groups = grid()[:2]
    flat = [p for group in groups for p in group]
    with open_ledger(tmp_path, IDENTITY, groups, extend=False) as one:
        assert one.claim() == groups[0]
        with open_ledger(tmp_path, IDENTITY, groups, extend=False) as other:
            assert other.claim() == groups[1]
            assert other.claim() == [] == one.claim()
            status = read_status(tmp_path, IDENTITY, flat, extend=False)
            assert (status.finished, status.claimed, status.open) == (0, 6, 0)
            one.write([measure(p) for p in groups[0]], TIMING)
        status = read_status(tmp_path, IDENTITY, flat, extend=False)
        assert (status.finished, status.claimed, status.open) == (3, 0, 3)
        assert one.claim() == groups[1]
        with pytest.raises(InputError, match="another process evaluated the same point"):
            one.write([measure(p) for p in groups[0]], TIMING)
        assert one.finished_count() == 3


def test_who_looks_for_the_dead_is_not_taken_for_them(tmp_path: Path) -> None:
    with worker_lock(tmp_path) as living:
        assert is_alive(tmp_path, living)
    assert not is_alive(tmp_path, living)  # its file is gone
    killed = tmp_path / FOLDER / "killed.lock"
    killed.touch()
    with killed.open() as other:  # as another process that looks at this moment
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not is_alive(tmp_path, "killed")


def test_failed_points_are_kept_and_tried_again_when_asked(tmp_path: Path) -> None:
    groups = grid()[:2]
    flat = [p for group in groups for p in group]
    bad, (first, second, third) = Failure(point=groups[0][1], error="not a number"), groups[0]
    with open_ledger(tmp_path, IDENTITY, groups, extend=False) as one:
        assert one.claim() == groups[0]
        one.write([measure(first), bad, measure(third)], TIMING)
        assert one.finished_count() == 3 and one.claim() == groups[1]  # not to be done again
        one.write([measure(p) for p in groups[1]], TIMING)
        status = read_status(tmp_path, IDENTITY, flat, extend=False)
        assert (status.finished, status.failed, status.claimed, status.open) == (5, 1, 0, 0)
        record = read_sweep(tmp_path)
        assert record.failures == [bad] and second not in {r.point for r in record.results}
        assert len(record.results) == 5
        assert query(tmp_path, "SELECT nll, correct, tokens, accuracy, error FROM results WHERE error IS NOT NULL") == [
            (None, None, None, None, "not a number")
        ]
        with open_ledger(tmp_path, IDENTITY, groups, extend=False) as other:
            other.retry_failed()
            status = read_status(tmp_path, IDENTITY, flat, extend=False)
            assert (status.finished, status.failed, status.claimed, status.open) == (5, 0, 0, 1)
            assert other.finished_count() == 5 and other.claim() == [second]  # though who failed still runs
            other.write([measure(second)], TIMING)
            other.retry_failed()  # what is there stays
            assert other.finished_count() == 6
    assert read_sweep(tmp_path).failures == []


@pytest.mark.parametrize("name", ["nll", "correct", "perplexity", "tokens", "crossbar_parameters"])
def test_half_a_result_is_never_stored(tmp_path: Path, name: str) -> None:
    (points, *_), nothing = grid()[:1], {name: None}
    with open_ledger(tmp_path, IDENTITY, [points], extend=False) as ledger:
        good, half = measure(points[0]), dataclasses.replace(measure(points[1]), **nothing)
        with pytest.raises(InputError, match="CHECK constraint"):
            ledger.write([good, half], TIMING)
        assert ledger.finished_count() == 0  # all of a group or nothing


def test_settings_are_never_mixed(tmp_path: Path) -> None:
    fill(tmp_path, grid()[:1])
    for path, value, words in (
        (("code", "source_digest"), "e", ('code.source_digest was "d", is "e"', "-o")),
        (("config", "model"), "n", ('config.model was "m", is "n"', "-o")),
        (("text", "a.txt"), "1", ('text.a.txt was "0", is "1"', "-o")),
        (("text", "b.txt"), "1", ('text.b.txt was (nothing), is "1"', "-o")),
        (("model", "fingerprint"), "g", ("model.fingerprint", "-o")),
        (("config", "grid", "seed"), 1, ("config.grid.seed was 0, is 1", "-o")),
        (("config", "grid", "seeds"), 24, ("config.grid.seeds was 25, is 24", "-o")),
        (("config", "grid", "noise_scales"), [0.5], ("noise_scales was [0.5, 1.0], is [0.5]", "-o")),
    ):
        other: dict[str, Any] = copy.deepcopy(IDENTITY)
        inner = other
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        for extend in (False, True):
            with pytest.raises(InputError) as caught:
                fill(tmp_path, grid(), identity=other, extend=extend)
            assert all(word in str(caught.value) for word in words), caught.value
            assert "--extend" not in str(caught.value)


def test_a_grid_that_grew_keeps_its_rows(tmp_path: Path) -> None:
    fill(tmp_path, grid()[:25])
    other: dict[str, Any] = copy.deepcopy(IDENTITY)
    other["config"]["grid"] |= {"noise_scales": [0.5, 1.0, 2.0], "seeds": 26, "scoring_scale": 2.0}
    with pytest.raises(InputError, match="or give --extend"):
        fill(tmp_path, grid(), identity=other)
    for axis in ([2.0, 0.5, 1.0], [1.0, 0.5], [1.0, 2.0, 0.5]):  # the first of an axis may have a meaning of its own
        mixed: dict[str, Any] = copy.deepcopy(other)
        mixed["config"]["grid"]["noise_scales"] = axis
        for extend in (False, True):
            with pytest.raises(InputError, match=r"noise_scales was .* put new values of an axis behind those"):
                fill(tmp_path, grid(), identity=mixed, extend=extend)
    fill(tmp_path, grid(), 1, identity=other, extend=True)
    record = read_sweep(tmp_path)
    assert (record.points, len(record.results)) == (150, 78)
    assert record.config["grid"]["seeds"] == 26
    fill(tmp_path, grid(), 1, identity=other)  # now it is the store's own
    for scale in (3.0, None):  # scores would be others
        mixed = copy.deepcopy(other)
        mixed["config"]["grid"] |= {"scoring_scale": scale, "noise_scales": [0.5, 1.0, 2.0, 3.0]}
        with pytest.raises(InputError, match=r"scoring_scale was 2\.0"):
            fill(tmp_path, grid(), identity=mixed, extend=True)

    other["code"]["threefry_partitionable"] = False
    fill(tmp_path / "old", grid()[:1], identity=other)
    more = copy.deepcopy(other)
    more["config"]["grid"]["seeds"] = 27
    with pytest.raises(InputError, match="more seeds change those that are there"):
        fill(tmp_path / "old", grid()[:1], identity=more, extend=True)


def test_stores_that_are_none(tmp_path: Path) -> None:
    fill(tmp_path / "newer", grid()[:1])
    with contextlib.closing(sqlite3.connect(tmp_path / "newer" / FILE)) as connection, connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (str(SCHEMA + 1),))
    (tmp_path / "foreign").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "foreign" / FILE)) as connection, connection:
        connection.execute("CREATE TABLE meta (key, value)")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / FILE).write_text("no database, " * 100)
    fill(tmp_path / "damaged", grid())
    content = bytearray((tmp_path / "damaged" / FILE).read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    (tmp_path / "damaged" / FILE).write_bytes(content)
    for name, words in (
        ("newer", f"schema {SCHEMA + 1}, this hetmoe reads up to schema {SCHEMA}: upgrade"),
        ("foreign", "is a database, but no store"),
        ("text", "file is not a database"),
        ("damaged", "malformed"),
    ):
        before = (tmp_path / name / FILE).read_bytes()
        for read in (
            read_sweep,
            lambda d: fill(d, grid()[:1]),
            lambda d: read_status(d, IDENTITY, [], extend=False),
        ):
            with pytest.raises(InputError) as caught:
                read(tmp_path / name)
            assert words in str(caught.value) and "\n" not in str(caught.value)
        assert (tmp_path / name / FILE).read_bytes() == before  # not even touched
    with pytest.raises(InputError, match="holds no sweep"):
        read_sweep(tmp_path / "absent")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / FILE).touch()  # its maker was killed before it wrote
    with pytest.raises(InputError, match="never began"):
        read_sweep(tmp_path / "begun")
    fill(tmp_path / "begun", grid()[:1])
    assert len(read_sweep(tmp_path / "begun").results) == 3


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path) -> None:
    groups = grid()
    with open_ledger(tmp_path, IDENTITY, groups, extend=False) as ledger:
        pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages + 4}")
        done = 0
        with pytest.raises(InputError) as caught:  # noqa: PT012 (which of the two fails is chance)
            for _ in groups:
                points = ledger.claim()
                ledger.write([measure(p) for p in points], TIMING)
                done += len(points)
        assert f"{FILE}: database or disk is full; all finished points are kept" in str(caught.value)
        assert 0 < done == ledger.finished_count() < 150
    assert len(read_sweep(tmp_path).results) == done
    fill(tmp_path, groups)
    assert len(read_sweep(tmp_path).results) == 150


@contextlib.contextmanager
def unprivileged():
    """Root may write anywhere: become nobody for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that others may enter, which pytest's are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_directories_that_cannot_be_written(public: Path) -> None:
    tmp_path = public
    fill(tmp_path / "old", grid()[:1])
    (tmp_path / "new").mkdir()
    (tmp_path / "file").touch()
    for name in ("old", "new"):
        for folder in [*(tmp_path / name).rglob("*/"), tmp_path / name]:
            folder.chmod(0o555)
    with unprivileged():
        for name in ("old", "new", "old/deeper"):
            with pytest.raises(InputError, match=r"Permission denied") as caught:
                fill(tmp_path / name, grid()[:1])
            assert str(tmp_path / name) in str(caught.value)
        assert len(read_sweep(tmp_path / "old").results) == 3  # reading needs no right to write
    with pytest.raises(InputError, match="cannot be made a directory"):
        fill(tmp_path / "file", grid()[:1])
    with pytest.raises(InputError, match=r"is a file; name a directory"):
        read_status(tmp_path / "file", IDENTITY, [], extend=False)


def test_point_ids_are_what_they_were() -> None:
    """A store outlives versions: the identity of a point must not change."""
    content = (
        '{"bits":8,"device":"pcm","fraction":null,"noise_scale":0.5,"placement":"experts_analog","seed_index":0,'
        '"time_s":null}'
    )
    assert point_id(point(0)) == hashlib.sha256(content.encode()).hexdigest()[:32]
    assert len({point_id(p) for p in (point(0), point(1), point(0, 1.0), point(0, bits=0), point(0, time_s=0.0))}) == 5


def test_results_can_be_queried_with_sql(tmp_path: Path) -> None:
    fill(tmp_path, grid()[:1])
    digests = "model, fingerprint, weights_sha256, calibration_sha256, code_digest"
    rows = query(tmp_path, f"SELECT placement, nll, {digests}, device_kind, key_words FROM results")
    assert rows[0] == ("experts_analog", measure(grid()[0][0]).nll, "m", "f", "w", "c", "d", "cpu", "[1, 2]")
    assert query(tmp_path, "PRAGMA journal_mode") == [("wal",)]
