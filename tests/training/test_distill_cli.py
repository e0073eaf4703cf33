"""`attnswap distill` as a user meets it: what it writes, and one clear line for each wrong request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attnswap.cli import main
from attnswap.training.distill_settings import LinFusionSettings
from attnswap.training.emoji_folder import write_folder
from PIL import Image

QUICK = ["--steps", "1", "--batch", "2", "--cpu", "--report-pictures", "1"]


def distill(*arguments: str | Path, method: str = "linfusion") -> int:
    return main(["distill", method, *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path, method: str = "linfusion") -> str:
    capsys.readouterr()
    assert distill(*arguments, method=method) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attnswap: ")]
    assert len(lines) == 1
    return lines[0]


def test_from_a_folder_to_weights_and_report_and_on_from_there(
    tiny_sdxl: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert distill("--model", tiny_sdxl, "--data", pictures, "-o", out, *QUICK) == 0
    assert "1 steps, 2 pictures" in capsys.readouterr().out
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "checkpoint/state.safetensors",
        "checkpoint/losses.jsonl",
        "report/loss.png",
        "report/pictures.png",
        "report/report.json",
    }
    again = ("--model", tiny_sdxl, "--data", pictures, "-o", out, *QUICK, "--steps", "2")
    assert "--resume" in refused(capsys, *again)
    assert "--rate was 0.0001, not 0.1" in refused(capsys, *again, "--resume", "--rate", "0.1")
    assert distill(*again, "--resume") == 0
    assert json.loads((out / "report" / "report.json").read_text())["steps"] == 2


def test_clear_from_a_folder_to_weights_that_generate(
    tiny_flux: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ("--model", tiny_flux, "--data", pictures, "-o", out, *QUICK, "--width", "32,48", "--height", "32,32")
    given += ("--radius", "3", "--down-factor", "2")
    assert distill(*given, method="clear") == 0
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {
        "clear_local_3_down_2.safetensors",
        "checkpoint/state.safetensors",
        "checkpoint/losses.jsonl",
        "report/loss.png",
        "report/pictures.png",
        "report/report.json",
    }
    report = json.loads((out / "report" / "report.json").read_text())
    assert (report["radius"], report["down_factor"], report["sizes"]) == (3, 2, ["48x32"])
    assert "--radius was 3.0, not 4.0" in refused(capsys, *given, "--resume", "--radius", "4", method="clear")
    picture = ("a fox", "--model", tiny_flux, "--width", "32", "--height", "32", "--steps", "1", "--method", "clear")
    settings = ("--set", "radius=3", "--set", "down_factor=2", "--set", f"weights={out}", "-o", tmp_path / "fox.png")
    assert main(["generate", *map(str, (*picture, *settings))]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--radius", "0.5"), "radius must be a number of tokens, at least 1, or None, got 0.5"),
        (("--down-factor", "1"), "down_factor must be a whole number of tokens, at least 2"),
        (
            ("--size", "32", "--down-factor", "3"),
            "--size 32 is not a multiple of 12, which this model with --down-factor 3 needs; nearest: 36",
        ),
        (("--width", "32,30", "--height", "32,32"), "--width 30 is not a multiple of 4"),
        (("--width", "32,0", "--height", "32,32"), "--width 0: must be above 0"),
        (("--width", "32", "--height", "-32"), "--height -32: must be above 0"),
        (("--width", "32,64", "--height", "32"), "2 numbers for --width, 1 for --height: give pairs"),
        (("--width", "32", "--height", "32", "--size", "32"), "--size goes without --width and --height"),
        (("--every", "0"), "--every 0: must be above 0"),
        (("--clip", "0"), "--clip 0.0: must be above 0"),
        (("--guidance", "-1"), "--guidance -1.0: must not be below 0"),
        (("--model", "TINY_SD"), "CLEAR is distilled for FluxPipeline, this is a StableDiffusionPipeline"),
    ],
)
def test_a_wrong_request_for_clear_is_one_line(
    tiny_flux: Path,
    tiny_sd: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    given = [str(tiny_sd) if argument == "TINY_SD" else argument for argument in arguments]
    common = ("--model", tiny_flux, "--data", pictures, "-o", tmp_path / "out", *QUICK)
    assert message in refused(capsys, *common, *given, method="clear")
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_captions_are_drawn_by_the_teacher(
    tiny_sdxl: Path, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "captions.txt").write_text("a fox\nan owl\n")
    out = tmp_path / "out"
    data = ("--data", tmp_path / "captions.txt", "--per-caption", "2")
    assert distill("--model", tiny_sdxl, *data, "-o", out, *QUICK, "--mixed-precision", precision) == 0
    assert ("float32: this one overflows" in capsys.readouterr().err) == (precision == "fp16")
    drawn = [json.loads(line) for line in (out / "data" / "metadata.jsonl").read_text().splitlines()]
    assert [entry["text"] for entry in drawn] == ["a fox", "a fox", "an owl", "an owl"]
    assert all((out / "data" / entry["file_name"]).is_file() for entry in drawn)


def test_a_bundled_model_brings_captions(tmp_path: Path) -> None:
    from attnswap.pipelines import load
    from attnswap.training import distill as module

    settings = LinFusionSettings(model="emoji-sd", output=tmp_path, steps=1)
    examples, captions = module._source(settings, load.find("emoji-sd"), False)
    assert not examples
    assert len(captions) == 770
    assert captions[:2] == ["a fox", "a fox on a red background"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "none/here"), "no such folder or file, nor the word 'captions'"),
        ((), "--data captions: "),
        (("--data", "captions"), "give a text file, one caption a line"),
        (("--data", "PICTURES", "--rate", "0"), "--rate 0.0: must be above 0"),
        (("--data", "PICTURES", "--steps", "-1"), "--steps -1: must be above 0"),
        (("--data", "PICTURES", "--size", "36"), "--size 36 is not a multiple of 8, which this model needs"),
        (("--data", "PICTURES", "--seed", "-1"), "--seed -1 is out of range: 0 to 2^63 - 1"),
        (("--data", "PICTURES", "--seed", str(2**63)), f"--seed {2**63} is out of range"),
        (("--data", "PICTURES", "--mid", "C/0"), "--mid C/0: write C, C/16 or a number"),
        (("--data", "PICTURES", "--mid", "C/64"), "--mid C/64: a layer has 32 channels"),
        (("--data", "PICTURES", "--ema", "1"), "--ema 1.0: must be between 0 and 1"),
        (("--data", "PICTURES", "--caption-dropout", "1"), "--caption-dropout 1.0"),
        (("--data", "PICTURES", "--loss-weights", "1,-1,1"), "--loss-weights 1.0,-1.0,1.0: none below 0"),
        (("--data", "PICTURES", "--loss-weights", "1,1"), "--loss-weights 1.0,1.0: three numbers"),
        (("--data", "PICTURES", "--resume"), "there is no run in"),
        (("--data", "PICTURES", "--model", "emoji-sdd"), "Did you mean"),
    ],
)
def test_a_wrong_request_is_one_line(
    tiny_sdxl: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    given = [str(pictures) if argument == "PICTURES" else argument for argument in arguments]
    model = () if "--model" in given else ("--model", tiny_sdxl)
    assert message in refused(capsys, *model, "-o", tmp_path / "out", *QUICK, *given)


def test_a_run_needs_a_length(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--steps, --minutes or both" in refused(capsys, "--data", pictures, "-o", tmp_path / "out")


def test_a_model_without_a_unet(tiny_sd: Path, pictures: Path, tmp_path: Path, capsys, copy_of) -> None:
    folder = copy_of(tiny_sd)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    del index["unet"]
    (folder / "model_index.json").write_text(json.dumps(index))
    message = refused(capsys, "--model", folder, "--data", pictures, "-o", tmp_path / "out", *QUICK)
    assert "LinFusion is for U-Nets, it has transformer (FluxTransformer2DModel)" in message


def test_a_unet_that_takes_more_than_latents(tiny_sd: Path, pictures: Path, tmp_path: Path, capsys, copy_of) -> None:
    from diffusers import UNet2DConditionModel

    folder = copy_of(tiny_sd)
    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(folder / "unet")
    message = refused(capsys, "--model", folder, "--data", pictures, "-o", tmp_path / "out", *QUICK)
    assert "its U-Net takes 9 channels, its autoencoder makes 4" in message


def test_an_output_folder_of_something_else(tiny_sdxl: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    given = ("--model", tiny_sdxl, "--data", pictures, *QUICK)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    assert "is not empty (it has thesis.tex)" in refused(capsys, *given, "-o", out)
    (out / "thesis.tex").rename(out / "config.json")  # a model's, perhaps
    for more in ((), ("--resume",)):
        assert str(out) in refused(capsys, *given, "-o", out, *more)
    (out / "config.json").rename(out / "thesis.tex")
    assert "that is a file" in refused(capsys, *given, "-o", out / "thesis.tex")
    assert (out / "thesis.tex").read_text() == "mine"


def test_a_damaged_checkpoint(tiny_sdxl: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    (out / "checkpoint").mkdir(parents=True)
    (out / "checkpoint" / "state.safetensors").write_bytes(b"x" * 100)
    message = refused(capsys, "--model", tiny_sdxl, "--data", pictures, "-o", out, *QUICK, "--resume")
    assert "is no checkpoint of a distillation" in message


def test_a_method_without_distillation_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["distill", "hidiffusion", "--data", "captions"])
    assert end.value.code == 2
    assert "invalid choice: 'hidiffusion'" in capsys.readouterr().err


def test_reference_pictures_become_training_data(tmp_path: Path) -> None:
    import numpy as np
    from attnswap.pipelines.emoji_reference import Reference
    from attnswap.training.distill_data import read_folder

    sprites = np.zeros((2, 8, 8, 4), np.uint8)
    count = write_folder(Reference(("fox", "owl"), sprites, {"red": (230, 40, 40)}), tmp_path / "data")
    examples = read_folder(tmp_path / "data")
    assert count == len(examples) == 4
    assert examples[1].caption == "a fox on a red background"
    assert Image.open(examples[1].path).getpixel((0, 0)) == (230, 40, 40)
