"""A file remembers what made it, all of it, and tells what is otherwise now."""

from __future__ import annotations

import contextlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attnswap import __version__
from attnswap.pipelines import load, provenance, save, settings, video_writer
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.job import Job
from attnswap.pipelines.lora import Lora
from PIL import Image

UNKNOWN = "the model's files are not known to be the same, as the file does not say which they were"
CPU = torch.device("cpu")
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(kind == ".mp4" and not save.has_av(), reason="no PyAV"))
    for kind in (".png", ".gif", ".mp4")
]
WILD = "ein Füchslein 🦊👨‍👩‍👧 \"quoted\" 'too' \\ ; = # %s {}\n\r\t\0\x1b[31m\u202e狐狸 "


def surroundings(folder: Path, **fields: Any) -> dict[str, Any]:
    return provenance.surroundings(load.find(str(folder)), Job(prompt="a fox", **fields), CPU)


def write(path: Path, record: dict[str, Any]) -> None:
    if path.suffix == ".png":
        save.write_png(Image.new("RGB", (16, 16)), path, record)
        return
    with video_writer.writers(path, None, fps=Fraction(8), record=record) as (writer,):
        writer.add(np.zeros((16, 16, 3), np.uint8))


@pytest.mark.parametrize("kind", KINDS)
class TestRecord:
    def test_comes_back_as_it_was_with_any_text_in_it(self, tmp_path: Path, kind: str) -> None:
        company = [{"prompt": WILD * 200, "negative": None, "seed": seed} for seed in range(8)]
        record = {"prompt": WILD * 250, "negative": WILD, "seed": 2**63, "batch": {"index": 1, "of": company}}
        assert len(record["prompt"].encode()) > 10_000
        write(tmp_path / f"a{kind}", record)
        assert save.read_record(tmp_path / f"a{kind}") == record

    def test_of_a_million_characters(self, tmp_path: Path, kind: str) -> None:
        record = {"prompt": "🦊" * 1_000_000}
        write(tmp_path / f"a{kind}", record)
        assert save.read_record(tmp_path / f"a{kind}") == record

    def test_of_a_damaged_file_is_refused_in_a_line(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / f"a{kind}"
        write(path, {"prompt": WILD})
        whole = path.read_bytes()
        random = np.random.default_rng(0)
        for _ in range(300):
            damaged = bytearray(whole)
            for place in random.integers(0, len(damaged), 3):
                damaged[place] = random.integers(256)
            path.write_bytes(damaged[: random.integers(1, len(damaged) + 1)])
            with contextlib.suppress(BadInput):  # and nothing else
                save.read_record(path)

    def test_of_a_record_too_deep_to_read_is_refused_in_a_line(
        self, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(json, "dumps", lambda *_, **__: '{"a":' + "[" * 100_000)
        write(tmp_path / f"a{kind}", {})
        with pytest.raises(BadInput, match="is not a readable"):
            save.read_record(tmp_path / f"a{kind}")


class TestSurroundings:
    def test_are_what_json_knows(self, tiny_sd: Path) -> None:
        found = surroundings(tiny_sd)
        assert json.loads(json.dumps(found)) == found

    def test_name_the_hardware(self, tiny_sd: Path) -> None:
        found = surroundings(tiny_sd)
        assert (found["device"], found["threads"]) == ("cpu", torch.get_num_threads())
        assert torch.backends.cpu.get_cpu_capability() in found["device_name"]

    def test_name_an_accelerator_as_it_names_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
        assert provenance.device_name(torch.device("cuda:1")) == "GPU 1"

    def test_name_the_backend_that_was_asked_for(self, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("ATTNSWAP_BACKEND", raising=False)
        assert surroundings(tiny_sd)["backend"] == "auto"
        monkeypatch.setenv("ATTNSWAP_BACKEND", "eager")
        assert surroundings(tiny_sd)["backend"] == "eager"

    def test_have_the_versions_of_what_was_used(self, tiny_sd: Path, tmp_path: Path) -> None:
        always = {"attnswap", "python", "torch", "diffusers", "transformers"}
        found = surroundings(tiny_sd)["versions"]
        assert set(found) == always
        assert found["attnswap"] == __version__
        assert set(surroundings(tiny_sd, loras=(Lora("a"),))["versions"]) == always | {"peft"}
        assert set(surroundings(tiny_sd, image=tmp_path / "a.png")["versions"]) == always | {"pillow"}
        assert set(surroundings(tiny_sd, frames=5, output=Path("a.gif"))["versions"]) == always | {"pillow"}

    def test_have_that_of_pyav_where_it_wrote_the_clip(self, tiny_sd: Path) -> None:
        pytest.importorskip("av")
        assert "av" in surroundings(tiny_sd, frames=5, output=Path("a.mp4"))["versions"]

    def test_know_every_file_by_its_content(self, tiny_sd: Path, tmp_path: Path) -> None:
        Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
        (tmp_path / "style.safetensors").write_bytes(b"adapter")
        methods = {"linfusion": settings.build({"linfusion": {"weights": "emoji-sd"}})[0].to_dict()}
        loras = (Lora(str(tmp_path / "style.safetensors")), Lora("nobody/has-this"))
        found = surroundings(tiny_sd, image=tmp_path / "in.png", loras=loras, methods=methods)["fingerprints"]
        assert len(found["image"]) == 64
        assert [value and len(value) for value in (found["model"], *found["loras"])] == [16, 16, None]
        assert len(found["weights"]["linfusion"]) == 16


class TestDifferences:
    @pytest.fixture
    def now(self, tiny_sd: Path) -> dict[str, Any]:
        fingerprints = {"model": "m", "loras": ["l", None], "weights": {"linfusion": "w"}, "image": "i"}
        return surroundings(tiny_sd) | {
            "loras": [{"id": "style.safetensors"}, {"id": "gone.safetensors"}],
            "image": "in.png",
            "fingerprints": fingerprints,
        }

    def test_are_none_on_the_same_machine(self, now: dict[str, Any]) -> None:
        assert provenance.differences(json.loads(json.dumps(now)), now) == []

    @pytest.mark.parametrize("name", ["attnswap", "torch", "python"])
    def test_name_versions(self, now: dict[str, Any], name: str) -> None:
        record = now | {"versions": now["versions"] | {name: "0.0.9", "peft": "0.1"}}
        assert provenance.differences(record, now) == [f"{name} 0.0.9 then, {now['versions'][name]} now"]

    def test_name_another_kind_of_device_once(self, now: dict[str, Any]) -> None:
        record = now | {"device": "cuda:1", "device_name": "NVIDIA H200", "threads": None}
        assert provenance.differences(record, now) == [f"cuda:1 (NVIDIA H200) then, cpu ({now['device_name']}) now"]

    def test_name_another_device_of_the_same_kind(self, now: dict[str, Any]) -> None:
        record = now | {"device_name": "6502"}
        assert provenance.differences(record, now) == [f"cpu (6502) then, cpu ({now['device_name']}) now"]

    def test_do_not_name_the_place_of_a_device(self, now: dict[str, Any]) -> None:
        there, here = ({"device": device, "device_name": "NVIDIA H200"} for device in ("cuda:1", "cuda"))
        assert provenance.differences(now | there, now | here) == []

    def test_name_threads_and_backend(self, now: dict[str, Any]) -> None:
        record = now | {"threads": 7777, "backend": "eager"}
        assert provenance.differences(record, now) == [
            f"7777 threads of the CPU then, {now['threads']} now",
            "ATTNSWAP_BACKEND eager then, auto now",
        ]

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"model": "x"}, "the model's files differ"),
            ({"loras": ["x", None]}, "the files of the LoRA style.safetensors differ"),
            ({"loras": ["l", "x"]}, "the files of the LoRA gone.safetensors are not to be had here"),
            ({"weights": {"linfusion": "x"}}, "the weights of linfusion differ"),
            ({"image": "x"}, "the contents of the image in.png differ"),
        ],
    )
    def test_name_files(self, now: dict[str, Any], changed: dict[str, Any], said: str) -> None:
        record = now | {"fingerprints": now["fingerprints"] | changed}
        assert provenance.differences(record, now) == [said]

    def test_of_a_file_of_an_earlier_version_are_those_it_can_tell(self, now: dict[str, Any]) -> None:
        record = {"prompt": "a fox", "device": "cpu", "versions": {"torch": "2.0"}}
        assert provenance.differences(record, now) == [
            f"torch 2.0 then, {now['versions']['torch']} now",
            UNKNOWN,
        ]

    @pytest.mark.parametrize("value", [None, True, 7, 1.5, "x", [], {}, [[1]], {"model": {}, "loras": 1, "image": []}])
    def test_take_what_anybody_may_have_written_for_not_recorded(self, now: dict[str, Any], value: Any) -> None:
        names = ("versions", "fingerprints", "threads")
        record = {**now, **dict.fromkeys(names, value)}
        found = provenance.differences(record, now)
        assert UNKNOWN in found
        record["fingerprints"] = {"model": "m", "loras": value, "weights": value, "image": 1}
        record["versions"] = dict.fromkeys(now["versions"], None if isinstance(value, str) else value)
        record["threads"] = None
        assert provenance.differences(record, now) == []

    def test_do_not_steer_the_terminal(self, now: dict[str, Any]) -> None:
        evil = "\x1b[2J\u202e" + "x" * 10_000
        record = now | {"versions": {"torch": evil}, "device": evil, "device_name": evil, "backend": evil}
        found = provenance.differences(record, now)
        assert len(found) == 3
        assert all(line.isprintable() and len(line) < 400 for line in found)
