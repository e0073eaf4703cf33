"""The U-Nets of `tiny` with fewer layers still, where a test runs many steps."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler

from . import tiny


def slim(name: str, **more: Any) -> Any:
    """A pipeline, "sd15" or "sdxl", with one layer a block."""
    more = {"scheduler": DDIMScheduler(clip_sample=False, steps_offset=1), **more}
    if name == "sd15":
        return tiny.sd15(tiny.sd15_unet(layers_per_block=1), **more)
    return tiny.sdxl(tiny.sdxl_unet(layers_per_block=1, transformer_layers_per_block=1), **more)


def sample(pipe: Any, **more: Any) -> torch.Tensor:
    """Latents after three steps at twice the native side."""
    return tiny.run(pipe, **{"steps": 3, **more})
