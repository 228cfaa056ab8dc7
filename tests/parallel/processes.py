"""Starting Python processes with simulated devices."""

import os
import subprocess
import sys

from tests.checkpoint.golden_files import ROOT


def environment() -> dict[str, str]:
    """Of a process that sees this checkout and the CPU only."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def output_of(module: str, *arguments: object) -> str:
    """What `python -m module` prints, if it ends well."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
