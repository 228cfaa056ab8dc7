"""Reading a store that a process of another machine may be writing at this moment.

A reader of SQLite's own takes locks, and shares memory with the writer where there is a write-ahead log. Neither is to
be trusted between machines. So the file and its log are copied byte by byte, and the copy is opened. It is used only if
it is the store of some moment:

- Without a log, the file did not change while it was read. (That of a part is only ever replaced as a whole.)
- With a log, the log did not begin anew from before the file was read until after the log was. Then a page of the file
  that a checkpoint had half written, or had written after others were read, is in the copied log as well, since pages
  get into the log first; and SQLite takes it from there. What of the log is not committed has no valid checksum.
"""

import contextlib
import errno
import os
import sqlite3
import tempfile
import time
from pathlib import Path

from hetmoe.errors import InputError
from hetmoe.sweep.database import FILE, one_line

ATTEMPTS, PAUSE = 100, 0.05  # seconds; a log begins anew every thousand pages, and a copy takes milliseconds
_LOG_HEADER = 32  # bytes, with random numbers that change whenever the log begins anew


def read_snapshot(path: Path) -> sqlite3.Connection:
    """Copies a store into memory.

    Raises:
        InputError: if it cannot be read, or always changes.
    """
    database, log = _consistent(path)
    memory = sqlite3.connect(":memory:", isolation_level=None)
    memory.row_factory = sqlite3.Row
    try:
        with tempfile.TemporaryDirectory() as folder, one_line(path):
            copy = Path(folder) / FILE
            copy.write_bytes(database)
            _log_of(copy).write_bytes(log)
            with contextlib.closing(sqlite3.connect(copy)) as source:
                source.backup(memory)
    except InputError:
        memory.close()
        raise
    return memory


def _consistent(path: Path) -> tuple[bytes, bytes]:
    """The bytes of the file and of its log, which is empty if there is none."""
    for _ in range(ATTEMPTS):
        try:
            generation = _generation(path)
            database, changed = _read(path)
            log = _read(_log_of(path))[0] if generation else b""
            if _generation(path) == generation and (generation or not changed):
                return database, log
        except OSError as error:
            # The log went with the last process that had the store open; a server forgot a file that was replaced.
            if not path.exists() or error.errno not in {errno.ENOENT, errno.ESTALE}:
                raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        time.sleep(PAUSE)
    raise InputError(f"{path}: changes faster than it can be read; try again")


def _read(path: Path) -> tuple[bytes, bool]:
    """The content, and whether it changed meanwhile."""
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        content = file.read()
    with path.open("rb") as file:  # once more: a network file system looks at the server when a file is opened
        after = os.fstat(file.fileno())
    same = before.st_ino == after.st_ino  # else it was replaced, and what was read is whole
    return content, same and (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)


def _generation(path: Path) -> bytes:
    """What tells a log from the next one; empty if there is none, or nothing in it."""
    try:
        with _log_of(path).open("rb") as file:
            header = file.read(_LOG_HEADER)
    except FileNotFoundError:
        return b""
    return header if len(header) == _LOG_HEADER else b""


def _log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")
