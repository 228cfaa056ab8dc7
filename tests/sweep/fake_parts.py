"""Parts without a model, forked and killed at random instants; run as `python fake_parts.py DIR KILLS SEED`.

As `fake_workers`, but on stores of parts: three of them until half of the log is there, then two. All along, this
process collects.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from hetmoe.sweep import ledger as ledger_module
from hetmoe.sweep.collect import collect
from hetmoe.sweep.lock import part_lock
from hetmoe.sweep.part_store import open_part
from hetmoe.sweep.parts import Part, part_directory
from hetmoe.sweep.points import point_id
from hetmoe.sweep.survey import make_survey
from tests.sweep.fake_workers import FACTS, IDENTITY, TIMING, count_lines, grid, measure, wait_for_log

EARLY = {key: value for key, value in IDENTITY.items() if key != "model"}
POINTS = [point for group in grid() for point in group]


def run(directory: Path, part: Part, rng: random.Random) -> None:
    log = os.open(directory / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    folder = part_directory(directory, part)
    with part_lock(folder):
        survey = make_survey(directory)
        survey.check(EARLY, extend=False)
        groups = survey.share(part, grid(), retry_failed=False)
        with open_part(folder, IDENTITY, groups, total=len(POINTS), extend=False) as ledger:
            while points := ledger.claim():
                for one in points:
                    os.write(log, f"claimed {point_id(one)}\n".encode())
                time.sleep(rng.uniform(0, 0.03))
                ledger.write([measure(one) for one in points], TIMING)
                for one in points:
                    os.write(log, f"wrote {point_id(one)}\n".encode())


def start(directory: Path, part: Part, seed: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run(directory, part, random.Random(seed))
        code = 0
    finally:
        os._exit(code)


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status


def main(directory: Path, kills: int, seed: int) -> None:
    ledger_module.provenance = lambda: FACTS
    rng = random.Random(seed)
    directory.mkdir()
    for of in (3, 2):
        parts = [Part(index=index, of=of) for index in range(of)]
        children = {part: start(directory, part, part.index) for part in parts}
        for number in range(kills // 2):
            if of == 3 and count_lines(directory) > len(POINTS):
                break
            wait_for_log(directory, rng.randrange(1, 7))
            time.sleep(rng.uniform(0, 0.01))
            victim = rng.choice(parts)
            end(children[victim])
            children[victim] = start(directory, victim, 100 + number)
            assert not collect(directory, EARLY, POINTS, extend=False).differences
        for child in children.values() if of == 3 else ():
            end(child)
    for child in children.values():
        _, status = os.waitpid(child, 0)
        assert status == 0, status


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
