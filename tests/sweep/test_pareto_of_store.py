"""`hetmoe pareto` of a sweep's store: its plans and its measured quality, estimated on hardware."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.sweep.store import SweepRecord, read_sweep
from hetmoe.technologies.from_store import config_of, plan_of, tried_in
from tests.models.tiny import FULL


@pytest.fixture
def store(run, write_config: Callable[..., Path], tmp_path: Path) -> Path:
    code, _, err = run("sweep", write_config(), "-o", tmp_path / "store")
    assert code == 0, err
    return tmp_path / "store"


def test_points_are_those_of_the_store(run, store: Path, tmp_path: Path) -> None:
    code, out, err = run("pareto", store, "--batch", 1, "--batch", 4, "-o", tmp_path / "p")
    assert code == 0, err
    record, written = read_sweep(store), json.loads((tmp_path / "p" / "pareto.json").read_text())
    assert set(written["groups"]) == {"pcm-c0-8bits", "pcm-c4-8bits"} and "pcm, c = 4, 8-bit converters" in out
    points = written["groups"]["pcm-c4-8bits"]["points"]
    measured: dict[str, list[float]] = {}
    for result in record.results:
        if result.point.noise_scale == 4:
            measured.setdefault(result.point.placement, []).append(result.perplexity)
    assert len(points) == 2 * (len(measured) + 1)
    for point in points:
        if point["rule"] == "all_digital":
            assert point["tiles"] == 0
            continue
        np.testing.assert_allclose(point["perplexity"], np.mean(measured[point["rule"]]), rtol=1e-12)
        assert (point["tiles"] > 0) == (point["rule"] != "all_digital")
    rules = {p["rule"]: p["tiles"] for p in points}
    assert rules["router_norm"] == rules["random"] == 0.75 * rules["experts_analog"]


def test_plans_are_those_that_were_measured(store: Path) -> None:
    record = read_sweep(store)
    config = config_of(record)
    assert isinstance(config, ModelConfig) and config.num_experts == 8
    plans = {}
    for result in record.results:
        plans.setdefault(result.point.placement, []).append(np.asarray(plan_of(record, config, result.point).experts))
    scores = np.asarray(record.scores["router_norm"])
    for plan in plans["router_norm"]:
        np.testing.assert_array_equal(np.sort(np.argsort(-scores[0], kind="stable")[:2]), np.flatnonzero(~plan[0]))
    assert all((~plan).sum() == 2 for plan in plans["random"])
    assert len({plan.tobytes() for plan in plans["random"]}) == 2  # one for each seed
    assert all(plan.all() for plan in plans["experts_analog"])
    assert {c.noise_scale for c in tried_in(record, config)} == {0, 4}


@pytest.mark.parametrize("sizes", [FULL])
def test_configs_survive_the_store(sizes: dict[str, int]) -> None:
    config = ModelConfig(**sizes)
    content = json.loads(json.dumps(dataclasses.asdict(config)))
    record = SweepRecord.__new__(SweepRecord)
    object.__setattr__(record, "model", {"config": content})
    assert config_of(record) == config
    object.__setattr__(record, "model", {"name": "x"})
    with pytest.raises(InputError, match="cannot be read"):
        config_of(record)
