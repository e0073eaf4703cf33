"""What the server answers, and what it does not."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from attnswap.demo import serve
from attnswap.demo.cost.pace import Pace
from attnswap.demo.server import gate, uploads, visitors
from attnswap.demo.server.limits import Limits
from attnswap.demo.server.shelf import Shelf
from attnswap.demo.server.visitors import Visitors
from attnswap.demo.server.worker import Worker
from attnswap.demo.site import Site
from attnswap.pipelines.errors import BadInput, JobFailed
from attnswap.pipelines.job import Job
from gradio.state_holder import StateHolder
from PIL import Image


@pytest.fixture(scope="module")
def module_site(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("served")
    worker = Worker()
    yield Site(shelf, worker, Visitors(folder, worker), Limits(max_size=256, max_steps=20), Pace(), folder)
    worker.close()


@pytest.fixture(scope="module")
def url(module_site: Site) -> Iterator[str]:
    with serve.running(module_site) as url:
        yield url


def called(url: str, endpoint: str, *data: Any) -> str:
    """What an endpoint answers to a request that nobody has checked."""
    begun = httpx.post(f"{url}gradio_api/call/{endpoint}", json={"data": list(data)})
    return httpx.get(f"{url}gradio_api/call/{endpoint}/{begun.json()['event_id']}", timeout=20).text


def file_at(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


class TestFilesOfThisMachine:
    def test_none_is_served(self, url: str, module_site: Site) -> None:
        (module_site.folder / "secret.png").write_bytes(b"secret")
        here = Path(__file__)
        for path in ("/etc/passwd", here, os.path.relpath(here), module_site.folder / "secret.png", "%2Fetc%2Fpasswd"):
            assert httpx.get(f"{url}gradio_api/file={path}").status_code == 403, path
            assert httpx.get(f"{url}gradio_api/file/{path}").status_code == 403, path

    def test_none_in_the_current_folder_is_served_from_where_gradio_keeps_examples(
        self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / ".gradio" / "cached_examples").mkdir(parents=True)
        (tmp_path / ".gradio" / "cached_examples" / "a.txt").write_text("secret")
        assert httpx.get(f"{url}gradio_api/file=.gradio/cached_examples/a.txt").status_code == 403

    @pytest.mark.parametrize("path", ["/etc/passwd", __file__, "README.md"])
    def test_none_is_taken_for_an_upload(self, url: str, path: str) -> None:
        assert "was not uploaded" in (said := called(url, "restore", file_at(path))) or "blocked" in said
        assert "event: error" in said

    def test_an_upload_is(self, url: str, tmp_path: Path) -> None:
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        with (tmp_path / "a.png").open("rb") as file:
            [path] = httpx.post(f"{url}gradio_api/upload", files={"files": file}).json()
        said = called(url, "restore", file_at(path))
        assert "a.png does not say how it was made" in said
        assert path not in said


class TestTheWeb:
    def test_nothing_is_fetched_for_a_request(self, url: str) -> None:
        assert "fetches nothing from the web" in called(url, "restore", file_at("http://example.com/a.png"))

    @pytest.mark.parametrize("address", ["http://example.com/a.png", "https:/example.com/a.png", "ftp://example.com"])
    def test_nothing_is_passed_on(self, url: str, address: str) -> None:
        assert httpx.get(f"{url}gradio_api/file={address}").status_code == 404
        assert httpx.get(f"{url}gradio_api/proxy={address}").status_code == 404

    def test_the_hub_is_not_asked(self) -> None:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import OfflineModeIsEnabled

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            with serve._offline(), pytest.raises(OfflineModeIsEnabled):
                HfApi().model_info("nobody/nothing")
            assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    "path",
    ["monitoring", "monitoring/summary", "gradio_api/runs", "gradio_api/run-history/records",
     "gradio_api/deep_link?session_hash=a", "gradio_api/stream/a/1/2/playlist.m3u8"],
)  # fmt: skip
def test_what_no_page_needs_is_not_there(url: str, path: str) -> None:
    assert httpx.get(f"{url}{path}").status_code == 404


@pytest.mark.parametrize(
    "path", ["gradio_api/process_recording", "gradio_api/vibe-edit/", "gradio_api/run-history/connect"]
)
def test_what_would_run_or_store_something_is_not_there(url: str, path: str) -> None:
    assert httpx.post(f"{url}{path}", files={"files": b"abc"}).status_code == 404


def test_the_page_is_there(url: str) -> None:
    answer = httpx.get(url)
    assert answer.status_code == 200
    assert '"title":"attnswap"' in answer.text


class TestPagesFromElsewhere:
    """That are open in a browser on this machine, while the server is for this machine alone."""

    @pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "[", "::1"])
    def test_a_name_that_leads_here_is_not_answered(self, url: str, host: str) -> None:
        assert httpx.get(url, headers={"Host": host}).status_code == 403

    @pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:7860", "LOCALHOST"])
    def test_names_of_this_machine_are(self, url: str, host: str) -> None:
        assert httpx.get(url, headers={"Host": host}).status_code == 200

    @pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example"])
    def test_their_requests_do_nothing(self, url: str, module_site: Site, origin: str) -> None:
        """Browsers send those that need no leave; Gradio would run them, and only keep the answer back."""
        posted = httpx.post(f"{url}gradio_api/call/image", json={"data": []}, headers={"Origin": origin})
        assert posted.status_code == 403

    def test_requests_of_the_own_page_do(self, url: str) -> None:
        for origin in (url, "http://localhost:3000", "http://[::1]"):
            posted = httpx.post(f"{url}gradio_api/call/history", json={"data": []}, headers={"Origin": origin})
            assert posted.status_code == 200, origin

    def test_where_a_password_is_asked_for_any_name_will_do(self, module_site: Site) -> None:
        """As behind another server, which has a name; who comes by a name of their own has no cookie for it."""
        with serve.running(module_site, auth=serve.credentials("ann:secret")) as url:
            assert httpx.get(url, headers={"Host": "demo.example"}).status_code == 200


class TestTheQueue:
    @pytest.mark.parametrize("name", ["image", "prepare", "restore"])
    def test_cannot_be_gone_past(self, url: str, name: str) -> None:
        assert httpx.post(f"{url}gradio_api/run/{name}", json={"data": []}).status_code == 404
        assert httpx.post(f"{url}gradio_api/api/{name}", json={"data": []}).status_code == 404

    def test_is_not_needed_by_what_answers_at_once(self, url: str) -> None:
        from gradio_client import Client

        client = Client(url, verbose=False)
        assert client.predict(api_name="/stop") == "Nothing of yours is running."
        answer = httpx.post(f"{url}gradio_api/run/stop", json={"data": [""], "session_hash": "a"})
        assert answer.status_code == 200


def test_an_upload_that_there_is_no_room_for_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MOST", 0)
    answer = httpx.post(f"{url}gradio_api/upload", files={"files": b"abc"})
    assert (answer.status_code, "no room" in answer.text) == (507, True)


def test_room_is_kept_for_an_upload_that_is_under_way_and_free_again_when_it_breaks_off(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MOST", 16 * 2**20)
    monkeypatch.setattr(uploads, "RECOUNT", -1.0)

    def upload() -> int:
        return httpx.post(f"{url}gradio_api/upload", files={"files": bytes(2**20)}).status_code

    assert upload() == 200
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0)) as raw:
        raw.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: multipart/form-data; boundary=a\r\nContent-Length: %d\r\n\r\n" % (29 * 2**19)
        )
        until(lambda: upload() == 507)
    until(lambda: upload() == 200)


def test_gradio_remembers_no_more_pages_than_visitors_may_have(
    module_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visitors, "MAX_VISITORS", 1)
    apps: list[Any] = []
    set_blocks = StateHolder.set_blocks

    def watched(self: StateHolder, blocks: Any) -> None:
        apps.append(self)
        set_blocks(self, blocks)

    monkeypatch.setattr(StateHolder, "set_blocks", watched)
    with serve.running(module_site) as url:
        for number in range(serve.SESSIONS + 3):
            asked = {"data": [""], "session_hash": str(number)}
            assert httpx.post(f"{url}gradio_api/run/stop", json=asked).status_code == 200
        assert len(apps[-1].session_data) == serve.SESSIONS


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


class TestLongRequests:
    def test_a_form_that_is_none_is_refused(self, url: str) -> None:
        answer = httpx.post(f"{url}gradio_api/call/restore", content=b"x" * (4 * 2**20 + 1))
        assert (answer.status_code, answer.text) == (413, "More than 4 MiB.")

    def test_also_where_it_does_not_say_how_long_it_is(self, url: str) -> None:
        def parts() -> Iterator[bytes]:
            for _ in range(5):
                yield b"x" * 2**20

        assert httpx.post(f"{url}gradio_api/call/restore", content=parts()).status_code == 413

    def test_an_upload_may_be_as_long_as_a_file_and_no_longer(self, url: str) -> None:
        address = httpx.URL(url)
        for length, answer in ((2**20, b""), (101 * 2**20, b"HTTP/1.1 413")):
            with socket.create_connection((address.host, address.port or 0)) as raw:
                raw.sendall(
                    b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\n"
                    b"Content-Type: multipart/form-data; boundary=a\r\nContent-Length: %d\r\n\r\n" % length
                )
                raw.settimeout(0.5)
                try:
                    assert raw.recv(12) == answer
                except TimeoutError:  # it waits for the rest
                    assert answer == b""


class TestPasswords:
    def test_a_user_and_a_password_are_both_asked_for(self) -> None:
        known = serve.credentials("ann:a:secret")
        assert known("ann", "a:secret")
        for user, password in (("ann", "a"), ("bob", "a:secret"), ("", ""), ("ann ", "a:secret"), ("ann", "\udc80")):
            assert not known(user, password), (user, password)

    def test_both_are_compared_whatever_the_first_comes_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compared: list[tuple[bytes, bytes]] = []

        def compare(one: bytes, other: bytes) -> bool:
            compared.append((one, other))
            return one == other

        monkeypatch.setattr(serve.hmac, "compare_digest", compare)
        serve.credentials("ann:secret")("bob", "x")
        assert len(compared) == 2
        assert len({len(text) for pair in compared for text in pair}) == 1

    @pytest.mark.parametrize("text", ["ann", "ann:", ":secret", " :secret", ""])
    def test_another_form_is_refused(self, text: str) -> None:
        with pytest.raises(BadInput, match="USER:PASSWORD"):
            serve.credentials(text)

    def test_nothing_is_shown_without_them(self, module_site: Site) -> None:
        with serve.running(module_site, auth=serve.credentials("ann:secret")) as url:
            for path in ("config", "gradio_api/info", "gradio_api/file=/etc/passwd"):
                assert httpx.get(f"{url}{path}").status_code == 401, path
            assert httpx.post(f"{url}gradio_api/call/history", json={"data": []}).status_code == 401
            wrong = httpx.post(f"{url}login", data={"username": "ann", "password": "guess"})
            assert wrong.status_code == 400
            with httpx.Client() as client:
                client.post(f"{url}login", data={"username": "ann", "password": "secret"})
                assert client.get(f"{url}config").status_code == 200

    def test_they_cannot_be_guessed_at_any_pace(self, module_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gate, "GUESSED_IN", 2.0)
        right = {"username": "ann", "password": "secret"}
        with serve.running(module_site, auth=serve.credentials("ann:secret")) as url, httpx.Client() as client:
            assert client.post(f"{url}login", data=right).status_code == 200
            for guess in range(gate.GUESSES):
                assert httpx.post(f"{url}login/", data={**right, "password": str(guess)}).status_code == 400
            begun = time.monotonic()
            assert httpx.post(f"{url}login", data=right).status_code == 429
            assert client.get(f"{url}config").status_code == 200  # who is in stays in
            while httpx.post(f"{url}login", data=right).status_code == 429:
                assert time.monotonic() - begun < 10
                time.sleep(0.1)


class TestAddresses:
    def test_a_port_that_is_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(BadInput) as said:
            serve.free_port("127.0.0.1", other.getsockname()[1])
        assert "is in use; --port 0 takes one that is free" in str(said.value)

    @pytest.mark.parametrize(
        ("host", "port", "said"),
        [("no.such.host.invalid", 7860, "no such host"), ("192.0.2.1", 7860, "nothing can listen at 192.0.2.1"),
         ("127.0.0.1", 70000, "out of range"), ("127.0.0.1", -1, "out of range")],
    )  # fmt: skip
    def test_one_that_is_none(self, host: str, port: int, said: str) -> None:
        with pytest.raises(BadInput, match=said):
            serve.free_port(host, port)

    def test_it_is_said_who_can_come(self) -> None:
        local, public = "http://127.0.0.1:7860/", "https://abc.gradio.live"
        assert list(serve._said(local, None, "127.0.0.1", asks=False)) == [f"attnswap demo: {local} (Ctrl-C ends it)"]
        shared = list(serve._said(local, public, "127.0.0.1", asks=False))
        assert "Everybody with the address can use this machine" in shared[-1]
        assert "Everybody in this network" in list(serve._said(local, None, "0.0.0.0", asks=False))[-1]
        assert list(serve._said(local, public, "0.0.0.0", asks=True))[1:] == [f"for everybody: {public}"]


class TestAPublicAddress:
    def test_is_passed_on(self, module_site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        monkeypatch.setattr("gradio.networking.setup_tunnel", lambda **_: "https://abc.gradio.live")
        address = {"server_name": "127.0.0.1", "server_port": serve.free_port("127.0.0.1", 0)}
        with serve._environment(module_site.folder), serve._launched(module_site, **address, share=True) as (_, public):
            assert public == "https://abc.gradio.live"
        assert capsys.readouterr().out == ""

    def test_that_is_not_to_be_had_is_a_line(self, module_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(**_: Any) -> str:
            raise OSError("no way out")

        monkeypatch.setattr("gradio.networking.setup_tunnel", refuse)
        with (
            pytest.raises(JobFailed, match="--share: no public address") as said,
            serve.running(module_site, share=True),
        ):
            pass
        assert "\n" not in str(said.value)


def test_what_the_libraries_are_told_holds_while_the_server_runs_and_no_longer(url: str, module_site: Site) -> None:
    before = dict(os.environ)
    with serve._environment(module_site.folder / "another"):
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
        assert os.environ["GRADIO_TEMP_DIR"] == str(module_site.folder / "another" / "cache")
        assert "127.0.0.1" in os.environ["NO_PROXY"]
    assert dict(os.environ) == before


def test_eight_visitors_at_once_one_of_whom_asks_for_too_much(url: str) -> None:
    """None waits for more than those before, and the one that fails keeps nobody."""
    from gradio_client import Client

    made: dict[int, Any] = {}

    def visit(number: int) -> None:
        client = Client(url, verbose=False, httpx_kwargs={"timeout": 60})  # seconds; else 5 for each answer
        steps = 21 if number == 3 else 2
        try:
            picture, *_ = client.predict("a fox", image=None, seed=number, steps=steps, api_name="/image")
            made[number] = Image.open(picture).size
        except Exception as error:
            made[number] = str(error)

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert "steps 21 is more than this server allows: at most 20" in made.pop(3)
    assert made == dict.fromkeys([0, 1, 2, 4, 5, 6, 7], (64, 64))


def test_a_client_that_cancels_frees_the_device(url: str, module_site: Site) -> None:
    from gradio_client import Client

    client = Client(url, verbose=False)
    long = client.submit("a fox", image=None, width=256, height=256, steps=20, api_name="/image")
    end = time.monotonic() + 20
    while not (module_site.worker.busy(client.session_hash) and long.outputs()):
        assert time.monotonic() < end
        time.sleep(0.02)
    long.cancel()
    while module_site.worker.busy(client.session_hash):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert Image.open(client.predict("a fox", image=None, steps=2, api_name="/image")[0]).size == (64, 64)


def test_a_page_that_is_gone_does_not_lose_what_it_has_begun(url: str, module_site: Site) -> None:
    """As a phone that is locked: what listened to the job is cut off."""
    data = {"prompt": "a fox", "width": 128, "height": 128, "steps": 8}
    begun = httpx.post(f"{url}gradio_api/call/v2/image", json=data).json()["event_id"]
    end = time.monotonic() + 20
    with httpx.stream("GET", f"{url}gradio_api/call/image/{begun}", timeout=20) as events:
        next(line for line in events.iter_lines() if "step 1 of 8" in line)
    [run] = module_site.worker._runs
    while run._left is None:
        assert run.thread.is_alive(), "it was done before Gradio knew"
        time.sleep(0.02)
    while run.thread.is_alive():
        assert time.monotonic() < end
        time.sleep(0.02)
    entries = module_site.visitors.of(SimpleNamespace(session_hash=run.visitor)).entries
    assert [entry.result.job.steps for entry in entries] == [8]


def test_a_model_that_cannot_be_had_is_said_before_anything_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(BadInput, match="no model"):
        serve.serve([str(tmp_path / "nothing")], Job(""), Limits(), port=0)
    assert os.listdir(tmp_path) == []
