"""Whether a result can be written is found out before it is computed, and leaves nothing behind."""

import pathlib

import pytest

from hetmoe.errors import InputError
from hetmoe.files import check_writable


def test_nothing_is_left_behind(tmp_path: pathlib.Path) -> None:
    check_writable(tmp_path / "new" / "deep" / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_files_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuses)
    with pytest.raises(InputError, match=f"{tmp_path} is not writable .Read-only file system"):
        check_writable(tmp_path / "new" / "r.json")
