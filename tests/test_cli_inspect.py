"""`attnswap inspect`: what attention costs at a size and what would be done about it, on one screen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .test_cli import Cli, attnswap, refused

__all__ = ["attnswap"]  # a fixture


def _json(result: tuple[int, str, str]) -> dict[str, Any]:
    status, out, _ = result
    assert status == 0
    document: dict[str, Any] = json.loads(out)
    return document


@pytest.mark.parametrize("model", ["emoji-sd", "emoji-flux", "emoji-video"])
def test_a_bundled_model_is_one_screen(attnswap: Cli, model: str) -> None:
    status, out, err = attnswap("inspect", model)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) <= 24
    assert max(len(line) for line in out.splitlines() if not line.startswith("auto: ")) <= 120


def test_the_native_size_is_meant_where_none_is_given(attnswap: Cli) -> None:
    assert (
        attnswap("inspect", "emoji-video")[1]
        == (attnswap("inspect", "emoji-video", "--width", 96, "--height", 96, "--frames", 17, "--steps", 12)[1])
    )


def test_the_cost_and_the_choice_come_first(attnswap: Cli) -> None:
    out = attnswap("inspect", "emoji-flux", "--width", 256, "--height", 256)[1]
    lines = out.splitlines()
    assert lines[0] == "emoji-flux at 256x256 px, 12 steps:"
    assert "8 layers, over up to 1,040 tokens (32x32 and 16 of text)" in lines[1]
    assert lines[4].split() == ["dense", "8.65", "million", "100.0%", "100.0%", "1.00x"]
    [clear] = [line.split() for line in lines if line.strip().startswith("clear  ")]
    assert clear[:4] == ["clear", "454", "thousand", "5.2%"]
    auto = next(i for i, line in enumerate(lines) if line.startswith("auto: clear: 1,024 image tokens"))
    assert auto < next(i for i, line in enumerate(lines) if line.startswith("transformer: "))


def test_of_a_unet_the_largest_attention_is_named(attnswap: Cli, tmp_path: Path) -> None:
    """In SDXL it is not that of the whole latent."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    blocks = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 16),
        down_block_types=blocks,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
    )
    unet.save_config(tmp_path / "unet")
    DDIMScheduler(clip_sample=False, steps_offset=1).save_config(tmp_path / "scheduler")
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))
    cost = _json(attnswap("inspect", tmp_path, "--json"))["cost"]
    assert (cost["width"], cost["grid"], cost["tokens"]) == (128, [8, 8], 64)


def test_what_auto_would_put_together_has_a_row(attnswap: Cli) -> None:
    out = attnswap("inspect", "emoji-sd", "--width", 256, "--height", 256)[1]
    assert "  hidiffusion + linfusion  " in out
    assert "auto: hidiffusion + linfusion: 16 times the native area, hidiffusion acts above 1.5 times; " in out
    assert "  hidiffusion + linfusion  " not in attnswap("inspect", "emoji-sd")[1]


def test_layers_are_listed_where_they_are_asked_for(attnswap: Cli, tiny_sd: Path) -> None:
    layer = "+ down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert layer not in attnswap("inspect", tiny_sd)[1]
    assert layer in attnswap("inspect", tiny_sd, "--layers")[1]
    assert layer in attnswap("inspect", tiny_sd, "--method", "hidiffusion")[1]


def test_auto_lists_the_layers_of_what_it_would_choose(attnswap: Cli) -> None:
    out = attnswap("inspect", "emoji-flux", "--method", "auto", "--width", 256, "--height", 256)[1]
    assert "transformer: clear on FluxTransformer2DModel: 8 of 8 attention layers" in out
    assert "adaspa on" not in out
    out = attnswap("inspect", "emoji-flux", "--method", "auto")[1]
    assert "auto: dense attention: " in out
    assert "transformer: " not in out


@pytest.mark.parametrize("width", ["256", "64"])
def test_as_json(attnswap: Cli, width: str) -> None:
    found = _json(attnswap("inspect", "emoji-sd", "--width", width, "--height", width, "--json"))
    assert (found["model"], found["pipeline"]) == ("emoji-sd", "StableDiffusionPipeline")
    cost = found["cost"]
    assert (cost["width"], cost["frames"], cost["tokens"]) == (int(width), None, (int(width) // 4) ** 2)
    assert 0 < cost["attention_share"] < 1
    shares = {method["name"]: method["share"] for method in cost["methods"]}
    assert (shares["hidiffusion"] < 1) == (width == "256")
    assert found["auto"]["methods"].keys() == ({"hidiffusion", "linfusion"} if width == "256" else set())
    assert {entry["method"] for entry in found["layers"]} == {"hidiffusion", "linfusion"}
    assert {entry["method"] for entry in found["refusals"]} == {"adaspa", "clear"}


def test_the_settings_are_the_presets_for_the_size(attnswap: Cli) -> None:
    def steps_with_smaller_maps(side: int) -> float:
        found = _json(attnswap("inspect", "emoji-sd", "--width", side, "--height", side, "--json"))
        [hidiffusion] = [method for method in found["cost"]["methods"] if method["name"] == "hidiffusion"]
        return float(hidiffusion["share"])

    # From four times the native side on, the preset halves more maps, and for the whole run.
    assert steps_with_smaller_maps(256) < steps_with_smaller_maps(248)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("emoji-sd", "--width", 100), "width 100 is not a multiple of 8"),
        (("emoji-sd", "--width", -8), "width -8 is out of range"),
        (("emoji-sd", "--frames", 17), "--frames 17: emoji-sd is a StableDiffusionPipeline"),
        (("emoji-video", "--frames", 16), "frames 16 is not 2n + 1"),
        (("emoji-video", "--frames", 99999), "where the model's positions end"),
        (("emoji-flux", "--steps", 0), "steps 0 is out of range"),
        (("emoji-flux", "--device", "cuda:99"), "--device cuda:99"),
        (("emoji-flux", "--method", "auto,clear"), "method auto chooses by itself"),
    ],
)
def test_what_the_model_cannot_make_is_one_line(attnswap: Cli, flags: tuple[Any, ...], said: str) -> None:
    refused(attnswap("inspect", *flags), said)


def test_a_model_that_does_not_say_its_size_is_listed_without_the_cost(
    attnswap: Cli, tiny_flux: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(tiny_flux)
    (folder / "attnswap.json").unlink()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxImg2ImgPipeline"}))
    status, out, _ = attnswap("inspect", folder)
    assert status == 0
    assert "what attention costs cannot be told: " in out
    assert "transformer: clear on FluxTransformer2DModel: 2 of 2 attention layers" in out
    refused(attnswap("inspect", folder, "--width", 64, "--height", 64), "begins with a picture")
    assert _json(attnswap("inspect", folder, "--json"))["cost"] is None


def test_needs_neither_weights_nor_network(attnswap: Cli, tiny_wan: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_wan)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    status, out, _ = attnswap("inspect", folder, "--frames", 17)
    assert status == 0
    assert "32x32 px, 17 frames" in out
    assert "transformer_2: adaspa on WanTransformer3DModel" in out
