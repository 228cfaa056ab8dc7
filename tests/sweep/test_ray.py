"""`hetmoe sweep --ray`: parts as tasks of Ray on this machine."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hetmoe.sweep.parts import Part, found_parts, part_directory
from hetmoe.sweep.store import MEASURED, read_sweep
from tests.sweep.processes import COMPILE_ONCE, PATIENCE, ROOT, start

pytestmark = pytest.mark.cluster

ONE = {"placements": '["all_digital", "experts_analog"]', "rules": None, "fractions": None, "noise_scales": "[2, 4]"}


def sweep(config: Path, directory: Path, *options: str) -> tuple[int, str, str]:
    """In a process of its own: Ray keeps threads and files."""
    done = subprocess.run(
        [sys.executable, "-m", "hetmoe.cli", "sweep", config.name, "-o", directory.name, *options],
        capture_output=True, text=True, timeout=PATIENCE, cwd=config.parent, check=False,
        env=os.environ | COMPILE_ONCE | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": f"{config}.cache"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def values(directory: Path) -> dict[Any, Any]:
    return {r.point: tuple(getattr(r, name) for name in MEASURED) for r in read_sweep(directory).results}


def test_parts_by_ray_are_the_plain_sweep(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config, directory = write_config(**ONE), tmp_path / "by-ray"
    code, out, err = sweep(config, directory, "--ray", "3")
    assert code == 0, err
    assert (
        all(f"part {index}/3: finished" in out for index in range(3)) and "collected 5 new points from 3 parts" in out
    )
    assert "Perplexity per token" in out
    assert [str(part) for part in found_parts(directory)] == ["0/3", "1/3", "2/3"]
    alone = start(config, tmp_path / "alone")
    out, _ = alone.communicate(timeout=PATIENCE)
    assert alone.returncode == 0, out
    assert values(directory) == values(tmp_path / "alone")
    code, out, err = sweep(config, directory, "--ray", "3")  # nothing is left
    assert code == 0 and "collected 0 new points" in out, err


def test_a_part_that_fails_is_named_and_the_others_finish(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config, directory = write_config(**ONE), tmp_path / "by-ray"
    bad = part_directory(directory, Part(index=1, of=3))
    bad.parent.mkdir(parents=True)
    bad.write_text("in the way")
    code, out, err = sweep(config, directory, "--ray", "3")
    assert (
        code == 2 and err.startswith("hetmoe: 1 of 3 parts failed (part 1/3: hetmoe: ") and len(err.splitlines()) == 1
    )
    assert str(bad) in err and "the same command goes on" in err
    assert "part 0/3: finished" in out and "part 2/3: finished" in out
    assert "2 of 5 points are not there yet" in out
    bad.unlink()
    code, out, err = sweep(config, directory, "--ray", "3")
    assert code == 0 and "collected 2 new points" in out, err
    assert len(read_sweep(directory).results) == 5


def test_no_cluster_at_an_address(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(**ONE)
    code, _, err = sweep(config, tmp_path / "s", "--ray", "2", "--ray-address", "127.0.0.1:1")
    assert code == 2 and err.startswith("hetmoe: --ray-address 127.0.0.1:1: nobody answers ("), err
    code, _, err = sweep(config, tmp_path / "s", "--ray", "2", "--ray-address", "auto")
    assert code == 2 and err.splitlines()[-1].startswith("hetmoe: Ray (auto): "), err
    assert not (tmp_path / "s").exists()
