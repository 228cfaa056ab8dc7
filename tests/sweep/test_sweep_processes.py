"""Real `hetmoe sweep` processes: two at a time, killed, and compared bit for bit with one that was left alone."""

import contextlib
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hetmoe.sweep.database import FILE
from hetmoe.sweep.store import read_sweep
from tests.sweep.processes import PATIENCE, finished, start


def test_two_processes_killed_and_restarted_give_the_bits_of_one(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    scales = ", ".join(str(1 + n / 8) for n in range(10))
    config = write_config(
        placements='["experts_analog"]', rules='["random"]', noise_scales=f"[{scales}]", seeds="10"
    )  # 200 points, 100 groups, one program
    directory, rng = tmp_path / "shared", random.Random(5)
    alone = start(config, tmp_path / "alone")
    out, _ = alone.communicate(timeout=PATIENCE)
    assert alone.returncode == 0, out
    total = len(read_sweep(tmp_path / "alone").results)
    assert total == 200

    killed = 0
    pair = [start(config, directory), start(config, directory)]  # together on no directory at all
    for target in (rng.randrange(1, 50), rng.randrange(50, 120)):
        while finished(directory) < target:
            assert not any(p.poll() for p in pair), [p.communicate() for p in pair if p.poll()]
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.02))
        victim = pair.pop(0)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        killed += victim.returncode == -signal.SIGKILL  # on a busy machine it may have ended before
        if len(pair) == 1 and target < 50:
            pair.append(start(config, directory))
    survivor = pair[0]
    out, _ = survivor.communicate(timeout=PATIENCE)
    assert survivor.returncode == 0 and "100% of 200 points" in out, out

    def bits(path: Path) -> dict[Any, Any]:
        return {
            r.point: (r.nll, r.correct, r.perplexity, r.bits_per_byte, r.accuracy) for r in read_sweep(path).results
        }

    assert bits(directory) == bits(tmp_path / "alone")
    with contextlib.closing(sqlite3.connect(directory / FILE)) as connection:
        claims = connection.execute("SELECT point_id, worker FROM claims ORDER BY number").fetchall()
        finisher = dict(connection.execute("SELECT point_id, worker FROM finished").fetchall())
    assert killed  # with none the rest says nothing about kills
    assert dict(claims) == finisher
    assert total <= len(claims) <= total + 2 * killed  # a group of two points may be lost with each kill, no more
