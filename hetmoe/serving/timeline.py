"""What happened in equal spans of time."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass
class Span:
    """Sums and time means of one span; energies of a step that crosses a boundary are shared by time."""

    start_s: float
    end_s: float
    tokens: float = 0.0  # generated
    prompt_tokens: float = 0.0
    steps: float = 0.0
    busy_s: float = 0.0
    energy_j: float = 0.0  # of steps and of waiting, without actions
    action_j: float = 0.0
    waiting_s: float = 0.0  # requests in the queue, times seconds
    running_s: float = 0.0
    digital: float = 0.0  # share of experts, at the end
    expected_loss: float | None = None  # nats per token, as a policy sees it, at the end

    @property
    def seconds(self) -> float:
        """Length."""
        return self.end_s - self.start_s

    def record(self) -> dict[str, Any]:
        """Sums as rates and means."""
        length = self.seconds
        return {
            "start_s": self.start_s, "end_s": self.end_s, "tokens_per_s": self.tokens / length,
            "prompt_tokens_per_s": self.prompt_tokens / length, "steps": self.steps, "busy": self.busy_s / length,
            "power_w": (self.energy_j + self.action_j) / length, "energy_j": self.energy_j, "action_j": self.action_j,
            "waiting": self.waiting_s / length, "running": self.running_s / length, "digital": self.digital,
            "expected_loss": self.expected_loss,
        }  # fmt: skip


ROUNDING = 1e-6  # of a width
SUMS = ("tokens", "prompt_tokens", "steps", "busy_s", "energy_j", "action_j", "waiting_s", "running_s")


class Timeline:
    """Spans of one width; each is handed on when it is over."""

    def __init__(self, width_s: float, done: Callable[[Span], None]) -> None:
        self.spans: list[Span] = []
        self._width, self._done = width_s, done
        self._now = Span(0.0, width_s)

    def add(
        self, start: float, seconds: float, *, energy: float, waiting: int, running: int, busy: bool,
        tokens: int = 0, prompt: int = 0, digital: float = 0.0, expected_loss: float | None = None,
    ) -> None:  # fmt: skip
        """Something that lasts; its tokens and energy are spread evenly over its time."""
        end, left = start + seconds, 1.0
        while True:
            within = min(end, self._now.end_s) - start
            share = left if end <= self._now.end_s else within / seconds
            now = self._now
            now.tokens += share * tokens
            now.prompt_tokens += share * prompt
            now.steps += share * busy
            now.busy_s += within * busy
            now.energy_j += share * energy
            now.waiting_s += within * waiting
            now.running_s += within * running
            now.digital, now.expected_loss = digital, expected_loss
            if end <= self._now.end_s:
                return
            start, left = self._now.end_s, left - share
            self._close(self._now.end_s)

    def act(self, time_s: float, energy: float) -> None:
        """Energy of actions, at once; at a boundary (but for rounding) they belong to what comes after it."""
        if time_s >= self._now.end_s - ROUNDING * self._width:
            self._close(self._now.end_s)
        self._now.action_j += energy

    def finish(self, end_s: float) -> None:
        """Cuts the last span at the end; one of less than half the width goes to the span before it."""
        last = self._now
        if self.spans and end_s - last.start_s < self._width / 2:
            kept = self.spans[-1]
            for name in SUMS:
                setattr(kept, name, getattr(kept, name) + getattr(last, name))
            kept.end_s = end_s
        else:
            last.end_s = end_s
            self._close(end_s)

    def _close(self, end_s: float) -> None:
        self.spans.append(self._now)
        self._done(self._now)
        count = len(self.spans)
        self._now = Span(end_s, (count + 1) * self._width)
