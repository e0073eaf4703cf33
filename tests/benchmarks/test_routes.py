"""What the measurement of routes counts and writes down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnswap.benchmarks import routes
from attnswap.benchmarks.high_resolution import write_page
from attnswap.pipelines.emoji_reference import Reference, sample_captions
from attnswap.pipelines.load import find


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`ladder` draws what is asked in half the time of `direct`, which draws nothing."""
    reference = Reference.load(find("emoji-sd").folder / "reference")
    asked = iter([pair for pair in sample_captions(reference, 3, seed=1) for _ in range(2)])

    def draw(_model: str, variant: str, _prompt: str, side: int, seed: int, *, apart: bool) -> dict[str, Any]:
        picture = reference.compose(*next(asked)).repeat(side // reference.side, 0).repeat(side // reference.side, 1)
        ladder = variant == "ladder"
        return {
            "picture": picture if ladder else np.ones_like(picture),
            "seconds": (1 + seed) * (1.0 if ladder else 2.0),
            "strengths": [0.4] if ladder else None,
            "peak_bytes": 2**30 if apart else None,
        }

    monkeypatch.setattr(routes, "_draw", draw)
    return routes.measure("emoji-sd", [2], 3, ["direct", "ladder"])


def test_accuracy_time_and_memory_of_every_variant(result: dict[str, Any]) -> None:
    direct, ladder = result["sizes"][128].values()
    assert (ladder["nearest"], direct["nearest"]) == (1, 0)
    assert (ladder["seconds"], ladder["share_of_first"]) == (2, 0.5)
    assert direct["peak_bytes"] == 2**30


def test_are_put_between_the_marks_of_the_page(result: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- measured: begin -->x<!-- measured: end -->\n<!-- routes: begin -->y<!-- routes: end -->\nb\n"
    )
    write_page(page, routes.page_section(result, "images/routes"), "routes")
    text = page.read_text()
    assert "| ladder | 0.4 | 100% |" in text
    assert "128 px, 4x the native area" in text
    assert "-->x<!--" in text
    assert "y<" not in text
    assert text.endswith("<!-- routes: end -->\nb\n")
