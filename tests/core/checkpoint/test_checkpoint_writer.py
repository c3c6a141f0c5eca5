"""Whether something can be written is known before the work that it is the result of."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dsv3_plugin.checkpoint.writer import require_writable, require_writable_file
from dsv3_plugin.errors import InputError


def test_nothing_is_left_of_the_question(tmp_path: Path) -> None:
    require_writable(tmp_path, "--save")
    require_writable(tmp_path / "new" / "newer", "--save")
    require_writable_file(tmp_path / "file", "--plot")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("place", "code"),
    [("file", errno.ENOTDIR), ("file/below", errno.ENOTDIR), ("/proc", errno.ENOENT), ("/proc/new", errno.ENOENT)],
)
def test_what_takes_no_file_is_refused(place: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"^--save X: cannot be written: {os.strerror(code)}; name another place$"):
        require_writable(tmp_path / place, "--save X")


@pytest.mark.parametrize("place", ["folder", "none/file", "/proc/file"])
def test_a_file_that_cannot_be_made_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"^--plot X: "):
        require_writable_file(tmp_path / place, "--plot X")
