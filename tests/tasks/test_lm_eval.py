"""The real tasks of lm-eval on a few local questions, against prompts written by hand and the float64 numpy model."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetmoe import cli
from hetmoe.checkpoint.save import save_model
from hetmoe.errors import InputError
from hetmoe.evaluate.tasks.names import PAPER_TASKS
from hetmoe.evaluate.tasks.score import Chip, Score, score_requests
from hetmoe.models.model import Model
from tests.tasks.questions import Row, all_splits, rows, subject_rows, write_files, write_jsonl, write_snapshots
from tests.tasks.tiny import numpy_score, tiny_model

pytestmark = [pytest.mark.tasks, pytest.mark.filterwarnings("ignore")]  # lm-eval and what it imports warn

Run = Callable[..., tuple[int, str, str]]
Question = tuple[list[tuple[str, str]], list[str], int]  # (context, continuation) of every choice; choices; right one


@pytest.fixture(scope="session")
def tiny() -> Model:
    return tiny_model()


@pytest.fixture(scope="session")
def manager() -> Any:
    """lm-eval's index of tasks, which takes long to make."""
    from hetmoe.evaluate.tasks.harness import task_manager

    return task_manager()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def subjects(manager: Any) -> list[str]:
    """Of mmlu, named by lm-eval."""
    from hetmoe.evaluate.tasks.harness import _leaf_names

    found = [name.removeprefix("mmlu_") for name in _leaf_names(manager, "mmlu")]
    assert len(found) == 57
    return found


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, subjects: list[str]) -> Path:
    return write_files(tmp_path_factory.mktemp("files"), subjects)


@pytest.fixture(scope="session")
def snapshots(tmp_path_factory: pytest.TempPathFactory, subjects: list[str]) -> Path:
    return write_snapshots(tmp_path_factory.mktemp("snapshots"), subjects)


def load(manager: Any, name: str, tiny: Model, root: Path, shots: int | None = None, limit: int | None = None) -> Any:
    from hetmoe.evaluate.tasks.harness import load_task

    return load_task(manager, name, tiny, root=root, shots=shots, limit=limit)


def ids(tiny: Model, text: str) -> list[int]:
    return tiny.tokenizer.encode(text).ids  # every byte is a token: nothing merges where two texts meet


def by_hand(task: str, row: Row) -> Question:
    """The prompt of every choice, as the papers of the tasks and lm-eval's files describe them."""
    if task == "winogrande":
        before, after = row["sentence"].split("_")
        options = [before + row["option1"], before + row["option2"]]
        return [(option, " " + after.strip()) for option in options], options, int(row["answer"]) - 1
    if task == "piqa":
        prompt, choices, right = f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]
    elif task.startswith("arc"):
        prompt, choices = f"Question: {row['question']}\nAnswer:", row["choices"]["text"]
        right = row["choices"]["label"].index(row["answerKey"])
    elif task == "boolq":
        prompt, choices = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"]
        right = row["label"]
    elif task == "hellaswag":
        prompt = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        choices, right = [e.replace(" [title]", ". ").replace("  ", " ") for e in row["endings"]], int(row["label"])
    elif task == "mathqa":
        prompt, right = f"Question: {row['Problem']}\nAnswer:", "abcde".index(row["correct"])
        choices = [part.split(" ) ")[1] for part in row["options"].split(" , ")]
    else:
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
        about = f"The following are multiple choice questions (with answers) about {task.replace('_', ' ')}.\n\n"
        prompt, choices, right = f"{about}{row['question']}\n{listed}\nAnswer:", list("ABCD"), row["answer"]
    return [(prompt, " " + choice) for choice in choices], choices, right


def expected(tiny: Model, task: str, content: list[Row]) -> tuple[list[float], list[float], list[float]]:
    """(log-likelihood of every choice; of every question 1 if acc is right; the same for acc_norm)."""
    log_probs: list[float] = []
    acc, norm = [], []
    for row in content:
        pairs, choices, right = by_hand(task, row)
        values = [numpy_score(tiny, ids(tiny, context), ids(tiny, continuation))[0] for context, continuation in pairs]
        log_probs += values
        acc.append(float(np.argmax(values) == right))
        norm.append(float(np.argmax(np.asarray(values) / [len(c) for c in choices]) == right))
    return log_probs, acc, norm


HAS_NORM = {"piqa", "arc_easy", "arc_challenge", "hellaswag", "mathqa"}


