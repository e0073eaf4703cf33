"""The distilled weights that ship with `emoji-flux`: nearer to dense attention than the same attention untrained."""

from __future__ import annotations

import attnswap
import pytest
import torch
from attnswap.pipelines import load, presets
from attnswap.training.distill_evaluate import evaluate

NAME = "emoji-flux"
FOLDER = load.BUNDLED / NAME


@pytest.fixture(scope="module")
def figures() -> dict:
    return evaluate(NAME, [NAME, None], method="clear", count=4, batch=4, device="cpu")


def test_pictures_are_nearly_those_of_dense_attention(figures: dict) -> None:
    dense, local = figures["dense"], figures[NAME]
    assert dense["count"] == 4
    assert local["nearest"] >= dense["nearest"] - 0.25
    assert local["colour"] >= dense["colour"] - 0.25


def test_distilling_is_what_made_them_so(figures: dict) -> None:
    assert figures[NAME]["psnr"] > figures["none"]["psnr"] + 3
    assert figures[NAME]["ssim"] > figures["none"]["ssim"]


def test_the_preset_names_them() -> None:
    settings = presets.read(FOLDER).settings_of("clear")
    assert settings["weights"] == NAME
    inspection = attnswap.inspect(load.load(load.find(NAME), dtype=torch.float32), attnswap.Clear(**settings))
    assert inspection.remarks == (f"weights: {NAME}",)


def test_the_folder_holds_what_was_published_and_is_small() -> None:
    (file,) = (FOLDER / "clear").iterdir()
    assert file.match("clear_local_*.safetensors")
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 20e6
