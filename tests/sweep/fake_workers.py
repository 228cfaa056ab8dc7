"""Workers without a model, forked and killed at random instants; run as `python fake_workers.py DIR KILLS SEED`.

Every worker notes in DIR/log what it claimed and what it wrote, each as soon as that is certain.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from hetmoe.sweep import ledger as ledger_module
from hetmoe.sweep.ledger import Timing, open_ledger
from hetmoe.sweep.points import SweepPoint, group_points, point_id
from hetmoe.sweep.store import Measurement

FACTS = {
    "time_utc": "now", "command": ["hetmoe"], "git_revision": None, "versions": {}, "machine": "x",
    "device": {"platform": "cpu", "kind": "cpu", "count": 1},
}  # fmt: skip
IDENTITY: dict[str, Any] = {
    "config": {"grid": {"seeds": 25, "noise_scales": [0.5, 1.0], "seed": 0, "scoring_scale": None}, "model": "m"},
    "text": {"a.txt": "0"},
    "model": {"name": "m", "fingerprint": "f", "weights_sha256": "w"},
    "calibration": "c",
    "code": {"version": "1", "source_digest": "d", "threefry_partitionable": True},
}
TIMING = Timing(started_utc="a", ended_utc="b", seconds=0.25, key_words=[1, 2])


def point(seed: int, scale: float = 0.5, **changes: object) -> SweepPoint:
    values = {
        "placement": "experts_analog", "fraction": None, "device": "pcm", "noise_scale": scale, "time_s": None,
        "bits": 8, "seed_index": seed,
    }  # fmt: skip
    return SweepPoint(**(values | changes))


def grid() -> list[list[SweepPoint]]:
    """50 groups of 3 points."""
    lines = [("experts_analog", None), ("random", 0.25), ("random", 0.5)]
    return group_points(
        point(seed, scale, placement=name, fraction=fraction)
        for scale in (0.5, 1.0)
        for seed in range(25)
        for name, fraction in lines
    )


def measure(of: SweepPoint) -> Measurement:
    """Different for every point, with all digits of a float."""
    value = int(point_id(of)[:12], 16) / 7
    return Measurement(
        point=of, nll=value, correct=value / 3, tokens=10, bytes=30, questions=4, perplexity=value / 11,
        bits_per_byte=value / 13, accuracy=None, digital_parameters=5, crossbar_parameters=9,
    )  # fmt: skip


def run(directory: Path, rng: random.Random) -> None:
    log = os.open(directory / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with open_ledger(directory, IDENTITY, grid(), extend=False) as ledger:
        while ledger.finished_count() < ledger.total:
            points = ledger.claim()
            for one in points:
                os.write(log, f"claimed {point_id(one)}\n".encode())
            time.sleep(rng.uniform(0, 0.01))
            if points:
                ledger.write([measure(one) for one in points], TIMING)
            for one in points:
                os.write(log, f"wrote {point_id(one)}\n".encode())


def start(directory: Path, seed: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run(directory, random.Random(seed))
        code = 0
    finally:
        os._exit(code)


def wait_for_log(directory: Path, more: int) -> None:
    """Until some more lines are there, or nothing happens any more."""
    target, end = count_lines(directory) + more, time.monotonic() + 0.3
    while count_lines(directory) < target and time.monotonic() < end:
        time.sleep(0.001)


def count_lines(directory: Path) -> int:
    log = directory / "log"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def main(directory: Path, kills: int, seed: int) -> None:
    ledger_module.provenance = lambda: FACTS
    rng = random.Random(seed)
    directory.mkdir()
    workers = [start(directory, n) for n in range(3)]  # all on an empty directory
    for number in range(kills):
        wait_for_log(directory, rng.randrange(1, 7))  # by deeds, not by the clock: a busy machine is slow
        time.sleep(rng.uniform(0, 0.01))
        victim = workers.pop(0)
        os.kill(victim, signal.SIGKILL)
        _, status = os.waitpid(victim, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
        workers.append(start(directory, 100 + number))
    for worker in workers:
        _, status = os.waitpid(worker, 0)
        assert status == 0, status


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
