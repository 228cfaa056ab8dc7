"""`hetmoe convert`: between the Hugging Face layout and Orbax checkpoints."""

import shutil
from pathlib import Path
from typing import cast

from hetmoe.checkpoint import orbax_directory
from hetmoe.checkpoint.load import load_model, model_directory
from hetmoe.checkpoint.save import save_model
from hetmoe.commands.common import make_console
from hetmoe.commands.export import ANALOG_OPTIONS, PLACEMENT_OPTIONS, PROGRAM_OPTIONS
from hetmoe.errors import InputError
from hetmoe.files import check_new_directory, check_writable
from hetmoe.placement.plan_file import BESIDE_MODEL

TARGETS = ("orbax", "safetensors")


def only_output(argument: Path | None, option: Path | None) -> Path:
    """The directory to write, named by OUTPUT or by -o. Raises InputError for none, or both."""
    if (argument is None) == (option is None):
        raise InputError("name the directory to write once: OUTPUT or -o DIR")
    return cast("Path", option if argument is None else argument)


def refuse_program_options(given: frozenset[str]) -> None:
    """Raises InputError if options were typed that only `--stablehlo` has."""
    useless = [name for name in (*PROGRAM_OPTIONS, *PLACEMENT_OPTIONS, *ANALOG_OPTIONS) if name in given]
    if useless:
        raise InputError(f"--{useless[0].replace('_', '-')} is an option of convert --stablehlo: a layout has none")


def run(model_source: str, output: Path, target: str, dtype: str | None) -> None:
    """Loads a model and writes it in the other layout."""
    if target not in TARGETS:
        raise InputError(f"--to {target!r} is unknown: use {' or '.join(TARGETS)}")
    check_new_directory(output)
    check_writable(output / "config.json")  # before a large model is loaded
    model = load_model(model_source, dtype)
    write = orbax_directory.write if target == "orbax" else save_model
    write(output, model)
    plan = model_directory(model_source) / BESIDE_MODEL
    if plan.is_file():
        shutil.copyfile(plan, output / BESIDE_MODEL)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    make_console().print(f"{model.name} as {target}: {output} ({size / 1e6:,.1f} MB, {model.params.embed.dtype})")
