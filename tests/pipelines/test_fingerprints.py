"""What tells the files of a model apart, and what does not matter."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attnswap.pipelines import fingerprints, load
from attnswap.pipelines.lora import Lora

Copy = Callable[[Path], Path]


def of(folder: Path, variant: str | None = None) -> str | None:
    return fingerprints.of_model(load.find(str(folder)), variant)


class TestModel:
    def test_is_the_same_for_a_copy(self, tiny_sd: Path, copy_of: Copy) -> None:
        copy = copy_of(tiny_sd)
        os.utime(copy / "model_index.json", (1, 1))
        assert of(copy) == of(tiny_sd)
        assert len(of(copy) or "") == 16

    @pytest.mark.skipif(os.name != "posix", reason="links")
    def test_is_the_same_for_links_as_in_the_cache_of_the_hub(self, tiny_sd: Path, tmp_path: Path) -> None:
        for path in tiny_sd.rglob("*"):
            if path.is_file():
                link = tmp_path / path.relative_to(tiny_sd)
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(path)
        assert of(tmp_path) == of(tiny_sd)

    @pytest.mark.parametrize(
        "name",
        [
            "README.md",
            "attnswap.json",
            "samples/fox.json",
            "unet/.cache.json",
            "unet/diffusion_pytorch_model.bin",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "unet/diffusion_pytorch_model.safetensors.index.json",
        ],
    )
    def test_does_not_count_what_the_pipeline_does_not_read(self, tiny_sd: Path, copy_of: Copy, name: str) -> None:
        path = copy_of(tiny_sd) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        assert of(copy_of_folder(path, name)) == of(tiny_sd)

    @pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
    def test_counts_configurations(self, tiny_sd: Path, copy_of: Copy, name: str) -> None:
        path = copy_of(tiny_sd) / name
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"another": 1}))
        assert of(copy_of_folder(path, name)) != of(tiny_sd)

    def test_counts_weights_of_the_same_size(self, tiny_sd: Path, copy_of: Copy) -> None:
        copy = copy_of(tiny_sd)
        weights = next((copy / "vae").glob("*.safetensors"))
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        assert of(copy) != of(tiny_sd)

    def test_counts_the_weights_of_the_variant_where_there_are_some(self, tiny_sd: Path, copy_of: Copy) -> None:
        copy = copy_of(tiny_sd)
        assert of(copy, "fp16") == of(copy)  # there are none: the others are read
        (copy / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
        assert of(copy, "fp16") != of(copy) == of(tiny_sd)

    def test_that_has_gone_has_none(self, tiny_sd: Path, copy_of: Copy) -> None:
        copy = copy_of(tiny_sd)
        model = load.find(str(copy))
        assert fingerprints.of_model(model, None) is not None
        shutil.rmtree(copy / "vae")
        assert fingerprints.of_model(model, None) is None


def copy_of_folder(path: Path, name: str) -> Path:
    """The model folder that has `name` at `path`."""
    return path.parents[len(Path(name).parts) - 1]


class TestLargeFiles:
    def test_a_part_of_the_weights_is_enough(self, tmp_path: Path) -> None:
        content = bytearray(os.urandom(8 * 2**20))
        (tmp_path / "a.safetensors").write_bytes(content)
        content[3 * 2**20 : 4 * 2**20] = bytes(2**20)  # as a LoRA merged into some layers
        (tmp_path / "b.safetensors").write_bytes(content)
        one, other = (fingerprints.fingerprint(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
        assert one != other

    @pytest.mark.parametrize("place", [0, -1])
    def test_as_are_the_first_and_the_last_byte(self, tmp_path: Path, place: int) -> None:
        content = bytearray(2 * 2**20)
        (tmp_path / "a.safetensors").write_bytes(content)
        content[place] = 1
        (tmp_path / "b.safetensors").write_bytes(content)
        one, other = (fingerprints.fingerprint(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
        assert one != other

    @pytest.mark.skipif(os.name != "posix", reason="files with holes")
    def test_are_not_read_whole(self, tmp_path: Path) -> None:
        with (tmp_path / "a.safetensors").open("wb") as file:
            file.truncate(2**40)  # reading it all would take minutes
        assert fingerprints.fingerprint(tmp_path / "a.safetensors")

    @pytest.mark.skipif(not Path("/proc/version").exists(), reason="files of Linux")
    def test_one_of_the_system_that_says_it_is_empty_is_not_read_to_its_end(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Some have none."""
        monkeypatch.setattr(fingerprints, "WHOLE", 8)
        path = Path("/proc/version")
        assert path.stat().st_size == 0
        assert fingerprints.fingerprint(path) == hashlib.sha256(b"0\n" + path.read_bytes()[:8]).hexdigest()[:16]

    def test_a_file_that_has_changed_is_read_again(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(b"one")
        before = fingerprints.fingerprint(path)
        path.write_bytes(b"two")
        os.utime(path, ns=(1, 1))
        assert fingerprints.fingerprint(path) != before


# Too long, nobody's home folder, no name at all, and one that the Hub refuses.
NOWHERE = pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/a.png", "a\0b", "a/b..c"])


@NOWHERE
class TestNamesThatNothingHas:
    def test_of_a_file(self, name: str) -> None:
        assert fingerprints.of_file(Path(name)) is None
        assert fingerprints.fingerprint(Path(name)) is None

    def test_of_an_adapter(self, name: str) -> None:
        assert fingerprints.of_lora(Lora(name)) is None

    def test_of_the_weights_of_a_method(self, name: str) -> None:
        methods: dict[str, dict[str, Any]] = {
            "linfusion": {"weights": name},
            "clear": {"weights": name, "radius": 3.0, "down_factor": None},
        }
        assert fingerprints.of_weights(methods, load.find("emoji-sd")) == {"linfusion": None, "clear": None}


class TestLora:
    def test_is_that_of_its_file_wherever_it_lies(self, tmp_path: Path) -> None:
        for name in ("a.safetensors", "folder/b.safetensors"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"adapter")
        loras = (Lora(str(tmp_path / "a.safetensors")), Lora(str(tmp_path / "folder"), 0.5, "b.safetensors"))
        one, other = (fingerprints.of_lora(lora) for lora in loras)
        assert one == other is not None

    def test_asks_nobody(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from huggingface_hub import constants

        def connect(*_: object) -> None:
            pytest.fail("a request was made")

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(socket.socket, "connect", connect)
        monkeypatch.setattr(socket, "getaddrinfo", connect)
        assert fingerprints.of_lora(Lora("nobody/has-this")) is None
        assert fingerprints.of_lora(Lora(str(tmp_path / "nothing.safetensors"))) is None


class TestWeightsOfMethods:
    def test_automatic_ones_are_those_they_stand_for(self) -> None:
        model = load.find("emoji-sd")
        found = [fingerprints.of_weights({"linfusion": {"weights": name}}, model) for name in ("auto", "emoji-sd")]
        assert found[0] == found[1]
        assert found[0]["linfusion"] is not None

    def test_differ_from_those_of_another_radius(self, tmp_path: Path) -> None:
        model = load.find("emoji-flux")
        for radius in (3, 4):
            (tmp_path / f"clear_local_{radius}.safetensors").write_bytes(b"%d" % radius)
        found = [
            fingerprints.of_weights({"clear": {"weights": str(tmp_path), "radius": radius, "down_factor": None}}, model)
            for radius in (3.0, 4.0)
        ]
        assert found[0] != found[1]
        assert None not in (found[0]["clear"], found[1]["clear"])

    def test_are_not_asked_for_where_a_method_has_none(self, tiny_sd: Path) -> None:
        methods = {"clear": {"weights": None}, "hidiffusion": {}}
        assert fingerprints.of_weights(methods, load.find(str(tiny_sd))) == {}

    def test_that_nobody_knows_have_none(self, tiny_sd: Path) -> None:
        methods = {"linfusion": {"weights": "auto"}}
        assert fingerprints.of_weights(methods, load.find(str(tiny_sd))) == {"linfusion": None}
