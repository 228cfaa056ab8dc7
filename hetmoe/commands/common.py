"""Shared by commands."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from hetmoe.evaluate.text import heldout_files, read_text
from hetmoe.files import write_text


def make_console() -> Console:
    """The terminal; 160 columns wide where output goes to a file or a pipe, so that no table is cut."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def choose_text(text: Path | None) -> list[Path]:
    """The user's file, or the embedded held-out text (one file per source)."""
    if text is None:
        return heldout_files()
    read_text(text)  # so that a bad file is named before the model is loaded
    return [text]


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Indented JSON, whole or not at all; NaN and infinity are refused (they are not JSON)."""
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
