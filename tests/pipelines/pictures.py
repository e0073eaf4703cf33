"""What a pipeline makes, for comparing."""

from __future__ import annotations

from typing import Any

import torch


def picture(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    made: torch.Tensor = pipe("a fox", num_inference_steps=2, generator=generator, output_type="pt").images
    return made
