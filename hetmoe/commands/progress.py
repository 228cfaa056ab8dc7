"""A progress bar, or where output is no terminal a line every tenth of the way."""

import contextlib
from collections.abc import Callable, Generator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def show_progress(
    console: Console, description: str, unit: str, total: int, done: float = 0
) -> Generator[Callable[[float], None]]:
    """Gives the function to call with the number of newly finished units; `done` of `total` are finished before."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total, completed=done)  # pyright: ignore[reportArgumentType] (floats add up as well)

        def advance(count: float) -> None:
            nonlocal done
            bar.advance(task, count)
            if not console.is_terminal and _tenths(done + count, total) > _tenths(done, total):  # a log has no bar
                console.print(f"{(done + count) / total:.0%} of {total} {unit}")
            done += count

        yield advance


def _tenths(done: float, total: int) -> int:
    return int(done * 10 / total + 1e-6)  # parts of a unit do not add up exactly
