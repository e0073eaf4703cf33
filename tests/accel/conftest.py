"""Shared by the engine's tests."""

from __future__ import annotations

import os
from typing import Any

import pytest

# Inductor keeps compiled code on disk and would run yesterday's kernel.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"


@pytest.fixture(params=["sd15", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    """A slim pipeline of each structure."""
    from .slim import slim

    return slim(request.param)
