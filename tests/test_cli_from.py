"""`attnswap generate --from`: what a file that anybody may have written gets opened, and what it does not."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnswap.pipelines import save
from PIL import Image

from .test_cli import Cli, attnswap, refused

__all__ = ["attnswap"]  # a fixture

Written = Callable[..., str]


@pytest.fixture
def written(attnswap: Cli, tiny_sd: Path) -> Written:
    """Writes h.png with a record that has been changed by hand, such as `written(image="a.png")`."""
    assert attnswap("generate", "a fox", "-m", tiny_sd, "--steps", 2, "-o", "fox.png")[0] == 0
    record = save.read_record(Path("fox.png"))

    def write(**changes: Any) -> str:
        save.write_png(Image.new("RGB", (64, 64)), Path("h.png"), record | changes)
        return "h.png"

    return write


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub could be asked; the test fails if it is."""
    from huggingface_hub import constants

    def request(*_: object, **__: object) -> None:
        pytest.fail("something went out")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", request)
    monkeypatch.setattr(socket, "getaddrinfo", request)


def picture(name: str, colour: int) -> str:
    Path(name).parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((64, 64, 3), colour, np.uint8)).save(name)
    return name


class TestWhatTheFileAsksFor:
    def test_is_said_first(self, attnswap: Cli, tiny_sd: Path) -> None:
        attnswap(
            "generate", "a fox", "-m", tiny_sd, "--steps", 2, "--image", picture("a.png", 90), "-o", "fox.png"
        )  # fmt: skip
        status, _, err = attnswap("generate", "--from", "fox.png", "-o", "again.png")
        assert status == 0
        asked = err.splitlines()[0]
        assert asked.startswith("attnswap: the file asks for model ")
        assert asked.endswith(", image a.png.")

    def test_is_not_what_comes_along_or_is_repeated(self, attnswap: Cli, written: Written, tiny_sd: Path) -> None:
        _, _, err = attnswap("generate", "--from", "fox.png", "-m", tiny_sd, "-o", "again.png")
        assert "asks for" not in err
        written(model="emoji-sd", dtype="int8")
        refused(attnswap("generate", "--from", "h.png", "-o", "again.png"), "int8")

    def test_cannot_paint_the_terminal(self, attnswap: Cli, written: Written) -> None:
        Path("a\x1b[31m.png").write_bytes(Path("fox.png").read_bytes())
        written(image="a\x1b[31m.png", strength=0.5)
        _, _, err = attnswap("generate", "--from", "h.png", "-o", "again.png")
        assert "image a\\x1b[31m.png" in err
        assert "\x1b" not in err.splitlines()[0]

    @pytest.mark.usefixtures("online")
    @pytest.mark.parametrize(
        ("named", "flag"),
        [
            ({"model": "nobody/fox"}, "--model nobody/fox"),
            ({"loras": [{"id": "nobody/fox"}]}, "--lora nobody/fox"),
            ({"methods": {"linfusion": {"weights": "nobody/fox"}}}, "--set linfusion.weights=nobody/fox"),
            ({"methods": {"linfusion": {"weights": "auto"}}}, "--set linfusion.weights=auto"),
            ({"methods": {"clear": {"weights": "nobody/fox", "radius": 8}}}, "--set clear.weights=nobody/fox"),
        ],
    )
    def test_is_not_downloaded(
        self, attnswap: Cli, written: Written, named: dict[str, Any], flag: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(Path("empty").resolve()))
        refused(attnswap("generate", "--from", written(**named), "-o", "again.png"), f"only {flag} downloads")

    @pytest.mark.parametrize(
        "flags", [("-m", "nobody/fox"), ("--lora", "nobody/fox"), ("--set", "linfusion.weights=nobody/fox")]
    )
    def test_may_be_downloaded_where_it_is_repeated(
        self, attnswap: Cli, written: Written, flags: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import constants

        class Asked(BaseException):
            pass

        def request(*_: object, **__: object) -> None:
            raise Asked

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(socket, "getaddrinfo", request)
        monkeypatch.setattr(socket.socket, "connect", request)
        written(
            **{
                "-m": {"model": "nobody/fox"},
                "--lora": {"loras": [{"id": "nobody/fox"}]},
                "--set": {"methods": {"linfusion": {"weights": "nobody/fox"}}},
            }[flags[0]]
        )
        with pytest.raises(Asked):
            attnswap("generate", "--from", "h.png", *flags, "-o", "again.png")

    @pytest.mark.parametrize("share", ["//host/share/x", "\\\\host\\share\\x", "\\/host/x"])
    def test_is_on_no_network_share(self, attnswap: Cli, written: Written, share: str) -> None:
        for named in (
            {"model": share},
            {"loras": [{"id": share}]},
            {"methods": {"linfusion": {"weights": share}}},
            {"image": share, "fingerprints": {"image": "0" * 64}},
        ):
            refused(attnswap("generate", "--from", written(**named), "-o", "again.png"), "network share")

    @pytest.mark.parametrize("name", ["~nobodyxyz/x", "a" * 5000], ids=["nobody's home", "too long"])
    def test_has_a_name_that_files_can_have(self, attnswap: Cli, written: Written, name: str) -> None:
        for named in (
            {"model": name},
            {"loras": [{"id": name}]},
            {"methods": {"linfusion": {"weights": name}}},
            {"image": name},
            {"image": name, "fingerprints": {"image": "0" * 64}},
        ):
            refused(attnswap("generate", "--from", written(**named), "-o", "again.png"), "cannot be looked up")
        refused(attnswap("generate", "a fox", "-m", name), "cannot be looked up")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_comes_to_an_end(self, attnswap: Cli, written: Written) -> None:
        os.mkfifo("a.png")
        written(image="a.png", fingerprints={"image": "0" * 64})
        refused(attnswap("generate", "--from", "h.png", "-o", "again.png"), "a.png is no file but a pipe or a device")


class TestImage:
    @pytest.fixture
    def made(self, attnswap: Cli, tiny_sd: Path) -> tuple[object, ...]:
        """out/fox.png was made of a.png; the flags that make it again in the folder above it."""
        os.mkdir("out")
        flags = ("-m", tiny_sd, "--steps", 2, "--image", picture("a.png", 90))
        assert attnswap("generate", "a fox", *flags, "-o", "out/fox.png")[0] == 0
        return ("generate", "--from", "out/fox.png", "-o", "again.png")

    def test_is_that_which_the_file_names(self, attnswap: Cli, made: tuple[object, ...]) -> None:
        status, out, _ = attnswap(*made)
        assert status == 0
        assert "the same pixels as" in out

    def test_is_taken_from_beside_the_file(self, attnswap: Cli, made: tuple[object, ...]) -> None:
        os.rename("a.png", "out/a.png")
        picture("a.png", 200)
        status, out, err = attnswap(*made)
        assert status == 0
        assert "the same pixels as" in out
        assert "not as it was made" not in err
        os.remove("a.png")
        assert attnswap(*made)[0] == 0

    def test_is_no_other(self, attnswap: Cli, made: tuple[object, ...]) -> None:
        picture("a.png", 200)
        refused(attnswap(*made), "image a.png is not the one that", "was made from; give --image")
        os.remove("a.png")
        refused(attnswap(*made), "no image a.png here or beside", "give --image")

    def test_is_another_where_it_is_given(self, attnswap: Cli, made: tuple[object, ...]) -> None:
        picture("b.png", 200)
        status, out, _ = attnswap(*made, "--image", "b.png")
        assert status == 0
        assert "the same pixels as" not in out

    def test_of_a_file_that_does_not_tell_it_apart_is_taken(self, attnswap: Cli, made: tuple[object, ...]) -> None:
        record = save.read_record(Path("out/fox.png"))
        del record["fingerprints"]
        save.write_png(Image.new("RGB", (64, 64)), Path("out/fox.png"), record)
        picture("a.png", 200)
        assert attnswap(*made)[0] == 0


def test_another_device_is_compared_and_so_is_what_is_repeated(attnswap: Cli, tiny_sd: Path) -> None:
    attnswap("generate", "a fox", "-m", tiny_sd, "--steps", 2, "--seed", 3, "-o", "fox.png")
    for flags in (("--device", "cpu"), ("--seed", 3), ("-m", tiny_sd)):
        _, out, _ = attnswap("generate", "--from", "fox.png", *flags, "-o", "again.png")
        assert "the same pixels as" in out
    _, out, _ = attnswap("generate", "--from", "fox.png", "--seed", 4, "-o", "again.png")
    assert "the same pixels as" not in out
