"""An evaluation over a million tokens that is killed again and again, beside one that is left alone.

    python experiments/long_evaluation.py          # build/long_evaluation, docs/experiments/long_evaluation.json

Both are `hetmoe eval reference --mesh data=2,expert=4 --cpu-devices 8 --tokens 1048576 --progress FILE`, on the
embedded held-out text with its lines in another order each time it is repeated. One is killed (SIGKILL) as soon as it
has finished between 3 and 20 more parts of 65,536 tokens, and started again with the same command. Takes half an hour
on two cores. Expected: the same digits in every number of both results.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from hetmoe.evaluate.provenance import provenance
from hetmoe.evaluate.text import heldout_files
from hetmoe.files import write_text

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "long_evaluation"
RESULTS = ROOT / "docs" / "experiments" / "long_evaluation.json"
TOKENS = 2**20


def make_text(path: Path) -> None:
    draw = random.Random(0)
    lines = [line for file in heldout_files() for line in file.read_text().splitlines() if line.strip()]
    size = sum(len(line) for line in lines)
    copies = []
    for _ in range(5 * TOKENS // size + 1):  # a token has 3.1 bytes there: some text is left
        draw.shuffle(lines)
        copies.extend(lines)
    path.write_text("\n".join(copies) + "\n")


def command(name: str) -> list[str]:
    options = [
        "reference", "--text", "build/long_evaluation/text.txt", "--tokens", str(TOKENS), "--seq", "256",
        "--batch", "64", "--mesh", "data=2,expert=4", "--cpu-devices", "8", "--rule", "random", "--digital", "0.125",
        "--noise-scale", "5", "--seeds", "1", "--progress", f"build/long_evaluation/{name}.progress", "--json",
        f"build/long_evaluation/{name}.json",
    ]  # fmt: skip
    return ["hetmoe", "eval", *options]


def parts(name: str) -> int:
    file = BUILD / f"{name}.progress"
    return max(0, file.read_bytes().count(b"\n") - 1) if file.exists() else 0


def run(name: str, most: int | None) -> int:
    """Runs it until it ends, or has finished `most` more parts; its exit code."""
    before = parts(name)
    with (BUILD / f"{name}.log").open("a") as log:
        process = subprocess.Popen([sys.executable, "-m", "hetmoe.cli", *command(name)[1:]], cwd=ROOT, stdout=log)
        while process.poll() is None:
            if most is not None and parts(name) >= before + most:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.05)
    return process.returncode


def main() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    for old in (*BUILD.glob("*.progress"), *BUILD.glob("*.json"), *BUILD.glob("*.log")):
        old.unlink()
    make_text(BUILD / "text.txt")
    draw, killed_at = random.Random(1), []
    while True:
        code = run("killed", draw.randint(3, 20))
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        killed_at.append(parts("killed"))
        print(f"killed after {killed_at[-1]} parts", flush=True)
    assert run("alone", None) == 0
    killed, alone = (json.loads((BUILD / f"{name}.json").read_text()) for name in ("killed", "alone"))
    compared = ("text", "digital", "points", "expert_load", "paired_differences")
    equal = {name: json.dumps(killed[name]) == json.dumps(alone[name]) for name in compared}
    record = {
        "format": "hetmoe-long-evaluation-1",
        "provenance": provenance() | {"command": ["python", "experiments/long_evaluation.py"]},
        "command": command("alone"),
        "tokens": alone["text"]["tokens"],
        "parts": parts("alone"),
        "killed_after_parts": killed_at,
        "equal": equal,
        "progress_equal": (BUILD / "killed.progress").read_text() == (BUILD / "alone.progress").read_text(),
        "seconds_alone": alone["seconds"],
        "digital": alone["digital"],
        "points": alone["points"],
    }
    write_text(RESULTS, json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: record[name] for name in ("tokens", "parts", "killed_after_parts", "equal")}))
    if not all(equal.values()):
        sys.exit("the results differ")


if __name__ == "__main__":
    main()
