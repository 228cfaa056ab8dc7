"""Drawn requests against the distributions they are drawn from; traces against what they say."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hetmoe.errors import InputError
from hetmoe.serving.requests import Request, poisson_requests, read_trace, total_tokens

MANY = {"rate": 50.0, "duration_s": 200.0, "prompt": 20.0, "output": 7.0}


def test_arrivals_are_a_poisson_process() -> None:
    arrivals = np.array([r.arrival_s for r in poisson_requests(3, **MANY, context=10**6)])
    expected = MANY["rate"] * MANY["duration_s"]
    assert abs(len(arrivals) - expected) < 5 * np.sqrt(expected)  # the variance of a Poisson number is its mean
    assert (np.diff(arrivals) >= 0).all() and 0 <= arrivals[0] and arrivals[-1] <= MANY["duration_s"]
    assert stats.kstest(np.diff(arrivals), "expon", args=(0, 1 / MANY["rate"])).pvalue > 1e-3


def test_numbers_of_arrivals_vary_as_a_poisson_number() -> None:
    counts = [len(poisson_requests(seed, **MANY | {"duration_s": 2.0}, context=100)) for seed in range(400)]
    # 399 degrees of freedom: the ratio of variance to mean has a standard error of sqrt(2 / 399) = 7 %.
    assert np.var(counts, ddof=1) / np.mean(counts) == pytest.approx(1, abs=5 * np.sqrt(2 / 399))


@pytest.mark.parametrize(("name", "mean"), [("prompt", 20.0), ("output", 7.0)])
def test_lengths_are_geometric(name: str, mean: float) -> None:
    lengths = np.array([getattr(r, name) for r in poisson_requests(4, **MANY, context=10**6)])
    error = np.sqrt(mean * (mean - 1) / len(lengths))  # of the mean of a geometric distribution
    assert abs(lengths.mean() - mean) < 5 * error and lengths.min() == 1
    below = np.mean(lengths <= mean)
    assert below == pytest.approx(1 - (1 - 1 / mean) ** mean, abs=5 * np.sqrt(0.25 / len(lengths)))


def test_lengths_are_cut_to_the_context() -> None:
    whole = poisson_requests(4, **MANY, context=10**6)
    cut = poisson_requests(4, **MANY, context=16)
    assert [r.arrival_s for r in whole] == [r.arrival_s for r in cut]
    for one, short in zip(whole, cut, strict=True):
        assert short.prompt == min(one.prompt, 15)
        assert short.output == min(one.output, 16 - short.prompt)
    assert any(r.prompt > 15 for r in whole)
    assert total_tokens(cut[:2]) == (cut[0].prompt + cut[1].prompt, cut[0].output + cut[1].output)


def test_the_same_seed_draws_the_same() -> None:
    assert poisson_requests(4, **MANY, context=64) == poisson_requests(4, **MANY, context=64)
    assert poisson_requests(5, **MANY, context=64) != poisson_requests(4, **MANY, context=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0.0}, "rate=0.0 must be finite and above 0"),
        ({"rate": float("nan")}, "rate=nan"),
        ({"duration_s": float("inf")}, "duration=inf"),
        ({"prompt": 0.5}, "prompt=0.5 must be finite and at least 1"),
        ({"output": 0.0}, "output=0.0"),
        ({"rate": 1e-9}, "no request arrives in 200 s at 1e-09 per second"),
        ({"rate": 1e9}, "are 2e.11 requests, more than 5,000,000: lower one of them"),
        ({"context": 1}, "a context of 1 leaves no room"),
    ],
)
def test_drawn_from_nonsense(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        poisson_requests(0, **{"context": 64} | MANY | change)


HEADING = "arrival_s,prompt_tokens,output_tokens\n"


def test_a_trace_is_read_by_its_headings(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("\ufeffuser,output_tokens,arrival_s,prompt_tokens\nann,3,0.5,4\n\nbob,1,0.5,7\n")
    assert read_trace(path, context=8) == [Request(0.5, 4, 3), Request(0.5, 7, 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": is empty"),
        ("0,1,1\n", ":1: the first line must name the columns"),
        ("arrival_s,prompt_tokens\n0,1\n", ":1: .* lacks output_tokens"),
        (HEADING, ": the trace has no request"),
        (HEADING + "0,1,2\n1,1\n", ":3: output_tokens '' must be a whole number of at least 1"),
        (HEADING + "0,1.5,2\n", ":2: prompt_tokens '1.5' must be a whole number"),
        (HEADING + "0,0,2\n", ":2: prompt_tokens '0' must be"),
        (HEADING + "-1,1,2\n", ":2: arrival_s '-1' must be a number of seconds of at least 0"),
        (HEADING + "nan,1,2\n", ":2: arrival_s 'nan'"),
        (HEADING + "inf,1,2\n", ":2: arrival_s 'inf'"),
        (HEADING + "2,1,2\n\n1,1,2\n", ":4: arrivals must not go back in time"),
        (HEADING + "0,4,5\n", ":2: 4 tokens of prompt and 5 of output exceed the model's context of 8"),
    ],
)
def test_bad_traces_name_their_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=f"t.csv{message}"):
        read_trace(path, context=8)
