"""The endpoints as programs use them, on a running server."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from attnswap.demo.site import Site
from attnswap.pipelines import save
from attnswap.pipelines.session import Session
from PIL import Image

gradio_client = pytest.importorskip("gradio_client")

STEPS = 3


@pytest.fixture(scope="module")
def url(server: tuple[str, Site]) -> str:
    return server[0]


@pytest.fixture
def connect(url: str, tmp_path: Path) -> Any:
    return lambda: gradio_client.Client(url, verbose=False, download_files=tmp_path)


class TestAPicture:
    def test_takes_nothing_but_a_prompt(self, connect: Any) -> None:
        file, status, details = connect().predict("a fox", api_name="/image")
        record = save.read_record(Path(file))
        assert (record["prompt"], record["model"], record["width"]) == ("a fox", "emoji-sd", 64)
        assert status.startswith("Done in ")
        assert details["seed"] == record["seed"]

    def test_takes_a_method_with_its_settings_by_name(self, connect: Any) -> None:
        file, _, _ = connect().predict(
            "a fox", width=128, height=128, steps=STEPS, method="hidiffusion", hidiffusion_t1="0.5", api_name="/image"
        )
        assert save.read_record(Path(file))["methods"]["hidiffusion"]["t1"] == 0.5

    def test_is_the_same_for_the_same_seed(self, connect: Any) -> None:
        one, other = (connect().predict("a fox", seed=3, steps=STEPS, api_name="/image")[0] for _ in range(2))
        assert Path(one).read_bytes() == Path(other).read_bytes()


def test_a_clip_takes_nothing_but_a_prompt(connect: Any) -> None:
    file, _, details = connect().predict("a fox moving left", steps=STEPS, api_name="/video")
    path = Path(file["video"] if isinstance(file, dict) else file)
    assert path.suffix == ".mp4"
    assert save.read_record(path)["frames"] == details["frames"] == 17


def test_a_comparison_has_the_figures_of_both(connect: Any) -> None:
    found = connect().predict("a fox", width=128, height=128, steps=STEPS, method="hidiffusion", api_name="/compare")
    figures = next(each for each in found if isinstance(each, dict) and "variants" in each)
    assert [variant["name"] for variant in figures["variants"]] == ["dense", "hidiffusion"]
    assert all(variant["seconds"] > 0 for variant in figures["variants"])


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ({"width": 65}, "65"),
            ({"width": 100_000}, "100000|100,000"),
            ({"steps": 1_000}, "1000|1,000"),
            ({"model": "/etc"}, "/etc|offered"),
            ({"method": "nothing"}, "nothing"),
            ({"method": "linfusion", "linfusion_weights": "/etc/passwd"}, "weights"),
            ({"seed": -1}, "-1"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
    )
    def test_is_said_in_a_line(self, connect: Any, asked: dict[str, Any], said: str) -> None:
        with pytest.raises(gradio_client.exceptions.AppError, match=said) as caught:
            connect().predict("a fox", **asked, api_name="/image")
        assert "\n" not in str(caught.value).strip()

    def test_leaves_the_server_as_it_was(self, connect: Any) -> None:
        client = connect()
        with pytest.raises(gradio_client.exceptions.AppError):
            client.predict("a fox", width=65, api_name="/image")
        file, _, _ = client.predict("a fox", steps=1, api_name="/image")
        assert Path(file).stat().st_size > 0


class TestStop:
    def test_ends_a_run_and_the_next_begins(self, connect: Any) -> None:
        client = connect()
        job = client.submit("a fox", steps=20, width=256, height=256, api_name="/image")
        until(lambda: len(job.outputs()) > 1)
        said = client.predict(api_name="/stop")
        assert "Stopped after" in said
        file, _, _ = client.predict("a fox", steps=1, api_name="/image")
        assert Path(file).stat().st_size > 0

    def test_is_only_for_ones_own(self, connect: Any) -> None:
        mine, other = connect(), connect()
        job = mine.submit("a fox", steps=8, width=128, height=128, api_name="/image")
        until(lambda: len(job.outputs()) > 0)
        assert "Stopped" not in other.predict(api_name="/stop")
        file, _, _ = job.result(timeout=60)
        assert Path(file).stat().st_size > 0


def test_what_a_client_made_can_be_restored_from_its_file(connect: Any) -> None:
    client = connect()
    file, _, _ = client.predict("an owl", seed=5, steps=2, api_name="/image")
    found = client.predict(gradio_client.handle_file(file), api_name="/restore")
    settings = next(each for each in found if isinstance(each, dict) and "seed" in each)
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("an owl", 5, 2)


def test_the_block_masks_of_a_run_can_be_had(connect: Any) -> None:
    client = connect()
    asked = {"steps": STEPS, "method": "adaspa", "adaspa_search_steps": "1"}
    _, _, details = client.predict("a fox", **asked, api_name="/video")
    picture, said = client.predict(details["entry"], 0, 0, "0", api_name="/mask")
    with Image.open(picture) as image:
        assert image.width > 1
    assert said
    with pytest.raises(gradio_client.exceptions.AppError, match="no mask of layer '99'"):
        client.predict(details["entry"], 99, 0, "0", api_name="/mask")


def test_of_eight_clients_at_once_each_gets_its_own_and_one_that_fails_takes_nobody_with_it(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failing one asks for a guidance that no number can hold, which shows only while it runs."""
    clients = [connect() for _ in range(8)]
    make, at_once, most = Session.make, 0, 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            return make(*given, **named)
        finally:
            at_once -= 1

    def ask(number: int) -> tuple[int, Any]:
        asked: dict[str, Any] = {"guidance": 1e38} if number == 3 else {}
        try:
            return number, clients[number].predict("a fox", seed=number, steps=2, **asked, api_name="/image")
        except gradio_client.exceptions.AppError as error:
            return number, str(error)

    monkeypatch.setattr(Session, "make", counted)
    with ThreadPoolExecutor(8) as pool:
        found = dict(pool.map(ask, range(8)))
    assert "not-a-number" in found.pop(3)
    assert [details["seed"] for _, _, details in found.values()] == [0, 1, 2, 4, 5, 6, 7]
    assert len({Path(file).read_bytes() for file, _, _ in found.values()}) == 7
    assert most == 1


def until(holds: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


def raw(url: str, path: str) -> int:
    import httpx

    return httpx.get(f"{url.rstrip('/')}/gradio_api/file={path}").status_code


class TestFilesOfTheMachine:
    @pytest.mark.parametrize("path", ["/etc/passwd", f"{os.getcwd()}/pyproject.toml", "pyproject.toml"])
    def test_are_not_served(self, url: str, path: str) -> None:
        assert raw(url, path) in (403, 404)
