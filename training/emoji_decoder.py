"""Trains the decoder of `emoji-sd`'s autoencoder; the encoder is a closed form and stays as it is.

The decoder must draw at 1×, 2× and 4× the native side, because the model is there to be used above its native size: so
it sees whole native pictures and equally large crops of larger ones. Latents get a little noise, as sampled ones have.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from ..pipelines.emoji_reference import Reference
from . import emoji_models as models
from .emoji import render_reference

LATENT_NOISE = 0.05  # of the U-Net's latents, whose mean square is 1
NATIVE_SHARE = 0.5
PEAK_RATE = 2e-3


class Crops:
    """Random pictures `[N, 3, side, side]` in 0..1 at three scales, on the named colours."""

    def __init__(self, native: int, subjects: int | None, seed: int = 0):
        self.native, self.random = native, np.random.default_rng(seed)
        self.scales: list[Reference] = [render_reference(native * scale, subjects) for scale in (1, 2, 4)]
        self.colours = [None, *self.scales[0].colours]

    def draw(self, count: int) -> torch.Tensor:
        pictures = [self.one() for _ in range(count)]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def one(self) -> np.ndarray:
        level = 0 if self.random.random() < NATIVE_SHARE else int(self.random.integers(1, 3))
        reference = self.scales[level]
        subject = int(self.random.integers(len(reference.names)))
        colour = self.colours[self.random.integers(len(self.colours))]
        # Corners of a large picture are plain background, so crops come from around its middle.
        room = reference.side - self.native
        x, y = (int(room * self.random.beta(2, 2)) // models.PATCH * models.PATCH for _ in range(2))
        window = (slice(y, y + self.native), slice(x, x + self.native))
        rgba = reference.sprites[subject][window].astype(np.float32) / 255
        behind = np.array(reference.plain if colour is None else reference.colours[colour], np.float32) / 255
        return rgba[..., :3] * rgba[..., 3:] + behind * (1 - rgba[..., 3:])


def train_decoder(autoencoder, crops: Crops, minutes: float, path, batch: int = 8, device: str = "cpu", log=print):
    """Trains for `minutes` by mean squared error, learning rate decaying to the end; writes the weights to `path`."""
    autoencoder = autoencoder.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(autoencoder.decoder.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), fused=True)
    began, step, losses = time.monotonic(), 0, []
    while (progress := (time.monotonic() - began) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1, (step + 1) / 50) * max(0.01, 0.5 + 0.5 * math.cos(math.pi * progress))
        pictures = crops.draw(batch).to(device)
        with torch.no_grad():
            latents = autoencoder.encode(pictures * 2 - 1).latents
            latents = latents + torch.randn_like(latents) * (LATENT_NOISE / models.LATENT_SCALE)
        loss = nn.functional.mse_loss(autoencoder.decode(latents).sample, pictures * 2 - 1)
        loss.backward()
        nn.utils.clip_grad_norm_(autoencoder.decoder.parameters(), 0.5, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        losses.append(loss.item() / 4)
        if step % 100 == 0:
            log(
                f"step {step}, {step * batch} pictures, {-10 * math.log10(np.mean(losses)):.2f} dB "
                f"after {time.monotonic() - began:.0f} s"
            )
            losses.clear()
            save_file({name: value.contiguous() for name, value in autoencoder.state_dict().items()}, path)
    save_file({name: value.contiguous() for name, value in autoencoder.state_dict().items()}, path)
