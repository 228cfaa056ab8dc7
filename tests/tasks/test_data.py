"""Where questions come from, and which splits a task needs."""

from pathlib import Path
from typing import Any

import pytest

from hetmoe.errors import InputError
from hetmoe.evaluate.tasks.data import Source, find_source, needed_splits, use_source
from tests.tasks.questions import rows, write_jsonl

PIQA: dict[str, Any] = {
    "task": "piqa", "dataset_path": "baber/piqa", "dataset_name": None,
    "training_split": "train", "validation_split": "validation", "test_split": None,
}  # fmt: skip
MMLU: dict[str, Any] = {
    "task": "mmlu_anatomy", "dataset_path": "cais/mmlu", "dataset_name": "anatomy",
    "test_split": "test", "fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"},
}  # fmt: skip


def files(folder: Path, task: str, *splits: str) -> None:
    for split in splits:
        write_jsonl(folder / f"{split}.jsonl", rows(task, split, 3))


def no_splits(folder: Path, name: str | None) -> list[str]:
    raise AssertionError(f"{folder} {name} is not a snapshot")


def test_what_is_there_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has neither baber/piqa .* nor piqa with JSONL"):
        find_source(tmp_path, "piqa", None, PIQA)
    files(tmp_path / "piqa", "piqa", "validation")
    source = find_source(tmp_path, "piqa", None, PIQA)
    assert source.files == {"validation": tmp_path / "piqa" / "validation.jsonl"}
    assert str(source) == f"JSONL {tmp_path / 'piqa'} (validation)"
    (tmp_path / "baber" / "piqa").mkdir(parents=True)
    with pytest.raises(InputError, match=r"both .* hold its questions"):
        find_source(tmp_path, "piqa", None, PIQA)
    (tmp_path / "piqa" / "validation.jsonl").unlink()
    assert find_source(tmp_path, "piqa", None, PIQA) == Source(snapshot=tmp_path / "baber" / "piqa")


def test_leaves_of_a_group_lie_in_its_folder(tmp_path: Path) -> None:
    files(tmp_path / "mmlu" / "anatomy", "mmlu", "test")
    assert find_source(tmp_path, "mmlu_anatomy", "mmlu", MMLU).files is not None
    with pytest.raises(InputError, match="nor mmlu_anatomy with JSONL"):
        find_source(tmp_path, "mmlu_anatomy", None, MMLU)


def used(tmp_path: Path, config: dict[str, Any], shots: int) -> dict[str, Any]:
    source = find_source(tmp_path, config["task"], None, config)
    return use_source(config["task"], config, source, shots, no_splits)


def test_absent_splits_are_unset_or_refused(tmp_path: Path) -> None:
    files(tmp_path / "piqa", "piqa", "validation")
    found = used(tmp_path, PIQA, 0)
    assert found["training_split"] is None and found["validation_split"] == "validation"
    assert found["dataset_path"] == "json" and found["dataset_name"] is None
    assert found["dataset_kwargs"] == {"data_files": {"validation": str(tmp_path / "piqa" / "validation.jsonl")}}
    assert PIQA["training_split"] == "train"  # the task's own file is not changed
    with pytest.raises(InputError, match="takes its examples from split 'train', which JSONL"):
        used(tmp_path, PIQA, 2)
    files(tmp_path / "piqa", "piqa", "train")
    assert used(tmp_path, PIQA, 2)["training_split"] == "train"
    (tmp_path / "piqa" / "validation.jsonl").unlink()
    with pytest.raises(InputError, match="takes its questions from split 'validation'"):
        used(tmp_path, PIQA, 0)


def test_examples_of_mmlu_are_from_dev(tmp_path: Path) -> None:
    files(tmp_path / "mmlu_anatomy", "mmlu", "test", "train", "validation")
    assert used(tmp_path, MMLU, 0)["fewshot_split"] is None
    with pytest.raises(InputError, match="takes its examples from split 'dev'"):
        used(tmp_path, MMLU, 1)


def test_bad_rows_are_found_in_every_split_that_is_read(tmp_path: Path) -> None:
    files(tmp_path / "piqa", "piqa", "validation", "train", "other")
    (tmp_path / "piqa" / "other.jsonl").write_text("not read")
    used(tmp_path, PIQA, 0)
    (tmp_path / "piqa" / "train.jsonl").write_text('{"goal": "x"}\n')
    with pytest.raises(InputError, match=r"train.jsonl, line 1: sol1"):
        used(tmp_path, PIQA, 0)


def test_snapshots_keep_their_configuration(tmp_path: Path) -> None:
    asked: list[tuple[Path, str | None]] = []

    def splits(folder: Path, name: str | None) -> list[str]:
        asked.append((folder, name))
        return ["test"]

    found = use_source("mmlu_anatomy", MMLU, Source(snapshot=tmp_path), 0, splits)
    assert asked == [(tmp_path, "anatomy")]
    assert (found["dataset_path"], found["dataset_name"], found["fewshot_split"]) == (str(tmp_path), "anatomy", None)


def test_few_shot_never_takes_the_questions_themselves() -> None:
    config = PIQA | {"training_split": None}
    assert needed_splits("piqa", config, 0) == {"questions": "validation"}
    with pytest.raises(InputError, match="no split to take 2 examples from"):
        needed_splits("piqa", config, 2)
    assert needed_splits("piqa", config | {"fewshot_config": {"samples": [{}]}}, 2) == {"questions": "validation"}
    with pytest.raises(InputError, match="no test or validation split"):
        needed_splits("piqa", {"training_split": "train"}, 0)
