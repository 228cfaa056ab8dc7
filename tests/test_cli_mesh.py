"""Options of the command line that say where a command runs: on the one device that this process has."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from hetmoe.commands.described_model import describe_model
from hetmoe.commands.mesh_options import MeshOptions
from hetmoe.parallel.memory import Workload

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--tokens", "128", "--seq", "32", "--seeds", "1", "--batch", "4", "--input-range", "dynamic")

BAD = [
    (("--mesh", "experts=2"), "mesh 'experts=2': unknown axis 'experts'"),
    (("--mesh", "data=0"), "data='0' must be a whole number of at least 1"),
    (("--mesh", "data=2,data=2"), "'data' is named twice"),
    (("--mesh", ""), "unknown axis ''"),
    # The reference model has 32 experts and 4 heads.
    (("--mesh", "expert=3"), "expert of 3 parts does not divide the 32 experts of a layer"),
    (("--mesh", "tensor=3"), "tensor of 3 parts does not divide the 4 attention heads"),
    (
        ("--mesh", "data=3", "--batch", "16"),
        "data x expert of 3 parts does not divide the 16 windows of a batch (--batch)",
    ),
    (("--mesh", "seed=3", "--seeds", "8"), "seed of 3 parts does not divide the 8 noise seeds (--seeds)"),
    (("--mesh", "expert=2"), "mesh expert=2 has 2 parts, but there is 1 device"),
    (("--mesh", "data=1", "--rule", "measured"), "rule measured runs on one device: leave out --mesh"),
    (("--mesh", "auto", "--rule", "noise_sensitivity"), "rule noise_sensitivity runs on one device"),
    (("--mesh", "data=1", "--weights", "kernel"), "--weights kernel runs on one device: leave out --mesh"),
    (("--mesh", "data=1", "--jobs", "2"), "--jobs 2 runs on one device: leave out --mesh"),
    (("--coordinator", "10.0.0.1:1234"), "--coordinator HOST:PORT, --processes N and --process I go together"),
    (("--processes", "2", "--process", "0"), "go together"),
    (("--coordinator", "here", "--processes", "2", "--process", "0"), "--coordinator 'here' must be HOST:PORT"),
    (("--coordinator", "here:1", "--processes", "2", "--process", "2"), "--process 2 must be from 0 to 1"),
    (("--cluster", "pbs"), "cluster 'pbs' is unknown: use slurm, k8s, mpi"),
    (("--cluster", "slurm", "--process", "0"), "leave out --coordinator, --processes and --process"),
    (("--cpu-devices", "0"), "--cpu-devices 0 must be at least 1"),
    (("--cpu-devices", "two"), "Invalid value for '--cpu-devices'"),
]


def refused(run: Run, *arguments: object) -> str:
    code, out, err = run("eval", "reference", *arguments)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "Traceback" not in out + err, err
    return err


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_where_it_cannot_run_is_one_line(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    folder = tmp_path / "out"
    err = refused(run, *arguments, "--json", folder / "r.json", "--progress", folder / "progress")
    assert message in err
    assert not folder.exists()


def test_what_runs_on_one_of_several_devices_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    run = Workload(batch=8, seq=32, seeds=1, dtype=np.float32, weights="stored", dense=True)
    terminal = io.StringIO()
    config = describe_model("reference", "float32", load=False).config
    assert MeshOptions().choose(config, run, Console(file=terminal), one="--jobs 2") is None
    assert terminal.getvalue() == "--jobs 2 runs on one of the 8 devices\n"


def test_a_device_that_is_too_small_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hetmoe.commands.mesh_options.memory_of_device", lambda _: 2**25)
    err = refused(run, "--mesh", "data=1", "--json", tmp_path / "r.json")
    assert "mesh data=1 does not fit: a device needs " in err and "90% of its 0.03 GiB are 0.03 GiB" in err
    err = refused(run, "--mesh", "auto", "--json", tmp_path / "r.json")
    assert "no mesh of 1 devices fits" in err
    assert not list(tmp_path.iterdir())


def test_progress_of_something_else_is_one_line(run: Run, tmp_path: Path) -> None:
    other, text = tmp_path / "other", tmp_path / "text"
    other.write_text('{"format": "hetmoe-progress-1", "model": "reference", "fingerprint": "0123"}\n')
    text.write_text("no progress, and without a line's end")
    for path, message in (
        (other, "is the progress of another evaluation: --device was None, is now 'pcm'"),
        (text, "is no progress of an evaluation"),
        (tmp_path, "is a directory; name a file"),
    ):
        before = path.read_bytes() if path.is_file() else None
        err = refused(run, *SMALL, "--digital", "0", "--progress", path, "--json", tmp_path / "r.json")
        assert message in err and str(path) in err
        assert before is None or path.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"other", "text"}


def test_a_mesh_of_one_device_and_a_file_of_progress_change_no_number(run: Run, tmp_path: Path) -> None:
    progress = tmp_path / "progress"

    def evaluated(*arguments: object) -> tuple[dict[str, Any], str]:
        path = tmp_path / "r.json"
        code, out, err = run(
            "eval", "reference", *SMALL, "--digital", "0.5", "--rule", "random", *arguments, "--json", path
        )
        assert code == 0, err
        return json.loads(path.read_text()), " ".join(out.split())

    plain, plain_out = evaluated()
    meshed, out = evaluated("--mesh", "data=1", "--progress", progress)
    assert plain["mesh"] is None
    assert meshed["mesh"] == {"axes": {"data": 1, "seed": 1, "expert": 1, "tensor": 1}, "devices": 1, "processes": 1}
    assert "Memory per device, 1 in mesh data=1" in out and "Memory per device" not in plain_out
    assert "Load of experts" in out and plain["expert_load"] == meshed["expert_load"]
    # 128 tokens to 2 experts in each of 4 layers.
    np.testing.assert_array_equal(np.sum(meshed["expert_load"], axis=1), [128 * 2] * 4)
    for ours, wanted in zip([meshed["digital"], *meshed["points"]], [plain["digital"], *plain["points"]], strict=True):
        assert ours["placement"] == wanted["placement"]
        np.testing.assert_allclose(ours["perplexity"], wanted["perplexity"], rtol=1e-5)
    lines = [json.loads(line) for line in progress.read_text().splitlines()]
    assert lines[0]["mesh"] == meshed["mesh"] and len(lines) > 2
    again, out = evaluated("--mesh", "data=1", "--progress", progress)
    assert f"{len(lines) - 1} parts of the text are finished" in out
    assert again["points"] == meshed["points"] and again["digital"] == meshed["digital"]
    assert len(progress.read_text().splitlines()) == len(lines)
