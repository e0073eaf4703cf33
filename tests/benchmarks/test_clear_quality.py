"""What the measurement of CLEAR draws, counts and writes down."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnswap.benchmarks import clear_quality
from attnswap.kernels.local_attention import ideal_pairs
from attnswap.pipelines.emoji_reference import Reference

TEXT = 8
LOCAL = {"radius": 2.0}


@pytest.fixture
def emoji(tiny_flux: Path, copy_of: Any) -> Path:
    """The tiny random model with the reference of an emoji model of its size."""
    folder = copy_of(tiny_flux)
    sprites = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 4), np.uint8)
    Reference(("fox", "owl"), sprites, {"blue": (0, 0, 255)}).save(folder / "reference")
    return folder


@pytest.fixture
def result(emoji: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of the command, with its page: one prompt at the native size and one at twice."""
    page = emoji / "page.md"
    page.write_text("a\n<!-- clear: begin -->x<!-- clear: end -->\nb\n")
    variants = [clear_quality.Variant(clear_quality.DENSE), clear_quality.Variant("ladder, clear", LOCAL, "ladder")]
    monkeypatch.setattr(clear_quality, "large_variants", lambda local, ntk_factor: variants)
    line = "clear_quality --local radius=2 weights=none --pooled radius=1 down_factor=2 --factors 1 2 --prompts 2 1"
    outputs = ["--json", f"{emoji}/q.json", "--pictures", f"{emoji}/images", "--page", f"{page}"]
    monkeypatch.setattr(sys, "argv", [*line.split(), "--model", str(emoji), *outputs])
    clear_quality.main()
    return {**json.loads((emoji / "q.json").read_text()), "page": page.read_text()}


def test_the_native_size_is_compared_with_dense_attention_and_large_pictures_are_judged(
    result: dict[str, Any], emoji: Path
) -> None:
    native, double = result["sizes"]["32"], result["sizes"]["64"]
    assert list(native) == ["dense", "clear, no weights", "clear, distilled", "pooled, no weights"]
    local, pooled = native["clear, no weights"], native["pooled, no weights"]
    tokens = (64 + TEXT) ** 2
    assert local["density"] == ideal_pairs((8, 8), 2, dense=TEXT) / tokens
    assert pooled["density"] == ideal_pairs((8, 8), 1, dense=TEXT, pooled=16) / tokens
    assert "psnr" not in native["dense"]
    assert local["psnr"] == native["clear, distilled"]["psnr"] != pooled["psnr"]  # the same settings here
    assert 0 < local["ssim"] < 1
    assert native["dense"]["of_dense"] == 1
    assert double["ladder, clear"]["density"] < 1
    assert "psnr" not in double["ladder, clear"]
    assert {path.name for path in (emoji / "images").iterdir()} == {"q-32.png", "q-64.png"}


def test_what_has_no_weights_is_left_out_with_the_reason(result: dict[str, Any]) -> None:
    assert list(result["left_out"]) == ["32"]
    assert "expected clear_local_1_down_2.safetensors" in result["left_out"]["32"]["pooled, distilled"]
    assert "- pooled, distilled: left out, " in result["page"]


def test_the_page_has_a_table_for_each_size_between_its_marks(result: dict[str, Any]) -> None:
    page = result["page"]
    assert page.startswith("a\n<!-- clear: begin -->\n")
    assert page.endswith("<!-- clear: end -->\nb\n")
    assert "### 32 px, the native size, prompts: 2" in page
    assert "### 64 px, 2x the native side, prompts: 1" in page
    assert "*clear* is `radius=2.0`, *pooled* is `radius=1.0, down_factor=2" in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {9, 7}


def test_settings_for_large_pictures_are_tried_one_by_one_and_not_on_the_native_size() -> None:
    local = {"radius": 4, "ntk_factor": 2.0}
    tried = {v.name: v.settings for v in clear_quality.large_variants(local, 10.0) if v.settings}
    assert tried["clear"]["ntk_factor"] == 1.0
    changed = [{name for name, value in values.items() if value != tried["clear"][name]} for values in tried.values()]
    assert changed == [
        set(),
        {"ntk_factor"},
        {"ntk_factor", "ntk_decay"},
        {"proportional_attention"},
        {"ntk_factor", "proportional_attention"},
        set(),
    ]
