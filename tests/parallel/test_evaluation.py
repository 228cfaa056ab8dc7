"""Evaluation, calibration and rules on meshes; compared with one device inside a process of their own."""

import numpy as np
import pytest
from rich.console import Console

from hetmoe.commands.mesh_options import load_table
from hetmoe.parallel.mesh import make_mesh
from hetmoe.parallel.shard import Shard
from tests.parallel.processes import output_of


def test_eight_seeds_on_eight_devices_are_those_of_one_device() -> None:
    assert output_of("tests.parallel.evaluation_cases", "seeds").split() == ["evaluated", "seed=8"]


def test_ranges_and_scores_are_those_of_one_device() -> None:
    assert "calibrated and scored data=2,expert=4" in output_of("tests.parallel.evaluation_cases", "ranges")


@pytest.mark.slow
def test_evaluations_on_all_kinds_of_meshes() -> None:
    assert len(output_of("tests.parallel.evaluation_cases", "all").splitlines()) == 5


def test_the_load_is_shown_as_fullest_over_mean() -> None:
    console = Console(width=120)
    load = np.array([[1, 3, 2, 2], [4, 0, 0, 0]])
    mesh = make_mesh(Shard())
    with console.capture() as captured:
        console.print(load_table(load, mesh))
    rows = [line for line in captured.get().splitlines() if "expert" in line and "Load" not in line]
    # Fullest over mean: 3 / 2 and 4 / 1; one device has everything.
    assert rows[0].split()[-6:] == ["2", "│", "2.75", "│", "4.00", "│"]
    assert rows[1].split()[-6:] == ["6", "│", "1.00", "│", "1.00", "│"]
