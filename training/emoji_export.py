"""Writes the trained `emoji-sd` as the folder that ships: stock layout, fp16 safetensors, reference pictures."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from . import emoji_models as models

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


def export_pipeline(out: Path, model, data, work: Path, steps: int, guidance: float) -> None:
    """Write U-Net, text encoder, tokenizer, autoencoder and scheduler, `reference/` and `attnswap.json` to `out`."""
    autoencoder = data.autoencoder()
    autoencoder.load_state_dict(load_file(work / "decoder.safetensors"))
    pipe = models.build_pipeline(model.unet, model.text_encoder, data.tokenizer, autoencoder)
    pipe.to(dtype=torch.float16).save_pretrained(out, safe_serialization=True)
    # CLIP's own two files are read by every Transformers version and need no second copy of the vocabulary.
    shutil.rmtree(out / "tokenizer")
    shutil.copytree(work / "tokenizer", out / "tokenizer")
    # Transformers loads what was saved in half precision as half, beside a U-Net that Diffusers loads as float32.
    correct(out / "text_encoder" / "config.json", dtype="float32")
    # Diffusers writes this derived value, derives it again on loading, and warns about the one in the file.
    correct(out / "vae" / "config.json", block_out_channels=None)
    data.reference.save(out / "reference")
    about = {
        "native_side": data.reference.side,
        "steps": steps,
        "guidance": guidance,
        "description": f"{len(data.reference.names)} animals, plants and food as emoji, on "
        f"{len(data.reference.colours)} coloured backgrounds; for trying, testing and measuring",
        "licence": "Apache-2.0; drawings: Noto Color Emoji, SIL OFL 1.1",
        "examples": EXAMPLES,
        "reference": "reference",
        # So small a U-Net needs its resolution-aware parts longer than published, and at 4x both throughout.
        "methods": {"hidiffusion": {"t1": 1.0}},
        "methods_from": {"4": {"hidiffusion": {"t1": 1.0, "t2": 1.0}}},
    }
    (out / "attnswap.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
