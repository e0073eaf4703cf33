"""Writes a trained `emoji-video` as the folder that ships: stock layout, fp16 safetensors, sprites, preset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..pipelines.emoji_reference import Reference
from .emoji_export import correct
from .emoji_flux_models import TEXT_LENGTH
from .emoji_video_clips import FRAMES

FRAMES_PER_SECOND = 8
EXAMPLES = (
    "a fox moving left on a green background",
    "a penguin growing on a blue background",
    "a giraffe moving up on a purple background",
)


def export_pipeline(out: Path, pipe, reference: Reference, steps: int, guidance: float) -> None:
    """Write a pipeline's parts in half precision, `reference/` and `attnswap.json` to `out`.

    Args:
        steps, guidance: recorded as the defaults.
    """
    pipe.to(dtype=torch.float16).save_pretrained(out, safe_serialization=True)
    # Transformers loads what was saved in half precision as half, beside a denoiser that Diffusers loads as float32.
    correct(out / "text_encoder" / "config.json", dtype="float32")
    reference.save(out / "reference")
    (out / "attnswap.json").write_text(json.dumps(preset(reference, steps, guidance), indent=2) + "\n")


def preset(reference: Reference, steps: int, guidance: float) -> dict[str, Any]:
    """What `attnswap.json` says."""
    return {
        "native_side": reference.side,
        "frames": FRAMES,
        "fps": FRAMES_PER_SECOND,
        "steps": steps,
        "guidance": guidance,
        "max_sequence_length": TEXT_LENGTH,
        "methods": {"adaspa": {"min_tokens": 512}},  # a clip has 1296, less than the method's default
        "description": f"clips of {len(reference.names)} animals, plants and food as emoji that move or grow on "
        f"{len(reference.colours)} coloured backgrounds; for trying, testing and measuring",
        "licence": "Apache-2.0; drawings: Noto Color Emoji, SIL OFL 1.1",
        "examples": list(EXAMPLES),
        "reference": "reference",
    }
