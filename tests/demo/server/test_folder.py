"""What a server writes is its own, and gone with it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from attnswap.demo.server import folder
from attnswap.demo.server.folder import private_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def dead() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_by(pid: int, tmp_path: Path) -> Path:
    path = tmp_path / f"{folder._of_this_machine()}{pid}-abc"
    path.mkdir()
    (path / "a.png").write_bytes(b"")
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="has no modes")
def test_nobody_else_can_look_into_it() -> None:
    with private_folder() as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_it_goes_with_all_that_is_in_it_also_when_something_breaks(tmp_path: Path) -> None:
    def interrupted() -> None:
        with private_folder() as path:
            (path / "deep").mkdir()
            (path / "deep" / "a.png").write_bytes(b"")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_server_has_left_goes_when_the_next_one_begins(tmp_path: Path, dead: int) -> None:
    left = left_by(dead, tmp_path)
    with private_folder():
        assert not left.exists()


def test_that_of_a_server_that_runs_stays(tmp_path: Path) -> None:
    other = left_by(os.getpid(), tmp_path)
    with private_folder() as path:
        assert other.exists()
        assert path != other


def test_that_of_another_machine_stays_where_the_folder_is_shared(
    tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as there:
        there.setattr("socket.gethostname", lambda: "another")
        other = left_by(dead, tmp_path)
    with private_folder():
        assert other.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right of their own")
def test_a_link_that_is_called_so_is_not_followed(tmp_path: Path, dead: int) -> None:
    (mine := tmp_path / "mine").mkdir()
    (tmp_path / f"{folder._of_this_machine()}{dead}-abc").symlink_to(mine)
    with private_folder():
        assert mine.is_dir()
