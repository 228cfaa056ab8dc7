"""Exported programs run by a new process that knows nothing of hetmoe."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from hetmoe.errors import InputError
from hetmoe.export.directory import ARGUMENTS, program_file

# What runs an export without hetmoe, in its directory: tokens to logits.
SNIPPET = f"""\
import jax
from jax import export
from safetensors.flax import load_file

arguments = load_file("{ARGUMENTS}")
with open("{program_file("PLATFORM")}", "rb") as file:
    forward = export.deserialize(bytearray(file.read()))
logits = jax.jit(forward.call)(arguments, tokens)
"""
_BEFORE = "import sys\nimport numpy\ntokens = numpy.load(sys.argv[1])\n"
_AFTER = "numpy.save(sys.argv[2], logits)\nassert not any(name.split('.')[0] == 'hetmoe' for name in sys.modules)\n"


def fresh_logits(directory: Path, platform: str, tokens: np.ndarray) -> np.ndarray:
    """Logits of int32 tokens `[batch, seq]` by the files of an export, in a new Python process on the same machine.

    Raises:
        InputError: if that process fails; with the end of what it said.
    """
    code = _BEFORE + SNIPPET.replace("PLATFORM", platform) + _AFTER
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "tokens.npy", Path(folder) / "logits.npy"
        np.save(given, tokens)
        # On a GPU this process holds part of the memory already.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, str(given), str(found)],
            cwd=directory, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            lines = ["no message", *done.stderr.strip().splitlines()]
            reason = next((line for line in reversed(lines) if "Error" in line), lines[-1])
            raise InputError(f"the exported program does not run in a new process: {reason[:500]}")
        return np.load(found)
