"""What must be known to repeat a result."""

import datetime
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("hetmoe", "jax", "jaxlib", "flax", "numpy", "safetensors", "tokenizers")


def provenance() -> dict[str, Any]:
    """Versions, code revision, device and command of this process."""
    device = jax.devices()[0]
    return {
        "command": ["hetmoe", *sys.argv[1:]],
        "time_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "git_revision": _git_revision(),
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "machine": platform.machine(),
    }


def _git_revision() -> str | None:
    """Revision of a checkout, with '+' if it has changes; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        revision = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return revision.stdout.strip()
