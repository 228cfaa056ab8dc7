"""Runs of two processes with four devices each, beside one process with eight."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.parallel.hosts import Processes
from tests.checkpoint.golden_files import ROOT
from tests.parallel.processes import environment, output_of


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@contextlib.contextmanager
def started(commands: list[list[str]], **variables: str) -> Generator[list[subprocess.Popen[str]]]:
    """Processes side by side; what is left of them ends with the test."""
    env = environment() | variables
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def two(case: str, *more: object, **variables: str) -> contextlib.AbstractContextManager[list[subprocess.Popen[str]]]:
    """Both processes of a run."""
    run = [sys.executable, "-m", "tests.parallel.host_cases", case, str(free_port()), "2"]
    return started([[*run, str(number), *map(str, more)] for number in range(2)], **variables)


def text_of(process: subprocess.Popen[str]) -> str:
    """What a process prints that ends well."""
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-3000:]
    assert "was ended before" not in err
    return own(out)


def own(out: str) -> str:
    """Without what the library that connects processes on CPUs prints: several threads, into each other's lines."""
    lines = out.splitlines(keepends=True)
    return "".join(line for line in lines if "[Gloo]" not in line and "peer ranks" not in line)


def finished(case: str, *more: object, **variables: str) -> list[str]:
    with two(case, *more, **variables) as processes:
        return [text_of(process) for process in processes]


def test_two_processes_find_what_one_does() -> None:
    main, other = finished("evaluate")
    assert not other  # results are given once
    found, alone = json.loads(main), json.loads(output_of("tests.parallel.host_cases", "evaluate", 0, 1, 0))
    for left, right in zip(found[:4], alone[:4], strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5)
    assert found[4] == alone[4]


def test_a_process_reads_the_experts_of_its_devices_only() -> None:
    read = [json.loads(out) for out in finished("load")]
    everything = json.loads(output_of("tests.parallel.host_cases", "load", 0, 1, 0))
    for number, keys in enumerate(read):
        experts = {int(key.split(".experts.")[1].split(".")[0]) for key in keys if ".experts." in key}
        assert experts == set(range(4 * number, 4 * number + 4))
    assert set(read[0]) | set(read[1]) == set(everything)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_other_ends_and_what_is_finished_is_kept(tmp_path: Path, victim: int) -> None:
    with two("killed", tmp_path, VICTIM=str(victim)) as processes:
        processes[victim].wait(timeout=200)
        since = time.monotonic()
        _, err = processes[1 - victim].communicate(timeout=100)
        assert time.monotonic() - since < 60
        assert processes[1 - victim].returncode not in (0, None)
        assert f"process {1 - victim} of 2" in err and "kept" in err
    lines = (tmp_path / "progress").read_text().splitlines()
    assert [json.loads(line)["part"] for line in lines[1:]] == ["0"]
    main, _ = finished("killed", tmp_path, VICTIM="2")
    assert main.split() == ["30.0", "3"]  # 0 + ... + 7, and the number of the part
    assert len((tmp_path / "progress").read_text().splitlines()) == 4


