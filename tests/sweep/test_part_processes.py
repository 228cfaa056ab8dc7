"""Real processes of parts: at once, killed, collected while they run, in another number; and the bits of one alone."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hetmoe.sweep import worker
from hetmoe.sweep.lock import part_lock
from hetmoe.sweep.parts import Part, found_parts, part_directory
from hetmoe.sweep.store import MEASURED, read_sweep
from tests.sweep.processes import PATIENCE, finished, start

Run = Callable[..., tuple[int, str, str]]


def test_parts_killed_collected_and_changed_in_number_give_the_bits_of_one_process(
    run: Run, write_config: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    scales = ", ".join(str(1 + n / 8) for n in range(8))
    config = write_config(
        placements='["experts_analog"]', rules='["random"]', noise_scales=f"[{scales}]", seeds="8"
    )  # 128 points, 64 groups, one program
    directory = tmp_path / "shared"
    first, second = (Part(index=index, of=2) for index in range(2))

    def wait_for(part: Part, count: int, process: Any) -> None:
        while finished(part_directory(directory, part)) < count:
            assert process.poll() is None or not process.returncode, process.communicate()
            time.sleep(0.005)

    def rows(where: Path) -> dict[Any, Any]:
        return {r.point: tuple(getattr(r, name) for name in MEASURED) for r in read_sweep(where).results}

    one, other = start(config, directory, "--part", "0/2"), start(config, directory, "--part", "1/2")
    wait_for(first, 6, one)
    one.send_signal(signal.SIGKILL)
    one.communicate()
    assert one.returncode == -signal.SIGKILL
    kept = finished(part_directory(directory, first))
    before = rows(part_directory(directory, first))
    wait_for(second, 2, other)
    code, out, err = run("sweep", config, "-o", directory, "--collect")  # while the other runs, or has just ended
    assert code == 0 and "new points from 2 parts" in out, err
    assert kept <= len(read_sweep(directory).results) < 128

    one = start(config, directory, "--part", "0/2")  # the same command goes on, and is killed again
    wait_for(first, kept + 4, one)
    one.send_signal(signal.SIGKILL)
    one.communicate()
    assert one.returncode == -signal.SIGKILL
    out, _ = other.communicate(timeout=PATIENCE)
    assert other.returncode == 0 and "part 1/2 is finished" in out, out

    more = [start(config, directory, "--part", f"{index}/3") for index in range(3)]  # evaluate what is open, at once
    for process in more:
        out, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, out
    parts = found_parts(directory)
    assert len(parts) == 5 and sum(finished(part_directory(directory, part)) for part in parts) == 128  # none twice
    assert before.items() <= rows(part_directory(directory, first)).items()
    code, out, err = run("sweep", config, "-o", directory, "--collect")
    assert code == 0 and "warning" not in out, err
    assert finished(directory) == 128

    alone = start(config, tmp_path / "alone")
    out, _ = alone.communicate(timeout=PATIENCE)
    assert alone.returncode == 0, out
    assert rows(directory) == rows(tmp_path / "alone")
    monkeypatch.setattr(worker, "evaluate_group", None)
    code, out, err = run("sweep", config, "-o", directory)
    assert code == 0 and "128 points, 128 finished" in out, err


def test_a_second_process_of_a_part_is_refused(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(placements='["experts_analog"]', rules=None, fractions=None)
    with part_lock(part_directory(tmp_path / "s", Part(index=0, of=2))):
        process = start(config, tmp_path / "s", "--part", "0/2")
        out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2 and "0-of-2: another process works at this part" in out, out
