"""Which models are found, and which are refused with what words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attnswap import UnsupportedModel
from attnswap.pipelines import load
from attnswap.pipelines.errors import BadInput, JobFailed

Copy = Callable[[Path], Path]


def as_pickle(file: Path, name: str) -> None:
    file.unlink()
    torch.save({}, file.with_name(name))


def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub could be asked; the test fails if it is."""
    import socket

    from huggingface_hub import constants

    def request(*_: object, **__: object) -> None:
        pytest.fail("something went out")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", request)
    monkeypatch.setattr(socket, "getaddrinfo", request)


class TestFind:
    def test_a_bundled_model_by_name(self, bundled_fake: str, tiny_sd: Path) -> None:
        assert load.find(bundled_fake).folder == tiny_sd

    def test_a_folder(self, tiny_sd: Path) -> None:
        model = load.find(str(tiny_sd))
        assert model.pipeline == "StableDiffusionPipeline"
        assert model.denoisers == {"unet": "UNet2DConditionModel"}

    def test_a_folder_relative_to_here_and_to_home(self, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tiny_sd.parent)
        assert load.find(tiny_sd.name).components == load.find(str(tiny_sd)).components
        monkeypatch.setenv("HOME", str(tiny_sd.parent))
        monkeypatch.setenv("USERPROFILE", str(tiny_sd.parent))
        assert load.find(f"~/{tiny_sd.name}").folder == tiny_sd

    @pytest.mark.parametrize("name", ["~nobodyxyz/x", "a" * 5000], ids=["nobody's home", "too long"])
    def test_a_name_that_no_folder_can_have_is_one_short_line(self, name: str) -> None:
        with pytest.raises(BadInput, match="cannot be looked up") as refusal:
            load.find(name)
        assert len(str(refusal.value)) < 200

    def test_nobody_is_asked_for_what_is_not_here_unless_that_is_meant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        online(monkeypatch)
        for name in ("nobody/fox", "--nobody/fox"):  # the Hub has no names like the second
            with pytest.raises(BadInput, match=f"no model {name}: .* only --model {name} downloads it"):
                load.find(name, ask=False)

    def test_what_is_in_the_hubs_cache_is_taken_unasked(
        self, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        repository = tmp_path / "models--nobody--fox"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("f" * 40)
        shutil.copytree(tiny_sd, repository / "snapshots" / ("f" * 40))
        assert load.find("nobody/fox", ask=False).pipeline == "StableDiffusionPipeline"

    def test_a_local_model_causes_no_request(self, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import socket

        from huggingface_hub import constants

        def request(*_: object, **__: object) -> None:
            pytest.fail("something went out")

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(socket.socket, "connect", request)
        monkeypatch.setattr(socket, "getaddrinfo", request)
        load.load(load.find(str(tiny_sd)), dtype=torch.float32)

    @pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.ckpt", "MODEL.CKPT", "nobody/model.bin"])
    def test_a_pickle_is_refused_by_name(self, name: str) -> None:
        with pytest.raises(BadInput, match=f"{name} is a pickle"):
            load.find(name)

    @pytest.mark.parametrize(
        ("part", "old", "new"),
        [
            ("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
            ("text_encoder", "model.safetensors", "pytorch_model.bin"),
            ("vae", "diffusion_pytorch_model.safetensors", "vae.ckpt"),
        ],
    )
    def test_a_folder_with_pickles_alone_is_refused_by_name(
        self, tiny_sd: Path, copy_of: Copy, part: str, old: str, new: str
    ) -> None:
        folder = copy_of(tiny_sd)
        as_pickle(folder / part / old, new)
        with pytest.raises(BadInput, match=f"pickle {part}/{new}"):
            load.find(str(folder))

    def test_a_pickle_beside_safetensors_is_never_opened(self, tiny_sd: Path, copy_of: Copy) -> None:
        folder = copy_of(tiny_sd)
        (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
        load.load(load.find(str(folder)), dtype=torch.float32)

    def test_a_folder_without_a_pipeline_says_what_was_found(self, tiny_sd: Path, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModel, match=r"no model_index\.json, found config\.json, diffusion_pytorch"):
            load.find(str(tiny_sd / "unet"))
        with pytest.raises(UnsupportedModel, match="found nothing"):
            load.find(str(tmp_path))

    def test_a_pipeline_without_a_denoiser_says_what_was_found(self, tmp_path: Path) -> None:
        index = {"_class_name": "VaePipeline", "vae": ["diffusers", "AutoencoderKL"], "unet": [None, None]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(UnsupportedModel, match=r"VaePipeline.* no denoiser.* found vae \(AutoencoderKL\)"):
            load.find(str(tmp_path))

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
    def test_a_broken_index(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(UnsupportedModel, match="names no pipeline"):
            load.find(str(tmp_path))

    def test_a_pipeline_that_brings_its_own_code_is_not_run(self, tmp_path: Path) -> None:
        index = {"_class_name": ["pipeline", "Mine"], "unet": ["diffusers", "UNet2DConditionModel"]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(UnsupportedModel, match="a pipeline of its own, which is not run"):
            load.find(str(tmp_path))

    def test_a_single_file_checkpoint_is_told_how_to_become_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "sd.safetensors").touch()
        with pytest.raises(BadInput, match="save_pretrained"):
            load.find(str(tmp_path / "sd.safetensors"))


class TestLoad:
    def test_broken_weights_are_one_line(self, tiny_sd: Path, copy_of: Copy) -> None:
        folder = copy_of(tiny_sd)
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(JobFailed, match="could not be loaded") as failure:
            load.load(load.find(str(folder)), dtype=torch.float32)
        assert "\n" not in str(failure.value)

    @pytest.mark.parametrize("file", ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"])
    def test_weights_that_are_none_are_one_line(self, tiny_sd: Path, copy_of: Copy, file: str) -> None:
        folder = copy_of(tiny_sd)
        (folder / file).write_bytes(b"not weights")
        with pytest.raises(JobFailed, match="could not be loaded") as failure:
            load.load(load.find(str(folder)), dtype=torch.float32)
        assert "\n" not in str(failure.value)

    def test_in_the_dtype_asked_for(self, tiny_sd: Path) -> None:
        pipe = load.load(load.find(str(tiny_sd)), dtype=torch.bfloat16)
        assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


class TestChoices:
    def test_float32_on_the_cpu(self, tiny_sd: Path) -> None:
        assert load.pick_dtype("auto", torch.device("cpu"), load.find(str(tiny_sd))) is torch.float32

    def test_half_precision_on_an_accelerator(self, tiny_sd: Path) -> None:
        model = load.find(str(tiny_sd))
        assert load.pick_dtype("auto", torch.device("cuda"), model) is torch.float16
        assert load.pick_dtype("bf16", torch.device("cuda"), model) is torch.bfloat16

    @pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "meta"])
    def test_a_device_that_is_not_here(self, name: str) -> None:
        with pytest.raises(BadInput, match="--device"):
            load.pick_device(name)
