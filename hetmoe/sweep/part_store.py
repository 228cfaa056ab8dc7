"""The store of one part of a sweep, on a file system that machines share.

SQLite's locks and its write-ahead log cannot be trusted there, nor can `flock`. So the store of a part is kept in
memory, where no file system matters, and after every group the file `parts/I-of-N/sweep.sqlite` is replaced as a whole,
by a new one that has reached the disk before it takes the name:

- Whoever opens the file sees all of it, of one moment, on any machine: finished groups, and nothing half written.
- A process that is killed, or a machine that loses power, leaves the file as it was after the last finished group. The
  next process of the part reads it and goes on.
- No file is ever written by two machines. A lock keeps a second process from a part where the file system has locks;
  where it has none, the second to write sees that the file is not the one that it read, and stops. Either way a file
  stays a valid store; at worst a group is evaluated twice.

The alternative, SQLite's rollback journal on the shared file and a published copy of it, needs the file system's locks
to be written, and a second file that says the same as the first.
"""

import contextlib
import os
import sqlite3
import uuid
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from hetmoe.errors import InputError
from hetmoe.sweep.database import FILE, one_line
from hetmoe.sweep.ledger import Ledger, Timing, prepare_store, register
from hetmoe.sweep.points import SweepPoint
from hetmoe.sweep.snapshot import read_snapshot
from hetmoe.sweep.store import Failure, Measurement


class PartLedger(Ledger):
    """The only worker's access to the store of a part. Made by `open_part`."""

    def __init__(
        self, directory: Path, connection: sqlite3.Connection, worker: str, groups: Sequence[Sequence[SweepPoint]],
        seen: tuple[int, int] | None,
    ) -> None:  # fmt: skip
        super().__init__(directory, connection, worker, groups)
        self._seen = seen

    def write(self, outcomes: Sequence[Measurement | Failure], timing: Timing) -> None:
        """Writes what the evaluation of a group gave, and publishes it.

        Raises:
            InputError: if the file cannot be written, or another process has written it.
        """
        super().write(outcomes, timing)
        content, temporary = self._connection.serialize(), self._path.with_name(f"{FILE}.{self._worker}.tmp")
        if _stamp(self._path) != self._seen:
            raise InputError(
                f"{self._path}: another process works at this part, and has finished a group meanwhile; run each part "
                "once at a time"
            )
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise InputError(
                f"{self._path}: cannot be written ({error.strerror}); all other finished points are kept: mend this, "
                "then run the same command again"
            ) from None
        self._seen = _stamp(self._path)


@contextlib.contextmanager
def open_part(
    directory: Path,
    identity: dict[str, Any],
    groups: Sequence[Sequence[SweepPoint]],
    *,
    total: int,
    extend: bool,
) -> Generator[PartLedger]:
    """Opens the store of a part as its only worker; hold `part_lock` meanwhile. There is no file before a group is.

    Args:
        directory: of the part (`part_directory`).
        identity: `config`, `text`, `model` and `code` of this run.
        groups: what the part is to finish, or has finished.
        total: how many points the grid has.
        extend: see `check_identity`.

    Raises:
        InputError: for another store, one of other settings, or a file that cannot be read.
    """
    path, worker = directory / FILE, uuid.uuid4().hex
    for left in directory.glob(f"{FILE}.*.tmp"):  # by a process that was killed
        left.unlink(missing_ok=True)
    seen = _stamp(path)
    with contextlib.closing(_in_memory() if seen is None else read_snapshot(path)) as connection:
        with one_line(path):
            prepare_store(connection, directory, identity, total, extend=extend, journal="MEMORY")
            register(connection, worker, identity["code"]["source_digest"])
        yield PartLedger(directory, connection, worker, groups, seen)


def _in_memory() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.row_factory = sqlite3.Row
    return connection


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells a file from the one that replaces it; None if there is none."""
    try:
        with path.open("rb") as file:  # a network file system looks at the server when a file is opened
            status = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
