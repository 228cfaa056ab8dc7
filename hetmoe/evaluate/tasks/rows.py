"""Questions in JSONL files: every row is checked against what its task reads, before lm-eval sees it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hetmoe.errors import InputError

# Dataset (as the task files of lm-eval name it, with the configuration where it matters) -> check of one row, which
# raises `_Wrong` with what is wrong.
Check = Callable[[dict[str, Any]], None]
_OPTION_OF_MATHQA = re.compile(r"[abcd] \) .*?, |e \) .*?$")  # as in lm-eval's task


class _WrongError(Exception):
    """What is wrong with a row."""


def _text(row: dict[str, Any], *fields: str, empty: bool = False) -> None:
    for field in fields:
        if not isinstance(row.get(field), str) or not (empty or row[field].strip()):
            raise _WrongError(f"{field}={_short(row.get(field))} must be a text{'' if empty else ' that is not empty'}")


def _one_of(row: dict[str, Any], field: str, *allowed: Any) -> None:
    value = row.get(field)
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise _WrongError(f"{field}={_short(value)} must be one of {', '.join(json.dumps(a) for a in allowed)}")


def _texts(value: Any, field: str, count: int | None) -> list[str]:
    right = isinstance(value, list) and all(isinstance(v, str) and v for v in value)
    if not right or len(value) != (count or max(len(value), 2)):
        raise _WrongError(f"{field}={_short(value)} must be a list of {count or 'two or more'} texts")
    return value


def _short(value: Any) -> str:
    if value is None:
        return "(absent)"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "..."


def _piqa(row: dict[str, Any]) -> None:
    _text(row, "goal", "sol1", "sol2")
    _one_of(row, "label", 0, 1)


def _arc(row: dict[str, Any]) -> None:
    _text(row, "question")
    choices = row.get("choices")
    if not isinstance(choices, dict):
        raise _WrongError(f"choices={_short(choices)} must be an object with text and label")
    texts = _texts(choices.get("text"), "choices.text", None)
    labels = _texts(choices.get("label"), "choices.label", len(texts))
    _one_of(row, "answerKey", *labels)


def _boolq(row: dict[str, Any]) -> None:
    _text(row, "passage", "question")
    _one_of(row, "label", 0, 1)


def _hellaswag(row: dict[str, Any]) -> None:
    _text(row, "activity_label", "ctx_a")
    _text(row, "ctx_b", empty=True)
    _texts(row.get("endings"), "endings", 4)
    _one_of(row, "label", "0", "1", "2", "3")


def _winogrande(row: dict[str, Any]) -> None:
    _text(row, "sentence", "option1", "option2")
    if "_" not in row["sentence"]:
        raise _WrongError(f"sentence={_short(row['sentence'])} has no '_' where the options go")
    if not row["sentence"].split("_", 1)[1].strip():
        raise _WrongError(f"sentence={_short(row['sentence'])} has no text behind '_', which is what is scored")
    _one_of(row, "answer", "1", "2")


def _mathqa(row: dict[str, Any]) -> None:
    _text(row, "Problem", "options")
    found = [match[0] for match in _OPTION_OF_MATHQA.findall(row["options"])]
    if found != list("abcde"):
        raise _WrongError(
            f"options={_short(row['options'])} must be of the form 'a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5'"
        )
    _one_of(row, "correct", *"abcde")


def _mmlu(row: dict[str, Any]) -> None:
    _text(row, "question")
    _texts(row.get("choices"), "choices", 4)
    _one_of(row, "answer", 0, 1, 2, 3)


_CHECKS: dict[tuple[str, str | None], Check] = {
    ("baber/piqa", None): _piqa,
    ("allenai/ai2_arc", None): _arc,
    ("aps/super_glue", "boolq"): _boolq,
    ("Rowan/hellaswag", None): _hellaswag,
    ("allenai/winogrande", None): _winogrande,
    ("regisss/math_qa", None): _mathqa,
    ("cais/mmlu", None): _mmlu,
}


def check_rows(path: Path, dataset: str, configuration: str | None) -> int:
    """Checks the rows of a JSONL file; returns their number.

    Args:
        path: the file.
        dataset: name of the dataset whose schema the rows must have. Of other datasets than those of the paper's tasks
            only the form is checked: every row an object with the same fields.
        configuration: its configuration.

    Raises:
        InputError: naming file and line.
    """
    check = _CHECKS.get((dataset, configuration)) or _CHECKS.get((dataset, None))
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    fields: set[str] | None = None
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _check_form(row, fields)
            if check is not None:
                check(row)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not readable as JSON ({error})") from None
        except _WrongError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        fields = set(row)
        count += 1
    if not count:
        raise InputError(f"{path}: holds no rows")
    return count


def _check_form(row: Any, fields: set[str] | None) -> None:
    if not isinstance(row, dict):
        raise _WrongError("must be a JSON object")
    if fields is not None and set(row) != fields:
        differing = ", ".join(sorted(set(row) ^ fields))
        raise _WrongError(f"has not the fields of the row before it (differing: {differing})")
