"""Measures the folder of an exported `emoji-video`; needs neither the font nor the `emoji` package.

The folder's own `reference/` says what the clips should be, its `attnswap.json` how to sample.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from ..pipelines.emoji_reference import Reference, psnr
from .emoji_evaluate import load, settings
from .emoji_video_clips import all_asks, clip_caption, compose, sample_asks
from .emoji_video_judge import judge


def generate(pipe, prompts: list[str], chosen: dict, seed: int = 0, batch: int = 12, **more) -> np.ndarray:
    """Clips `[N, frames, side, side, 3]` in 0..1, as `chosen` (an `attnswap.json`) says.

    The starting noise of each prompt is drawn on the CPU from a seed of its own, so it is the same in every batch.
    `more` goes to the pipeline, before what is chosen.
    """
    options = {
        "height": chosen["native_side"],
        "width": chosen["native_side"],
        "num_frames": chosen["frames"],
        "num_inference_steps": chosen["steps"],
        "guidance_scale": chosen["guidance"],
        "max_sequence_length": chosen["max_sequence_length"],
        **more,
    }
    parts = []
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        generators = [torch.Generator().manual_seed(seed + first + index) for index in range(len(part))]
        parts.append(pipe(part, generator=generators, output_type="np", **options).frames)
    return np.concatenate(parts)


@torch.no_grad()
def through_autoencoder(autoencoder, clip: np.ndarray) -> np.ndarray:
    """A clip `[F, H, W, 3]` in 0..1, encoded and decoded again, clipped to 0..1."""
    frames = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].to(autoencoder.device, autoencoder.dtype) * 2 - 1
    decoded = autoencoder.decode(autoencoder.encode(frames).latent_dist.mode()).sample
    return decoded[0].permute(1, 2, 3, 0).float().cpu().numpy() / 2 + 0.5


def evaluate(folder: str | Path, count: int = 60, seed: int = 0, device: str = "cpu", **changed) -> dict:
    """Autoencoder PSNR on every 29th clip of the data, shares of `count` prompts shown right, seconds, size in MB.

    `changed` replaces settings of the folder's `attnswap.json`.
    """
    folder = Path(folder)
    chosen = {**settings(folder), **changed}
    pipe, reference = load(folder, device), Reference.load(folder / "reference")
    data = [compose(reference, ask) for ask in all_asks(reference)[::29]]
    again = [through_autoencoder(pipe.vae, clip) for clip in data]
    asks = sample_asks(reference, count, seed)
    prompts = [clip_caption(reference.names[subject], motion, colour) for subject, motion, colour in asks]
    began = time.monotonic()
    clips = generate(pipe, prompts, chosen, seed)
    seconds = time.monotonic() - began
    return {
        "autoencoder_psnr": round(psnr(np.stack(again), np.stack(data)), 2),
        **vars(judge(clips, asks, reference)),
        "steps": chosen["steps"],
        "guidance": chosen["guidance"],
        "seconds": round(seconds, 1),
        "megabytes": round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6, 2),
    }
