"""Gathering parts: once is as often, provenance, differences, failures, and what others work at meanwhile."""

import contextlib
import copy
import dataclasses
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hetmoe.errors import InputError
from hetmoe.sweep import ledger as ledger_module
from hetmoe.sweep.collect import Collection, collect
from hetmoe.sweep.database import FILE
from hetmoe.sweep.ledger import open_ledger
from hetmoe.sweep.part_store import open_part
from hetmoe.sweep.parts import Part, part_directory
from hetmoe.sweep.store import Failure, Measurement, read_sweep
from hetmoe.sweep.survey import make_survey
from tests.sweep.fake_parts import EARLY, POINTS
from tests.sweep.fake_workers import FACTS, IDENTITY, TIMING, grid, measure

FIRST, SECOND = Part(index=0, of=2), Part(index=1, of=2)


@pytest.fixture(autouse=True)
def facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "provenance", lambda: FACTS)


def fill(
    directory: Path, part: Part, outcomes: Sequence[Measurement | Failure], identity: dict[str, Any] = IDENTITY,
    scores: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Writes outcomes as one group."""
    folder = part_directory(directory, part)
    folder.mkdir(parents=True, exist_ok=True)
    with open_part(folder, identity, [[o.point for o in outcomes]], total=len(POINTS), extend=True) as ledger:
        ledger.write_scores(scores or {}, [[0.5]])
        assert ledger.claim() == [o.point for o in outcomes]
        ledger.write(outcomes, TIMING)


def gather(directory: Path, identity: dict[str, Any] = EARLY, *, extend: bool = False) -> Collection:
    return collect(directory, identity, POINTS, extend=extend)


def content(directory: Path) -> list[list[tuple[Any, ...]]]:
    with contextlib.closing(sqlite3.connect(directory / FILE)) as connection:
        return [
            connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
            for table in ("meta", "runs", "scores", "finished")
        ]


def other(identity: dict[str, Any], table: str, **changes: Any) -> dict[str, Any]:
    return identity | {table: identity[table] | changes}


def test_once_is_as_often_and_rows_come_with_all_that_is_known(tmp_path: Path) -> None:
    for part, group in ((FIRST, grid()[0]), (SECOND, grid()[1])):
        fill(tmp_path, part, [measure(p) for p in group], scores={f"rule {part}": [[1.0]]})
    assert gather(tmp_path) == Collection(parts=2, added=6, differences=[])
    once = content(tmp_path)
    assert gather(tmp_path) == Collection(parts=2, added=0, differences=[])
    assert content(tmp_path) == once
    record = read_sweep(tmp_path)
    assert record.points == 150 and record.scores == {"rule 0/2": [[1.0]], "rule 1/2": [[1.0]]}
    assert record.frequencies == [[0.5]]
    alone = {r.point: r for part in (FIRST, SECOND) for r in read_sweep(part_directory(tmp_path, part)).results}
    assert {r.point: r for r in record.results} == alone  # provenance included
    assert len({r.provenance["worker"] for r in record.results}) == 2

    fill(tmp_path, FIRST, [measure(p) for p in grid()[2]])
    assert gather(tmp_path).added == 3
    status = make_survey(tmp_path).count(POINTS)
    assert (status.finished, status.uncollected, status.open) == (9, 0, 141)


def test_the_same_point_twice(tmp_path: Path) -> None:
    same, differs, *_ = points = grid()[0]
    fill(tmp_path, FIRST, [measure(p) for p in points])
    changed = dataclasses.replace(measure(differs), nll=measure(differs).nll * (1 + 2**-52))
    fill(tmp_path, SECOND, [measure(same), changed], scores={"a": [[1.0]]})
    found = gather(tmp_path)
    assert (found.parts, found.added) == (2, 3)
    (line,) = found.differences
    assert differs.describe() in line and "part 1/2 (cpu, " in line and "which is kept" in line
    assert f"nll is {changed.nll!r}" in line and f"but {measure(differs).nll!r}" in line
    kept = {r.point: r.nll for r in read_sweep(tmp_path).results}
    assert kept == {p: measure(p).nll for p in points}
    assert gather(tmp_path).differences == [line]  # said again


def test_other_scores_are_reported(tmp_path: Path) -> None:
    for part, group, score in ((FIRST, grid()[0], 1.0), (SECOND, grid()[1], 1.5)):
        fill(tmp_path, part, [measure(p) for p in group], scores={"router_norm": [[score]], "same": [[0.1]]})
    (line,) = gather(tmp_path).differences
    assert line.startswith("scores of router_norm: those of part 1/2")
    assert read_sweep(tmp_path).scores == {"router_norm": [[1.0]], "same": [[0.1]]}


def test_a_number_is_worth_more_than_a_failure(tmp_path: Path) -> None:
    first, second, third = points = grid()[0]
    fill(tmp_path, FIRST, [Failure(point=first, error="not a number"), measure(second)])
    assert gather(tmp_path).added == 2
    assert [f.point for f in read_sweep(tmp_path).failures] == [first]
    status = make_survey(tmp_path).count(points)
    assert (status.finished, status.failed, status.open) == (1, 1, 1)
    fill(tmp_path, SECOND, [measure(first), Failure(point=second, error="not a number"), measure(third)])
    status = make_survey(tmp_path).count(points)
    assert (status.finished, status.failed, status.uncollected, status.open) == (3, 0, 1, 0)
    assert gather(tmp_path) == Collection(parts=2, added=2, differences=[])
    record = read_sweep(tmp_path)
    assert record.failures == [] and {r.point for r in record.results} == set(points)
    assert gather(tmp_path).added == 0


def test_what_a_process_works_at_is_left_to_it(tmp_path: Path) -> None:
    fill(tmp_path, FIRST, [measure(p) for p in grid()[0]])
    with open_ledger(tmp_path, IDENTITY, grid(), extend=False) as ledger:
        points = ledger.claim()
        assert points == grid()[0] and gather(tmp_path).added == 0
        ledger.write([measure(p) for p in points], TIMING)
        assert ledger.claim() == grid()[1]
    assert gather(tmp_path) == Collection(parts=1, added=0, differences=[])
    fill(tmp_path, SECOND, [measure(p) for p in grid()[1]])
    assert gather(tmp_path).added == 3  # its process has ended


@pytest.mark.parametrize(
    ("table", "changes", "words"),
    [
        ("code", {"source_digest": "e"}, 'code.source_digest was "e", is "d"'),
        ("code", {"jax": "0.0"}, 'code.jax was "0.0", is (nothing)'),
        ("config", {"model": "n"}, 'config.model was "n", is "m"'),
        ("text", {"a.txt": "1"}, 'text.a.txt was "1", is "0"'),
        ("model", {"weights_sha256": "v"}, 'model.weights_sha256 was "v", is "w"'),
    ],
)
def test_a_part_of_other_settings_is_named_and_nothing_is_collected(
    tmp_path: Path, table: str, changes: dict[str, Any], words: str
) -> None:
    fill(tmp_path, FIRST, [measure(p) for p in grid()[0]])
    fill(tmp_path, SECOND, [measure(p) for p in grid()[1]], identity=other(IDENTITY, table, **changes))
    with pytest.raises(InputError) as caught:
        gather(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'parts' / '1-of-2'}: ") and words in str(caught.value)
    assert "run all parts with the same" in str(caught.value) and not (tmp_path / FILE).exists()


def test_a_model_that_is_known_is_compared(tmp_path: Path) -> None:
    fill(tmp_path, FIRST, [measure(p) for p in grid()[0]])
    with pytest.raises(InputError, match=r"0-of-2: .*weights_sha256"):
        gather(tmp_path, other(IDENTITY, "model", weights_sha256="v"))


def test_a_grid_that_grew(tmp_path: Path) -> None:
    fill(tmp_path, FIRST, [measure(p) for p in grid()[0]])
    grown = copy.deepcopy(EARLY)
    grown["config"]["grid"]["seeds"] = 26
    with pytest.raises(InputError, match=r"0-of-2: .* or give --extend"):
        gather(tmp_path, grown)
    assert gather(tmp_path, grown, extend=True).added == 3
    fill(tmp_path, SECOND, [measure(p) for p in grid()[1]])  # on a machine that knows nothing of it
    assert gather(tmp_path, grown).added == 3  # the main store is of this grid now
    assert read_sweep(tmp_path).config["grid"]["seeds"] == 26
    with pytest.raises(InputError, match=r"config\.grid\.seeds was 26, is 25"):
        gather(tmp_path)


def test_nothing_to_collect(tmp_path: Path) -> None:
    (tmp_path / "parts" / "0-of-2").mkdir(parents=True)  # a part that has finished nothing yet
    (tmp_path / "parts" / "notes").mkdir()
    assert gather(tmp_path) == Collection(parts=0, added=0, differences=[])
    assert not (tmp_path / FILE).exists()
    fill(tmp_path, FIRST, [measure(p) for p in grid()[0]])
    (part_directory(tmp_path, FIRST) / FILE).write_text("no database, " * 100)
    with pytest.raises(InputError, match=r"0-of-2.*file is not a database"):
        gather(tmp_path)
