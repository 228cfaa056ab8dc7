"""Tasks of lm-eval: loading them, building their requests once, and turning scores into its metrics.

Importing this module needs lm-eval (the extra `eval`).
"""

import collections
import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.tasks._yaml_loader import load_yaml  # pyright: ignore[reportMissingImports]

from hetmoe.errors import InputError
from hetmoe.evaluate.tasks.adapter import Encoder
from hetmoe.evaluate.tasks.batching import Request
from hetmoe.evaluate.tasks.data import Source, find_source, needed_splits, use_source
from hetmoe.evaluate.tasks.names import METRICS, PAPER_TASKS, Metrics
from hetmoe.evaluate.tasks.score import Score
from hetmoe.models.model import Model

_FEWSHOT_SEED = 1234  # lm-eval's own default
_SCORED = ("multiple_choice", "loglikelihood")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedTask:
    """A task with its requests built and encoded: what is left is to score them, once per seed."""

    name: str
    leaves: list[tuple[Any, int]]  # lm-eval's tasks, and how many requests each has
    group: Any  # lm-eval's group, or None for a task that is its own only leaf
    requests: list[Request]
    questions: int
    shots: int
    digest: str  # of all questions and token ids
    sources: list[Source]  # of every leaf; empty for the hub

    @property
    def where(self) -> str:
        """Where the questions came from, in a few words."""
        if not self.sources:
            return "hub"
        first = str(self.sources[0])
        return first if len(set(map(str, self.sources))) == 1 else f"{first} and {len(self.sources) - 1} more"

    def metrics(self, scores: Sequence[Score]) -> Metrics:
        """lm-eval's metrics of all requests' scores."""
        found: dict[str, Metrics] = {}
        start = 0
        for task, count in self.leaves:
            found[task.task_name] = _leaf_metrics(task, scores[start : start + count])
            start += count
        if self.group is None:
            return next(iter(found.values()))
        return _group_metrics(self.group, found) | {"subtasks": found}


def task_manager() -> Any:
    """lm-eval's index of all its tasks; takes some ten seconds."""
    return TaskManager()


def load_task(
    manager: Any, name: str, model: Model, *, root: Path | None, shots: int | None, limit: int | None
) -> PreparedTask:
    """Loads a task, or a group of tasks with a mean of its own, and builds its requests.

    Args:
        manager: lm-eval's index of tasks (`task_manager`).
        name: of the task.
        model: whose tokenizer encodes.
        root: folder of local questions; None = the hub.
        shots: examples per prompt; None = the task's own default.
        limit: the first questions of every leaf only.

    Raises:
        InputError: for an unknown name, a task that generates text, or questions that are absent or malformed.
    """
    leaves = _leaf_names(manager, name)
    sources: list[Source] = []
    local_entries: dict[str, Any] = {}
    configs = {leaf: _config(manager, leaf) for leaf in leaves}
    wanted = {leaf: _shots(config, shots) for leaf, config in configs.items()}
    for leaf, config in configs.items():
        _refuse_generation(leaf, config.get("output_type", "generate_until" if "class" not in config else None))
        if "class" not in config:
            needed_splits(leaf, config, wanted[leaf])
        if root is not None:
            source = find_source(root, leaf, None if leaf == name else name, config)
            local = use_source(leaf, config, source, wanted[leaf], _splits_of)
            local_entries[leaf] = dataclasses.replace(manager.task_index[leaf], yaml_path=None, cfg=local)
            sources.append(source)
    own_entries = {leaf: manager.task_index[leaf] for leaf in local_entries}
    manager.task_index.update(local_entries)  # a group finds its tasks by name, so the names must lead to local ones
    try:
        loaded = manager.load([name])
        tasks = list(loaded["tasks"].values())
        for task in tasks:
            _refuse_generation(task.task_name, task.OUTPUT_TYPE)
            task.set_config("num_fewshot", wanted.get(task.task_name, shots or 0))
            task.set_fewshot_seed(_FEWSHOT_SEED)
            task.build_all_requests(limit=limit, rank=0, world_size=1)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  whatever its data make a task raise
        place = "the hub; give a folder of local questions with --data" if root is None else str(root)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(f"task {name!r}: its questions cannot be used ({reason}); they come from {place}") from None
    finally:
        manager.task_index.update(own_entries)
    for task in tasks:
        if "acc" not in task.aggregation():
            raise InputError(f"task {task.task_name!r} has no accuracy ('acc'), but {', '.join(task.aggregation())}")
    return _prepared(name, tasks, loaded.get("groups", {}).get(name), model, max(wanted.values()), sources)


def _prepared(name: str, tasks: list[Any], group: Any, model: Model, shots: int, sources: list[Source]) -> PreparedTask:
    encoder = Encoder(model)
    digest = hashlib.sha256()
    requests: list[Request] = []
    for task in tasks:
        for instance, (_, context, continuation) in zip(
            task.instances, encoder.loglikelihood(task.instances, disable_tqdm=True), strict=True
        ):
            requests.append(Request(context=context, continuation=continuation))
            told = [task.task_name, instance.doc, context, continuation]
            digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    return PreparedTask(
        name=name,
        leaves=[(task, len(task.instances)) for task in tasks],
        group=group,
        requests=requests,
        questions=sum(len({instance.doc_id for instance in task.instances}) for task in tasks),
        shots=shots,
        digest=digest.hexdigest(),
        sources=sources,
    )


