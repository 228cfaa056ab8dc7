"""Which code made a result."""

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import hetmoe


def code_digest(package: Path) -> str:
    """Digest of the names and contents of all Python files of a package."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def code_record() -> dict[str, Any]:
    """What a number may depend on besides config, text and model."""
    return {
        "version": metadata.version("hetmoe"),
        "source_digest": code_digest(Path(hetmoe.__file__).parent),
        "jax": metadata.version("jax"),
        "jaxlib": metadata.version("jaxlib"),
        "threefry_partitionable": bool(jax.config.jax_threefry_partitionable),  # pyright: ignore[reportAttributeAccessIssue]
    }
