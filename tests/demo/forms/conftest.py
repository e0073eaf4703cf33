"""A site on the bundled models, and its forms of pictures and of clips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from attnswap.demo.cost.pace import Pace
from attnswap.demo.forms.job_form import JobForm
from attnswap.demo.server.limits import Limits
from attnswap.demo.server.shelf import Shelf
from attnswap.demo.server.visitors import Visitor, Visitors
from attnswap.demo.server.worker import Worker
from attnswap.demo.site import Site
from PIL import Image

from .given import REQUEST, form_of


@pytest.fixture(scope="module")
def site(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Of all tests here, as building forms takes time and nothing of it changes."""
    folder, worker = tmp_path_factory.mktemp("site"), Worker()
    limits = Limits(max_size=256, max_frames=33, max_steps=20, max_prompt=200)
    yield Site(shelf, worker, Visitors(folder, worker), limits, Pace(), folder)
    worker.close()


@pytest.fixture(scope="module")
def form(site: Site) -> JobForm:
    return form_of(site)


@pytest.fixture(scope="module")
def clip_form(site: Site) -> JobForm:
    return form_of(site, clips=True)


@pytest.fixture
def visitor(site: Site) -> Visitor:
    return site.visitors.of(REQUEST)


@pytest.fixture
def upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A picture where Gradio keeps what is uploaded, twice as wide as high."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(exist_ok=True)
    path = tmp_path / "cache" / "beach.jpg"
    Image.new("RGB", (400, 200), "teal").save(path)
    return str(path)
