"""Where the questions of a task come from: the hub, a local snapshot of it, or JSONL files."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from hetmoe.errors import InputError
from hetmoe.evaluate.tasks.rows import check_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Questions of one leaf task: a snapshot of its hub repository, or JSONL files by split."""

    snapshot: Path | None = None
    files: dict[str, Path] | None = None

    def __str__(self) -> str:
        """One line for the user."""
        if self.snapshot is not None:
            return f"snapshot {self.snapshot}"
        folder = next(iter((self.files or {}).values())).parent
        return f"JSONL {folder} ({', '.join(self.files or {})})"


def find_source(root: Path, task: str, group: str | None, config: dict[str, Any]) -> Source:
    """Recognises by what is there: `root/<hub repository>` is a snapshot, `root/<task>/<split>.jsonl` are files.

    Args:
        root: the user's folder.
        task: name of the leaf task.
        group: name of the group that was asked for, whose leaves lie in `root/<group>/<configuration>`.
        config: the task's own file of lm-eval.

    Raises:
        InputError: if there is neither, or both.
    """
    repository, name = config.get("dataset_path"), config.get("dataset_name")
    if not isinstance(repository, str):
        raise InputError(f"task {task!r} makes its questions in Python: it cannot take them from --data")
    folder = root / task if group is None else root / group / str(name or task)
    files = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    snapshot = root / repository
    if snapshot.is_dir() and files:
        raise InputError(f"task {task!r}: both {snapshot} and {folder} hold its questions; remove one of them")
    if snapshot.is_dir():
        return Source(snapshot=snapshot)
    if files:
        return Source(files=files)
    raise InputError(
        f"task {task!r}: {root} has neither {repository} (a snapshot of the hub's repository) nor "
        f"{folder.relative_to(root)} with JSONL files named after the splits"
    )


def needed_splits(task: str, config: dict[str, Any], shots: int) -> dict[str, str]:
    """Split to evaluate (`"questions"`) and, for few-shot prompts, to take the examples from (`"examples"`).

    Raises:
        InputError: if examples are wanted of a task that names no split for them. lm-eval would take them from the
            questions themselves without a word.
    """
    splits = {"questions": config.get("test_split") or config.get("validation_split")}
    if splits["questions"] is None:
        raise InputError(f"task {task!r} names no test or validation split")
    if shots:
        few = config.get("fewshot_config") or {}
        own = few.get("samples") is not None
        examples = config.get("fewshot_split") or few.get("split") or config.get("training_split")
        if examples is None and not own:
            raise InputError(f"task {task!r} has no split to take {shots} examples from; use --num-fewshot 0")
        if examples is not None:
            splits["examples"] = examples
    return splits  # pyright: ignore[reportReturnType]


def use_source(
    task: str,
    config: dict[str, Any],
    source: Source,
    shots: int,
    splits_of: Callable[[Path, str | None], Collection[str]],
) -> dict[str, Any]:
    """The task's file with its questions taken from `source`, and checked if they are JSONL files.

    Splits that are not there and not needed are unset: lm-eval would stumble over them. It never falls back to another
    split for what is needed.

    Args:
        task: name of the leaf task.
        config: its file.
        source: its questions.
        shots: examples per prompt.
        splits_of: (folder, configuration) -> splits of a snapshot.

    Raises:
        InputError: for a split that is needed and absent, or a bad row.
    """
    name = config.get("dataset_name")
    needed = needed_splits(task, config, shots)
    there = source.files.keys() if source.files is not None else splits_of(source.snapshot or Path(), name)
    for purpose, split in needed.items():
        if split not in there:
            raise InputError(
                f"task {task!r} takes its {purpose} from split {split!r}, which {source} does not hold"
                + ("; use --num-fewshot 0" if purpose == "examples" else "")
            )
    changed = dict(config)
    for field in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if changed.get(field) not in there:
            changed[field] = None
    few = changed.get("fewshot_config")
    if few is not None and few.get("split") not in there:
        changed["fewshot_config"] = {key: value for key, value in few.items() if key != "split"}
    if source.files is None:
        return changed | {"dataset_path": str(source.snapshot)}
    used = {split: source.files[split] for split in source.files if split in set(needed.values()) | _named(changed)}
    for path in used.values():
        check_rows(path, config["dataset_path"], name)
    data_files = {split: str(path) for split, path in used.items()}
    return changed | {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": data_files}}


def _named(config: dict[str, Any]) -> set[str]:
    fields = ("training_split", "validation_split", "test_split", "fewshot_split")
    return {config[field] for field in fields if config.get(field) is not None}
