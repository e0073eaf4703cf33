"""Writes a trained emoji model as the folder that ships: stock layout, fp16 safetensors, reference pictures."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..pipelines.emoji_reference import Reference

EXAMPLES = ("a fox on a blue background", "a banana on a purple background", "an owl on an orange background")


def contact_sheet(pictures: np.ndarray, columns: int = 12) -> Image.Image:
    """Pictures `[N, H, W, 3]` in 0..1 side by side, row by row."""
    count, height, width = pictures.shape[:3]
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    sheet = np.ones((rows * height, columns * width, 3), np.float32)
    for index, picture in enumerate(pictures):
        y, x = divmod(index, columns)
        sheet[y * height : (y + 1) * height, x * width : (x + 1) * width] = picture
    return Image.fromarray((sheet.clip(0, 1) * 255).round().astype(np.uint8))


def correct(config: Path, **changes) -> None:
    """Set keys of a configuration file; `None` removes one."""
    settings = {**json.loads(config.read_text()), **changes}
    kept = {key: value for key, value in settings.items() if value is not None}
    config.write_text(json.dumps(kept, indent=2) + "\n")


def export_pipeline(
    out: Path, pipe, reference: Reference, clip_files: Path, steps: int, guidance: float, **more
) -> None:
    """Write a pipeline's parts in half precision, `reference/` and `attnswap.json` to `out`.

    Args:
        clip_files: the folder `build_tokenizer` wrote. CLIP's own two files are read by every Transformers version and
            need no second copy of the vocabulary.
        steps, guidance: recorded as the defaults.
        more: further keys of `attnswap.json`.
    """
    pipe.to(dtype=torch.float16).save_pretrained(out, safe_serialization=True)
    shutil.rmtree(out / "tokenizer")
    shutil.copytree(clip_files, out / "tokenizer")
    # Transformers loads what was saved in half precision as half, beside a denoiser that Diffusers loads as float32.
    for config in out.glob("text_encoder*/config.json"):
        correct(config, dtype="float32")
    # Diffusers writes this derived value, derives it again on loading, and warns about the one in the file; and it
    # writes where an autoencoder was loaded from.
    correct(out / "vae" / "config.json", block_out_channels=None, _name_or_path=None)
    reference.save(out / "reference")
    about = {
        "native_side": reference.side,
        "steps": steps,
        "guidance": guidance,
        "description": f"{len(reference.names)} animals, plants and food as emoji, on "
        f"{len(reference.colours)} coloured backgrounds; for trying, testing and measuring",
        "licence": "Apache-2.0; drawings: Noto Color Emoji, SIL OFL 1.1",
        "examples": EXAMPLES,
        "reference": "reference",
        **more,
    }
    (out / "attnswap.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
