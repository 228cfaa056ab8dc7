"""Means and standard errors, by hand."""

import math

import pytest

from hetmoe.evaluate.tasks.summary import summarise, ties_note


def metrics(acc: float, error: float | None = 0.1, norm: float | None = None) -> dict[str, float | int | None]:
    found = {"questions": 10, "acc": acc, "acc_stderr": error}
    return found if norm is None else found | {"acc_norm": norm, "acc_norm_stderr": 0.2}


def test_by_hand() -> None:
    results = {
        "piqa": [metrics(0.8, 0.1, 0.9), metrics(0.5, 0.1, 0.7), metrics(0.7, 0.3, 0.5), metrics(0.6, 0.2, 0.9)],
        "boolq": [metrics(0.6, 0.2), metrics(0.3), metrics(0.4), metrics(0.2)],
    }
    lines, averages = summarise(results)
    assert [(line.task, line.metric) for line in lines] == [("piqa", "acc"), ("piqa", "acc_norm"), ("boolq", "acc")]
    assert lines[0].mean == pytest.approx(0.6)
    # Sample variance (0.01 + 0.01 + 0) / 2 over 3 seeds.
    assert lines[0].standard_error == pytest.approx(math.sqrt(0.01 / 3))
    assert lines[0].sampling == pytest.approx(0.2) and lines[0].digital_sampling == 0.1
    acc, norm = averages
    assert (acc.task, norm.task) == ("average of 2 tasks", "average of 1 tasks")
    assert acc.digital == pytest.approx(0.7)
    # Of each seed: 0.40, 0.55, 0.40. Mean 0.45, variance (0.0025 + 0.01 + 0.0025) / 2 over 3: not what adding the
    # errors of the two tasks as if they were independent gives.
    assert acc.per_seed == pytest.approx([0.4, 0.55, 0.4]) and acc.mean == pytest.approx(0.45)
    assert acc.standard_error == pytest.approx(math.sqrt(0.0075 / 3))
    assert acc.digital_sampling == pytest.approx(math.sqrt(0.1**2 + 0.2**2) / 2)
    assert norm.mean == pytest.approx(0.7)


def test_without_spread_there_is_no_error() -> None:
    lines, averages = summarise({"piqa": [metrics(0.8), metrics(0.5, None)]})
    for line in (*lines, *averages):
        assert line.mean == 0.5 and line.standard_error is None and line.sampling is None
    lines, averages = summarise({"piqa": [metrics(0.8, None)]})
    assert all(line.mean is None and line.digital == 0.8 for line in (*lines, *averages))
    assert averages[0].digital_sampling is None


def test_ties_are_told_where_there_are_any() -> None:
    def tied(*ties: int) -> list[dict[str, float | int | None]]:
        return [metrics(0.5) | {"ties": n} for n in ties]

    assert ties_note({"piqa": tied(0, 0), "boolq": tied(0)}) == ""
    assert ties_note({"piqa": tied(0, 3, 4), "boolq": tied(0, 0, 0), "mmlu": tied(2)}) == (
        "Questions with tied best answers, of which lm-eval takes the first: piqa 0 digital, 3.5 on chips of 10; "
        "mmlu 2 digital of 10."
    )