@pytest.mark.parametrize("task", [t for t in PAPER_TASKS if t != "mmlu"])
def test_accuracy_is_that_of_prompts_written_by_hand(tiny: Model, manager: Any, files: Path, task: str) -> None:
    prepared = load(manager, task, tiny, files)
    scores = score_requests(tiny, prepared.requests, Chip(), 600)
    found = prepared.metrics(scores)
    content = list(all_splits(task))[-1][1]
    log_probs, acc, norm = expected(tiny, task, content)
    # Up to 60 terms, each off by a few float32 units of logits of order 10.
    np.testing.assert_allclose([s.log_prob for s in scores], log_probs, rtol=2e-5, atol=1e-3)
    assert (found["questions"], found["acc"]) == (len(content), pytest.approx(np.mean(acc)))
    assert found["acc_stderr"] == pytest.approx(np.std(acc, ddof=1) / len(acc) ** 0.5)
    assert ("acc_norm" in found) == (task in HAS_NORM)
    if task in HAS_NORM:
        assert found["acc_norm"] == pytest.approx(np.mean(norm))
        assert found["acc_norm_stderr"] == pytest.approx(np.std(norm, ddof=1) / len(norm) ** 0.5)


def test_mmlu_is_the_mean_over_all_questions(tiny: Model, manager: Any, files: Path, subjects: list[str]) -> None:
    prepared = load(manager, "mmlu", tiny, files)
    found = prepared.metrics(score_requests(tiny, prepared.requests, Chip(), 600))
    of_subject = {
        subject: expected(tiny, subject, splits["test"])[1] for subject, splits in subject_rows(subjects).items()
    }
    assert {n.removeprefix("mmlu_"): m["acc"] for n, m in found["subtasks"].items()} == {
        subject: pytest.approx(np.mean(acc)) for subject, acc in of_subject.items()
    }
    every = np.concatenate(list(of_subject.values()))
    assert found["questions"] == len(every) == 57 * 2 + 28
    assert found["acc"] == pytest.approx(every.mean()) and 0 < found["acc"] < 1
    # Pooled over subjects, by lm-eval's formula.
    variance = sum(len(a) * (len(a) - 1) * np.var(a, ddof=1) / len(a) for a in of_subject.values())
    assert found["acc_stderr"] == pytest.approx((variance / (len(every) - 57) / len(every)) ** 0.5)


@pytest.mark.parametrize("shots", [0, 2])
def test_the_same_numbers_as_lm_eval_itself_and_from_snapshots(
    tiny: Model, manager: Any, files: Path, snapshots: Path, shots: int
) -> None:
    import lm_eval  # pyright: ignore[reportMissingImports]

    from hetmoe.evaluate.tasks.adapter import HetMoELM

    names = [name for name in PAPER_TASKS if name != "mmlu"] + ["mmlu_anatomy", "mmlu_virology"]
    for subject in ("anatomy", "virology"):
        for split in ("test", "dev"):
            write_jsonl(files / f"mmlu_{subject}" / f"{split}.jsonl", rows(subject, split, 5))
            write_jsonl(snapshots / "cais/mmlu" / subject / f"{split}.jsonl", rows(subject, split, 5))
    found, again, tasks = {}, {}, []
    for name in names:
        prepared = load(manager, name, tiny, files, shots)
        copied = load(manager, name, tiny, snapshots, shots)
        assert prepared.digest == copied.digest and prepared.shots == copied.shots == shots
        assert prepared.where.startswith("JSONL") and copied.where.startswith("snapshot")
        tasks.append(prepared.leaves[0][0])
        found[name] = prepared.metrics(score_requests(tiny, prepared.requests, Chip(), 600))
        again[name] = copied.metrics(score_requests(tiny, copied.requests, Chip(), 600))
    assert found == again
    theirs = lm_eval.simple_evaluate(
        model=HetMoELM(tiny, tokens_per_batch=600), tasks=tasks, task_manager=manager, num_fewshot=shots,
        log_samples=False,
    )["results"]  # fmt: skip
    for name in names:
        for metric in ("acc", "acc_norm"):
            assert (metric in found[name]) == (f"{metric},none" in theirs[name])
            if metric in found[name]:
                assert found[name][metric] == pytest.approx(theirs[name][f"{metric},none"])
                assert found[name][f"{metric}_stderr"] == pytest.approx(theirs[name][f"{metric}_stderr,none"])


