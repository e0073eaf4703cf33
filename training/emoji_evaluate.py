"""Measures the folder of an exported emoji model; needs neither the font nor the `emoji` package.

The folder's own `reference/` says what the pictures should be, its `attnswap.json` how to sample.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch

from ..pipelines.emoji_reference import Reference, caption, judge, psnr, sample_captions


def load(folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """The stock pipeline of the folder, without a progress bar."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def settings(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "attnswap.json").read_text())


def generate(pipe, prompts: list[str], side: int, steps: int, guidance: float, seed: int = 0, **more) -> np.ndarray:
    """Pictures `[N, side, side, 3]` in 0..1; the starting noise is drawn on the CPU, so it is the same everywhere.

    `more` goes to the pipeline.
    """
    return pipe(
        prompts,
        height=side,
        width=side,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        **more,
    ).images


def reference_pictures(reference: Reference) -> np.ndarray:
    """Every subject on every background, `[N, side, side, 3]`."""
    return np.concatenate([reference.all_on(colour) for colour in (None, *reference.colours)])


@torch.no_grad()
def through_autoencoder(autoencoder, pictures: np.ndarray, batch: int = 35) -> np.ndarray:
    """Pictures `[N, H, W, 3]` in 0..1, encoded and decoded again, clipped to 0..1."""
    parts = []
    for part in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(batch):
        latents = autoencoder.encode((part * 2 - 1).to(autoencoder.device, autoencoder.dtype)).latents
        parts.append(autoencoder.decode(latents).sample.float().cpu() / 2 + 0.5)
    return torch.cat(parts).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def evaluate(
    folder: str | Path,
    count: int = 60,
    seed: int = 0,
    device: str = "cpu",
    steps: int | None = None,
    guidance: float | None = None,
) -> dict:
    """Autoencoder PSNR on the data, shares of `count` captions drawn right, seconds, size in MB."""
    folder, chosen = Path(folder), settings(folder)
    steps, guidance = steps or chosen["steps"], chosen["guidance"] if guidance is None else guidance
    pipe, reference = load(folder, device), Reference.load(folder / "reference")
    more = {key: chosen[key] for key in ("max_sequence_length",) if key in chosen}
    data = reference_pictures(reference)
    asked = sample_captions(reference, count, seed)
    began = time.monotonic()
    pictures = generate(
        pipe,
        [caption(reference.names[subject], colour) for subject, colour in asked],
        reference.side,
        steps,
        guidance,
        seed,
        **more,
    )
    seconds = time.monotonic() - began
    score = judge(pictures, asked, reference)
    return {
        "autoencoder_psnr": round(psnr(through_autoencoder(pipe.vae, data), data), 2),
        **vars(score),
        "steps": steps,
        "guidance": guidance,
        "seconds": round(seconds, 1),
        "megabytes": round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6, 2),
    }
