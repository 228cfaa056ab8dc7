"""Sweeps of a model on a mesh, by one process and by two."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hetmoe.sweep.store import read_sweep
from tests.checkpoint.golden_files import ROOT
from tests.parallel.processes import environment
from tests.parallel.test_hosts import free_port

MESH = ("--mesh", "data=2,expert=2")


def start(config: Path, output: Path, *options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hetmoe.cli", "sweep", config, "-o", output, *options]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_two(config: Path, output: Path) -> list[subprocess.Popen[str]]:
    at = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2)
    return [start(config, output, *MESH, "--cpu-devices", 2, *at, "--process", number) for number in range(2)]


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-3000:]
    return out


def numbers(directory: Path) -> np.ndarray:
    found = {(r.point.describe(), r.point.seed_index): r.nll for r in read_sweep(directory).results}
    return np.array([found[name] for name in sorted(found)])


def test_points_of_a_mesh_are_those_of_one_device(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(seeds="1")
    running = [
        start(config, tmp_path / "one"), start(config, tmp_path / "mesh", *MESH, "--cpu-devices", 4)
    ]  # fmt: skip
    for process in running:
        finish(process)
    # On so small a text a step of a converter that flips shows in the fourth digit.
    np.testing.assert_allclose(numbers(tmp_path / "mesh"), numbers(tmp_path / "one"), rtol=2e-3)


def test_two_processes_write_once_and_keep_what_is_finished_when_one_is_killed(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config, output = write_config(), tmp_path / "two"
    main, other = start_two(config, output)
    try:
        deadline = time.monotonic() + 300
        while not kept(output) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(other.pid, signal.SIGKILL)
        since = time.monotonic()
        _, err = main.communicate(timeout=100)
        assert time.monotonic() - since < 60
        assert main.returncode != 0 and "hetmoe: process 0 of 2" in err and "kept" in err
    finally:
        for process in (main, other):
            process.kill()
            process.communicate()
    before = kept(output)
    assert before
    outs = [finish(process) for process in start_two(config, output)]
    assert "Perplexity" in outs[0] and "Perplexity" not in outs[1]
    assert kept(output) >= before
    alone = start(config, tmp_path / "alone", *MESH, "--cpu-devices", 4)
    finish(alone)
    np.testing.assert_allclose(numbers(output), numbers(tmp_path / "alone"), rtol=1e-6)


def kept(directory: Path) -> int:
    """Points in the store."""
    if not (directory / "sweep.sqlite").exists():
        return 0
    try:
        return len(read_sweep(directory).results)
    except Exception:  # noqa: BLE001 (it is being made)
        return 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mesh", "seed=2", "--cpu-devices", 2), "does not divide the 1 noise seeds"),
        (("--status", "--mesh", "data=2"), "evaluates nothing here"),
        (("--part", "0/2", "--coordinator", "a:1", "--processes", 2, "--process", 0), "is for one process"),
    ],
)
def test_what_a_sweep_cannot_use_is_refused(
    write_config: Callable[..., Path], tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    process = start(write_config(), tmp_path / "out", *options)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert message in err and len(err.strip().splitlines()) == 1