def test_examples_come_from_the_training_split(tiny: Model, manager: Any, files: Path) -> None:
    prepared = load(manager, "piqa", tiny, files, shots=2)
    train = [
        f"Question: {r['goal']}\nAnswer: {r['sol2'] if r['label'] else r['sol1']}" for r in rows("piqa", "train", 6)
    ]
    for request in prepared.requests:
        examples = tiny.tokenizer.decode(request.context).split("\n\n")[:-1]
        assert len(set(examples)) == 2 and set(examples) <= set(train)


@pytest.mark.parametrize("task", ["piqa", "mmlu"])
def test_ties_of_best_answers_are_counted(tiny: Model, manager: Any, files: Path, task: str) -> None:
    prepared = load(manager, task, tiny, files)
    choices = len(prepared.requests) // prepared.questions
    scores = [Score(-float(n % choices), False) for n in range(len(prepared.requests))]
    assert prepared.metrics(scores)["ties"] == 0
    scores[1] = Score(0.0, False)  # of the first question
    scores[-1] = scores[-2] = Score(1.0, False)  # of the last
    scores[choices + 1] = Score(-0.5, False)  # near is no tie
    found = prepared.metrics(scores)
    assert found["ties"] == 2
    assert task == "piqa" or sum(leaf["ties"] for leaf in found["subtasks"].values()) == 2


def test_limit_takes_the_first_questions(tiny: Model, manager: Any, files: Path) -> None:
    whole, part = load(manager, "piqa", tiny, files), load(manager, "piqa", tiny, files, limit=3)
    assert part.questions == 3 and part.requests == whole.requests[:6] and part.digest != whole.digest


def test_examples_without_a_training_split_are_refused(tiny: Model, manager: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "piqa" / "validation.jsonl", rows("piqa", "validation", 4))
    (tmp_path / "Rowan" / "hellaswag").mkdir(parents=True)
    write_jsonl(tmp_path / "Rowan" / "hellaswag" / "validation.jsonl", rows("hellaswag", "validation", 4))
    for task in ("piqa", "hellaswag"):
        assert load(manager, task, tiny, tmp_path).questions == 4
        with pytest.raises(InputError, match="takes its examples from split 'train'"):
            load(manager, task, tiny, tmp_path, shots=1)


