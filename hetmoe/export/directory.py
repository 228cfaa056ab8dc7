"""Exports on disk: programs, their arguments, and a record that makes the directory loadable."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.export import Exported
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from safetensors import SafetensorError
from safetensors.numpy import save_file

from hetmoe.errors import InputError
from hetmoe.evaluate.provenance import provenance
from hetmoe.export.program import ExportedPrograms
from hetmoe.files import staged_directory

FORMAT = "hetmoe-export-1"
RECORD, ARGUMENTS = "export.json", "arguments.safetensors"


def program_file(platform: str) -> str:
    """The file with a serialised `jax.export.Exported`; that with its StableHLO as text ends in `.mlir`."""
    return f"forward.{platform}.jaxexport"


def write_export(
    directory: str | Path,
    exported: ExportedPrograms,
    *,
    about: dict[str, Any],
    check: Callable[[Path], dict[str, Any] | None],
) -> None:
    """Writes programs, arguments and record as a new directory.

    Interrupted at any point, it leaves no directory of this name, and nothing that loads.

    | file | content |
    |---|---|
    | `export.json` | the record: format, versions, sizes and arguments in order, files with SHA-256, `about` |
    | `arguments.safetensors` | the arguments by name |
    | `forward.PLATFORM.jaxexport` | the program, for `jax.export.deserialize` |
    | `forward.PLATFORM.mlir` | the same as StableHLO text, for reading and for other compilers |

    Args:
        directory: must not exist, or be empty.
        exported: what `export_forward` returned.
        about: what was exported; plain values.
        check: called with the finished files, before the record is written; what it returns goes there. An exception
            leaves nothing behind.

    Raises:
        InputError: if the directory exists and is not empty, or cannot be written.
    """
    directory = Path(directory)
    with staged_directory(directory) as staged:
        try:
            arrays = {name: np.asarray(value, order="C") for name, value in exported.arguments.items()}
            save_file(arrays, staged / ARGUMENTS)
        except SafetensorError as error:  # a full disk, for example
            raise InputError(f"{directory}: the arguments cannot be written ({error})") from None
        for platform, program in exported.programs.items():
            (staged / program_file(platform)).write_bytes(program.serialize())
            text_file = (staged / program_file(platform)).with_suffix(".mlir")
            text_file.write_text(stablehlo_text(program), encoding="utf-8")
        files = {path.name: describe_file(path) for path in sorted(staged.iterdir())}
        for path in staged.iterdir():
            path.chmod(0o644)
        record = _record(exported, about) | {"files": files, "check": check(staged)}
        (staged / RECORD).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def stablehlo_text(program: Exported) -> str:
    """StableHLO without where in Python it comes from, which would be most of the text; `%argN` in the record's order.

    Programs for any batch or length hold JAX's custom calls `shape_assertion`: other compilers want fixed sizes.
    """
    with ir.Context() as context:
        module: Any = stablehlo.deserialize_portable_artifact(context, program.mlir_module_serialized)
        return module.operation.get_asm(enable_debug_info=False)


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def describe_arguments(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, shape and dtype, in order."""
    return [{"name": name, "shape": list(value.shape), "dtype": str(value.dtype)} for name, value in arguments.items()]


def _record(exported: ExportedPrograms, about: dict[str, Any]) -> dict[str, Any]:
    batch, length = exported.tokens
    versions = {program.calling_convention_version for program in exported.programs.values()}
    return {
        "format": FORMAT,
        "calling_convention_version": max(versions),
        "platforms": list(exported.programs),
        **about,
        "tokens": {"batch": batch, "length": length, "most_length": exported.most_length, "dtype": "int32"},
        "arguments": describe_arguments(exported.arguments),
        "provenance": provenance(),
    }
