"""The progress of a long evaluation in a file, so that it goes on where it was stopped without a changed digit.

A line of JSON per finished part of the text, behind a first line that says what is evaluated. Sums are stored as they
came, and added up in the same order whether or not the run was ever stopped. A line that was cut off is dropped.
"""

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np

from hetmoe.errors import InputError
from hetmoe.files import opened_to_lock

FORMAT = "hetmoe-progress-1"


class Progress:
    """Sums of finished parts by name. Made by `open_progress` or `open_in_memory`.

    `chunk` is how many batches of text make a part; None = all of them.
    """

    def __init__(self, found: dict[str, Any], write: Callable[[str], Any], chunk: int | None) -> None:
        self._found, self._write, self.chunk, self._lock = found, write, chunk, threading.Lock()

    @property
    def finished(self) -> int:
        """How many parts are there."""
        return len(self._found)

    def sums(self, name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The sums of a part, float32 or integers: those that are stored, or computed now and stored."""
        if name not in self._found:
            values = {key: np.asarray(value).tolist() for key, value in compute().items()}
            with self._lock:  # seeds may run side by side
                self._write(json.dumps({"part": name, "sums": values}, allow_nan=True) + "\n")
                self._found[name] = values
        return {key: np.asarray(value, np.float64) for key, value in self._found[name].items()}


def open_in_memory() -> Progress:
    """Keeps nothing beyond the run."""
    return Progress({}, lambda line: line, None)


@contextlib.contextmanager
def open_progress(
    path: Path | None, identity: dict[str, Any], chunk: int, *, is_main: bool, share: Callable[[bytes | None], bytes]
) -> Generator[Progress]:
    """Opens the progress of an evaluation, which may be new.

    Args:
        path: the file; None = keep nothing.
        identity: what is evaluated. Progress of something else is refused.
        chunk: batches of a part.
        is_main: whether this process reads and writes; the others of a run follow it.
        share: gives what the main process has to all (`hetmoe.parallel.hosts.from_main`).

    Raises:
        InputError: for a file of another evaluation, one in use, or one that cannot be written.
    """
    if path is None:
        yield open_in_memory()
        return
    with contextlib.ExitStack() as stack:
        file, content, error = None, b"", ""
        if is_main:
            try:
                file = stack.enter_context(_locked(path))
                content = _whole_lines(path, file)
            except InputError as problem:  # the others wait: they are to hear of it
                error = str(problem)
            except OSError as problem:
                error = f"{path}: cannot be read ({problem.strerror})"
        answer = json.loads(share(json.dumps([error, content.decode(errors="replace")]).encode() if is_main else None))
        if answer[0]:
            raise InputError(answer[0])
        header, found = _parse(path, answer[1])
        wanted = json.loads(json.dumps({"format": FORMAT, **identity, "batches of a part": chunk}))
        if header is not None and header != wanted:
            name = next(name for name in wanted | header if wanted.get(name) != header.get(name))
            raise InputError(
                f"{path}: is the progress of another evaluation: {name} was {header.get(name)!r}, is now "
                f"{wanted.get(name)!r}; repeat the same command, or give another file"
            )

        def write(line: str) -> None:
            if file is not None:
                _append(path, file, line)

        if header is None:
            write(json.dumps(wanted) + "\n")
        yield Progress(found, write, chunk)


@contextlib.contextmanager
def _locked(path: Path) -> Generator[int]:
    with opened_to_lock(path) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process evaluates into this file") from None
        except OSError as error:  # a file system without locks
            raise InputError(f"{path}: cannot be locked ({error.strerror}); give a file on a local disk") from None
        yield handle


def _whole_lines(path: Path, handle: int) -> bytes:
    """The content up to the last line's end; what follows is cut off the file. A file of anything else is left alone.

    Raises:
        InputError: for a file that does not begin as progress does.
    """
    with os.fdopen(os.dup(handle), "rb") as file:
        file.seek(0)
        content = file.read()
    start = json.dumps({"format": FORMAT})[:-1].encode()
    if content[: len(start)] != start[: len(content)]:
        raise InputError(f"{path}: is no progress of an evaluation; give another file")
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.ftruncate(handle, len(whole))
    os.lseek(handle, 0, os.SEEK_END)
    return whole


def _append(path: Path, handle: int, line: str) -> None:
    data, before = line.encode(), os.lseek(handle, 0, os.SEEK_CUR)
    try:
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
    except OSError as error:
        with contextlib.suppress(OSError):  # another thread may yet append its line: not behind half of this one
            os.ftruncate(handle, before)
            os.lseek(handle, before, os.SEEK_SET)
        raise InputError(f"{path}: cannot be written ({error.strerror}); what is finished is kept") from None


def _parse(path: Path, content: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """(first line, sums by part)."""
    try:
        lines = [json.loads(line) for line in content.splitlines()]
        return (dict(lines[0]) if lines else None), {line["part"]: dict(line["sums"]) for line in lines[1:]}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: is damaged; remove it, or give another file") from None
