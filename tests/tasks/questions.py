"""A few questions of every task, in the schema of the hub's repositories, written as JSONL files or as snapshots."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TEXT = (
    "the man and woman went to house with dog or cat then they saw river near old town water is warm cold red blue "
    "how many books does she have left after you take two away from table who would never run fast in winter"
)
WORDS = TEXT.split()
# Task -> (hub repository, configuration, split that is evaluated, split of the examples).
TASKS = {
    "piqa": ("baber/piqa", None, "validation", "train"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", "train"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", "train"),
    "boolq": ("aps/super_glue", "boolq", "validation", "train"),
    "hellaswag": ("Rowan/hellaswag", None, "validation", "train"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", "train"),
    "mathqa": ("regisss/math_qa", None, "test", "train"),
}


def _say(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))


def _piqa(draw: random.Random, number: int) -> Row:
    return {"goal": _say(draw, 4, 9), "sol1": _say(draw, 2, 9), "sol2": _say(draw, 2, 9), "label": number % 2}


def _arc(draw: random.Random, number: int) -> Row:
    count = 3 if number == 1 else 4  # some published rows have three choices, some number them
    labels = ["1", "2", "3", "4"] if number == 2 else ["A", "B", "C", "D"][:count]
    choices = {"text": [_say(draw, 1, 6) for _ in labels], "label": labels}
    answer = labels[(number + 2) % count]
    return {"id": f"q{number}", "question": _say(draw, 5, 12) + "?", "choices": choices, "answerKey": answer}


def _boolq(draw: random.Random, number: int) -> Row:
    return {"question": _say(draw, 4, 8), "passage": _say(draw, 20, 40), "idx": number, "label": number % 2}


def _hellaswag(draw: random.Random, number: int) -> Row:
    return {
        "ind": number, "activity_label": "Cooking", "ctx_a": _say(draw, 5, 9) + ".", "ctx_b": _say(draw, 1, 2),
        "endings": [_say(draw, 3, 9) + " [title] now." for _ in range(4)], "label": str(number % 4),
    }  # fmt: skip


def _winogrande(draw: random.Random, number: int) -> Row:
    sentence = f"{_say(draw, 4, 8)} because _ {_say(draw, 3, 6)}."
    return {"sentence": sentence, "option1": "dog", "option2": "old cat", "answer": str(1 + number % 2)}


def _mathqa(draw: random.Random, number: int) -> Row:
    options = " , ".join(f"{letter} ) {draw.randint(1, 900)}" for letter in "abcde")
    return {"Problem": _say(draw, 8, 16) + "?", "options": options, "correct": "abcde"[number % 5]}


def _mmlu(draw: random.Random, number: int) -> Row:
    choices = [_say(draw, 1, 4) for _ in range(4)]
    return {"question": _say(draw, 4, 9) + "?", "subject": "any", "choices": choices, "answer": number % 4}


_ROWS = {
    "piqa": _piqa, "arc_easy": _arc, "arc_challenge": _arc, "boolq": _boolq, "hellaswag": _hellaswag,
    "winogrande": _winogrande, "mathqa": _mathqa,
}  # fmt: skip


def rows(task: str, split: str, count: int) -> list[Row]:
    """The same rows on every call; any other name than those of `TASKS` is a subject of mmlu."""
    draw = random.Random(f"{task} {split}")
    return [_ROWS.get(task, _mmlu)(draw, number) for number in range(count)]


def write_jsonl(path: Path, content: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in content), encoding="utf-8")


def all_splits(task: str) -> Iterator[tuple[str, list[Row]]]:
    """What the hub's repository holds, made small."""
    _, _, evaluated, examples = TASKS[task]
    for split in dict.fromkeys((examples, "validation", evaluated)):
        yield split, rows(task, split, 6 if split == examples else 5)


def subject_rows(subjects: list[str]) -> dict[str, dict[str, list[Row]]]:
    """Of every subject of mmlu: two or three questions, so that the group's mean must weigh them."""
    return {
        subject: {"test": rows(subject, "test", 2 + number % 2), "dev": rows(subject, "dev", 5)}
        for number, subject in enumerate(subjects)
    }


def write_files(root: Path, subjects: list[str]) -> Path:
    """JSONL files of all eight tasks."""
    for task in TASKS:
        for split, content in all_splits(task):
            write_jsonl(root / task / f"{split}.jsonl", content)
    for subject, splits in subject_rows(subjects).items():
        for split, content in splits.items():
            write_jsonl(root / "mmlu" / subject / f"{split}.jsonl", content)
    return root


def write_snapshots(root: Path, subjects: list[str]) -> Path:
    """The same rows in folders like snapshots of the hub's repositories: a README that lists configurations."""
    repositories: dict[str, dict[str, dict[str, list[Row]]]] = {"cais/mmlu": subject_rows(subjects)}
    for task, (repository, configuration, _, _) in TASKS.items():
        repositories.setdefault(repository, {})[configuration or "default"] = dict(all_splits(task))
    for repository, configurations in repositories.items():
        lines = ["---", "configs:"]
        for name, splits in configurations.items():
            lines += [f"- config_name: {name}", "  data_files:"]
            for split, content in splits.items():
                write_jsonl(root / repository / name / f"{split}.jsonl", content)
                lines += [f"  - split: {split}", f"    path: {name}/{split}.jsonl"]
        (root / repository / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
    return root
