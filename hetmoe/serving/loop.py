"""A server with continuous batching, step by step.

Between two steps the server admits the longest-waiting request if a place in the batch is free and the key-value cache
of its whole length fits beside those of the running ones; its prompt is then run alone, and gives its first token.
Otherwise one decoding step gives every running request a token. Prompts thus go before decoding, one at a time, and
requests leave when their last token is there (iteration-level scheduling as of Yu et al., Orca, OSDI 2022).
"""

import dataclasses
import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from hetmoe.errors import InputError
from hetmoe.serving.costs import StepCosts
from hetmoe.serving.requests import Request
from hetmoe.serving.timeline import Span, Timeline


class Served(NamedTuple):
    """Times of one request, s."""

    request: Request
    started_s: float  # its prompt, after waiting in the queue
    first_s: float  # its first token is there
    finished_s: float


class Plan(NamedTuple):
    """What the server runs from now on."""

    costs: StepCosts
    digital: float  # share of experts
    expected_loss: float | None = None
    action_j: float = 0.0  # of what changed


class Controller(Protocol):
    """Decides on the plan at equal intervals, the first time at time 0."""

    every_s: float

    def look(self, time_s: float, tokens: int) -> Plan:
        """The plan from now on; `tokens` were generated since the last look."""
        ...


@dataclasses.dataclass(frozen=True)
class Run:
    """All requests by their end, and the spans of time."""

    served: list[Served]
    spans: list[Span]
    end_s: float


def _nothing(span: Span) -> None:
    del span


class _Fixed:
    """A controller that never changes the plan."""

    every_s = math.inf

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def look(self, time_s: float, tokens: int) -> Plan:
        del time_s, tokens
        return self._plan


def fixed(costs: StepCosts, digital: float) -> Controller:
    """One plan for all time."""
    return _Fixed(Plan(costs, digital))


class _Server:
    """State of the loop."""

    def __init__(
        self, requests: Sequence[Request], controller: Controller, max_batch: int, window: int, timeline: Timeline
    ) -> None:
        self.requests, self.controller, self.max_batch, self.window = requests, controller, max_batch, window
        self.timeline, self.now, self.arrived = timeline, 0.0, 0
        self.waiting: deque[int] = deque()
        self.running: list[tuple[int, int]] = []  # (number of the step that finishes it, request)
        self.steps, self.held, self.tokens = 0, 0, 0
        self.started, self.first = {}, {}
        self.served: list[Served] = []
        self.plan, self.next_look = self._look()

    def run(self) -> None:
        while self.arrived < len(self.requests) or self.waiting or self.running:
            if self.now >= self.next_look:
                self.plan, self.next_look = self._look()
            while self.arrived < len(self.requests) and self.requests[self.arrived].arrival_s <= self.now:
                self.waiting.append(self.arrived)
                self.arrived += 1
            if self.waiting and len(self.running) < self.max_batch and self._fits(self.waiting[0]):
                self._admit(self.waiting.popleft())
            elif self.running:
                self._decode()
            else:
                self._wait()

    def _look(self) -> tuple[Plan, float]:
        """(the plan from now on, time of the next look)."""
        plan, every = self.controller.look(self.now, self.tokens), self.controller.every_s
        self.timeline.act(self.now, plan.action_j)
        self.tokens = 0
        # A look that rounding puts a little early counts as the one that was due.
        return plan, math.inf if math.isinf(every) else (math.floor(self.now / every + 1e-9) + 1) * every

    def _length(self, number: int) -> int:
        """Positions of the cache that a request needs in the end."""
        return min(self._total(number), self.window)

    def _total(self, number: int) -> int:
        """Positions of a request in the end."""
        return self.requests[number].prompt + self.requests[number].output

    def _fits(self, number: int) -> bool:
        costs = self.plan.costs
        needed = (self.held + self._length(number)) * costs.position_bytes
        if needed <= costs.room:
            return True
        if not self.running:
            request = self.requests[number]
            raise InputError(
                f"a request of {request.prompt} + {request.output} tokens needs {needed / 1e9:.3g} GB of key-value "
                f"cache, and the digital weights leave {max(costs.room, 0) / 1e9:.3g} GB"
            )
        return False

    def _spend(
        self, seconds: float, energy: float, *, busy: bool, running: int, tokens: int = 0, prompt: int = 0
    ) -> None:
        self.timeline.add(
            self.now, seconds, energy=energy, waiting=len(self.waiting), running=running, busy=busy, tokens=tokens,
            prompt=prompt, digital=self.plan.digital, expected_loss=self.plan.expected_loss,
        )  # fmt: skip
        self.now += seconds
        self.tokens += tokens

    def _admit(self, number: int) -> None:
        request = self.requests[number]
        self.started[number] = self.now
        seconds, energy = self.plan.costs.prefill(request.prompt)
        self._spend(seconds, energy, busy=True, running=len(self.running) + 1, tokens=1, prompt=request.prompt)
        self.first[number] = self.now
        if request.output == 1:
            self._finish(number)
            return
        heapq.heappush(self.running, (self.steps + request.output - 1, number))
        self.held += self._length(number)

    def _decode(self) -> None:
        batch = len(self.running)
        # A request that finishes at a step has as many positions less as it is steps from there.
        seen = sum(min(self._total(n) - (end - self.steps), self.window) for end, n in self.running)
        seconds, energy = self.plan.costs.decode(batch, seen / batch)
        self._spend(seconds, energy, busy=True, running=batch, tokens=batch)
        self.steps += 1
        while self.running and self.running[0][0] == self.steps:
            number = heapq.heappop(self.running)[1]
            self.held -= self._length(number)
            self._finish(number)

    def _finish(self, number: int) -> None:
        self.served.append(Served(self.requests[number], self.started[number], self.first[number], self.now))

    def _wait(self) -> None:
        """Nothing to do until the next request or look."""
        seconds = min(self.requests[self.arrived].arrival_s, self.next_look) - self.now
        self._spend(seconds, self.plan.costs.idle_power * seconds, busy=False, running=0)


def serve(
    requests: Sequence[Request],
    controller: Controller,
    *,
    max_batch: int,
    span_s: float,
    window: int | None = None,
    each: Callable[[Span], None] = _nothing,
) -> Run:
    """Serves all requests, the last ones to their end.

    Args:
        requests: by arrival.
        controller: `fixed`, or a policy.
        max_batch: most requests that run at once, at least 1.
        span_s: width of the timeline's spans, s.
        window: most positions that the cache keeps of a sequence; None = all.
        each: called with every span when it is over.

    Raises:
        InputError: for a batch or width out of range, or a request whose key-value cache does not fit.
    """
    if max_batch < 1 or not span_s > 0:
        raise InputError(f"max_batch={max_batch!r} must be at least 1, and span_s={span_s!r} above 0")
    timeline = Timeline(span_s, each)
    longest = max(r.prompt + r.output for r in requests)
    server = _Server(requests, controller, max_batch, longest if window is None else window, timeline)
    server.run()
    timeline.finish(server.now)
    return Run(served=server.served, spans=timeline.spans, end_s=server.now)
