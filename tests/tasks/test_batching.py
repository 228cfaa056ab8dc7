"""Requests in few shapes: nothing lost, nothing scored that is not asked for."""

import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.evaluate.tasks.batching import Request, make_batches, padded_lengths


@pytest.mark.parametrize(
    ("positions", "lengths"), [(20, [20]), (32, [32]), (100, [32, 64, 100]), (512, [32, 64, 128, 256, 512])]
)
def test_lengths_are_powers_of_two_up_to_the_positions(positions: int, lengths: list[int]) -> None:
    assert padded_lengths(positions) == lengths


def some_requests(count: int) -> list[Request]:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 90, (count, 2))
    return [
        Request(context=rng.integers(1, 99, a).tolist(), continuation=rng.integers(1, 99, min(b, 40)).tolist())
        for a, b in sizes.tolist()
    ]


def test_every_request_is_in_one_row_with_its_last_tokens() -> None:
    requests = some_requests(57)
    batches = make_batches(requests, 100, 256)
    assert sorted(np.concatenate([b.index for b in batches]).tolist()) == list(range(57))
    assert {b.tokens.shape for b in batches} == {(8, 32), (4, 64), (2, 100)}
    lengths = [b.tokens.shape[1] for b in batches]
    assert lengths == sorted(lengths, reverse=True)
    truncated = 0
    for batch in batches:
        assert not batch.scored[len(batch.index) :].any()
        for row, i in enumerate(batch.index):
            request = requests[i]
            ids = [*request.context, *request.continuation]
            truncated += len(ids) > 101
            kept = ids[-101:]
            used = len(kept) - 1
            assert batch.tokens[row, :used].tolist() == kept[:-1] and not batch.tokens[row, used:].any()
            assert batch.targets[row][batch.scored[row]].tolist() == request.continuation
            assert np.flatnonzero(batch.scored[row]).tolist() == list(range(used - len(request.continuation), used))
            assert used > batch.tokens.shape[1] // 2 or batch.tokens.shape[1] == 32  # the shortest length that fits
    assert truncated > 3


def test_a_batch_has_a_row_at_least() -> None:
    requests = [Request(context=[1] * 60, continuation=[2])]
    assert make_batches(requests, 64, 8)[0].tokens.shape == (1, 64)
    assert make_batches([], 64, 8) == []


@pytest.mark.parametrize(("context", "continuation"), [([1], []), ([], [1]), ([1], [1] * 65)])
def test_what_cannot_be_scored_is_refused(context: list[int], continuation: list[int]) -> None:
    with pytest.raises(InputError, match="neither may be empty"):
        make_batches([Request(context=context, continuation=continuation)], 64, 64)
