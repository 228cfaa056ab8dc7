"""Locks that the kernel frees the moment their process ends, however it ends: no clocks, no heartbeats.

They hold between processes of one machine, as does SQLite's write-ahead log. Machines that share a store's directory
have parts of their own (`part_store`).
"""

import contextlib
import fcntl
import os
import uuid
from collections.abc import Generator
from pathlib import Path

from hetmoe.errors import InputError
from hetmoe.files import make_directory, opened_to_lock

FOLDER = "workers"


@contextlib.contextmanager
def worker_lock(directory: Path) -> Generator[str]:
    """Holds the lock of a new worker and gives the worker's name.

    Raises:
        InputError: if the directory cannot be written.
    """
    name = uuid.uuid4().hex
    path = _path(directory, name)
    with _exclusive(path):
        try:
            yield name
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def opening_lock(directory: Path) -> Generator[None]:
    """Lets one process at a time open, and perhaps create, the store.

    Raises:
        InputError: if the directory cannot be written.
    """
    with _exclusive(directory / FOLDER / "opening.lock"):
        yield


@contextlib.contextmanager
def part_lock(directory: Path) -> Generator[None]:
    """Keeps a second process from a part of a sweep, as far as the file system has locks.

    A shared one may have none, or none between machines: `part_store` does not depend on them.

    Raises:
        InputError: if the directory cannot be written, or another process holds the lock.
    """
    make_directory(directory)
    with opened_to_lock(directory / "part.lock") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{directory}: another process works at this part; stop it, or let it finish") from None
        except OSError:
            pass
        yield


def is_alive(directory: Path, worker: str) -> bool:
    """Whether the process of a worker runs: its lock can then not be shared."""
    try:
        handle = os.open(_path(directory, worker), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look at once do not see each other
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _path(directory: Path, worker: str) -> Path:
    return directory / FOLDER / f"{worker}.lock"


@contextlib.contextmanager
def _exclusive(path: Path) -> Generator[None]:
    make_directory(path.parent)
    with opened_to_lock(path) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            raise InputError(
                f"{path}: cannot be locked ({error.strerror}); use a directory on a local disk (of a sweep in parts, "
                "copy the folder 'parts' there and collect)"
            ) from None
        yield
