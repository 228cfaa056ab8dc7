"""Runs over chips: what is computed, what is kept, and what an interrupted run does next."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import hetmoe
from hetmoe.errors import InputError
from hetmoe.evaluate.noise_sweep import Placement, random_placement
from hetmoe.evaluate.tasks import run
from hetmoe.evaluate.tasks.batching import Request
from hetmoe.evaluate.tasks.run import Analog, chips_to_run, run_tasks
from hetmoe.evaluate.tasks.store import Store
from hetmoe.models.model import Model
from tests.tasks.tiny import tiny_model


@dataclasses.dataclass
class FakeTask:
    """Its metric is the sum of its log-likelihoods."""

    name: str
    digest: str = "d"

    @property
    def requests(self) -> list[Request]:
        return [Request(context=[len(self.name)], continuation=[1, 2])]

    def metrics(self, scores: Any) -> dict[str, Any]:
        return {"questions": 1, "acc": sum(s.log_prob for s in scores), "acc_stderr": None}


@pytest.fixture(scope="module")
def tiny() -> Model:
    return tiny_model()


def make_analog(tiny: Model, seeds: int = 2, scale: float = 3.0, **changes: Any) -> Analog:
    given = {
        "spec": hetmoe.analog_spec("pcm", noise_scale=scale), "calibration": None,
        "placement": Placement(name="experts analog", plans=[hetmoe.experts_analog(tiny.config)]),
        "keys": jax.random.split(jax.random.key(0), seeds),
    }  # fmt: skip
    return Analog(**(given | changes))


def store_of(folder: Path, **settings: Any) -> Store:
    store = Store(folder=folder, settings={"device": "pcm"} | settings, provenance={"made": "here"})
    store.open()
    return store


TASKS = [FakeTask("one"), FakeTask("three"), FakeTask("seven77")]


def go(
    tiny: Model, store: Store, analog: Analog, tasks: list[FakeTask], stop_after: int | None = None
) -> tuple[Any, int, int]:
    """(results, tasks scored, chips programmed)."""
    scored: list[int] = []
    programmed: list[int] = []
    real_score, real_chip = run.score_requests, run._chip

    def score(*arguments: Any) -> Any:
        if stop_after is not None and len(scored) == stop_after:
            raise KeyboardInterrupt
        scored.append(1)
        return real_score(*arguments)

    def chip(*arguments: Any) -> Any:
        programmed.append(1)
        return real_chip(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "score_requests", score)
        patch.setattr(run, "_chip", chip)
        try:
            results = run_tasks(
                tiny, tasks, analog, store, tokens_per_batch=64, implementation="xla", progress=lambda *_: None
            )
        except KeyboardInterrupt:
            results = None
    return results, len(scored), len(programmed)


def test_each_chip_is_programmed_once_and_runs_all_tasks(tiny: Model, tmp_path: Path) -> None:
    results, scored, programmed = go(tiny, store_of(tmp_path / "a"), make_analog(tiny), TASKS)
    assert (scored, programmed) == (9, 2)
    for task in TASKS:
        values = [metrics["acc"] for metrics in results[task.name]]
        assert len(set(values)) == 3  # digital and two seeds
        for name, value in zip(("digital", "seed0", "seed1"), values, strict=True):
            record = json.loads((tmp_path / "a" / "results" / f"{task.name}-{name}.json").read_text())
            assert record["metrics"]["acc"] == value and record["provenance"] == {"made": "here"}
    again, *_ = go(tiny, store_of(tmp_path / "b"), make_analog(tiny), TASKS)
    assert again == results  # deterministic


def test_an_interrupted_run_goes_on_where_it_stopped(tiny: Model, tmp_path: Path) -> None:
    whole, *_ = go(tiny, store_of(tmp_path / "whole"), make_analog(tiny), TASKS)
    _, scored, _ = go(tiny, store_of(tmp_path / "a"), make_analog(tiny), TASKS, stop_after=5)
    assert scored == 5 and len(list((tmp_path / "a" / "results").iterdir())) == 5
    results, scored, programmed = go(tiny, store_of(tmp_path / "a"), make_analog(tiny), TASKS)
    assert (scored, programmed) == (4, 2) and results == whole
    results, scored, programmed = go(tiny, store_of(tmp_path / "a"), make_analog(tiny), TASKS)
    assert (scored, programmed) == (0, 0) and results == whole


def test_seeds_and_tasks_may_be_added(tiny: Model, tmp_path: Path) -> None:
    first, *_ = go(tiny, store_of(tmp_path / "a"), make_analog(tiny, 2), TASKS[:2])
    more, scored, _ = go(tiny, store_of(tmp_path / "a"), make_analog(tiny, 3), TASKS)
    assert scored == 4 + 2 and more["one"][:3] == first["one"]


def test_results_of_something_else_are_refused(tiny: Model, tmp_path: Path) -> None:
    go(tiny, store_of(tmp_path / "a"), make_analog(tiny), TASKS)
    with pytest.raises(InputError, match='device is "pcm" there and "afm" here'):
        store_of(tmp_path / "a", device="afm")
    with pytest.raises(InputError, match="limit is absent there and 3 here"):
        store_of(tmp_path / "a", limit=3)
    store = store_of(tmp_path / "a")
    with pytest.raises(InputError, match=r"one-digital.json: made with other questions"):
        go(tiny, store, make_analog(tiny), [FakeTask("one", "other")])
    with pytest.raises(InputError, match=r"seed0.json: made with other seed"):
        go(tiny, store, make_analog(tiny, keys=jax.random.split(jax.random.key(1), 2)), TASKS)
    other = Placement(name="experts analog", plans=[hetmoe.place(np.ones((1, 4)), 0.5)])
    with pytest.raises(InputError, match=r"seed0.json: made with other placement"):
        go(tiny, store, make_analog(tiny, placement=other), TASKS)
    (tmp_path / "a" / "results" / "one-seed0.json").write_text("{}")
    with pytest.raises(InputError, match="not a result of 'hetmoe tasks'"):
        go(tiny, store, make_analog(tiny), TASKS)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        store_of(tmp_path / "b")


def test_only_chips_that_differ_are_run(tiny: Model) -> None:
    quiet = hetmoe.analog_spec("pcm", noise_scale=0.0)
    drifting = hetmoe.analog_spec("pcm", noise_scale=0.0, time_s=86400.0)
    digital = Placement(name="all digital", plans=[hetmoe.all_digital(tiny.config)])
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = random_placement("random", tiny, 0.5, keys)
    assert chips_to_run(make_analog(tiny, 3)) == 3
    assert chips_to_run(make_analog(tiny, 3, placement=digital)) == 0
    assert chips_to_run(make_analog(tiny, 3, spec=quiet)) == 1
    assert chips_to_run(make_analog(tiny, 3, spec=drifting)) == 3
    assert chips_to_run(make_analog(tiny, 3, spec=quiet, placement=drawn)) == 3
