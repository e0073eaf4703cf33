"""What pictures are made of."""

from __future__ import annotations

import pytest
from attnswap.accel import heat_map
from PIL import Image


def corners(monkeypatch: pytest.MonkeyPatch) -> list[tuple[heat_map.HeatMap, heat_map.Geometry]]:
    """The maps of the pictures drawn from here on, and where their cells are."""
    found: list[tuple[heat_map.HeatMap, heat_map.Geometry]] = []
    draw = heat_map.HeatMap.draw

    def watch(self: heat_map.HeatMap, image: Image.Image, left: int, top: int, **names: str) -> None:
        found.append((self, self.geometry(left, top)))
        draw(self, image, left, top, **names)

    monkeypatch.setattr(heat_map.HeatMap, "draw", watch)
    return found
