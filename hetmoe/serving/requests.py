"""Requests: drawn from a Poisson process, or read from a trace."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hetmoe.errors import InputError
from hetmoe.evaluate.text import read_text

MOST_REQUESTS = 5_000_000  # some 3 GB, and minutes of simulation
COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")


class Request(NamedTuple):
    """One prompt and how many tokens are generated from it."""

    arrival_s: float
    prompt: int
    output: int


def poisson_requests(
    seed: int, *, rate: float, duration_s: float, prompt: float, output: float, context: int
) -> list[Request]:
    """Arrivals of a Poisson process; lengths are geometric, of at least 1.

    Lengths that exceed the model's context are cut: the prompt to leave room for one token, and then the output.

    Args:
        seed: of all draws.
        rate: requests per second.
        duration_s: until the last arrival.
        prompt: mean tokens of a prompt.
        output: mean generated tokens.
        context: positions that the model has.

    Raises:
        InputError: for rates, durations or means out of range, or when no request arrives.
    """
    for name, value, least in (
        ("rate", rate, 0.0), ("duration", duration_s, 0.0), ("prompt", prompt, 1.0), ("output", output, 1.0)
    ):  # fmt: skip
        if not math.isfinite(value) or value < least or value == 0:
            raise InputError(f"{name}={value!r} must be finite and {'above 0' if least == 0 else 'at least 1'}")
    if context < 2:
        raise InputError(f"a context of {context} leaves no room for a prompt and a token")
    if rate * duration_s > MOST_REQUESTS:
        raise InputError(
            f"rate={rate:g} for duration={duration_s:g} s are {rate * duration_s:.3g} requests, more than "
            f"{MOST_REQUESTS:,}: lower one of them"
        )
    draws = np.random.default_rng(seed)
    count = int(draws.poisson(rate * duration_s))
    if count == 0:
        raise InputError(f"no request arrives in {duration_s:g} s at {rate:g} per second: raise one of them")
    arrivals = np.sort(draws.uniform(0, duration_s, count))  # of a Poisson process, given their number
    prompts = np.minimum(draws.geometric(1 / prompt, count), context - 1)
    outputs = np.minimum(draws.geometric(1 / output, count), context - prompts)
    return [Request(float(a), int(p), int(o)) for a, p, o in zip(arrivals, prompts, outputs, strict=True)]


def read_trace(path: Path, *, context: int) -> list[Request]:
    """A CSV file with the columns `arrival_s`, `prompt_tokens` and `output_tokens`, and any others.

    Raises:
        InputError: naming the line, for missing columns, values that are no numbers in range, arrivals that go back in
            time, requests longer than the model's context, or a trace without requests.
    """
    rows = csv.reader(read_text(path).removeprefix("\ufeff").splitlines())  # as spreadsheets write it
    heading = next(rows, [])
    if missing := [name for name in COLUMNS if name not in heading]:
        raise InputError(
            f"{path}:1: the first line must name the columns {', '.join(COLUMNS)}, with commas; it lacks {missing[0]}"
        )
    found: list[Request] = []
    for row in rows:
        if row:
            found.append(_request(path, rows.line_num, dict(zip(heading, row, strict=False)), context))
            if len(found) > 1 and found[-1].arrival_s < found[-2].arrival_s:
                raise InputError(f"{path}:{rows.line_num}: arrivals must not go back in time; sort the file by them")
    if not found:
        raise InputError(f"{path}: the trace has no request")
    return found


def _request(path: Path, line: int, row: dict[str, str], context: int) -> Request:
    def number(name: str, kind: type, least: float) -> float:
        said = row.get(name, "")
        try:
            value = kind(said)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= least):
            what = "a whole number of at least 1" if kind is int else "a number of seconds of at least 0"
            raise InputError(f"{path}:{line}: {name} {said!r} must be {what}")
        return value

    found = Request(number(COLUMNS[0], float, 0), int(number(COLUMNS[1], int, 1)), int(number(COLUMNS[2], int, 1)))
    if found.prompt + found.output > context:
        raise InputError(
            f"{path}:{line}: {found.prompt} tokens of prompt and {found.output} of output exceed the model's context "
            f"of {context}"
        )
    return found


def total_tokens(requests: Sequence[Request]) -> tuple[int, int]:
    """(tokens of prompts, generated tokens)."""
    return sum(r.prompt for r in requests), sum(r.output for r in requests)
