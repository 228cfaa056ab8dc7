"""One worker of a sweep that is a run of several processes: process 0 has the store, the others follow it."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from hetmoe.parallel import hosts
from hetmoe.sweep.ledger import Ledger, Timing
from hetmoe.sweep.points import SweepPoint, point_id
from hetmoe.sweep.store import Failure, Measurement


class SharedLedger:
    """The ledger of process 0 in all processes of a run; in the others `ledger` is None.

    Every method is called by all processes, in the same order; see `Ledger` for what they do.
    """

    def __init__(self, ledger: Ledger | None, groups: Sequence[Sequence[SweepPoint]]) -> None:
        self._ledger = ledger
        self._points = {point_id(point): point for group in groups for point in group}

    @property
    def total(self) -> int:
        """How many points there are."""
        return len(self._points)

    def claim(self) -> list[SweepPoint]:
        """What process 0 has claimed for all."""
        return [self._points[number] for number in self._told(lambda ledger: [point_id(p) for p in ledger.claim()])]

    def write(self, outcomes: Sequence[Measurement | Failure], timing: Timing) -> None:
        """Writes once."""
        if self._ledger is not None:
            self._ledger.write(outcomes, timing)

    def write_scores(self, scores: dict[str, Any], frequencies: Any) -> None:
        """Writes once."""
        if self._ledger is not None:
            self._ledger.write_scores(scores, frequencies)

    def retry_failed(self) -> None:
        """Forgets once that points failed."""
        if self._ledger is not None:
            self._ledger.retry_failed()

    def finished_count(self) -> int:
        """As process 0 counts."""
        return self._told(lambda ledger: ledger.finished_count())

    def _told(self, ask: Callable[[Ledger], Any]) -> Any:
        content = None if self._ledger is None else json.dumps(ask(self._ledger)).encode()
        return json.loads(hosts.from_main(content))
