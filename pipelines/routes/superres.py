"""Two-branch super-resolution of a picture, as in LinFusion (arXiv 2409.02097) after DemoFusion (arXiv 2311.16973).

Each step asks the U-Net twice: for the latent as it is, which draws detail, and for a blurred one with dilated
convolutions, which sees as much of the picture as at the trained size and keeps its layout. The nearer to the end, the
more the first counts. At the start the latent is also pulled to the noised picture it came from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..errors import BLACKED_OUT, JobFailed
from .dilation import Dilated

#: Per-channel mean and standard deviation of latents, [B, C, 1, 1] each, fp32.
Moments = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net gets beside latent and timestep; with guidance negative and positive, in this order."""

    arguments: dict[str, Any]
    guidance: float
    guided: bool


@torch.no_grad()
def upscale(
    pipe: Any,
    image: Image.Image,
    *,
    prompt: str,
    negative: str | None = None,
    steps: int,
    strength: float,
    guidance: float,
    scale: int,
    generator: torch.Generator,
    moments: Moments | None = None,
    cosine_scales: tuple[float, float, float] = (3, 1, 1),
    sigma: float = 0.8,
    on_begin: Callable[[torch.Tensor], None] = lambda timesteps: None,
    on_step: Callable[[int, torch.Tensor], None] = lambda step, latents: None,
) -> torch.Tensor:
    """Draws `image`, already resized to its final size, anew with detail.

    Works with any scheduler that Diffusers' image-to-image works with. One that starts again from a sample it has
    stored (UniPC's corrector, the second half of a Heun step) drops part of the pull to the first picture.

    Args:
        pipe: a StableDiffusionPipeline or StableDiffusionXLPipeline.
        image: of the size to draw.
        steps: of a whole run, of which the last `ceil(steps * strength)` are run.
        scale: how many times the trained side this is; dilation of the second branch, 2 or more.
        generator: draws the sample of the encoder, then the noise, as in image-to-image.
        moments: what each channel of the result is standardised to; None takes those of the encoded `image`.
        cosine_scales: exponents by which the pull to the picture, the share of the dilated branch and its blur fade.
        sigma: standard deviation of the blur, in latent pixels, at the start.
        on_begin: is told the timesteps that will be run.
        on_step: is told the number of the step done, from 1, and the latents.

    Returns:
        The picture, [1, 3, H, W] in 0..1.
    """
    scheduler, device = pipe.scheduler, pipe._execution_device
    text = conditioning(pipe, prompt, negative, guidance, image.size)
    scheduler.set_timesteps(steps, device=device)
    begin = (steps - math.ceil(steps * strength - 1e-6)) * scheduler.order
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    on_begin(timesteps)
    start = encode(pipe, image, generator).to(text.arguments["encoder_hidden_states"].dtype)
    noise = randn_tensor(start.shape, generator=generator, device=device, dtype=start.dtype)
    step_arguments = pipe.prepare_extra_step_kwargs(generator, 0.0)

    latents = scheduler.add_noise(start, noise, timesteps[:1])
    for index, t in enumerate(timesteps):
        pull, share, softness = weights(float(t), scheduler.config.num_train_timesteps, cosine_scales)
        latents = (1 - pull) * latents + pull * scheduler.add_noise(start, noise, t[None])
        near = predict(pipe, latents, t, text)
        soft = standardise(blur(latents, 2 * scale - 1, sigma * softness), moments_of(latents))
        with Dilated(scale):
            far = predict(pipe, soft, t, text)
        # Without clipping or thresholding a solver's update is linear in the prediction, so one step with the mixture
        # is the mixture of two steps from the same state: it needs no copy of the scheduler, and multistep solvers
        # remember what was really done.
        latents = scheduler.step(near.lerp(far, share), t, latents, **step_arguments, return_dict=False)[0]
        on_step(index + 1, latents)
    picture = decode(pipe, standardise(latents, moments_of(start) if moments is None else moments))
    pipe.maybe_free_model_hooks()
    return picture


def weights(t: float, train_steps: int, cosine_scales: tuple[float, float, float]) -> tuple[float, float, float]:
    """Pull to the first picture, share of the dilated branch and softness of its blur at timestep `t`."""
    fade = 0.5 * (1 + math.cos(math.pi * (train_steps - t) / train_steps))
    first, second, third = (fade**exponent for exponent in cosine_scales)
    return first, second, 0.99 * third + 0.01


def moments_of(latents: torch.Tensor) -> Moments:
    latents = latents.float()
    return latents.mean((2, 3), keepdim=True), latents.std((2, 3), keepdim=True)


