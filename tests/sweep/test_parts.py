"""`hetmoe sweep --part`, `--collect` and `--status` in this process: the rows of a plain sweep, and what is refused."""

import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hetmoe.commands import sweep as sweep_command
from hetmoe.commands import sweep_parts
from hetmoe.errors import InputError
from hetmoe.sweep import code_digest, ray_parts, worker
from hetmoe.sweep.database import FILE
from hetmoe.sweep.part_store import PartLedger
from hetmoe.sweep.parts import Part, parse_part
from hetmoe.sweep.points import SweepPoint
from hetmoe.sweep.store import MEASURED, SweepResult, read_sweep
from tests.sweep.fake_workers import measure

Write = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
ONE = {"placements": '["all_digital", "experts_analog"]', "rules": None, "fractions": None, "noise_scales": "[2, 4]"}
GROUPS = 5  # of ONE: one point each


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[SweepPoint]:
    """All points that are evaluated from now on."""
    points: list[SweepPoint] = []
    evaluate = worker.evaluate_group

    def note(setup: Any, group: list[SweepPoint]) -> Any:
        points.extend(group)
        return evaluate(setup, group)

    monkeypatch.setattr(worker, "evaluate_group", note)
    return points


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model fails."""
    for module in (sweep_command, sweep_parts):
        monkeypatch.setattr(module, "load_for_sweep", None)


def values(directory: Path) -> dict[SweepPoint, tuple[Any, ...]]:
    """To the last bit."""

    def row(result: SweepResult) -> tuple[Any, ...]:
        facts = (result.provenance[n] for n in ("key_words", "evaluated_together", "weights_sha256", "code_digest"))
        return (*(getattr(result, name) for name in MEASURED), *facts)

    return {result.point: row(result) for result in read_sweep(directory).results}


def test_three_parts_are_the_plain_sweep(
    run: Run, write_config: Write, tmp_path: Path, evaluated: list[SweepPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, plain, parts = write_config(), tmp_path / "plain", tmp_path / "in-parts"
    code, _, err = run("sweep", config, "-o", plain)
    assert code == 0, err
    total = len(evaluated)
    evaluated.clear()
    for index in range(3):
        code, out, err = run("sweep", config, "-o", parts, "--part", f"{index}/3")
        assert code == 0 and f"part {index}/3" in out, err
    assert len(evaluated) == len(set(evaluated)) == total
    assert not (parts / FILE).exists()  # no two machines ever write one file

    for reader in (("report", parts), ("pareto", parts)):
        code, _, err = run(*reader, "-o", tmp_path / "out")
        assert code == 2 and f"run hetmoe sweep CONFIG -o {parts} --collect first" in err, err
    code, out, err = run("sweep", config, "-o", parts, "--status")
    assert code == 0 and f"{total} of {total} points finished, 0 claimed by processes that run, 0 open" in out, err
    assert out.count("points, the last at 20") == 3 and f"{total} points are in parts only" in out

    with monkeypatch.context() as patch:
        for module in (sweep_command, sweep_parts):
            patch.setattr(module, "load_for_sweep", None)
        for added in (total, 0):
            code, out, err = run("sweep", config, "-o", parts, "--collect")
            assert code == 0 and f"collected {added} new points from 3 parts" in out, err
            assert "Perplexity per token" in out and "warning" not in out and "not there yet" not in out
        code, out, err = run("sweep", config, "-o", parts, "--part", "1/3")
        assert code == 0 and "part 1/3: nothing is left to evaluate" in out, err
    assert values(parts) == values(plain)
    records = read_sweep(parts), read_sweep(plain)
    assert records[0].scores == records[1].scores and records[0].frequencies == records[1].frequencies
    assert records[0].points == records[1].points == total
    commands = {r.provenance["worker"]: r.provenance["command"] for r in records[0].results}
    assert sorted(command[-1] for command in commands.values()) == ["0/3", "1/3", "2/3"]

    evaluated.clear()
    code, out, err = run("sweep", config, "-o", parts)
    assert code == 0 and f"{total} points, {total} finished" in out and evaluated == [], err
    code, _, err = run("report", parts, "-o", tmp_path / "report")
    assert code == 0, err


def test_the_plain_command_collects_and_evaluates_the_rest(
    run: Run, write_config: Write, tmp_path: Path, evaluated: list[SweepPoint]
) -> None:
    config = write_config(**ONE)
    code, _, err = run("sweep", config, "--part", "1/2")
    assert code == 0, err
    first = list(evaluated)
    code, out, err = run("sweep", config)
    assert code == 0 and "collected 2 new points from 1 parts" in out and "5 points, 2 finished" in out, err
    assert len(first) == 2 and len(evaluated) == len(set(evaluated)) == GROUPS
    # A part that comes later finds nothing to do, though its own folder is empty.
    code, out, err = run("sweep", config, "--part", "0/2")
    assert code == 0 and "nothing is left" in out and len(evaluated) == GROUPS, err
    assert len(read_sweep(tmp_path / "s").results) == GROUPS


def test_the_number_of_parts_may_change(
    run: Run, write_config: Write, tmp_path: Path, evaluated: list[SweepPoint]
) -> None:
    config = write_config(**ONE)
    assert run("sweep", config, "--part", "0/2")[0] == 0
    code, out, err = run("sweep", config, "--collect")
    assert code == 0 and "2 of 5 points are not there yet" in " ".join(out.split()), err
    for part in ("0/3", "1/3", "2/3", "0/2", "1/2"):
        code, _, err = run("sweep", config, "--part", part)
        assert code == 0, err
    assert len(evaluated) == len(set(evaluated)) == GROUPS
    code, _, err = run("sweep", config, "--collect")
    assert code == 0 and len(read_sweep(tmp_path / "s").results) == GROUPS, err


def test_failed_points_are_tried_again_when_asked(
    run: Run, write_config: Write, evaluated: list[SweepPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(**(ONE | {"noise_scales": "[2, 1e38]"}))
    for part in ("0/2", "1/2", "0/2", "1/2"):
        code, _, err = run("sweep", config, "--part", part)
        assert code == 0, err
    assert len(evaluated) == GROUPS
    code, out, err = run("sweep", config, "--status")
    assert code == 0 and "3 of 5 points finished, 2 failed, 0 claimed" in out, err
    code, out, err = run("sweep", config, "--collect")
    assert code == 0 and "2 points failed and are in no mean" in out, err
    for option in ("--status", "--collect"):
        code, _, err = run("sweep", config, option, "--retry-failed")
        assert code == 2 and "leave out --retry-failed" in err, err
    again: list[SweepPoint] = []
    monkeypatch.setattr(worker, "evaluate_group", lambda _, group: [again.extend(group), [*map(measure, group)]][1])
    for part in ("0/2", "1/2"):
        code, _, err = run("sweep", config, "--part", part, "--retry-failed")
        assert code == 0, err
    assert [point.noise_scale for point in again] == [1e38, 1e38]
    code, out, err = run("sweep", config, "--status")
    assert "5 of 5 points finished, 0 claimed" in out, err


def test_a_grid_may_grow_in_parts(run: Run, write_config: Write, tmp_path: Path, evaluated: list[SweepPoint]) -> None:
    config = write_config(**ONE)
    for part in ("0/2", "1/2"):
        assert run("sweep", config, "--part", part)[0] == 0
    assert run("sweep", config, "--collect")[0] == 0
    write_config(**(ONE | {"seeds": "3"}))
    code, _, err = run("sweep", config, "--part", "0/2")
    assert code == 2 and "config.grid.seeds was 2, is 3" in err and "or give --extend" in err
    for part in ("0/2", "1/2"):
        code, _, err = run("sweep", config, "--part", part, "--extend")
        assert code == 0, err
    code, _, err = run("sweep", config, "--extend", "--collect")
    assert code == 0 and len(read_sweep(tmp_path / "s").results) == len(evaluated) == len(set(evaluated)) == 7, err
    code, out, err = run("sweep", config)
    assert code == 0 and "7 points, 7 finished" in out, err


def test_interrupted(run: Run, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, writes = PartLedger.write, []

    def interrupt(self: PartLedger, *arguments: Any) -> None:
        write(self, *arguments)
        writes.append(1)
        if len(writes) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    config = write_config(**ONE)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job in the background
    monkeypatch.setattr(PartLedger, "write", interrupt)
    code, _, err = run("sweep", config, "--part", "0/1")
    signal.signal(signal.SIGINT, before)
    assert code == 130
    assert err == f"hetmoe: interrupted; 2 of 5 points are stored in {tmp_path / 's'}; the same command goes on\n"
    code, out, err = run("sweep", config, "--part", "0/1")
    assert code == 0 and "5 points, 2 finished" in out and len(writes) == GROUPS, err


@pytest.mark.usefixtures("without_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--part", "3/3"), "--part 3/3: parts are counted from 0, so that the last one is 2/3"),
        (("--part", "0/0"), "--part 0/0: there must be at least 1 part"),
        (("--part", "-1/3"), '--part -1/3: give I/N, such as 0/4, or "slurm"'),
        (("--part", "1"), '--part 1: give I/N, such as 0/4, or "slurm"'),
        (("--part", "1/2/3"), "--part 1/2/3: give I/N"),
        (("--part", "a/b"), "--part a/b: give I/N"),
        (("--part", "0/6"), "6 parts are more than there are groups of points: the grid has 5"),
        (("--part", "slurm"), "SLURM_ARRAY_TASK_ID is not set; run within a job array"),
        (("--ray", "6"), "6 parts are more than there are groups of points: the grid has 5"),
        (("--ray", "0"), "0 parts: there must be at least 1"),
        (("--ray", "2"), "hetmoe sweep --ray needs Ray: pip install 'hetmoe[cluster]'"),
        (("--ray-address", "auto"), "--ray-address needs --ray N"),
        (("--part", "0/2", "--status"), "--status and --part exclude each other"),
        (("--part", "0/2", "--collect"), "--part and --collect exclude each other"),
        (("--part", "0/2", "--ray", "2"), "--part and --ray exclude each other"),
        (("--collect", "--status"), "--status and --collect exclude each other"),
        (("--collect", "--ray", "2"), "--collect and --ray exclude each other"),
        (("--collect",), "no part has finished anything; run hetmoe sweep with --part I/N first"),
    ],
)
def test_refusals(
    run: Run, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(ray_parts, "find_spec", lambda _: None)  # as if it were not installed
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    code, out, err = run("sweep", write_config(**ONE), *arguments)
    assert code == 2 and message in err and len(err.splitlines()) == 1, err
    assert "Traceback" not in out and [p.name for p in tmp_path.iterdir()] == ["s.toml"]


def test_other_settings_are_refused_before_the_model_is_loaded(
    run: Run, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(**ONE)
    assert run("sweep", config, "--part", "0/2")[0] == 0
    monkeypatch.setattr(sweep_parts, "load_for_sweep", None)
    monkeypatch.setattr(sweep_command, "load_for_sweep", None)
    record = code_digest.code_record()
    for changed, words in (
        ({"source_digest": "0123"}, 'is "0123"'),
        ({"jax": "0.0.1"}, f'code.jax was "{record["jax"]}", is "0.0.1"'),
    ):
        monkeypatch.setattr("hetmoe.sweep.setup.code_record", lambda changed=changed: record | changed)
        for options in ((), ("--collect",), ("--status",), ("--part", "0/2"), ("--part", "1/2"), ("--part", "0/3")):
            code, _, err = run("sweep", config, *options)
            assert code == 2 and f"{tmp_path / 's' / 'parts' / '0-of-2'}: holds results of other settings" in err, err
            assert words in err and "run all parts with the same CONFIG" in err and len(err.splitlines()) == 1
    assert [path.name for path in (tmp_path / "s" / "parts").iterdir()] == ["0-of-2"]
    assert not (tmp_path / "s" / FILE).exists()


def test_another_model_is_refused_before_anything_is_compiled(
    run: Run, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(**ONE)
    assert run("sweep", config, "--part", "0/2")[0] == 0
    identify = sweep_parts.model_identity
    monkeypatch.setattr("hetmoe.commands.sweep_job.make_setup", None)
    for module, options in ((sweep_command, ()), (sweep_parts, ("--part", "1/2")), (sweep_parts, ("--part", "0/3"))):
        monkeypatch.setattr(module, "model_identity", lambda model: identify(model) | {"weights_sha256": "0"})
        code, _, err = run("sweep", config, *options)
        assert code == 2 and "0-of-2: holds results of other settings (model.weights_sha256 was" in err, err
    assert not (tmp_path / "s" / FILE).exists()


def test_differences_are_warnings_with_both_numbers(run: Run, write_config: Write, tmp_path: Path) -> None:
    config = write_config(**ONE)
    assert run("sweep", config)[0] == 0
    main, part = tmp_path / "s" / FILE, tmp_path / "s" / "parts" / "0-of-1"
    before = {r.point: r.nll for r in read_sweep(tmp_path / "s").results}
    part.mkdir(parents=True)
    with sqlite3.connect(main) as connection, sqlite3.connect(part / FILE) as copy:
        connection.backup(copy)
        copy.execute("UPDATE finished SET nll = nll * (1 + 1e-15)")
    connection.close()
    copy.close()
    code, out, err = run("sweep", config, "--collect")
    assert code == 0 and "collected 0 new points from 1 parts" in out, err
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == GROUPS + 1 and "machines of different kinds round differently" in warnings[-1]
    for point, nll in before.items():
        (line,) = (line for line in warnings if point.describe() in line)
        assert repr(nll) in line and repr(nll * (1 + 1e-15)) in line
    assert {r.point: r.nll for r in read_sweep(tmp_path / "s").results} == before


def test_parts_of_a_job_array() -> None:
    def part(task: str, *others: str) -> Part:
        names = ("ID", "MIN", "COUNT", "STEP")
        values = zip(names, (task, *others), strict=False)
        return parse_part("slurm", {f"SLURM_ARRAY_TASK_{name}": value for name, value in values})

    assert part("0", "0", "4", "1") == Part(index=0, of=4)
    assert part("3", "0", "4") == Part(index=3, of=4)  # old versions of Slurm have no step
    assert [part(str(n), "1", "3", "1").index for n in (1, 2, 3)] == [0, 1, 2]
    assert [part(str(n), "4", "3", "5").index for n in (4, 9, 14)] == [0, 1, 2]
    for arguments, words in (
        (("7", "1", "3", "1"), "task 7 has no place among 3 tasks from 1 in steps of 1; use an array without gaps"),
        (("5", "4", "3", "5"), "task 5 has no place"),
        (("0", "1", "3", "1"), "task 0 has no place"),
        (("x", "1", "3"), "SLURM_ARRAY_TASK_ID is 'x', which is no number"),
        (("1", "1"), "SLURM_ARRAY_TASK_COUNT is not set"),
        (("1",), "SLURM_ARRAY_TASK_MIN is not set"),
    ):
        with pytest.raises(InputError) as caught:
            part(*arguments)
        assert words in str(caught.value)


def test_a_job_array_runs_its_part(run: Run, write_config: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ID", "5"), ("MIN", "1"), ("COUNT", "3"), ("STEP", "2")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    code, out, err = run("sweep", write_config(**ONE), "--part", "slurm")
    assert code == 0 and "part 2/3 is finished" in out, err
