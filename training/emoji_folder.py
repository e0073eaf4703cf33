"""Writes the pictures of a bundled emoji model as a folder of training data: subjects on every background, captions.

python -m attnswap.training.emoji_folder FOLDER [--model emoji-sd]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from ..pipelines import load
from ..pipelines.emoji_reference import Reference, caption
from .distill_data import METADATA


def write_folder(reference: Reference, folder: Path) -> int:
    """Every subject on every background as PNG, with a metadata.jsonl; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for subject in reference.names:
        for colour in (None, *reference.colours):
            name = f"{len(lines):04d}.png"
            pixels = (reference.compose(subject, colour) * 255).round().astype(np.uint8)
            Image.fromarray(pixels).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": caption(subject, colour)}) + "\n")
    (folder / METADATA).write_text("".join(lines), encoding="utf-8")
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="emoji-sd", choices=[*load.bundled()])
    options = parser.parse_args()
    reference = Reference.load(load.bundled()[options.model] / "reference")
    print(f"{options.folder}: {write_folder(reference, options.folder)} pictures")


if __name__ == "__main__":
    main()
