"""LinFusion on the command line: weights as a setting, and one line where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from .accel import tiny
from .accel.methods import linfusion_cases as cases
from .test_cli import Cli, attnswap, no_steps, refused

__all__ = ["attnswap", "no_steps"]  # fixtures

SMALL = ("--steps", 2, "--width", 64, "--height", 64, "-o", "fox.png", "--method", "linfusion")


@pytest.fixture
def weights(tiny_sd: Path, tmp_path: Path) -> Path:
    cases.write(tmp_path / "weights", UNet2DConditionModel.from_pretrained(tiny_sd / "unet"), 4)
    return tmp_path / "weights"


def test_makes_a_picture_with_the_weights_given(attnswap: Cli, tiny_sd: Path, weights: Path) -> None:
    settings = ("--set", f"weights={weights}", "--set", "eps=1e-3")
    status, out, err = attnswap("generate", "a fox", "-m", tiny_sd, *SMALL, *settings, "--report", "r.json")
    assert (status, err) == (0, "")
    assert "linfusion" in out
    assert "16 of 32 attention layers" in out
    report = json.loads(Path("r.json").read_text())
    assert str(weights) in json.dumps(report)
    again = attnswap("generate", "--from", "fox.png", "-o", "again.png")
    assert again[0] == 0
    assert Path("again.png").read_bytes()[-4000:] == Path("fox.png").read_bytes()[-4000:]


def test_no_weights_are_a_setting_too(attnswap: Cli, tiny_sd: Path) -> None:
    status, out, _ = attnswap("generate", "a fox", "-m", tiny_sd, *SMALL, "--set", "weights=none")
    assert status == 0
    assert "16 of 32 attention layers" in out


@pytest.mark.usefixtures("no_steps")
@pytest.mark.parametrize("given", ["weights=no-such-weights", "weights=some/where", "weights=auto"])
def test_weights_that_are_not_here_are_one_line(attnswap: Cli, tiny_sd: Path, given: str) -> None:
    refused(attnswap("generate", "a fox", "-m", tiny_sd, *SMALL, "--set", given), "LinFusion weights")
    assert not Path("fox.png").exists()


@pytest.mark.usefixtures("no_steps")
def test_weights_of_another_base_are_one_line(attnswap: Cli, tiny_sd: Path, tmp_path: Path) -> None:
    cases.write(tmp_path / "other", tiny.sdxl_unet())
    result = attnswap("generate", "a fox", "-m", tiny_sd, *SMALL, "--set", f"weights={tmp_path / 'other'}")
    refused(result, str(tmp_path / "other"), "28 layers", "16 layers")


def test_inspect_needs_neither_weights_nor_network(attnswap: Cli, tiny_sd: Path) -> None:
    status, out, _ = attnswap("inspect", tiny_sd, "--method", "linfusion")
    assert status == 0
    assert "linfusion on UNet2DConditionModel: 16 of 32 attention layers" in out
    assert "weights: none known for these layers" in out
