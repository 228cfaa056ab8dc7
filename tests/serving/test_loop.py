"""The server against runs worked out by hand and laws of queues."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetmoe.errors import InputError
from hetmoe.serving.loop import Plan, Run, Served, fixed, serve
from hetmoe.serving.requests import Request, poisson_requests
from tests.serving.constant import ConstantCosts

A, B, C = Request(0.0, 4, 3), Request(0.2, 2, 2), Request(0.4, 1, 1)


def run(requests: list[Request], costs: ConstantCosts, max_batch: int = 2, **options: float) -> Run:
    return serve(requests, fixed(costs, 0.25), max_batch=max_batch, span_s=options.pop("span_s", 0.7), **options)


def test_a_run_worked_out_by_hand() -> None:
    """Prompts first, one at a time; C waits for a place, which B leaves first."""
    costs = ConstantCosts()
    assert run([A, B, C], costs).served == [
        Served(B, 1.0, 2.0, 2.5),
        Served(C, 2.5, 3.5, 3.5),
        Served(A, 0.0, 1.0, 4.0),
    ]
    # Behind A's prompt and first token and B's; then behind A's prompt and two tokens.
    assert costs.asked == [(2, ((4 + 1) + (2 + 1)) / 2), (1, 4 + 2)]


def test_the_cache_holds_back_the_longest_waiting_and_all_behind_it() -> None:
    """7 positions of A and 4 of B are too many; C would fit beside A, but came later."""
    found = run([A, B, C], ConstantCosts(room=9.0))
    assert found.served == [Served(A, 0.0, 1.0, 2.0), Served(C, 3.0, 4.0, 4.0), Served(B, 2.0, 3.0, 4.5)]
    assert run([A, B, C], ConstantCosts(room=11.0)).served == run([A, B, C], ConstantCosts()).served
    assert run([A, B, C], ConstantCosts(room=22.0, position_bytes=2.0)).served == run([A, B, C], ConstantCosts()).served


def test_a_sliding_window_bounds_what_the_cache_holds() -> None:
    whole = run([A, B, C], ConstantCosts()).served
    assert run([A, B, C], ConstantCosts(room=9.0), window=5).served == whole  # 5 of A and 4 of B
    assert run([A, B, C], ConstantCosts(room=9.0), window=6).served != whole


def test_positions_beyond_a_window_are_not_read() -> None:
    """Of A's 5, then 6 positions and B's 3 the window has 4 and 3; without the window see the first test."""
    costs = ConstantCosts()
    run([A, B, C], costs, window=4)
    assert costs.asked == [(2, (4 + 3) / 2), (1, 4)]


def test_a_request_that_never_fits_is_an_error() -> None:
    with pytest.raises(InputError, match=r"a request of 4 \+ 3 tokens needs 7e-09 GB .* leave 6e-09 GB"):
        run([A], ConstantCosts(room=6.0))
    for change in ({"max_batch": 0}, {"span_s": 0.0}, {"span_s": math.nan}):
        with pytest.raises(InputError, match="max_batch"):
            run([A], ConstantCosts(), **change)


def test_waiting_in_a_queue_with_one_server() -> None:
    """One token per request and a constant time of service s: M/D/1, mean wait = rho s / (2 (1 - rho)).

    (Pollaczek-Khinchine.) 24 runs of 4,000 requests start empty, which matters for some ten requests of each.
    """
    rho, seconds = 0.6, 1.0
    means = []
    for seed in range(24):
        requests = poisson_requests(
            seed, rate=rho / seconds, duration_s=4000 * seconds / rho, prompt=1.0, output=1.0, context=8
        )
        served = run(requests, ConstantCosts(prompt_s=seconds), span_s=1e9).served
        means.append(np.mean([s.started_s - s.request.arrival_s for s in served]))
    error = np.std(means, ddof=1) / np.sqrt(len(means))
    expected = rho * seconds / (2 * (1 - rho))
    assert error < 0.02 * expected
    assert abs(np.mean(means) - expected) < 5 * error


REQUESTS = st.lists(
    st.builds(Request, st.floats(0, 20), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=25
).map(lambda found: sorted(found, key=lambda r: r.arrival_s))


@given(REQUESTS, st.integers(1, 5), st.floats(18, 60), st.floats(0.05, 30))
def test_what_holds_in_every_run(requests: list[Request], max_batch: int, room: float, span: float) -> None:
    costs = ConstantCosts(prompt_s=0.375, room=room)
    found = run(requests, costs, max_batch, span_s=span)
    served, spans = found.served, found.spans
    assert sorted(s.request for s in served) == sorted(requests)
    # First come, first served; nothing starts early; each request's own tokens take their steps.
    in_order = sorted(served, key=lambda s: s.started_s)
    assert [s.request.arrival_s for s in in_order] == sorted(r.arrival_s for r in requests)
    assert all(b.started_s >= a.first_s for a, b in itertools.pairwise(in_order))  # one prompt at a time
    for one in served:
        assert one.started_s >= one.request.arrival_s and one.first_s == one.started_s + costs.prompt_s
        assert one.finished_s >= one.first_s + (one.request.output - 1) * costs.step_s - 1e-9
        assert (one.finished_s == one.first_s) == (one.request.output == 1)
    # No moment has more running requests, or positions, than there is room for.
    for moment in (s.started_s for s in served):
        running = [s for s in served if s.started_s <= moment < s.finished_s]
        assert len(running) <= max_batch
        assert sum(s.request.prompt + s.request.output for s in running) <= room
    # Tokens, energy and time all appear in the spans.
    assert found.end_s == max(s.finished_s for s in served) == spans[-1].end_s
    steps = len(costs.asked)
    busy = len(requests) * costs.prompt_s + steps * costs.step_s
    totals = {
        name: math.fsum(getattr(s, name) for s in spans) for name in ("tokens", "prompt_tokens", "busy_s", "steps")
    }
    assert totals["tokens"] == pytest.approx(sum(r.output for r in requests))
    assert totals["prompt_tokens"] == pytest.approx(sum(r.prompt for r in requests))
    assert totals["busy_s"] == pytest.approx(busy) and totals["steps"] == pytest.approx(len(requests) + steps)
    assert sum(batch for batch, _ in costs.asked) == sum(r.output - 1 for r in requests)
    energy = len(requests) * costs.prompt_j + steps * costs.step_j + (found.end_s - busy) * costs.idle_power
    assert math.fsum(s.energy_j for s in spans) == pytest.approx(energy)
    # Little's law over the whole run: the queue's time is what requests wait, but for arrivals within a step, which
    # the queue sees only when it is over; the batch's is what they run, less the prompts of others meanwhile.
    waited = math.fsum(s.started_s - s.request.arrival_s for s in served)
    assert math.fsum(s.waiting_s for s in spans) <= waited + 1e-9
    assert math.fsum(s.waiting_s for s in spans) >= waited - len(requests) * max(costs.step_s, costs.prompt_s) - 1e-9
    ran = math.fsum(s.finished_s - s.started_s for s in served)
    assert math.fsum(s.running_s for s in spans) == pytest.approx(ran)


@dataclasses.dataclass
class Alternating:
    """Other costs at every look."""

    every_s: float
    looks: list[tuple[float, int]]

    def look(self, time_s: float, tokens: int) -> Plan:
        self.looks.append((time_s, tokens))
        count = len(self.looks)
        return Plan(
            ConstantCosts(step_s=0.5 * count, step_j=3.0 * count), 0.1 * count, 0.01 * count, action_j=float(count)
        )


def test_plans_change_between_steps() -> None:
    """Looks are due every 1.2 s and happen at the first step's end after that."""
    controller = Alternating(1.2, [])
    found = serve([Request(0.0, 1, 6), Request(30.0, 1, 1)], controller, max_batch=1, span_s=1.2)
    # The prompt until 1.0 and a step of 0.5 until 1.5; then steps of 1.0 until 2.5; of 1.5 until 4.0; of 2.0.
    assert found.served[0].finished_s == 1.0 + 0.5 + 1.0 + 1.5 + 2.0 + 2.5
    assert controller.looks[:6] == [(0.0, 0), (1.5, 2), (2.5, 1), (4.0, 1), (6.0, 1), (8.5, 1)]
    # While nothing runs, looks come when they are due.
    assert [time for time, _ in controller.looks[6:9]] == pytest.approx([9.6, 10.8, 12.0])
    assert sum(s.action_j for s in found.spans) == sum(range(1, len(controller.looks) + 1))
    assert found.spans[0].digital == pytest.approx(0.1) and found.spans[1].expected_loss == pytest.approx(0.02)


def test_spans_are_handed_on_as_they_end() -> None:
    seen = []
    found = serve([A, B, C], fixed(ConstantCosts(), 0.25), max_batch=2, span_s=0.7, each=seen.append)
    assert seen == found.spans and [s.start_s for s in seen] == [0.0, *(s.end_s for s in seen[:-1])]
