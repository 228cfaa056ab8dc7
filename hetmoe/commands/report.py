"""`hetmoe report`: a page, figures and tables from a sweep's store."""

from pathlib import Path

from hetmoe.commands.common import make_console
from hetmoe.files import check_writable, write_bytes
from hetmoe.report.build import PAGE, build_report
from hetmoe.report.facts import progress
from hetmoe.sweep.store import read_sweep


def run(directory: Path, output: Path | None) -> None:
    """Reads the store, makes all files in memory, then writes them, the page last."""
    folder = directory / "report" if output is None else output
    check_writable(folder / PAGE)
    record = read_sweep(directory)
    files = build_report(record)
    for name in sorted(files, key=lambda name: name == PAGE):
        write_bytes(folder / name, files[name])
    console = make_console()
    console.print(progress(record), markup=False)
    console.print(f"report: {folder / PAGE} ({len(files) - 1} figures and tables beside it)", markup=False)
