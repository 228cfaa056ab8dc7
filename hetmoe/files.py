"""Writing result files whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from hetmoe.errors import InputError


def check_writable(path: Path) -> None:
    """Raises InputError unless a file can be made at `path`. Call it before long work; it leaves nothing behind."""
    if len(path.name.encode()) > 255:
        raise InputError(f"{path.name[:40]}...: a file name of more than 255 bytes")
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise InputError(f"{path}: {folder} is not a directory")
    try:
        with tempfile.TemporaryFile(dir=folder):  # permissions alone do not tell: think of /proc
            pass
    except OSError as error:
        raise InputError(f"{path}: {folder} is not writable ({error.strerror})") from None


def check_new_directory(path: Path) -> None:
    """Raises InputError if a directory to be written exists and holds something."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists; choose another output or remove it first")


def make_directory(path: Path) -> None:
    """Makes a directory and its parents. Raises InputError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a directory ({error.strerror})") from None


@contextlib.contextmanager
def opened_to_lock(path: Path) -> Generator[int]:
    """A descriptor of a file for `fcntl.flock`; it is closed at the end, which frees the lock.

    The file and its folder are made if need be.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def staged_directory(path: Path) -> Generator[Path]:
    """A temporary directory beside `path`, to be filled; it is renamed to `path` at the end, and removed on errors.

    Whenever it is interrupted, `path` is absent (or as empty as it was) or complete. A killed process leaves the
    temporary directory behind: write last what makes a directory load.

    Raises:
        InputError: if `path` exists and is not empty, or its folder cannot be made or written.
    """
    check_new_directory(path)
    make_directory(path.parent)
    try:
        temporary = Path(tempfile.mkdtemp(dir=path.parent.absolute(), prefix=f".{path.name[:60]}.partial-"))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, path)  # noqa: PTH105 (Path.replace has no other meaning here, but reads as of files)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes through a temporary file in the same folder, so that a reader never sees half a file."""
    check_writable(path)
    make_directory(path.parent)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:60]}-")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """UTF-8 text, whole or not at all."""
    write_bytes(path, content.encode())