def test_what_differs_or_does_not_fit_is_refused_by_both() -> None:
    for out in finished("refused"):
        lines = out.splitlines()
        assert "process 1 of 2 differs from process 0 in jax: '0.10.1' and '0.10.0'" in lines[0]
        assert "more processes than parts: 1 parts for 2 processes with 8 devices" in lines[1]
        assert "4 parts for 2 processes with 8 devices" in lines[2] and "more processes" not in lines[2]
        assert "has 16 parts, but there are 8 devices" in lines[3]
        assert len(lines) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "host:1", "count": 2}, "go together"),
        ({"count": 2, "number": 0}, "go together"),
        ({"coordinator": "host", "count": 2, "number": 0}, "must be HOST:PORT"),
        ({"coordinator": ":12", "count": 2, "number": 0}, "must be HOST:PORT"),
        ({"coordinator": "host:65536", "count": 2, "number": 0}, "must be HOST:PORT"),
        ({"coordinator": "host:1", "count": 0, "number": 0}, "--processes 0 must be at least 1"),
        ({"coordinator": "host:1", "count": 2, "number": 2}, "from 0 to 1"),
        ({"coordinator": "host:1", "count": 2, "number": -1}, "from 0 to 1"),
        ({"cluster": "pbs"}, "use slurm, k8s, mpi"),
        ({"cluster": "slurm", "count": 2}, "leave out"),
        ({"cluster": "k8s"}, "JOB_COMPLETION_INDEX"),
        ({"cluster": "k8s", "coordinator": "a:1", "count": 2, "number": 0}, "JOB_COMPLETION_INDEX"),
        ({"cluster": "k8s", "coordinator": "a", "count": 2}, "must be HOST:PORT"),
    ],
)
def test_where_a_process_stands_must_be_whole(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Processes(**given)


def test_one_process_needs_no_others() -> None:
    assert not Processes().several
    assert Processes(cluster="slurm").several


WHO = """
import jax
from hetmoe.errors import InputError
from hetmoe.parallel import hosts
jax.config.update("jax_num_cpu_devices", 2)
try:
    hosts.start(hosts.Processes({}))
    print(jax.process_index(), jax.process_count(), jax.device_count(), hosts.everyone("where", jax.process_index()))
except InputError as error:
    print(error)
"""


def of_cluster(arguments: str, number: int, **variables: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in environment().items() if not name.startswith("SLURM")}
    of_number = {name: value.format(number) for name, value in variables.items()}
    return subprocess.Popen(
        [sys.executable, "-c", WHO.format(arguments)], cwd=ROOT, env=clean | of_number, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def said_by(processes: list[subprocess.Popen[str]]) -> list[str]:
    return [own(process.communicate(timeout=300)[0]).strip() for process in processes]


def test_processes_of_slurm_and_of_a_kubernetes_job_find_each_other() -> None:
    """By the variables that srun, and Kubernetes with an indexed Job, set."""
    slurm = {
        "SLURM_JOB_ID": str(20000 + os.getpid() % 20000), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_PROCID": "{}", "SLURM_LOCALID": "{}", "SLURM_STEP_NUM_NODES": "1",
    }  # fmt: skip
    k8s = f"cluster='k8s', coordinator='127.0.0.1:{free_port()}', count=2"
    for arguments, variables in (("cluster='slurm'", slurm), (k8s, {"JOB_COMPLETION_INDEX": "{}"})):
        found = said_by([of_cluster(arguments, number, **variables) for number in range(2)])
        assert found == ["0 2 4 [0, 1]", "1 2 4 [0, 1]"]


def test_variables_of_a_cluster_that_are_missing_are_named() -> None:
    (slurm,) = said_by([of_cluster("cluster='slurm'", 0)])
    assert "--cluster slurm" in slurm and "--coordinator" in slurm
    (k8s,) = said_by([of_cluster("cluster='k8s', coordinator='a:1', count=2", 0, JOB_COMPLETION_INDEX="2")])
    assert "JOB_COMPLETION_INDEX='2' must be a number below --processes 2" in k8s


def evaluation(folder: Path, name: str) -> contextlib.AbstractContextManager[list[subprocess.Popen[str]]]:
    """`hetmoe eval` in two processes with four devices each."""
    options = [
        "reference", "--tokens", "512", "--seq", "64", "--batch", "8", "--seeds", "2", "--digital", "0.25",
        "--noise-scale", "2", "--mesh", "data=2,expert=4", "--cpu-devices", "4", "--progress", folder / name,
        "--json", folder / f"{name}.json", "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process",
    ]  # fmt: skip
    return started([[sys.executable, "-m", "hetmoe.cli", "eval", *map(str, options), str(n)] for n in range(2)])


@pytest.mark.slow  # three evaluations of two processes
@pytest.mark.parametrize("victim", [0, 1])
def test_an_evaluation_goes_on_without_a_changed_digit_after_a_process_was_killed(tmp_path: Path, victim: int) -> None:
    progress = tmp_path / "killed"
    with evaluation(tmp_path, "killed") as processes:
        deadline = time.monotonic() + 300
        while not progress.exists() or progress.read_bytes().count(b"\n") < 4:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
        processes[victim].send_signal(signal.SIGKILL)
        since = time.monotonic()
        _, err = processes[1 - victim].communicate(timeout=100)
        assert time.monotonic() - since < 60
        assert processes[1 - victim].returncode not in (0, None)
        assert f"process {1 - victim} of 2" in err and "kept" in err
    kept = progress.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    for name in ("killed", "alone"):
        with evaluation(tmp_path, name) as processes:
            out, quiet = (text_of(process) for process in processes)
            assert not quiet
            assert ("parts of the text are finished" in out) == (name == "killed")
    assert progress.read_bytes().startswith(kept)
    killed, alone = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("killed", "alone"))
    for of in ("text", "digital", "points", "expert_load", "paired_differences"):
        assert killed[of] == alone[of], of
