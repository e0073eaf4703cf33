"""Pipelines of the FLUX kind on the command line, with and without CLEAR."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnswap.accel.families.base import attention_layers
from attnswap.accel.methods.clear_weights import from_stock, save
from attnswap.pipelines import low_memory
from PIL import Image

from .test_cli import Cli, attnswap, refused

__all__ = ["attnswap"]  # a fixture

WeightsOf = Callable[..., Path]
CLEAR = ("--method", "clear", "--set", "radius=3")


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a denoising step is run."""
    from diffusers import FluxTransformer2DModel

    def forward(*_: object, **__: object) -> None:
        pytest.fail("a denoising step was run")

    monkeypatch.setattr(FluxTransformer2DModel, "forward", forward)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of the transformer, and the base of its rotary positions then."""
    from diffusers import FluxTransformer2DModel

    seen: list[dict[str, Any]] = []
    forward = FluxTransformer2DModel.forward

    def watched(self: Any, *arguments: Any, **named: Any) -> Any:
        seen.append({**named, "theta": self.pos_embed.theta})
        return forward(self, *arguments, **named)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", watched)
    return seen


@pytest.fixture
def with_guidance(tiny_flux: Path, copy_of: Callable[[Path], Path]) -> Path:
    """A model that was trained on its guidance scale, as FLUX.1-dev was."""
    from diffusers import FluxTransformer2DModel

    folder = copy_of(tiny_flux)
    config = FluxTransformer2DModel.load_config(folder / "transformer")
    FluxTransformer2DModel.from_config({**config, "guidance_embeds": True}).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def weights_of(tiny_flux: Path, tmp_path: Path) -> WeightsOf:
    """Writes CLEAR weights for the tiny model with another configuration."""
    from diffusers import FluxTransformer2DModel

    def write(*, radius: float = 3, **changes: Any) -> Path:
        config = FluxTransformer2DModel.load_config(tiny_flux / "transformer")
        transformer = FluxTransformer2DModel.from_config({**config, **changes})
        layers = {name: from_stock(attn) for name, attn in attention_layers(transformer).items()}
        file = tmp_path / "clear.safetensors"
        save(file, layers, radius=radius)
        return file

    return write


class TestGenerate:
    def test_makes_a_picture_and_makes_it_again_from_its_file(self, attnswap: Cli, tiny_flux: Path) -> None:
        size = ("--width", 48, "--height", 64, "--seed", 3, "--negative", "a dog")
        status, out, err = attnswap("generate", "a fox", "-m", tiny_flux, *size, *CLEAR, "-o", "fox.png")
        assert (status, err) == (0, "")
        assert Image.open("fox.png").size == (48, 64)
        assert "clear on FluxTransformer2DModel: 4 denoiser calls, 2 of 2 attention layers accelerated" in out
        assert attnswap("generate", "--from", "fox.png", "-o", "again.png")[0] == 0
        assert Path("again.png").read_bytes() == Path("fox.png").read_bytes()

    def test_weights_of_another_radius_are_a_warning_of_one_line(
        self, attnswap: Cli, tiny_flux: Path, weights_of: WeightsOf
    ) -> None:
        file = weights_of(radius=5)
        flags = (*CLEAR, "--set", f"weights={file}", "--steps", 1, "-o", "fox.png")
        status, _, err = attnswap("generate", "a fox", "-m", tiny_flux, *flags)
        assert (status, err) == (0, f"attnswap: {file} was trained for radius 5 and is used with 3\n")

    def test_differs_with_the_radius(self, attnswap: Cli, tiny_flux: Path) -> None:
        for radius in ("3", "none"):
            flags = ("--method", "clear", "--set", f"radius={radius}", "-o", f"{radius}.png")
            assert attnswap("generate", "a fox", "-m", tiny_flux, *flags)[0] == 0
        assert attnswap("generate", "a fox", "-m", tiny_flux, "-o", "dense.png")[0] == 0
        local, everywhere, dense = (np.asarray(Image.open(f"{name}.png")) for name in ("3", "none", "dense"))
        assert not np.array_equal(local, dense)
        assert np.array_equal(everywhere, dense)

    def test_cuts_the_text_as_the_preset_says(
        self, attnswap: Cli, tiny_flux: Path, calls: list[dict[str, Any]]
    ) -> None:
        attnswap("generate", "a fox", "-m", tiny_flux, "--steps", 1, "-o", "fox.png")
        assert {call["encoder_hidden_states"].shape[1] for call in calls} == {8}

    def test_presets_have_settings_for_large_pictures(
        self, attnswap: Cli, tiny_flux: Path, copy_of: Callable[[Path], Path]
    ) -> None:
        model = copy_of(tiny_flux)
        preset = json.loads((model / "attnswap.json").read_text())
        large = {"2": {"clear": {"radius": 4, "ntk_factor": 2.0}}}
        (model / "attnswap.json").write_text(
            json.dumps({**preset, "methods": {"clear": {"radius": 3}}, "methods_from": large})
        )
        flags = ("--method", "clear", "--steps", 1, "-o", "fox.png", "--report", "-")
        for side, expected in ((32, (3, 1.0)), (64, (4, 2.0))):
            _, out, _ = attnswap("generate", "a fox", "-m", model, "--width", side, "--height", side, *flags)
            config = json.loads(out)["report"]["config"]
            assert (config["radius"], config["ntk_factor"]) == expected


class TestGuidance:
    def test_is_a_second_call_where_the_model_embeds_none(
        self, attnswap: Cli, tiny_flux: Path, calls: list[dict[str, Any]]
    ) -> None:
        attnswap("generate", "a fox", "-m", tiny_flux, "--steps", 1, "-o", "fox.png")
        assert len(calls) == 2
        attnswap("generate", "a fox", "-m", tiny_flux, "--steps", 1, "--guidance", 1, "-o", "fox.png")
        assert len(calls) == 3

    def test_is_embedded_where_the_model_has_learned_it(
        self, attnswap: Cli, with_guidance: Path, calls: list[dict[str, Any]]
    ) -> None:
        command = ("generate", "a fox", "-m", with_guidance, "--steps", 1, "--guidance", 3, "-o", "fox.png")
        assert attnswap(*command)[0] == 0
        assert [float(call["guidance"]) for call in calls] == [3.0]
        assert attnswap(*command, "--true-cfg", 2, "--negative", "a dog")[0] == 0
        assert [float(call["guidance"]) for call in calls] == [3.0] * 3
        assert attnswap("generate", "--from", "fox.png", "-o", "again.png")[0] == 0
        assert Path("again.png").read_bytes() == Path("fox.png").read_bytes()

    @pytest.mark.usefixtures("no_steps")
    def test_a_negative_prompt_that_would_count_for_nothing_is_one_line(
        self, attnswap: Cli, tiny_flux: Path, with_guidance: Path, tiny_sd: Path
    ) -> None:
        negative = ("--negative", "a dog")
        result = attnswap("generate", "a fox", "-m", with_guidance, *negative)
        refused(result, "--true-cfg above 1, which is 1")
        refused(attnswap("generate", "a fox", "-m", tiny_flux, *negative, "--guidance", 1), "--guidance above 1")
        refused(attnswap("generate", "a fox", "-m", tiny_flux, "--true-cfg", 2), "one kind of guidance", "--guidance")
        refused(attnswap("generate", "a fox", "-m", tiny_sd, "--true-cfg", 2), "one kind of guidance", "--guidance")


@pytest.mark.usefixtures("no_steps")
class TestWrongUseIsSaidBeforeAnyStep:
    @pytest.mark.parametrize(("size", "nearest"), [(33, 32), (35, 36), (3, 4)])
    def test_size_of_no_whole_tokens(self, attnswap: Cli, tiny_flux: Path, size: int, nearest: int) -> None:
        result = attnswap("generate", "a fox", "-m", tiny_flux, "--height", size)
        refused(result, f"height {size} is not a multiple of 4, which this model needs", f"nearest: {nearest}")

    def test_methods_that_are_not_combined(self, attnswap: Cli, tiny_flux: Path) -> None:
        result = attnswap("generate", "a fox", "-m", tiny_flux, "--method", "clear,linfusion")
        refused(result, "clear and linfusion cannot be combined")

    def test_size_that_pooling_does_not_divide(self, attnswap: Cli, tiny_flux: Path) -> None:
        result = attnswap("generate", "a fox", "-m", tiny_flux, "--width", 40, *CLEAR, "--set", "down_factor=4")
        refused(result, "width 40 is not a multiple of 16, which clear with down_factor 4 needs", "nearest: 32")

    def test_method_of_another_kind_of_model(self, attnswap: Cli, tiny_flux: Path, tiny_sd: Path) -> None:
        refused(attnswap("generate", "a fox", "-m", tiny_flux, "--method", "linfusion"), "FluxTransformer2DModel")
        refused(attnswap("generate", "a fox", "-m", tiny_sd, "--method", "clear"), "UNet2DConditionModel")

    def test_route_of_another_kind_of_model(self, attnswap: Cli, tiny_flux: Path) -> None:
        flags = ("--width", 64, "--height", 64, "--route", "superres")
        refused(attnswap("generate", "a fox", "-m", tiny_flux, *flags), "FluxTransformer2DModel", "--route ladder")

    def test_weights_of_another_model(self, attnswap: Cli, tiny_flux: Path, weights_of: WeightsOf) -> None:
        file = weights_of(attention_head_dim=8, axes_dims_rope=(2, 2, 4))
        result = attnswap("generate", "a fox", "-m", tiny_flux, *CLEAR, "--set", f"weights={file}")
        refused(
            result,
            f"{file} does not fit FluxTransformer2DModel: ",
            "expected transformer_blocks.0.attn.to_q.weight [32, 32], found [16, 16]",
        )

    def test_setting_the_method_refuses(self, attnswap: Cli, tiny_flux: Path) -> None:
        refused(attnswap("generate", "a fox", "-m", tiny_flux, "--method", "clear", "--set", "radius=0"), "radius")


class TestLadder:
    FLAGS = ("--steps", 4, "--width", 64, "--height", 64, "--route", "ladder", "--strengths", "0.5", "--guidance", 1)
    LARGE = (*CLEAR, "--set", "ntk_factor=10", "--set", "proportional_attention=true")

    def test_goes_by_stages(self, attnswap: Cli, tiny_flux: Path, calls: list[dict[str, Any]]) -> None:
        status, out, _ = attnswap("generate", "a fox", "-m", tiny_flux, *self.FLAGS, *CLEAR, "-o", "fox.png")
        assert status == 0
        assert Image.open("fox.png").size == (64, 64)
        assert "ladder, stage 1/2: 32x32, 4 steps" in out
        assert "ladder, stage 2/2: 64x64, strength 0.5, 2 steps" in out
        assert [call["hidden_states"].shape[1] for call in calls] == [64] * 4 + [256] * 2

    def test_has_a_dense_base_and_says_so(self, attnswap: Cli, tiny_flux: Path, calls: list[dict[str, Any]]) -> None:
        command = ("generate", "a fox", "-m", tiny_flux, *self.FLAGS, *self.LARGE, "-o", "fox.png")
        status, out, err = attnswap(*command)
        assert status == 0
        assert [call["theta"] for call in calls] == [10000] * 4 + [100000] * 2
        said = "the base (stage 1/2) runs without clear: only larger pictures need it"
        assert f"attnswap: {said}." in err
        assert "clear on FluxTransformer2DModel: 2 denoiser calls" in out
        assert f"  {said}" in out
        first = Path("fox.png").read_bytes()
        assert attnswap("generate", "--from", "fox.png", "-o", "fox.png")[0] == 0
        assert Path("fox.png").read_bytes() == first

    def test_without_a_route_such_settings_act_as_given(
        self, attnswap: Cli, tiny_flux: Path, calls: list[dict[str, Any]]
    ) -> None:
        attnswap("generate", "a fox", "-m", tiny_flux, "--steps", 1, "--guidance", 1, *self.LARGE, "-o", "fox.png")
        assert [call["theta"] for call in calls] == [100000]

    def test_report_gives_the_settings_asked_for(self, attnswap: Cli, tiny_flux: Path) -> None:
        _, out, _ = attnswap(
            "generate", "a fox", "-m", tiny_flux, *self.FLAGS, *self.LARGE, "-o", "fox.png", "--report", "-"
        )
        report = json.loads(out)["report"]
        assert report["config"]["ntk_factor"] == 10
        assert [denoiser["calls"] for denoiser in report["denoisers"]] == [2]
        assert report["density"] < 1

    def test_every_stage_is_one_that_pooling_divides(self, attnswap: Cli, tiny_flux: Path) -> None:
        size = ("--width", 160, "--height", 96, "--steps", 2, "--strengths", "0.5,0.5", "--route", "ladder")
        flags = (*size, "--guidance", 1, *CLEAR, "--set", "down_factor=4")
        status, out, _ = attnswap("generate", "a fox", "-m", tiny_flux, *flags, "-o", "fox.png")
        assert status == 0
        sizes = [line.split(": ")[1].split(",")[0] for line in out.splitlines() if line.startswith("ladder")]
        assert len(sizes) == 3
        assert all(int(side) % 16 == 0 for size in sizes for side in size.split("x"))

    def test_with_less_memory_is_the_same_picture(
        self, attnswap: Cli, tiny_flux: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(low_memory, "FF_LEAST_TOKENS", 16)
        flags = ("generate", "a fox", "-m", tiny_flux, *self.FLAGS, *self.LARGE)
        assert attnswap(*flags, "-o", "one.png")[0] == 0
        status, _, err = attnswap(*flags, "--low-memory", "-o", "two.png")
        assert status == 0
        assert "low memory: " in err
        one, two = (np.asarray(Image.open(name)).astype(int) for name in ("one.png", "two.png"))
        assert abs(one - two).max() <= 1


class TestInspect:
    def test_lists_the_layers_of_a_transformer(self, attnswap: Cli, tiny_flux: Path) -> None:
        status, out, _ = attnswap("inspect", tiny_flux, "--method", "clear")
        assert status == 0
        assert "transformer: clear on FluxTransformer2DModel: 2 of 2 attention layers" in out
        assert "+ single_transformer_blocks.0.attn" in out

    def test_shows_what_the_models_preset_sets(
        self, attnswap: Cli, tiny_flux: Path, copy_of: Callable[[Path], Path]
    ) -> None:
        model = copy_of(tiny_flux)
        preset = json.loads((model / "attnswap.json").read_text())
        sets = {"methods": {"clear": {"radius": 3}}, "methods_from": {"2": {"clear": {"radius": 4}}}}
        (model / "attnswap.json").write_text(json.dumps({**preset, **sets}))
        assert "local attention of radius 3" in attnswap("inspect", model, "--method", "clear")[1]
        assert "local attention of radius 16" in attnswap("inspect", tiny_flux, "--method", "clear")[1]

    def test_says_which_methods_do_not_apply(self, attnswap: Cli, tiny_flux: Path, tiny_sd: Path) -> None:
        _, out, _ = attnswap("inspect", tiny_flux)
        assert "transformer: hidiffusion: does not apply" in out
        assert "unet: clear: does not apply" in attnswap("inspect", tiny_sd)[1]
