"""What a U-Net is given in a training step: noisy latents, timesteps, the encoded captions and what else SDXL asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..pipelines.errors import BadInput
from .distill_data import Batch
from .distill_student import Inputs


class InputMaker:
    """From pictures and captions to inputs, by a pipeline's own autoencoder, text encoders and noise schedule.

    Args:
        pipe: SD 1.5, 2.1, SDXL or a pipeline built as they are; its autoencoder and text encoders are on `device`.
        name: what to call it in an error.
        caption_dropout: share of captions replaced by what the pipeline uses for none; guidance needs that learnt.

    Raises:
        BadInput: its U-Net takes other inputs than noisy latents and text, or its scheduler has another kind of noise.
    """

    def __init__(self, pipe: Any, name: str, *, device: torch.device, caption_dropout: float = 0.0) -> None:
        from diffusers import DDPMScheduler

        self.pipe, self.device, self.caption_dropout = pipe, device, caption_dropout
        self.is_xl = _check(pipe, name)
        self.dtype = pipe.unet.dtype
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    def upcast(self) -> bool:
        """Turn an autoencoder that overflows in float16 (SDXL's) to float32; whether that was needed.

        The pipeline draws no pictures like this: it turns its autoencoder to and fro by itself.
        """
        vae = self.pipe.vae
        needed = bool(getattr(vae.config, "force_upcast", False)) and vae.dtype == torch.float16
        if needed:
            vae.to(torch.float32)
        return needed

    @torch.no_grad()
    def __call__(self, batch: Batch, generator: torch.Generator) -> Inputs:
        """Inputs in the U-Net's dtype; all random numbers come from `generator`, which is on the CPU."""
        latents = self._encode(batch.pictures, generator).to(self.dtype)
        noise = torch.randn(latents.shape, generator=generator).to(self.device, self.dtype)
        total = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(total, (len(latents),), generator=generator).to(self.device)
        dropped = torch.rand(len(latents), generator=generator) < self.caption_dropout
        arguments = {
            "sample": self.scheduler.add_noise(latents, noise, timesteps),
            "timestep": timesteps,
            **self._conditions(batch, dropped.to(self.device)),
        }
        return Inputs(arguments, self._target(latents, noise, timesteps))

    def _encode(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents

        vae = self.pipe.vae
        latents: Tensor = retrieve_latents(vae.encode(pictures.to(self.device, vae.dtype)), generator)
        return latents * vae.config.scaling_factor

    def _target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
            return velocity
        return noise if kind == "epsilon" else latents

    def _conditions(self, batch: Batch, dropped: Tensor) -> dict[str, Any]:
        # The pipeline's own idea of "no caption" (zeros in SDXL) comes with every encoding.
        text, no_text, *pooled = self.pipe.encode_prompt(
            prompt=batch.captions,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=self.caption_dropout > 0,
        )
        conditions: dict[str, Any] = {"encoder_hidden_states": _without(text, no_text, dropped).to(self.dtype)}
        if self.is_xl:
            pooled_text, no_pooled_text = pooled
            conditions["added_cond_kwargs"] = {
                "text_embeds": _without(pooled_text, no_pooled_text, dropped).to(self.dtype),
                "time_ids": batch.sizes.to(self.device, self.dtype),
            }
        return conditions


def _without(text: Tensor, no_text: Tensor | None, dropped: Tensor) -> Tensor:
    """`text` `[B, …]`, and `no_text` where `dropped` `[B]` says so."""
    if no_text is None:
        return text
    return torch.where(dropped.view(-1, *[1] * (text.ndim - 1)), no_text, text)


def _check(pipe: Any, name: str) -> bool:
    """Whether the pipeline is built as SDXL is."""
    unet, scheduler = pipe.unet.config, pipe.scheduler.config
    if unet.in_channels != pipe.vae.config.latent_channels:
        raise BadInput(
            f"{name}: its U-Net takes {unet.in_channels} channels, its autoencoder makes "
            f"{pipe.vae.config.latent_channels}; distil the text-to-image model it was made from."
        )
    kind = scheduler.get("prediction_type")
    if "beta_schedule" not in scheduler or kind not in ("epsilon", "v_prediction", "sample"):
        raise BadInput(
            f"{name}: no training with its {type(pipe.scheduler).__name__} (prediction_type {kind}); a schedule of "
            "betas with epsilon, v_prediction or sample is needed."
        )
    if unet.addition_embed_type in (None, "text"):
        return False
    numbers = 6 * (unet.addition_time_embed_dim or 0)
    encoder = getattr(pipe, "text_encoder_2", None)
    if unet.addition_embed_type != "text_time" or encoder is None:
        raise BadInput(f"{name}: its U-Net asks for {unet.addition_embed_type} embeddings, which this training lacks.")
    if numbers + encoder.config.projection_dim != unet.projection_class_embeddings_input_dim:
        raise BadInput(f"{name}: its U-Net does not take SDXL's six size numbers (is it a refiner?).")
    return True
