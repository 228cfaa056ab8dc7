"""Numbers of a whole run."""

from typing import Any

import numpy as np

from hetmoe.serving.loop import Run
from hetmoe.serving.requests import total_tokens

PERCENTILES = (50, 90, 99)
LATENCIES = {
    "queueing_s": "waiting in the queue",
    "first_token_s": "until the first token",
    "per_token_s": "per further token",
    "whole_s": "until the last token",
}


def latencies(run: Run) -> dict[str, np.ndarray]:
    """Seconds of every request by `LATENCIES`; per further token only of those that have one."""
    arrival, started, first, finished, output = np.array(
        [(s.request.arrival_s, s.started_s, s.first_s, s.finished_s, s.request.output) for s in run.served]
    ).T
    more = output > 1
    return {
        "queueing_s": started - arrival, "first_token_s": first - arrival,
        "per_token_s": (finished - first)[more] / (output[more] - 1), "whole_s": finished - arrival,
    }  # fmt: skip


def summarise(run: Run) -> dict[str, Any]:
    """Throughput, energy, utilisation, and percentiles of latencies."""
    prompts, outputs = total_tokens([s.request for s in run.served])
    busy, energy, actions = (sum(getattr(s, n) for s in run.spans) for n in ("busy_s", "energy_j", "action_j"))
    decoding = sum(s.running_s for s in run.spans)
    return {
        "requests": len(run.served), "seconds": run.end_s, "prompt_tokens": prompts, "generated_tokens": outputs,
        "tokens_per_s": outputs / run.end_s, "busy": busy / run.end_s,
        "running": decoding / busy if busy else 0.0,
        "waiting": sum(s.waiting_s for s in run.spans) / run.end_s,
        "energy_j": energy + actions, "action_j": actions,
        "joules_per_token": (energy + actions) / outputs, "power_w": (energy + actions) / run.end_s,
        "latencies": {
            name: dict(zip(map(str, PERCENTILES), np.percentile(values, PERCENTILES).tolist(), strict=True))
            if len(values) else None
            for name, values in latencies(run).items()
        },
    }  # fmt: skip
