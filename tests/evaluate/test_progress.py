"""Progress in a file: what comes back after any interruption, and what is refused."""

import errno
import fcntl
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.evaluate.progress import Progress, open_in_memory, open_progress

IDENTITY: dict[str, Any] = {"model": "tiny", "noise scales": [0.0, 1.5], "mesh": None}
HEADER = {"format": "hetmoe-progress-1", **IDENTITY, "batches of a part": 3}
AWKWARD = np.array(
    [0.1, -0.0, np.nan, np.inf, -np.inf, 1e-45, 1.1754942e-38, 3.4028235e38, 16777217, 1 / 3], np.float32
)


def alone(content: bytes | None) -> bytes:
    """`share` of the only process."""
    assert content is not None
    return content


def opened(path: Path | None, identity: Any = IDENTITY, chunk: int = 3) -> AbstractContextManager[Progress]:
    return open_progress(path, identity, chunk, is_main=True, share=alone)


def never() -> dict[str, np.ndarray]:
    raise AssertionError("this part is stored")


def write(path: Path, parts: int, identity: Any = IDENTITY) -> None:
    with opened(path, identity) as store:
        for number in range(parts):
            store.sums(f"part/{number}", lambda n=number: {"nll": np.float32([n, n / 3])})


def refused(path: Path, *, identity: Any = IDENTITY, chunk: int = 3) -> str:
    """The message of a file that is refused, and left as it was."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(InputError) as found, opened(path, identity, chunk):
        pass
    assert before is None or path.read_bytes() == before
    assert str(path) in str(found.value)
    return str(found.value)


def test_a_new_file_begins_with_what_is_evaluated(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "progress"
    with opened(path) as store:
        assert store.finished == 0 and store.chunk == 3
        assert json.loads(path.read_text()) == HEADER
    assert path.read_text() == json.dumps(HEADER) + "\n"


def test_every_part_is_a_line_as_soon_as_it_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    with opened(path) as store:
        for number in range(3):
            store.sums(f"digital/{number}", lambda n=number: {"nll": np.float32(n), "load": np.arange(2) + n})
            lines = path.read_text().splitlines()
            assert len(lines) == number + 2 and store.finished == number + 1
            wanted = {"part": f"digital/{number}", "sums": {"nll": float(number), "load": [number, number + 1]}}
            assert json.loads(lines[-1]) == wanted


def test_sums_come_back_to_the_last_bit_and_are_not_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    values = {"nll": AWKWARD.reshape(2, 5), "load": np.array([[0, 2**31 - 1]], np.int32), "one": np.float32(0.7)}
    with opened(path) as store:
        new = store.sums("a", lambda: values)
        again = store.sums("a", never)
    with opened(path) as store:
        assert store.finished == 1
        resumed = store.sums("a", never)
    memory = open_in_memory().sums("a", lambda: values)
    for found in (new, again, resumed, memory):
        assert found.keys() == values.keys()
        for name, value in values.items():
            # As wide numbers, whose bits show the sign of zero too; float32 goes into them without rounding.
            assert found[name].dtype == np.float64 and found[name].shape == value.shape
            np.testing.assert_array_equal(found[name].view(np.int64), np.float64(value).view(np.int64))


def test_without_a_file_nothing_is_kept_and_all_text_is_one_part() -> None:
    for store in (open_in_memory(), open_in_memory()):
        assert store.chunk is None and store.finished == 0
        assert store.sums("a", lambda: {"x": np.float32(2)})["x"] == 2 == store.sums("a", never)["x"]
    with opened(None) as store:
        assert store.chunk is None and store.finished == 0


def test_a_last_line_cut_off_anywhere_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    write(path, 2)
    content = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == 3
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = sum(end <= size for end in ends)
        with opened(path) as store:
            assert store.finished == max(0, whole - 1)
            # The header is written anew if it was cut off.
            assert path.read_bytes() == content[: ends[max(0, whole - 1)]]
            for number in range(store.finished):
                np.testing.assert_array_equal(
                    store.sums(f"part/{number}", never)["nll"], np.float32([number, number / 3])
                )
        write(path, 2)
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "chunk", "message"),
    [
        ({"model": "other"}, 3, "model was 'tiny', is now 'other'"),
        ({"noise scales": [0.0, 1.6]}, 3, "noise scales was [0.0, 1.5], is now [0.0, 1.6]"),
        ({"mesh": {"axes": {"data": 2}}}, 3, "mesh was None, is now {'axes': {'data': 2}}"),
        ({"seeds": 8}, 3, "seeds was None, is now 8"),
        ({}, 4, "batches of a part was 3, is now 4"),
    ],
)
def test_another_evaluation_is_refused_by_what_differs(tmp_path: Path, changes: Any, chunk: int, message: str) -> None:
    path = tmp_path / "progress"
    write(path, 1)
    found = refused(path, identity=IDENTITY | changes, chunk=chunk)
    assert "is the progress of another evaluation" in found and message in found


def test_a_field_that_is_no_longer_there_is_named(tmp_path: Path) -> None:
    write(tmp_path / "progress", 1, IDENTITY | {"device": "pcm"})
    assert "device was 'pcm', is now None" in refused(tmp_path / "progress")


def test_an_identity_is_compared_as_json_has_it(tmp_path: Path) -> None:
    """Tuples and integer keys are lists and strings there."""
    identity = {"scales": (1.0, 0.1 + 0.2), "of": {1: "a"}}
    write(tmp_path / "progress", 1, identity)
    with opened(tmp_path / "progress", identity) as store:
        assert store.finished == 1


def test_a_file_in_use_is_refused_until_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    with opened(path):
        assert "another process evaluates into this file" in refused(path)
    with pytest.raises(RuntimeError, match="stop"), opened(path):
        raise RuntimeError("stop")
    with opened(path) as store:
        assert store.finished == 0


@pytest.mark.parametrize(
    "content",
    [
        b"some text\nof another kind\n",
        b"results without a line's end",  # nothing of it must be cut off
        b'{"format": "hetmoe-progress-2", "model": "tiny"}\n',
        b'{"format"}\n',
        b'{"options": {}}',
        b"\n",
        b"[1, 2]\n",
        bytes(range(256)),
    ],
    ids=str,
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert "is no progress of an evaluation" in refused(path)


DAMAGED = [
    "{",
    "",
    "3",
    "null",
    '{"part": "x"}',
    '{"sums": {}}',
    '{"part": [1], "sums": {}}',
    '{"part": "x", "sums": 3}',
]


@pytest.mark.parametrize("line", [*DAMAGED, "\xff"])
def test_a_damaged_line_in_the_middle_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "progress"
    write(path, 2)
    lines = path.read_text().splitlines()
    path.write_bytes("\n".join([*lines[:2], line, *lines[2:], ""]).encode("latin-1"))
    assert "is damaged" in refused(path)


def test_a_header_that_is_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    path.write_text('{"format": "hetmoe-progress-1", "model": \n')
    assert "is damaged" in refused(path)


def test_what_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot be written (Is a directory)" in refused(tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot be written (" in refused(tmp_path / "file" / "progress")

    def read_only(*_: object) -> int:  # permissions do not hold for root, who may run tests
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", read_only)
    assert "cannot be written (Permission denied)" in refused(tmp_path / "progress")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "lseek", broken)
    with (
        pytest.raises(InputError, match=r"progress: cannot be read \(Input/output error\)"),
        opened(tmp_path / "progress"),
    ):
        pass


def at_most(count: int, fail_after: float = float("inf")) -> Callable[[int, bytes], int]:
    """`os.write` that writes so many bytes at once, and none once the disk is full."""
    left, real = [fail_after], os.write

    def write_some(handle: int, data: bytes) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(handle, data[: int(min(count, left[0]))])
        left[0] -= written
        return written

    return write_some


def test_a_write_of_a_part_of_a_line_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "whole", 3)
    monkeypatch.setattr(os, "write", at_most(7))
    write(tmp_path / "pieces", 3)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "progress"
    write(path, 1)
    kept = path.read_bytes()
    with opened(path) as store:
        with monkeypatch.context() as full:
            full.setattr(os, "write", at_most(100, fail_after=10))
            with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)") as found:
                store.sums("b", lambda: {"x": np.float32(1)})
        assert str(path) in str(found.value) and "what is finished is kept" in str(found.value)
        assert store.finished == 1 and path.read_bytes() == kept
        # Another thread may have its line to write, when there is space again.
        store.sums("c", lambda: {"x": np.float32(2)})
    with opened(path) as store:
        assert store.finished == 2 and store.sums("c", never)["x"] == 2


def test_a_disk_without_space_for_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", at_most(100, fail_after=0))
    assert "No space left" in refused(tmp_path / "progress")


def test_lines_are_on_the_disk_when_a_part_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: sizes.append(os.fstat(handle).st_size))
    write(tmp_path / "progress", 2)
    content = (tmp_path / "progress").read_bytes()
    assert sizes == [at + 1 for at, byte in enumerate(content) if byte == ord("\n")]


def test_threads_that_write_at_once_make_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, parts, together = tmp_path / "progress", 24, threading.Barrier(8)
    monkeypatch.setattr(os, "write", at_most(5))  # many switches between threads inside a line

    def run(number: int) -> float:
        together.wait()
        return float(store.sums(f"part/{number}", lambda: {"x": np.full(20, number, np.float32)})["x"].sum())

    with opened(path) as store, ThreadPoolExecutor(8) as executor:
        assert list(executor.map(run, range(parts))) == [20.0 * n for n in range(parts)]
        assert store.finished == parts
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["part"]: line["sums"]["x"] for line in lines[1:]} == {f"part/{n}": [n] * 20 for n in range(parts)}


class Processes:
    """`share` of the main process and of another, which is sent what the main one gave."""

    sent: bytes = b""

    def of_main(self, content: bytes | None) -> bytes:
        assert content is not None
        self.sent = content
        return content

    def of_other(self, content: bytes | None) -> bytes:
        assert content is None
        return self.sent


def test_other_processes_follow_the_main_one_and_write_nothing(tmp_path: Path) -> None:
    path, processes = tmp_path / "progress", Processes()
    write(path, 2)
    with open_progress(path, IDENTITY, 3, is_main=True, share=processes.of_main) as main:
        before = path.read_bytes()
        elsewhere = tmp_path / "not" / "there" / path.name  # a disk of another machine
        with open_progress(elsewhere, IDENTITY, 3, is_main=False, share=processes.of_other) as other:
            assert other.finished == main.finished == 2 and other.chunk == main.chunk
            np.testing.assert_array_equal(other.sums("part/1", never)["nll"], main.sums("part/1", never)["nll"])
            assert other.sums("new", lambda: {"x": np.float32(3)})["x"] == 3
            assert other.finished == 3
        assert path.read_bytes() == before and not elsewhere.parent.parent.exists()


def test_other_processes_begin_with_a_new_file_too(tmp_path: Path) -> None:
    path, processes = tmp_path / "progress", Processes()
    with (
        open_progress(path, IDENTITY, 3, is_main=True, share=processes.of_main),
        open_progress(path, IDENTITY, 3, is_main=False, share=processes.of_other) as other,
    ):
        assert other.finished == 0
        other.sums("a", lambda: {"x": np.float32(3)})
        assert path.read_text() == json.dumps(HEADER) + "\n"


@pytest.mark.parametrize("trouble", ["in use", "not progress", "directory", "another evaluation"])
def test_other_processes_get_the_error_of_the_main_one(tmp_path: Path, trouble: str) -> None:
    path, processes, identity = tmp_path / "progress", Processes(), IDENTITY
    write(path, 1)
    with path.open("rb") as held:
        if trouble == "in use":
            fcntl.flock(held, fcntl.LOCK_EX)
        elif trouble == "not progress":
            path.write_text("x\n")
        elif trouble == "directory":
            path = tmp_path
        else:
            identity = IDENTITY | {"model": "other"}
        messages = []
        for is_main, share in ((True, processes.of_main), (False, processes.of_other)):
            with pytest.raises(InputError) as found, open_progress(path, identity, 3, is_main=is_main, share=share):
                pass
            messages.append(str(found.value))
    assert messages[0] == messages[1] and str(path) in messages[0]
