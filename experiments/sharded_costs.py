"""Memory, communication and FLOPs of published models on meshes of TPUs, from programs compiled for them.

    python experiments/sharded_costs.py            # all rows that docs/experiments/sharded_costs.json lacks
    python experiments/sharded_costs.py --table    # the table of the notes, from that file

Each row is one command `hetmoe info experiments/architectures/MODEL.json --mesh MESH --analyze --topology TOPOLOGY`,
which needs libtpu (`pip install libtpu` in the version that JAX's extra `tpu` asks for), but no TPU and no weights. One
window of 1024 tokens for each part of data x expert, bfloat16; "digital" is the model without crossbars, "layer" puts
all modules on PCM crossbars that are programmed layer by layer in the pass. A row takes 1 to 10 minutes on two
cores. Expected: every row but those marked fits, and the estimate that `hetmoe eval` refuses by is within a factor of
1.5 of the compiled program.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hetmoe.evaluate.provenance import provenance
from hetmoe.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "experiments" / "sharded_costs.json"
GIB, GB = 2**30, 1e9
MESHES = [
    ("olmoe_7b", "tpu:v5e:2x4", "data=2,expert=4"),
    ("olmoe_7b", "tpu:v5e:2x4", "expert=4,tensor=2"),
    ("deepseek_moe_16b", "tpu:v5e:4x4", "expert=16"),
    ("deepseek_v3_671b", "tpu:v5p:4x4x4", "expert=32,tensor=2"),
    ("moe_1t", "tpu:v5p:4x4x8", "expert=64,tensor=2"),
]
CASES = [*((*mesh, "digital") for mesh in MESHES), *((*mesh, "layer") for mesh in (MESHES[0], MESHES[2]))]


def rows() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def command(model: str, topology: str, mesh: str, weights: str) -> list[str]:
    return [
        "hetmoe", "info", f"experiments/architectures/{model}.json", "--mesh", mesh, "--analyze", "--topology",
        topology, "--weights", weights,
    ]  # fmt: skip


def measure(arguments: list[str]) -> dict[str, Any]:
    """What the command's record says, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        done = subprocess.run(
            [sys.executable, "-m", "hetmoe.cli", *arguments[1:], "--json", str(file)], cwd=ROOT, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return json.loads(file.read_text())["mesh"]
        return {"error": done.stderr.strip().splitlines()[-1]}


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| model | TPUs, mesh | crossbars | weights GiB | temporaries GiB | estimate GiB | sent GB | TFLOP at most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        start = f"| {row['model']} | {row['topology'].removeprefix('tpu:')}, {row['mesh']} | {row['weights']} |"
        if "error" in row["found"]:
            lines.append(f"{start} {row['found']['error']} |")
            continue
        of = row["found"]["compiled"]
        estimate = sum(row["found"]["bytes_per_device"].values()) / GIB
        lines.append(
            f"{start} {of['argument_bytes'] / GIB:.2f} | {of['temporary_bytes'] / GIB:.2f} | {estimate:.2f} | "
            f"{of['sent_bytes'] / GB:.2f} | {of['flops'] / 1e12:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        for model, topology, mesh, weights in CASES:
            found, arguments = rows(), command(model, topology, mesh, weights)
            if any(row["command"] == arguments for row in found):
                continue
            print(" ".join(arguments), flush=True)
            row = {
                "model": model, "topology": topology, "mesh": mesh, "weights": weights, "command": arguments,
                "found": measure(arguments),
            }  # fmt: skip
            made_by = provenance() | {"command": ["python", "experiments/sharded_costs.py"]}
            record = {"format": "hetmoe-sharded-costs-1", "provenance": made_by, "rows": [*found, row]}
            write_text(RESULTS, json.dumps(record, indent=1) + "\n")
    keys = ("model", "topology", "mesh", "weights")
    print(table(sorted(rows(), key=lambda row: CASES.index(tuple(row[key] for key in keys)))))


if __name__ == "__main__":
    main()
