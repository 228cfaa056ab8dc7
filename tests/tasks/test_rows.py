"""Rows of JSONL files: good ones of all eight tasks pass, bad ones are named by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from hetmoe.errors import InputError
from hetmoe.evaluate.tasks.rows import check_rows
from tests.tasks.questions import TASKS, rows, write_jsonl

DATASETS = {task: (repository, name) for task, (repository, name, _, _) in TASKS.items()} | {
    "mmlu": ("cais/mmlu", "anatomy")
}


@pytest.mark.parametrize("task", DATASETS)
def test_good_rows_pass(tmp_path: Path, task: str) -> None:
    write_jsonl(tmp_path / "test.jsonl", rows(task, "test", 7))
    assert check_rows(tmp_path / "test.jsonl", *DATASETS[task]) == 7


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("piqa", {"label": 2}, "label=2 must be one of 0, 1"),
    ("piqa", {"label": True}, "label=true"),
    ("piqa", {"label": "1"}, 'label="1"'),
    ("piqa", {"goal": "  "}, "goal="),
    ("piqa", {"sol2": None}, r"sol2=\(absent\)"),
    ("arc_easy", {"answerKey": "E"}, 'answerKey="E" must be one of "1", "2", "3", "4"'),
    ("arc_easy", {"choices": ["a", "b"]}, "choices="),
    ("arc_challenge", {"choices": {"text": ["a", "b"], "label": ["A", "B", "C"]}}, "choices.label="),
    ("arc_challenge", {"choices": {"text": ["a"], "label": ["A"]}}, "choices.text="),
    ("boolq", {"label": -1}, "label=-1"),
    ("boolq", {"passage": 3}, "passage=3"),
    ("hellaswag", {"label": ""}, 'label=""'),
    ("hellaswag", {"label": 1}, "label=1"),
    ("hellaswag", {"endings": ["a", "b", "c"]}, "endings="),
    ("winogrande", {"sentence": "no gap here."}, "has no '_'"),
    ("winogrande", {"sentence": "gap at the end _ "}, "no text behind '_'"),
    ("winogrande", {"answer": 1}, "answer=1"),
    ("mathqa", {"options": "a) 1, b) 2, c) 3, d) 4, e) 5"}, "options="),
    ("mathqa", {"options": "a ) 1 , b ) 2 , c ) 3 , d ) 4"}, "options="),
    ("mathqa", {"correct": "f"}, 'correct="f"'),
    ("mmlu", {"choices": ["a", "b", "c"]}, "choices="),
    ("mmlu", {"answer": 4}, "answer=4"),
    ("mmlu", {"answer": "A"}, 'answer="A"'),
]


@pytest.mark.parametrize(
    ("task", "change", "message"), BAD, ids=lambda v: json.dumps(v)[:40] if isinstance(v, dict) else ""
)
def test_bad_rows_are_named(tmp_path: Path, task: str, change: dict[str, Any], message: str) -> None:
    content = rows(task, "test", 4)
    content[2] |= change
    path = tmp_path / "test.jsonl"
    write_jsonl(path, content)
    with pytest.raises(InputError, match=message) as caught:
        check_rows(path, *DATASETS[task])
    assert f"{path}, line 3: " in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        (b'{"a": 1}\n{"a": ', "line 2: not readable as JSON"),
        (b'{"a": 1}\n[1]\n', "line 2: must be a JSON object"),
        (b'{"a": 1}\n\n{"a": 1, "b": 2}\n', r"line 3: has not the fields of the row before it \(differing: b\)"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
    ],
)
def test_other_datasets_are_checked_for_form(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        check_rows(path, "some/dataset", None)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        check_rows(tmp_path / "absent.jsonl", "some/dataset", None)
