"""Exported forward passes: versioned programs of JAX, with all weights as arguments, that run without hetmoe."""

from hetmoe.export.directory import write_export
from hetmoe.export.load import ExportedForward, load_exported
from hetmoe.export.program import PLATFORMS, ExportedPrograms, export_forward

__all__ = [
    "PLATFORMS",
    "ExportedForward",
    "ExportedPrograms",
    "export_forward",
    "load_exported",
    "write_export",
]
