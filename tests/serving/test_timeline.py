"""Spans of time, and the numbers of a whole run."""

import math

import numpy as np
import pytest

from hetmoe.serving.loop import Run, Served
from hetmoe.serving.requests import Request
from hetmoe.serving.summary import latencies, summarise
from hetmoe.serving.timeline import Span, Timeline


def nobody(span: Span) -> None:
    del span


def test_what_crosses_boundaries_is_shared_by_time() -> None:
    timeline = Timeline(2.0, nobody)
    timeline.act(0.0, 5.0)
    timeline.add(0.0, 1.0, energy=4.0, waiting=3, running=0, busy=False, digital=0.5)
    timeline.add(1.0, 4.0, energy=8.0, waiting=1, running=2, busy=True, tokens=2, prompt=6, digital=0.25)
    timeline.finish(5.0)
    assert timeline.spans == [
        Span(0.0, 2.0, 0.5, 1.5, 0.25, 1.0, 4.0 + 2.0, 5.0, 3.0 + 1.0, 2.0, digital=0.25),
        Span(2.0, 4.0, 1.0, 3.0, 0.50, 2.0, 4.0, 0.0, 2.0, 4.0, digital=0.25),
        Span(4.0, 5.0, 0.5, 1.5, 0.25, 1.0, 2.0, 0.0, 1.0, 2.0, digital=0.25),
    ]
    record = timeline.spans[0].record()
    assert record["tokens_per_s"] == 0.25 and record["power_w"] == (6 + 5) / 2 and record["busy"] == 0.5
    assert record["waiting"] == 2.0 and record["running"] == 1.0 and record["expected_loss"] is None


def test_a_sliver_at_the_end_joins_the_span_before() -> None:
    timeline = Timeline(2.0, nobody)
    timeline.add(0.0, 4.5, energy=9.0, waiting=0, running=1, busy=True, tokens=9)
    timeline.finish(4.5)
    assert [(s.start_s, s.end_s, s.tokens, s.energy_j) for s in timeline.spans] == [(0, 2, 4, 4), (2, 4.5, 5, 5)]
    only = Timeline(2.0, nobody)
    only.add(0.0, 0.5, energy=1.0, waiting=0, running=1, busy=True, tokens=1)
    only.finish(0.5)
    assert [(s.start_s, s.end_s, s.tokens) for s in only.spans] == [(0.0, 0.5, 1.0)]


def test_actions_at_a_boundary_belong_to_the_span_behind_it() -> None:
    timeline = Timeline(2.0, nobody)
    timeline.add(0.0, 2.0 - 1e-12, energy=4.0, waiting=0, running=0, busy=False, digital=0.5)
    timeline.act(2.0 - 1e-12, 7.0)
    timeline.add(2.0 - 1e-12, 1.0, energy=3.0, waiting=0, running=0, busy=False, digital=0.25)
    timeline.act(3.0, 1.0)
    timeline.finish(3.5)
    assert [(s.start_s, s.end_s, s.energy_j, s.action_j, s.digital) for s in timeline.spans] == [
        (0.0, 2.0, 4.0, 0.0, 0.5), (2.0, 3.5, 3.0, 8.0, 0.25)
    ]  # fmt: skip


def test_boundaries_do_not_drift() -> None:
    timeline = Timeline(0.1, nobody)
    for step in range(1000):
        timeline.add(step * 0.1, 0.1, energy=1.0, waiting=0, running=1, busy=True, tokens=1)
    timeline.finish(100.0)
    assert len(timeline.spans) in (999, 1000, 1001)
    np.testing.assert_allclose([s.end_s for s in timeline.spans[:-1]], 0.1 * np.arange(1, len(timeline.spans)))
    assert math.fsum(s.energy_j for s in timeline.spans) == pytest.approx(1000)


def made() -> Run:
    served = [
        Served(Request(0.0, 4, 3), 0.0, 1.0, 4.0), Served(Request(0.5, 2, 1), 1.0, 1.5, 1.5),
        Served(Request(1.0, 2, 2), 3.0, 3.5, 4.5),
    ]  # fmt: skip
    spans = [
        Span(0.0, 2.5, tokens=3, busy_s=2.0, energy_j=10, action_j=1, waiting_s=1.5, running_s=3.0),
        Span(2.5, 5.0, tokens=3, busy_s=2.0, energy_j=8, waiting_s=0.5, running_s=5.0),
    ]
    return Run(served=served, spans=spans, end_s=5.0)


def test_a_summary_worked_out_by_hand() -> None:
    found = latencies(made())
    assert {name: values.tolist() for name, values in found.items()} == {
        "queueing_s": [0.0, 0.5, 2.0], "first_token_s": [1.0, 1.0, 2.5], "per_token_s": [1.5, 1.0],
        "whole_s": [4.0, 1.0, 3.5],
    }  # fmt: skip
    summary = summarise(made())
    expected = {
        "requests": 3, "seconds": 5.0, "prompt_tokens": 8, "generated_tokens": 6, "tokens_per_s": 1.2, "busy": 0.8,
        "running": 2.0, "waiting": 0.4, "energy_j": 19, "action_j": 1, "joules_per_token": 19 / 6, "power_w": 3.8,
    }  # fmt: skip
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    assert summary["latencies"]["whole_s"] == pytest.approx({"50": 3.5, "90": 3.9, "99": 3.99})


def test_one_token_each_has_no_time_per_further_token() -> None:
    run = made()
    summary = summarise(Run(served=run.served[1:2], spans=run.spans, end_s=5.0))
    assert summary["latencies"]["per_token_s"] is None
