"""A folder for everything that a server writes, which nobody else can read and which goes with it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PREFIX = "attnswap-demo"


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder among the system's temporary ones, for this user alone (mode 700), removed at the end.

    Its name holds the machine and the process, so that what a killed server has left is removed by the next one.
    """
    _remove_leftovers()
    # `mkdtemp` makes it with mode 700. Resolved, as what Gradio gives of a path is.
    path = Path(tempfile.mkdtemp(prefix=f"{_of_this_machine()}{os.getpid()}-")).resolve()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _of_this_machine() -> str:
    """Containers may share a folder for temporary files and each count their processes from 1."""
    return f"{PREFIX}-{re.sub(r'[^A-Za-z0-9]', '_', socket.gethostname())}-"


def _remove_leftovers() -> None:
    begin = _of_this_machine()
    for path in Path(tempfile.gettempdir()).glob(f"{begin}*"):
        pid = path.name.removeprefix(begin).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)) and _is_mine(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_mine(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return path.is_dir() and not path.is_symlink() and (not hasattr(os, "getuid") or found.st_uid == os.getuid())