def test_adapter_on_texts(tiny: Model) -> None:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    from hetmoe.evaluate.tasks.adapter import HetMoELM

    lm = HetMoELM(tiny, tokens_per_batch=300)
    empty = Instance(request_type="loglikelihood", doc={}, arguments=("", "the cat"), idx=0)
    spaced = Instance(request_type="loglikelihood", doc={}, arguments=("the  ", "cat"), idx=0)
    found = lm.loglikelihood([empty, spaced], disable_tqdm=True)
    assert found[0][0] == pytest.approx(numpy_score(tiny, [256], ids(tiny, "the cat"))[0], rel=1e-5)
    assert found[1][0] == pytest.approx(numpy_score(tiny, ids(tiny, "the"), ids(tiny, "  cat"))[0], rel=1e-5)
    with pytest.raises(NotImplementedError, match="multiple choice"):
        lm.generate_until([empty])
    text = "water is warm and cold " * 15  # 345 tokens: windows of 150, 150 and the rest with full context
    rolled = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    whole = [256, *ids(tiny, text)]
    by_window = [
        numpy_score(tiny, whole[:1], whole[1:151]),
        numpy_score(tiny, whole[150:151], whole[151:301]),
        numpy_score(tiny, whole[195:301], whole[301:]),
    ]
    assert lm.loglikelihood_rolling([rolled])[0] == pytest.approx(sum(v for v, _ in by_window), rel=1e-5)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], manager: Any, tiny: Model,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:  # fmt: skip
    """Runs `hetmoe tasks` on the small model with the shared index: (exit code, stdout, stderr)."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    save_model(directory, tiny)
    monkeypatch.setattr("hetmoe.evaluate.tasks.harness.task_manager", lambda: manager)

    def call(*arguments: object) -> tuple[int, str, str]:
        words = ["hetmoe", "tasks", directory, "--seq", "32", "--seeds", "2", "--batch-tokens", "600", *arguments]
        monkeypatch.setattr("sys.argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def test_command_resumes_and_repeats(
    run: Run, files: Path, snapshots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hetmoe.evaluate.tasks import run as runs

    calls: list[int] = []
    real = runs.score_requests

    def score(*arguments: Any) -> Any:
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(runs, "score_requests", score)
    options = ("--task", "piqa", "--task", "winogrande", "--noise-scale", "5", "--digital", "0.25")
    stop_at = 3
    code, _, err = run(*options, "--data", files, "-o", tmp_path / "a")
    assert code == 130 and "the same command goes on from there" in err and len(calls) == 3
    stop_at = 99
    code, out, err = run(*options, "--data", files, "-o", tmp_path / "a", "--json", tmp_path / "a.json")
    assert (code, err) == (0, "") and len(calls) == 6
    assert out.count("(from an earlier run)") == 3 and f"from JSONL {files / 'piqa'}" in " ".join(out.split())
    code, out, err = run(*options, "--data", snapshots, "-o", tmp_path / "b", "--json", tmp_path / "b.json")
    assert (code, err) == (0, "") and len(calls) == 12
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    for name in ("settings", "lines", "averages"):
        assert first[name] == second[name]
    averages = first["averages"][0]
    seeds = [[t["per_seed"][s]["acc"] for t in first["tasks"].values()] for s in (0, 1)]
    assert averages["per_seed"] == pytest.approx(np.mean(seeds, axis=1).tolist())
    assert averages["standard_error"] == pytest.approx(np.std(np.mean(seeds, axis=1), ddof=1) / 2**0.5)
    assert re.search(rf"average of 2 tasks\s+│ acc\s+│\s+{averages['digital'] * 100:.2f}", out)
    code, _, err = run(*options, "--data", files, "-o", tmp_path / "a", "--limit", "2")
    assert code == 2 and "limit is absent there and 2 here" in err


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("pica", "unknown task 'pica': use piqa, arc_easy, arc_challenge, boolq, hellaswag, winogrande, mathqa, mmlu"),
        ("gsm8k", "task 'gsm8k' is of the kind generate_until"),
        ("wikitext", "task 'wikitext' is of the kind loglikelihood_rolling"),
        ("ai2_arc", "'ai2_arc' is a list of tasks, which lm-eval does not average: name arc_challenge, arc_easy"),
        ("sciq", "neither allenai/sciq (a snapshot of the hub's repository) nor sciq with JSONL files"),
    ],
)
def test_tasks_that_cannot_be_run(run: Run, tmp_path: Path, task: str, message: str) -> None:
    code, _, err = run("--task", task, "--data", tmp_path, "-o", tmp_path / "out")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err


def test_bad_questions_are_one_line(run: Run, tmp_path: Path) -> None:
    content = rows("winogrande", "validation", 3)
    content[1]["sentence"] = "no gap"
    write_jsonl(tmp_path / "files" / "winogrande" / "validation.jsonl", content)
    code, _, err = run("--task", "winogrande", "--data", tmp_path / "files", "-o", tmp_path / "out")
    assert code == 2 and "validation.jsonl, line 2: sentence=" in err
    write_jsonl(tmp_path / "copies" / "allenai" / "winogrande" / "validation.jsonl", content)
    (tmp_path / "copies" / "allenai" / "winogrande" / "README.md").write_text(
        "---\nconfigs:\n- config_name: winogrande_xl\n  data_files:\n  - split: validation\n"
        "    path: validation.jsonl\n---\n"
    )
    code, _, err = run("--task", "winogrande", "--data", tmp_path / "copies", "-o", tmp_path / "out")
    assert code == 2 and "its questions cannot be used (ValueError" in err and len(err.strip().splitlines()) == 1


def test_without_a_hub_the_way_out_is_told(run: Run, tmp_path: Path) -> None:
    code, _, err = run("--task", "piqa", "-o", tmp_path / "out")
    assert code == 2 and "give a folder of local questions with --data" in err and len(err.strip().splitlines()) == 1


def test_another_multiple_choice_task_runs(run: Run, tmp_path: Path) -> None:
    content = [
        {
            "question": f"what is {n}", "support": "water is warm", "correct_answer": "red",
            "distractor1": "blue", "distractor2": "cold", "distractor3": f"old {n}",
        }
        for n in range(3)
    ]  # fmt: skip
    write_jsonl(tmp_path / "sciq" / "test.jsonl", content)
    code, out, err = run("--task", "sciq", "--data", tmp_path, "-o", tmp_path / "out", "--placement", "all_digital")
    assert code == 0 and "digital sciq: acc" in out and "seed0" not in out, err
