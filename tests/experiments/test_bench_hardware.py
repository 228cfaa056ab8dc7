"""The benchmark of the hardware model on few points."""

import json
from pathlib import Path

import bench_hardware


def test_it_counts_its_points(tmp_path: Path) -> None:
    bench_hardware.main(plans=2, batches=3, systems=4, rounds=2, output=tmp_path / "b.json")
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [(row["model"], row["schedule"]) for row in rows] == [
        (model, schedule) for model in ("OLMoE-1B-7B", "reference") for schedule in ("serial", "overlap")
    ]
    for row in rows:
        assert row["points"] == 2 * 3 * 4 and len(row["seconds"]) == 2
        low, high = row["points_per_s_range"]
        assert 24 / max(row["seconds"]) == low <= row["points_per_s"] <= high == 24 / min(row["seconds"])
        assert row["single_points_per_s"] > 0 and row["demand_share"] > 0
