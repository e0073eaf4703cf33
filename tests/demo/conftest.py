"""A site on the bundled models, in a folder of the test's own, with small limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attnswap.demo import serve
from attnswap.demo.cost.pace import Pace
from attnswap.demo.server.limits import Limits
from attnswap.demo.server.shelf import Shelf
from attnswap.demo.server.visitors import Visitors
from attnswap.demo.server.worker import Worker
from attnswap.demo.site import Site

LIMITS = Limits(max_size=256, max_frames=33, max_steps=20, max_prompt=200)


@pytest.fixture(scope="session")
def shelf() -> Iterator[Shelf]:
    """Of all tests: what it knows of the bundled models is found out once, and nothing of it changes."""
    shelf = Shelf(["emoji-sd", "emoji-video"])
    yield shelf
    shelf.close()


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Gradio keeps what visitors upload; a file in here counts as one."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    return folder


@pytest.fixture
def site(shelf: Shelf, tmp_path: Path, uploads: Path) -> Iterator[Site]:
    worker = Worker()
    yield Site(
        shelf=shelf,
        worker=worker,
        visitors=Visitors(tmp_path, worker),
        limits=LIMITS,
        pace=Pace(),
        folder=tmp_path,
    )
    worker.close()


@pytest.fixture
def request_of() -> Any:
    """What Gradio gives of a visitor: `request_of("a")`."""
    return lambda name: SimpleNamespace(session_hash=name)


@pytest.fixture(scope="module")
def server(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Site]]:
    """The address of a running server, and what it offers."""
    folder = tmp_path_factory.mktemp("server")
    worker = Worker()
    site = Site(shelf, worker, Visitors(folder / "made", worker), LIMITS, Pace(), folder)
    (folder / "made").mkdir()
    with serve.running(site) as url:
        yield url, site
    worker.close()
