"""Where a server keeps its models, and what visitors make, is told to nobody."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio_client
import httpx
import pytest
from attnswap.demo import serve
from attnswap.demo.cost.pace import Pace
from attnswap.demo.server.limits import Limits
from attnswap.demo.server.shelf import Shelf
from attnswap.demo.server.visitors import Visitors
from attnswap.demo.server.worker import Worker
from attnswap.demo.site import Site
from attnswap.pipelines import load, save
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.generate import generate
from attnswap.pipelines.job import Job, again
from attnswap.pipelines.recorded import Original
from PIL import Image

# In the paths of everything that the operator has.
SECRET = "kept-in-secret"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp(SECRET)
    names = {"emoji-sd": "my-pictures", "emoji-video": "my-clips"}
    return [str(shutil.copytree(load.bundled()[name], folder / own)) for name, own in names.items()]


@pytest.fixture(scope="module")
def server(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Site]]:
    folder = tmp_path_factory.mktemp(f"{SECRET}-work")
    worker = Worker()
    (folder / "made").mkdir()
    site = Site(Shelf(models), worker, Visitors(folder / "made", worker), Limits(), Pace(), folder)
    with serve.running(site) as url:
        yield url, site
    worker.close()
    site.shelf.close()


@pytest.fixture(scope="module")
def answers(server: tuple[str, Site], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of all endpoints to somebody who makes one thing of each kind; files are downloaded, their paths the client's."""
    client = gradio_client.Client(server[0], verbose=False, download_files=tmp_path_factory.mktemp("downloads"))
    begin = tmp_path_factory.mktemp("visitor") / "begin.png"
    Image.new("RGB", (64, 96), (200, 30, 30)).save(begin)
    picture = {"prompt": "a fox", "model": "my-pictures", "steps": 2}
    stretched = {"width": 128, "height": 128, "image": gradio_client.handle_file(begin), "strength": 1.0}
    made = [
        client.predict(**picture, **stretched, method="hidiffusion", api_name="/image"),
        client.predict(prompt="a fox", model="my-clips", steps=2, frames=9, api_name="/video"),
        client.predict(**picture, **stretched, method="hidiffusion", api_name="/compare"),
    ]
    file = gradio_client.handle_file(made[0][0])
    asked: list[dict[str, Any]] = [
        {"api_name": "/estimate_image", **picture},
        {"api_name": "/restore", "file": file},
        {"api_name": "/restore_entry", "number": 1},
        {"api_name": "/inside", "entry": 1},
        {"api_name": "/history"},
    ]
    return [*made, *(client.predict(**each) for each in asked)]


def test_no_answer_tells_it(server: tuple[str, Site], answers: list[Any]) -> None:
    assert len(answers) == 8
    [visitor] = [each for each in server[1].visitors._visitors.values() if each.entries]
    compared = [list(entry.result.job.methods) for entry in visitor.entries[2:]]
    assert compared == [[], ["hidiffusion"]]  # what a comparison has made can be looked into, too
    assert SECRET not in json.dumps(answers, default=str)
    for page in ("", "config", "gradio_api/info"):
        assert SECRET not in httpx.get(f"{server[0]}{page}").text


def test_no_file_tells_it(server: tuple[str, Site], answers: list[Any]) -> None:
    files = [path for path in (server[1].folder / "made").rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {".png", ".mp4", ".html", ".json"} <= kinds
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path.name
        if path.suffix == ".mp4" or (path.suffix == ".png" and save.KEY in Image.open(path).info):
            assert SECRET not in json.dumps(save.read_record(path)), path.name


def test_with_the_picture_beside_it_and_the_model_named_a_command_makes_the_same_again(
    server: tuple[str, Site], answers: list[Any], models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = shutil.copy(answers[0][0], tmp_path / "made.png")
    record = save.read_record(made)
    [begun] = (server[1].folder / "made").glob(f"*/{record['image']}")
    shutil.copy(begun, tmp_path)

    def run(**changes: Any) -> None:
        job = Job(**{**again(record, changes), "output": tmp_path / "again.png", "device": "cpu"})
        generate(job, like=Original(made, record, changes))

    with pytest.raises(BadInput) as said:
        run()
    assert "\n" not in str(said.value)
    assert "my-pictures" in str(said.value)
    assert "--model" in str(said.value)
    run(model=models[0])
    with Image.open(made) as one, Image.open(tmp_path / "again.png") as other:
        assert one.tobytes() == other.tobytes()