def _leaf_names(manager: Any, name: str) -> list[str]:
    """The tasks that a name stands for. Raises InputError for one that stands for no task, or for a mere list."""
    entry = manager.task_index.get(name)
    if entry is None:
        close = difflib.get_close_matches(name, manager.all_tasks, n=3)
        raise InputError(
            f"unknown task {name!r}: use {', '.join(PAPER_TASKS)}, or another multiple-choice task of lm-eval"
            + (f" (such as {', '.join(close)})" if close else "")
        )
    if name in manager.all_tags:
        raise InputError(
            f"{name!r} is a list of tasks, which lm-eval does not average: name {', '.join(sorted(entry.tags))}"
        )
    if name not in manager.all_groups:
        return [name]
    if not load_yaml(entry.yaml_path, resolve_func=False).get("aggregate_metric_list"):
        raise InputError(f"{name!r} is a group of tasks that lm-eval does not average: name the tasks themselves")
    return list(_members(manager, name))


def _members(manager: Any, name: str) -> Iterator[str]:
    entry = manager.task_index[name]
    if name in manager.all_tags:
        yield from sorted(entry.tags)
    elif name in manager.all_groups:
        for member in load_yaml(entry.yaml_path, resolve_func=False)["task"]:
            if not isinstance(member, str) or member not in manager.task_index:
                raise InputError(
                    f"group {name!r} of lm-eval changes its tasks in its own file: name the tasks themselves"
                )
            yield from _members(manager, member)
    else:
        yield name


def _config(manager: Any, leaf: str) -> dict[str, Any]:
    entry = manager.task_index[leaf]
    return dict(entry.cfg or {}) if entry.yaml_path is None else dict(load_yaml(entry.yaml_path, resolve_func=True))


def _splits_of(folder: Path, configuration: str | None) -> list[str]:
    """Splits of a snapshot of a hub repository."""
    try:
        return datasets.get_dataset_split_names(str(folder), configuration)
    except Exception as error:  # noqa: BLE001  whatever a broken folder makes the library raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: not a usable snapshot ({type(error).__name__}: {reason})") from None


def _shots(config: dict[str, Any], shots: int | None) -> int:
    """As `lm_eval.simple_evaluate`: a task whose file says 0 stays at 0."""
    own = config.get("num_fewshot")
    return own or 0 if shots is None or own == 0 else shots


def _refuse_generation(name: str, output_type: str | None) -> None:
    if output_type is not None and output_type not in _SCORED:
        raise InputError(
            f"task {name!r} is of the kind {output_type}: hetmoe runs tasks that score given answers "
            f"({', '.join(_SCORED)}), such as {', '.join(PAPER_TASKS)}"
        )


def _leaf_metrics(task: Any, scores: Sequence[Score]) -> Metrics:
    """Means over questions, with lm-eval's standard error of sampling (None for one question)."""
    by_question: dict[int, list[Any]] = collections.defaultdict(list)
    for instance, score in zip(task.instances, scores, strict=True):
        instance.resps = [tuple(score)]
        instance.filtered_resps = {}
        by_question[instance.doc_id].append(instance)
    task.apply_filters()
    values: dict[str, list[float]] = collections.defaultdict(list)
    for instances in by_question.values():
        ordered = sorted(instances, key=lambda i: i.idx)
        key = next(iter(ordered[0].filtered_resps))
        result = task.process_results(ordered[0].doc, [i.filtered_resps[key] for i in ordered])
        for metric in METRICS:
            if metric in result:
                values[metric].append(float(result[metric]))
    found: Metrics = {"questions": len(by_question), "ties": count_ties(task, by_question.values())}
    for metric, each in values.items():
        found[metric] = float(np.mean(each))
        count = len(each)
        found[f"{metric}_stderr"] = float(np.std(each, ddof=1) / math.sqrt(count)) if count > 1 else None
    return found


def count_ties(task: Any, questions: Iterable[list[Any]]) -> int:
    """Questions with several best answers by likelihood (`acc`), of which lm-eval takes the first.

    Args:
        task: of lm-eval.
        questions: the scored instances of each.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0
    ties = 0
    for instances in questions:
        # For mutual information every choice is asked for a second time, behind an empty context.
        asked = [i for i in instances if i.idx < len(instances) // (2 if _asks_twice(task) else 1)]
        log_probs = [instance.resps[0][0] for instance in asked]
        ties += log_probs.count(max(log_probs)) > 1
    return ties


def _asks_twice(task: Any) -> bool:
    return "acc_mutual_info" in task.aggregation()


def _group_metrics(group: Any, leaves: dict[str, Metrics]) -> Metrics:
    """lm-eval's mean over the tasks of a group, with its standard error."""
    told: dict[str, dict[str, Any]] = {}
    for name, found in leaves.items():
        told[name] = {"sample_len": found["questions"]}
        for metric in METRICS:
            if metric in found:
                error = found[f"{metric}_stderr"]
                told[name] |= {
                    f"{metric},none": found[metric],
                    f"{metric}_stderr,none": "N/A" if error is None else error,
                }
    mean = group.aggregate(told)
    result: Metrics = {name: sum(found[name] for found in leaves.values()) for name in ("questions", "ties")}
    for metric in METRICS:
        if f"{metric},none" in mean:
            error = mean[f"{metric}_stderr,none"]
            result |= {
                metric: float(mean[f"{metric},none"]),
                f"{metric}_stderr": None if error == "N/A" else float(error),
            }
    return result
