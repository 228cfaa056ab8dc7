"""Puts the demo's table and picture into README.md.

    make demo && python experiments/readme_table.py

Reads build/demo/results.json, rewrites the part of README.md between the two marker comments, and copies the picture to
docs/demo.png. Cost: a second.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- demo table: experiments/readme_table.py -->\n", "<!-- end of demo table -->\n"


def cell(values: list[float], factor: float) -> str:
    """Mean and standard error."""
    mean = f"{np.mean(values) * factor:.2f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {np.std(values, ddof=1) / math.sqrt(len(values)) * factor:.2f}"


def table(record: dict[str, Any], metric: str, factor: float) -> str:
    """Markdown, one row per placement, one column per noise scale."""
    scales = list(dict.fromkeys(p["noise_scale"] for p in record["points"]))
    lines = [
        "| placement | " + " | ".join(f"c = {s:g}" for s in scales) + " |",
        "|---" * (len(scales) + 1) + "|",
        "| all digital | " + " | ".join([cell(record["digital"][metric], factor)] * len(scales)) + " |",
    ]
    for name in dict.fromkeys(p["placement"] for p in record["points"]):
        cells = [cell(p[metric], factor) for p in record["points"] if p["placement"] == name]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite README.md and docs/demo.png."""
    demo = ROOT / "build" / "demo"
    record = json.loads((demo / "results.json").read_text(encoding="utf-8"))
    text, seeds = record["text"], record["options"]["seeds"]
    body = (
        f"Perplexity per token of the embedded model on {text['tokens']:,} held-out tokens, "
        f"{record['options']['device']} noise, mean ± standard error over {seeds} seeds:\n\n"
        f"{table(record, 'perplexity', 1.0)}\n"
        f"Next-word accuracy, % of {text['questions']:,} questions with four answers:\n\n"
        f"{table(record, 'accuracy', 100.0)}"
    )
    readme = ROOT / "README.md"
    head, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    readme.write_text(head + BEGIN + body + END + rest.split(END)[1], encoding="utf-8")
    (ROOT / "docs").mkdir(exist_ok=True)
    shutil.copy(demo / "demo.png", ROOT / "docs" / "demo.png")


if __name__ == "__main__":
    main()