def standardise(latents: torch.Tensor, to: Moments) -> torch.Tensor:
    """Each channel shifted and scaled to the mean and standard deviation `to`; dtype as before."""
    mean, std = moments_of(latents)
    return ((latents.float() - mean) / std.clamp_min(1e-8) * to[1] + to[0]).to(latents.dtype)


def blur(latents: torch.Tensor, size: int, sigma: float) -> torch.Tensor:
    """Each channel of [B, C, H, W] under a Gaussian of `size` x `size`, zeros beyond the border."""
    at = torch.arange(size, dtype=torch.float32, device=latents.device) - (size - 1) / 2
    line = torch.exp(-(at**2) / (2 * sigma**2))
    line = (line / line.sum()).to(latents.dtype).expand(latents.shape[1], 1, 1, size)
    rows = F.conv2d(latents, line, padding=(0, size // 2), groups=latents.shape[1])
    return F.conv2d(rows, line.mT, padding=(size // 2, 0), groups=latents.shape[1])


def predict(pipe: Any, latents: torch.Tensor, t: torch.Tensor, text: Conditioning) -> torch.Tensor:
    """The U-Net's guided prediction."""
    batch = torch.cat([latents, latents]) if text.guided else latents
    batch = pipe.scheduler.scale_model_input(batch, t)
    prediction: torch.Tensor = pipe.unet(batch, t, **text.arguments, return_dict=False)[0]
    if text.guided:
        negative, positive = prediction.chunk(2)
        prediction = negative + text.guidance * (positive - negative)
    return prediction


def conditioning(pipe: Any, prompt: str, negative: str | None, guidance: float, size: tuple[int, int]) -> Conditioning:
    """What the stock pipeline would give its U-Net for these prompts, made by the pipeline's own functions."""
    device, distilled = pipe._execution_device, pipe.unet.config.time_cond_proj_dim
    guided = guidance > 1 and distilled is None
    positive, against, *pooled = pipe.encode_prompt(
        prompt=prompt,
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=negative,
    )

    def both(negative_part: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return torch.cat([negative_part, part]) if guided else part

    arguments: dict[str, Any] = {"encoder_hidden_states": both(against, positive)}
    if distilled is not None:
        arguments["timestep_cond"] = pipe.get_guidance_scale_embedding(
            torch.tensor([guidance - 1.0]), embedding_dim=distilled
        ).to(device, positive.dtype)
    if pooled:  # SDXL
        width, height = size
        projected = pooled[0].shape[-1] if pipe.text_encoder_2 is None else pipe.text_encoder_2.config.projection_dim
        ids = pipe._get_add_time_ids(
            (height, width), (0, 0), (height, width), dtype=positive.dtype, text_encoder_projection_dim=projected
        ).to(device)
        arguments["added_cond_kwargs"] = {"text_embeds": both(pooled[1], pooled[0]), "time_ids": both(ids, ids)}
    return Conditioning(arguments, guidance, guided)


def encode(pipe: Any, image: Image.Image, generator: torch.Generator) -> torch.Tensor:
    """Latents of a picture, scaled as the U-Net knows them."""
    pixels = pipe.image_processor.preprocess(image)
    with _precise(pipe):
        encoded = pipe.vae.encode(pixels.to(pipe._execution_device, pipe.vae.dtype))
        # A small autoencoder has no distribution to draw from.
        latents = encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents
    mean, std = _normalisation(pipe.vae, latents)
    return (latents - mean) * pipe.vae.config.scaling_factor / std


def decode(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """The picture [B, 3, H, W] in 0..1 of latents, checked or marked as the stock pipeline does with its own."""
    with _precise(pipe):
        mean, std = _normalisation(pipe.vae, latents)
        latents = (latents * std / pipe.vae.config.scaling_factor + mean).to(pipe.vae.dtype)
        picture = pipe.vae.decode(latents, return_dict=False)[0]
    if hasattr(pipe, "run_safety_checker"):
        picture, flagged = pipe.run_safety_checker(picture, picture.device, pipe.unet.dtype)
        if flagged and any(flagged):
            raise JobFailed(BLACKED_OUT)
    if getattr(pipe, "watermark", None) is not None:
        picture = pipe.watermark.apply_watermark(picture)
    processed: torch.Tensor = pipe.image_processor.postprocess(picture, output_type="pt")
    return processed


def _normalisation(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or std is None:
        return 0.0, 1.0
    return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)


@contextmanager
def _precise(pipe: Any) -> Iterator[None]:
    """SDXL's autoencoder overflows in half precision: it works in fp32 meanwhile, as in the stock pipeline."""
    dtype = pipe.vae.dtype
    upcast = hasattr(pipe, "upcast_vae") and pipe.vae.config.force_upcast and dtype != torch.float32
    if upcast:
        pipe.vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        if upcast:
            pipe.vae.to(dtype=dtype)
