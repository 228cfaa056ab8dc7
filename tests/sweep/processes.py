"""Real `hetmoe sweep` processes of a test."""

import contextlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

from hetmoe.sweep.database import FILE

ROOT = Path(__file__).parents[2]
PATIENCE = 600  # seconds; only a hang takes that long, however busy the machine is
COMPILE_ONCE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def start(config: Path, directory: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hetmoe.cli", "sweep", config, "-o", directory, *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | COMPILE_ONCE | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": f"{config}.cache"},
    )  # fmt: skip


def finished(directory: Path) -> int:
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(f"file:{directory / FILE}?mode=ro", uri=True)) as connection,
    ):
        return connection.execute("SELECT count(*) FROM finished").fetchone()[0]
    return 0
