"""Each bundled model works offline from its name alone, with the preset it ships."""

from __future__ import annotations

from pathlib import Path

import pytest
from attnswap.pipelines import load, presets
from attnswap.pipelines.generate import generate
from attnswap.pipelines.job import Job
from PIL import Image


@pytest.mark.parametrize("name", load.bundled())
class TestEveryBundledModel:
    def test_works_at_twice_its_native_side(self, name: str, tmp_path: Path) -> None:
        preset = presets.read(load.find(name).folder)
        side = 2 * (preset.native_side or 0)
        method, suffix, frames = "clear", ".png", None
        if "unet" in load.find(name).denoisers:
            method = "hidiffusion"
        elif preset.frames:
            method, suffix, frames = "adaspa", ".gif", 5
        output = tmp_path / f"fox{suffix}"
        job = Job(prompt="a fox", output=output, model=name, width=side, height=side, frames=frames, steps=2)
        result = generate(Job(**{**vars(job), "methods": {method: {}}}))
        with Image.open(output) as image:
            assert image.size == (side, side)
        assert result.report is not None
        assert result.report.to_dict()["density"] < 1

    def test_ships_a_preset_and_a_card(self, name: str) -> None:
        preset = presets.read(load.find(name).folder)
        assert preset.native_side
        assert preset.steps
        assert preset.guidance
        assert (load.find(name).folder / "README.md").is_file()

    def test_is_small(self, name: str) -> None:
        folder = load.find(name).folder
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 20e6


def test_the_default_model_is_bundled() -> None:
    assert Job(prompt="", output=Path()).model in load.bundled()
