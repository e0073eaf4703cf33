"""Calls of bare U-Nets and questions to reports, shared by the tests of HiDiffusion."""

from __future__ import annotations

from typing import Any

import attnswap
import torch
from diffusers import UNet2DConditionModel

from .. import tiny

#: Acts at every size, so that tests can be small.
ALWAYS = attnswap.HiDiffusion(active_above=0)


def inputs(unet: UNet2DConditionModel, size: tuple[int, int], batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """What a U-Net is called with, all but the timestep."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {
        "sample": torch.randn(batch, unet.config.in_channels, *size, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, tiny.TEXT, generator=generator),
    }
    if unet.config.addition_embed_type:
        pooled = torch.randn(batch, tiny.TEXT, generator=generator)
        found["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.ones(batch, 6)}
    return found


def call(unet: UNet2DConditionModel, size: tuple[int, int], timestep: Any = 500, **more: Any) -> torch.Tensor:
    """The U-Net's prediction, without gradients."""
    with torch.no_grad():
        out: torch.Tensor = unet(timestep=timestep, **{**inputs(unet, size), **more}).sample
    return out


def runs(handle: attnswap.Handle) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = handle.report().to_dict()["denoisers"][0]["runs"]
    return found


def last_run(handle: attnswap.Handle) -> tuple[int | None, int, int]:
    """(N, steps with the deep convolution, steps with the pooled maps) of the last run in the report."""
    run = runs(handle)[-1]
    return run["steps"], run["conv_steps"], run["pool_steps"]


def notes(handle: attnswap.Handle) -> dict[str, int]:
    return {note["text"]: note["count"] for note in handle.report().to_dict()["denoisers"][0]["notes"]}


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())
