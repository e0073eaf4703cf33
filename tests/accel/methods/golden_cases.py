"""Runs whose latents were recorded from the published HiDiffusion code: shared by the recorder and the test.

Weights and inputs come from numpy's integer-seeded uniform numbers, whose bits do not depend on the machine, and not
from torch's generators, whose last bits do.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from attnswap.tests.accel import tiny
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionXLControlNetPipeline
from torch import nn

SD15 = "runwayml/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
TURBO = "stabilityai/sdxl-turbo"
INPAINTING = "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"

# Every which value of the latents is kept: a wrong shift, size or step moves all of them, most by more than 0.1.
STRIDE = 7


@dataclass(frozen=True)
class Case:
    """One run of ten or so steps in double precision.

    Attributes:
        name: key in the recording.
        model: "sd15", "sdxl" or "sdxl-controlnet".
        known_as: the name by which the published code chooses its schedule.
        size: (h, w) of the latent.
        steps: N.
        shift: 0..3, or None for a rule that differs by step and layer.
        raunet, windows: which of the two parts is on.
        ours: fields of `HiDiffusion` that say what `known_as` says to the published code.
    """

    name: str
    model: str
    known_as: str
    size: tuple[int, int]
    steps: int = 10
    shift: int | None = None
    raunet: bool = True
    windows: bool = True
    ours: dict[str, Any] = field(default_factory=dict)

    def shift_of(self, step: int, layer: str) -> int:
        return (zlib.crc32(layer.encode()) + 3 * step) % 4 if self.shift is None else self.shift

    def checksum(self, pipe: Any) -> str:
        """Of the case, the weights and the inputs: a recording of something else is no reference."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for module in (pipe.unet, getattr(pipe, "controlnet", None)):
            for _, value in sorted(module.state_dict().items()) if module is not None else ():
                digest.update(value.double().numpy().tobytes())
        for _, value in sorted(arguments(self).items()):
            digest.update(value.double().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
        return digest.hexdigest()[:16]


CASES = (
    Case("sd15", "sd15", SD15, (16, 16)),
    Case("sd15 odd", "sd15", SD15, (17, 15)),
    Case("sd15 thin, no vertical roll", "sd15", SD15, (6, 32), steps=5),
    Case("sd15 thin, no horizontal roll", "sd15", SD15, (32, 6), steps=5),
    Case("sd15 resolution only", "sd15", SD15, (15, 20), windows=False),
    Case("sd15 windows only", "sd15", SD15, (16, 24), raunet=False),
    *(Case(f"sd15 shift {s}", "sd15", SD15, (16, 20), steps=3, shift=s) for s in range(4)),
    Case("sdxl", "sdxl", SDXL, (32, 32), steps=13),
    Case("sdxl odd", "sdxl", SDXL, (25, 38), steps=13),
    Case("sdxl thin", "sdxl", SDXL, (20, 48), steps=13),
    Case("sdxl resolution only", "sdxl", SDXL, (18, 27), steps=13, windows=False),
    Case("sdxl windows only", "sdxl", SDXL, (18, 32), steps=5, raunet=False),
    Case("sdxl inpainting", "sdxl", INPAINTING, (16, 24), ours={"aggressive": False}),
    Case("sdxl turbo", "sdxl", TURBO, (16, 24), steps=4),
    Case("sdxl controlnet", "sdxl-controlnet", SDXL, (8, 32), steps=7),
)


def build(case: Case) -> Any:
    """A tiny pipeline in double precision, known by the case's name."""
    # Sampling that clips would hide differences.
    scheduler = DDIMScheduler(clip_sample=False)
    if case.model == "sd15":
        pipe = tiny.sd15(scheduler=scheduler)
    elif case.model == "sdxl":
        pipe = tiny.sdxl(scheduler=scheduler)
    else:
        unet = tiny.sdxl_unet()
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 4))
        pipe = tiny.sdxl(unet, scheduler, cls=StableDiffusionXLControlNetPipeline, controlnet=fill(controlnet, 1))
    fill(pipe.unet, 0)
    pipe.register_to_config(_name_or_path=case.known_as)
    return pipe.to(torch.float64)


def fill(model: nn.Module, seed: int) -> nn.Module:
    """Give a model weights that are the same on every machine."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.from_numpy(rng.uniform(-1, 1, parameter.shape))
            if parameter.ndim > 1:
                values *= (3 / parameter[0].numel()) ** 0.5
            else:
                values = values / 10 + (1 if name.endswith("weight") else 0)
            parameter.copy_(values)
    return model.eval()


def arguments(case: Case) -> dict[str, Any]:
    """What the pipeline is called with."""
    rng = np.random.default_rng(2)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(-1.7, 1.7, shape))

    height, width = case.size
    found: dict[str, Any] = {
        "prompt_embeds": uniform(1, 7, tiny.TEXT),
        "negative_prompt_embeds": uniform(1, 7, tiny.TEXT),
        "latents": uniform(1, 4, height, width),
        "num_inference_steps": case.steps,
        "guidance_scale": 3.0,
        "output_type": "latent",
    }
    if case.model != "sd15":
        found["pooled_prompt_embeds"] = uniform(1, tiny.TEXT)
        found["negative_pooled_prompt_embeds"] = uniform(1, tiny.TEXT)
    if case.model == "sdxl-controlnet":
        found["image"] = uniform(1, 3, height * 8, width * 8) / 3.4 + 0.5
        found["controlnet_conditioning_scale"] = 0.7  # the published pipeline has a default of its own
    else:
        found |= {"height": height * 8, "width": width * 8}
    return found


def sampled(latents: torch.Tensor) -> torch.Tensor:
    return latents.double().flatten()[::STRIDE].clone()
