"""Statistics of the tokens that experts serve, counted by hand."""

from typing import Any

import numpy as np
import pytest

import served_tokens
from common import Options
from hetmoe.errors import InputError
from hetmoe.evaluate.statistics import Interval

TOKENS = np.array([0, 1, 0, 2, 3])
CHOSEN = np.array([[0, 1], [1, 2], [0, 2], [3, 0], [2, 1]])  # two experts per token


def test_ranks_by_count_with_ties_to_the_lower_id() -> None:
    assert served_tokens.frequency_rank(np.array([5, 0, 9, 5, 1])).tolist() == [2, 5, 1, 3, 4]


def test_every_copy_that_goes_to_the_group_counts() -> None:
    counts = served_tokens.routed_counts(TOKENS, CHOSEN, np.array([0, 1]), 5)
    # Token 0 at place 0 goes to both, token 1 to one, token 0 at place 2 to one, token 2 to one, token 3 to one.
    assert counts.tolist() == [3, 1, 1, 1, 0]
    assert served_tokens.routed_counts(TOKENS, CHOSEN, np.array([3]), 5).tolist() == [0, 0, 1, 0, 0]


def test_share_and_mean_rank() -> None:
    counts, rank = np.array([3, 1, 1, 1, 0]), np.array([1, 3, 2, 4, 5])
    found = served_tokens.served(counts, rank, 2)
    assert found.frequent_share == pytest.approx((3 + 1) / 6)  # tokens 0 and 2
    assert found.mean_rank == pytest.approx((3 * 1 + 3 + 2 + 4) / 6)
    with pytest.raises(InputError, match="give more --tokens"):
        served_tokens.served(np.zeros(5), rank, 2)


def test_quarters_are_the_ends_of_the_order() -> None:
    found = served_tokens.quarters(np.array([0.1, 0.8, 0.3, 0.9, 0.2, 0.5, 0.4, 0.6]))
    assert {name: sorted(experts) for name, experts in found.items()} == {"high": [1, 3], "low": [0, 4]}
    assert {name: list(experts) for name, experts in served_tokens.quarters(np.array([2.0, 1.0])).items()} == {
        "high": [0],
        "low": [1],
    }


def layer(low: float, high: float, with_share: float = 0.1, with_activation: float = 0.5) -> dict[str, Any]:
    interval = Interval(mean=(low + high) / 2, low=low, high=high, standard_error=0.1, count=8)
    return {
        "share_difference": interval,
        "spearman_score_frequent_share": with_share,
        "spearman_score_activation": with_activation,
    }


@pytest.mark.parametrize(
    ("layers", "holds"),
    [
        ([layer(0.1, 0.2), layer(0.01, 0.3)], "holds here"),
        ([layer(0.1, 0.2), layer(-0.1, 0.3)], "holds in some layers only here"),
        ([layer(0.1, 0.2), layer(-0.2, -0.1)], "does not hold here"),
        ([layer(-0.1, 0.2), layer(-0.2, 0.1)], "does not hold here"),
    ],
)
def test_the_verdict_counts_layers(layers: list[dict[str, Any]], holds: str) -> None:
    assert f'"High-score experts serve frequent tokens" {holds}: of 2 layers' in served_tokens.verdict(layers, 100)


def test_the_verdict_names_the_numbers() -> None:
    found = served_tokens.verdict([layer(0.1, 0.2, -0.25, 0.5), layer(-0.2, -0.1), layer(-0.1, 0.1, 0.2, 0.75)], 50)
    assert "50 most frequent tokens is higher for high-score than for low-score experts in 1, lower in 1" in found
    assert "not clearly different in 1" in found
    assert "-0.25 to +0.20 with that share, and +0.50 to +0.75 with activation frequency" in found


def test_too_little_text(tmp_path) -> None:
    with pytest.raises(InputError, match="4 windows, but 8 parts"):
        served_tokens.main(Options(tokens=256, seq=64, output=tmp_path))
