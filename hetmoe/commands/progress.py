"""A progress bar, or where output is no terminal a line every tenth of the way."""

import contextlib
from collections.abc import Callable, Generator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def show_progress(
    console: Console, description: str, unit: str, total: int, done: int = 0
) -> Generator[Callable[[int], None]]:
    """Gives the function to call with the number of newly finished units; `done` of `total` are finished before."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total, completed=done)

        def advance(count: int) -> None:
            nonlocal done
            bar.advance(task, count)
            if not console.is_terminal and (done + count) * 10 // total > done * 10 // total:  # a log has no bar
                console.print(f"{(done + count) / total:.0%} of {total} {unit}")
            done += count

        yield advance
