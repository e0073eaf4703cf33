"""Modular pipelines: blocks and guiders call the denoiser, once for each guidance branch and step."""

from __future__ import annotations

import attnswap
import torch
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLCoreDenoiseStep,
)

from . import tiny


def test_modular_blocks_run_with_the_steps_told_right_though_each_calls_twice() -> None:
    parts = tiny.sdxl()
    pipe = StableDiffusionXLCoreDenoiseStep().init_pipeline()
    pipe.update_components(unet=parts.unet, scheduler=parts.scheduler, vae=parts.vae)
    text = {
        "prompt_embeds": torch.ones(1, 7, tiny.TEXT),
        "negative_prompt_embeds": torch.zeros(1, 7, tiny.TEXT),
        "pooled_prompt_embeds": torch.ones(1, tiny.TEXT),
        "negative_pooled_prompt_embeds": torch.zeros(1, tiny.TEXT),
    }

    def run(steps: int) -> torch.Tensor:
        latents: torch.Tensor = pipe(
            **text,
            height=128,
            width=128,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            batch_size=1,
            dtype=torch.float32,
            output="latents",
        )
        return latents

    stock = run(5)
    handle = attnswap.enable(pipe, "hidiffusion")
    run(10)
    assert not torch.equal(run(5), stock)
    [denoiser] = handle.report().to_dict()["denoisers"]
    assert denoiser["calls"] == 2 * (10 + 5)
    assert [(r["steps"], r["conv_steps"], r["pool_steps"]) for r in denoiser["runs"]] == [(10, 1, 3), (5, 0, 2)]
    handle.disable()
    assert torch.equal(run(5), stock)
