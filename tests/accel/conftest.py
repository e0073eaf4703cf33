"""Shared by the engine's tests: one thread, for models this small a second one only gets in the way."""

from __future__ import annotations

import os

# Inductor keeps compiled code on disk and would run yesterday's kernel.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
