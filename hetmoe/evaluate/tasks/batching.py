"""Token sequences of many lengths in batches of few shapes, so that few programs are compiled."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from hetmoe.errors import InputError

SHORTEST = 32  # tokens: below this another program to compile costs more than the padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A continuation to score behind a context, both as token ids."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Some requests side by side, padded on the right; rows that only fill the batch score nothing.

    The shape `[rows, length]` follows from the length, the model and the tokens per batch alone.
    """

    index: np.ndarray  # which request a row is; shorter than there are rows in a batch that is not full
    tokens: np.ndarray  # int32 [rows, length]
    targets: np.ndarray  # int32 [rows, length]: the next token
    scored: np.ndarray  # bool [rows, length]: whether that token belongs to the continuation


def padded_lengths(positions: int) -> list[int]:
    """The lengths that occur: powers of two from `SHORTEST` up, the last cut to the model's positions."""
    lengths = [min(SHORTEST, positions)]
    while lengths[-1] < positions:
        lengths.append(min(2 * lengths[-1], positions))
    return lengths


def make_batches(requests: Sequence[Request], positions: int, tokens_per_batch: int) -> list[Batch]:
    """Batches of requests of similar length, longest first, so that what does not fit in memory fails at once.

    A request that is longer than the model's positions loses its first tokens, as in lm-eval.

    Args:
        requests: what to score.
        positions: the longest input of the model.
        tokens_per_batch: padding included; a batch has at least one row.

    Raises:
        InputError: for a continuation that is empty or longer than the model's positions.
    """
    inputs: list[np.ndarray] = []
    for request in requests:
        size = len(request.continuation)
        if not 0 < size <= positions or not len(request.context):
            raise InputError(
                f"a context of {len(request.context)} tokens with a continuation of {size}: neither may be empty, and "
                f"the continuation must fit in the model's {positions} positions"
            )
        inputs.append(np.asarray([*request.context, *request.continuation], np.int32)[-(positions + 1) :])
    allowed = np.asarray(padded_lengths(positions))
    order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
    buckets: dict[int, list[int]] = {}
    for i in order:
        buckets.setdefault(int(allowed[np.searchsorted(allowed, len(inputs[i]) - 1)]), []).append(i)
    batches: list[Batch] = []
    for length, members in buckets.items():
        rows = max(1, tokens_per_batch // length)
        for start in range(0, len(members), rows):
            index = np.asarray(members[start : start + rows])
            tokens, targets = np.zeros((2, rows, length), np.int32)
            scored = np.zeros((rows, length), bool)
            for row, i in enumerate(index):
                ids = inputs[i]
                tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
                scored[row, len(ids) - 1 - len(requests[i].continuation) : len(ids) - 1] = True
            batches.append(Batch(index=index, tokens=tokens, targets=targets, scored=scored))
    return batches
