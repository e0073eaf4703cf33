"""Adapters: what is put into a model, and what is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attnswap.pipelines import load, save
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.generate import generate
from attnswap.pipelines.job import Job, from_record
from attnswap.pipelines.lora import Lora, load_loras, lora_file, parse_lora
from safetensors.torch import load_file, save_file
from torch import nn

from .pictures import picture

LoraOf = Callable[..., Path]


@pytest.fixture
def lora_of(tmp_path: Path) -> LoraOf:
    """Writes a LoRA of rank 2 for every linear layer of a module whose name ends in `layers`."""

    def write(
        module: nn.Module, name: str = "fox", part: str = "unet", layers: str = "to_q", **more: torch.Tensor
    ) -> Path:
        generator, weights = torch.Generator().manual_seed(0), {}
        for layer, linear in module.named_modules():
            if layer.endswith(layers) and isinstance(linear, nn.Linear):
                for half, shape in (("A", (2, linear.in_features)), ("B", (linear.out_features, 2))):
                    key = f"{part}.{layer}.lora_{half}.weight"
                    weights[key] = torch.randn(shape, generator=generator)
        file = tmp_path / f"{name}.safetensors"
        save_file(weights | more, file)
        return file

    return write


def put_in(pipe: Any, *files: Path, scales: tuple[float, ...] = ()) -> tuple[str, ...]:
    scales = scales or (1.0,) * len(files)
    return load_loras(pipe, [Lora(str(file), scale) for file, scale in zip(files, scales, strict=True)], "emoji-sd")


class TestLoraText:
    @pytest.mark.parametrize("text", ["loras/fox.safetensors", "nobody/fox", "fox 2.safetensors"])
    def test_is_a_path_or_an_id(self, text: str) -> None:
        assert parse_lora(text) == Lora(text, 1.0, None)

    def test_may_be_that_of_diffusers_cli(self) -> None:
        text = json.dumps(
            {"lora_id": "nobody/fox", "lora_scale": -0.5, "weight_name": "a.safetensors", "adapter_name": "x"}
        )
        assert parse_lora(text) == Lora("nobody/fox", -0.5, "a.safetensors")
        assert parse_lora(' {"lora_id": "fox"}') == Lora("fox")

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("{", "is no JSON"),
            ("", "not ''"),
            ("{}", "lora_id is missing"),
            ('{"lora_id": "fox", "scale": 1}', r"no key scale\. Did you mean lora_scale\?"),
            ('{"lora_id": 3}', "not 3"),
            ('{"lora_id": "fox", "lora_scale": NaN}', "scale nan is no number"),
            (f'{{"lora_id": "fox", "lora_scale": 1{"0" * 400}}}', "scale 10+ is no number"),
            ('{"lora_id": "fox", "lora_scale": "much"}', "scale 'much' is no number"),
            ('{"lora_id": "fox", "lora_scale": true}', "scale True is no number"),
            ('{"lora_id": "fox", "weight_name": 1}', "weight_name 1 is no file name"),
        ],
    )
    def test_that_is_none_is_refused(self, text: str, says: str) -> None:
        with pytest.raises(BadInput, match=says):
            parse_lora(text)


class TestLoraFile:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "loras").mkdir()
        return tmp_path / "loras"

    def test_of_a_folder_is_its_only_one_or_that_named_as_usual(self, folder: Path) -> None:
        (folder / "fox.safetensors").touch()
        assert lora_file(Lora(str(folder))) == folder / "fox.safetensors"
        (folder / "pytorch_lora_weights.safetensors").touch()
        assert lora_file(Lora(str(folder))).name == "pytorch_lora_weights.safetensors"
        assert lora_file(Lora(str(folder), 1.0, "fox.safetensors")).name == "fox.safetensors"

    def test_among_several_must_be_named(self, folder: Path) -> None:
        (folder / "cat.safetensors").touch()
        (folder / "hedgehog.safetensors").touch()
        with pytest.raises(
            BadInput, match=r"has 2 files, cat\.safetensors, hedgehog\.safetensors: name one, as in '\{\"lora"
        ):
            lora_file(Lora(str(folder)))
        with pytest.raises(BadInput, match=r"has no hedghog\.safetensors\. Did you mean .*hedgehog"):
            lora_file(Lora(str(folder), 1.0, "hedghog.safetensors"))

    @pytest.mark.parametrize("name", ["fox.bin", "fox.pt", "FOX.CKPT"])
    def test_is_never_a_pickle(self, folder: Path, name: str) -> None:
        (folder / name).touch()
        for lora in (Lora(str(folder / name)), Lora(str(folder)), Lora(str(folder), 1.0, name)):
            with pytest.raises(BadInput, match=f"pickle.*{name}|{name} is a pickle"):
                lora_file(lora)

    @pytest.mark.parametrize("name", ["~nobodyxyz/x", "a" * 5000], ids=["nobody's home", "too long"])
    def test_has_a_name_that_files_can_have(self, name: str) -> None:
        with pytest.raises(BadInput, match="cannot be looked up"):
            lora_file(Lora(name))

    def test_is_not_downloaded_unless_that_is_meant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        def request(*_: object, **__: object) -> None:
            pytest.fail("something went out")

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("socket.socket.connect", request)
        monkeypatch.setattr("socket.getaddrinfo", request)
        with pytest.raises(BadInput, match=r"no LoRA nobody/fox: .* only --lora nobody/fox downloads it"):
            lora_file(Lora("nobody/fox"), ask=False)

    def test_that_is_not_there(self, folder: Path) -> None:
        (folder / "fox.safetensors").touch()
        with pytest.raises(BadInput, match=r"neither a file nor a folder here\. Did you mean fox\.safetensors\?"):
            lora_file(Lora(str(folder / "fix.safetensors")))
        (folder / "fox.safetensors").unlink()
        with pytest.raises(BadInput, match=r"LoRA .* has no \.safetensors"):
            lora_file(Lora(str(folder)))

    def test_of_the_hub_is_taken_from_its_cache_and_nobody_is_asked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(BadInput, match=r"no LoRA nobody/fox: neither a file .* HF_HUB_OFFLINE is set"):
            lora_file(Lora("nobody/fox"))
        repository = tmp_path / "models--nobody--fox"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("f" * 40)
        (repository / "snapshots" / ("f" * 40)).mkdir(parents=True)
        (repository / "snapshots" / ("f" * 40) / "fox.safetensors").touch()
        assert lora_file(Lora("nobody/fox")).is_file()
        with pytest.raises(BadInput, match=r"no LoRA nobody/fox/cat.safetensors"):
            lora_file(Lora("nobody/fox", 1.0, "cat.safetensors"))


class TestLoras:
    def test_add_up_at_their_scales(self, sd: Any, lora_of: LoraOf) -> None:
        fox, cat = lora_of(sd.unet), lora_of(sd.unet, "cat", layers="to_k")
        weights = {
            name: linear.weight.clone() for name, linear in sd.unet.named_modules() if name.endswith(("to_q", "to_k"))
        }
        assert put_in(sd, fox, cat, scales=(0.5, -2.0)) == ()
        made = picture(sd)
        sd.unload_lora_weights()
        assert not torch.equal(picture(sd), made)
        for scale, file in ((0.5, fox), (-2.0, cat)):
            adapter = load_file(file)
            for key in (key for key in adapter if "lora_B" in key):
                layer = key.removeprefix("unet.").removesuffix(".lora_B.weight")
                change = scale * adapter[key] @ adapter[key.replace("lora_B", "lora_A")]
                sd.unet.get_submodule(layer).weight.data = weights[layer] + change
        torch.testing.assert_close(picture(sd), made, atol=1e-4, rtol=1e-3)

    def test_of_the_text_encoder_too(self, sd: Any, lora_of: LoraOf) -> None:
        stock = picture(sd)
        of_text = lora_of(sd.text_encoder, "text", part="text_encoder", layers="q_proj")
        assert put_in(sd, of_text, lora_of(sd.unet), scales=(1.0, 0.0)) == (
            "LoRA text.safetensors changes text_encoder, not unet.",
        )
        assert not torch.equal(picture(sd), stock)

    def test_cause_no_request(self, sd: Any, lora_of: LoraOf, monkeypatch: pytest.MonkeyPatch) -> None:
        import socket

        from huggingface_hub import constants

        def request(*_: object, **__: object) -> None:
            pytest.fail("something went out")

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(socket.socket, "connect", request)
        monkeypatch.setattr(socket, "getaddrinfo", request)
        put_in(sd, lora_of(sd.unet))

    def test_whose_layers_are_partly_missing_say_so(
        self, sd: Any, lora_of: LoraOf, caplog: pytest.LogCaptureFixture
    ) -> None:
        more = {f"unet.nowhere.to_q.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
        [remark] = put_in(sd, lora_of(sd.unet, **more))
        assert remark.startswith("LoRA fox.safetensors: ")
        assert "nowhere.to_q.lora_A.weight" in remark
        assert "\n" not in remark
        assert caplog.records == []

    def test_of_another_model_are_refused(self, sd: Any, lora_of: LoraOf, capfd: pytest.CaptureFixture[str]) -> None:
        other = nn.ModuleDict({"to_q": nn.Linear(4, 4)})
        layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        shapes = {f"{layer}.lora_{half}.weight": torch.zeros(3, 3) for half in "AB"}
        anything = "unet or text_encoder"
        wrong = {
            f"fits no layer of emoji-sd's {anything}": lora_of(sd.unet, part="transformer"),
            f"does not fit emoji-sd's {anything}: Target modules": lora_of(other, "names"),
            f"does not fit emoji-sd's {anything}: .* size mismatch": lora_of(other, "shape", layers="-", **shapes),
            f"does not fit emoji-sd's {anything}: Invalid LoRA": lora_of(other, "none", layers="-", x=torch.zeros(1)),
        }
        capfd.readouterr()
        for says, file in wrong.items():
            with pytest.raises(BadInput, match=says) as refusal:
                put_in(sd, file)
            assert "\n" not in str(refusal.value)
            assert len(str(refusal.value)) < 400
        assert capfd.readouterr().err == ""

    def test_that_are_broken_are_refused(self, sd: Any, tmp_path: Path) -> None:
        (tmp_path / "fox.safetensors").write_text("a fox")
        with pytest.raises(BadInput, match=r"LoRA fox\.safetensors cannot be read"):
            put_in(sd, tmp_path / "fox.safetensors")

    def test_are_refused_by_pipelines_that_take_none(self) -> None:
        pipe = type("LattePipeline", (), {})()
        with pytest.raises(BadInput, match=r"--lora fox: latte is a LattePipeline, which takes none"):
            load_loras(pipe, [Lora("fox")], "latte")

    def test_need_peft(self, sd: Any, lora_of: LoraOf, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("diffusers.utils.USE_PEFT_BACKEND", False)
        with pytest.raises(BadInput, match=r"adapters need peft, .* pip install -U peft"):
            put_in(sd, lora_of(sd.unet))

    def test_of_one_of_two_transformers_say_which_goes_without(self, tiny_wan: Path, lora_of: LoraOf) -> None:
        pipe = load.load(load.find(str(tiny_wan)), dtype=torch.float32)
        said = put_in(pipe, lora_of(pipe.transformer, part="transformer"))
        assert said == ("LoRA fox.safetensors changes transformer, not transformer_2.",)


class TestJob:
    def test_has_them_and_its_record_names_them(self, tiny_sd: Path, sd: Any, lora_of: LoraOf, tmp_path: Path) -> None:
        lora = Lora(str(lora_of(sd.text_encoder, part="text_encoder", layers="q_proj")), 0.5)
        how = {"model": str(tiny_sd), "steps": 2, "output": tmp_path / "fox.png"}
        plain = generate(Job("a fox", **how))
        made = generate(Job("a fox", loras=(lora,), scheduler="unipc", **how))
        assert made.image != plain.image
        assert made.notices == ("LoRA fox.safetensors changes text_encoder, not unet.",)
        record = save.read_record(tmp_path / "fox.png")
        assert record["loras"] == [{"id": lora.id, "scale": 0.5, "weight_name": None}]
        assert record["scheduler"] == "UniPCMultistepScheduler"
        assert generate(Job(**from_record(record), output=tmp_path / "again.png")).image == made.image

    def test_is_refused_before_the_model_is_read(self, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def read(*_: object, **__: object) -> None:
            pytest.fail("the model was read")

        monkeypatch.setattr(load, "load", read)
        with pytest.raises(BadInput, match=r"no LoRA none\.safetensors"):
            generate(Job("a fox", model=str(tiny_sd), loras=(Lora("none.safetensors"),)))
