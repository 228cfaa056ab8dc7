"""How far the results of an evaluation on a mesh are from those on one device.

    python experiments/mesh_differences.py      # docs/experiments/mesh_differences.json

`hetmoe eval reference` on 512 tokens of the embedded text, once without a mesh and once on each of seven meshes of
eight simulated devices. Programmed weights are equal to the last bit on any mesh (`tests/parallel` finds it of small
models); sums are rounded otherwise only where XLA compiles another program, and a last bit may flip a step of a
converter, of which there are 254. Takes 5 minutes on two cores. Expected: the digital perplexity equal to 1e-6 of it;
most analog ones too, some off by a flipped step, which is far below the spread over noise seeds.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from hetmoe.evaluate.provenance import provenance
from hetmoe.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "experiments" / "mesh_differences.json"
MESHES = (
    "data=8", "expert=8", "seed=2,data=4", "seed=2,expert=4", "data=2,expert=4", "data=2,expert=2,tensor=2",
    "seed=2,expert=2,tensor=2",
)  # fmt: skip
COMMAND = [
    "hetmoe", "eval", "reference", "--tokens", "512", "--seq", "64", "--batch", "8", "--seeds", "2", "--digital",
    "0.25", "--noise-scale", "1",
]  # fmt: skip


def evaluate(*more: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        run = [sys.executable, "-m", "hetmoe.cli", *COMMAND[1:], *more, "--json", str(file)]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{' '.join([*COMMAND, *more])}: {done.stderr}")
        return json.loads(file.read_text())


def analog(results: dict[str, Any]) -> np.ndarray:
    """Perplexities [placements, seeds]."""
    return np.array([point["perplexity"] for point in results["points"]])


def main() -> None:
    alone = evaluate()
    of_alone = analog(alone)
    rows = []
    for mesh in MESHES:
        found = evaluate("--mesh", mesh, "--cpu-devices", "8")
        apart = np.abs(analog(found) / of_alone - 1)
        digital = abs(found["digital"]["perplexity"][0] / alone["digital"]["perplexity"][0] - 1)
        rows.append(
            {
                "mesh": mesh, "digital": digital, "analog_largest": float(apart.max()),
                "analog_median": float(np.median(apart)), "analog_above_1e-6": int((apart > 1e-6).sum()),
                "of": int(apart.size),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    spread = float((of_alone.std(axis=1, ddof=1) / of_alone.mean(axis=1)).mean())
    record = {
        "format": "hetmoe-mesh-differences-1",
        "provenance": provenance() | {"command": ["python", "experiments/mesh_differences.py"]},
        "command": COMMAND,
        "what": "relative differences of perplexities from those without a mesh",
        "meshes": rows,
        "spread_over_seeds": spread,
    }
    write_text(RESULTS, json.dumps(record, indent=1) + "\n")
    print(f"standard deviation over seeds: {spread:.1e} of the perplexity")


if __name__ == "__main__":
    main()
