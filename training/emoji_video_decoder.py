"""Trains the decoder of `emoji-video`'s autoencoder; the encoder is a closed form and stays as it is.

It sees the subject's surroundings in nine frames of random clips, with a little noise on the latents, as sampled ones
have.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from ..pipelines.emoji_reference import Reference
from . import emoji_video_models as models
from .emoji_video_clips import FRAMES, MOTIONS, over, sprite_clip

SEEN = 9  # frames a clip
WINDOW = 2 / 3  # of the side
LATENT_NOISE = 0.1  # of the transformer's latents, whose mean square is 1
PEAK_RATE = 2e-3


class Clips:
    """Random clips `[N, 3, 9, 64, 64]` in -1..1 (at 96 px)."""

    def __init__(self, reference: Reference, seed: int = 0):
        self.random = np.random.default_rng(seed)
        self.colours = list(reference.colours.values())
        self.sprites = [
            (sprite_clip(sprite, motion, reference.side) * 255).round().astype(np.uint8)
            for sprite in reference.sprites
            for motion in MOTIONS
        ]

    def draw(self, count: int) -> torch.Tensor:
        return (
            torch.from_numpy(np.stack([self.one() for _ in range(count)])).permute(0, 4, 1, 2, 3).contiguous() * 2 - 1
        )

    def one(self) -> np.ndarray:
        start = int(self.random.integers((FRAMES - SEEN) // models.PAIR + 1)) * models.PAIR
        rgba = self.sprites[self.random.integers(len(self.sprites))].astype(np.float32) / 255
        side = round(WINDOW * rgba.shape[1])
        x, y = (int(self.random.integers(rgba.shape[1] - side + 1)) for _ in range(2))
        window = rgba[start : start + SEEN, y : y + side, x : x + side]
        return over(window, self.colours[self.random.integers(len(self.colours))])


def train_decoder(autoencoder, reference: Reference, minutes: float, path: Path, batch: int = 4, log=print) -> None:
    """Trains for `minutes` by mean squared error, learning rate decaying to the end; writes the weights to `path`."""
    clips = Clips(reference)
    trained = [p for p in autoencoder.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=PEAK_RATE, betas=(0.9, 0.99), fused=True)
    began, step, losses = time.monotonic(), 0, []
    while (progress := (time.monotonic() - began) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1, (step + 1) / 50) * max(0.01, 0.5 + 0.5 * math.cos(math.pi * progress))
        wanted = clips.draw(batch)
        with torch.no_grad():
            latents = models.encode(autoencoder, wanted)
            latents = latents + torch.randn_like(latents) * LATENT_NOISE
        with torch.autocast("cpu", torch.bfloat16):
            drawn = autoencoder.decode(latents).sample
        loss = nn.functional.mse_loss(drawn.float(), wanted)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.5, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        losses.append(loss.item() / 4)
        if step % 50 == 0:
            seconds = time.monotonic() - began
            log(f"step {step}, {-10 * math.log10(np.mean(losses)):.2f} dB after {seconds:.0f} s", flush=True)
            losses.clear()
            save_file({name: value.contiguous() for name, value in autoencoder.state_dict().items()}, path)
    save_file({name: value.contiguous() for name, value in autoencoder.state_dict().items()}, path)
