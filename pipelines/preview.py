"""Latents on the way → a small picture of what is coming about, by the model's own autoencoder."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image

from . import clip

if TYPE_CHECKING:
    from .routes import Stage

# Of a preview in pixels, for as many latents a side: a decoder's work grows with their number alone.
SIDE, LEAST, MOST = 192, 16, 32
# Autoencoders whose latents are scaled as `_unscaled` has it: those of pictures alone, and those that take frames.
OF_PICTURES = (
    "AsymmetricAutoencoderKL",
    "AutoencoderDC",
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
    "AutoencoderTiny",
)
OF_FRAMES = (
    "AutoencoderKLCogVideoX",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLHunyuanVideo15",
    "AutoencoderKLLTX2Video",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLMochi",
    "AutoencoderKLQwenImage",
    "AutoencoderKLWan",
)


class Preview:
    """Decodes few latents: pooled to a small grid, and of a clip the frame in the middle alone.

    Nothing of the run is touched: neither its random numbers nor what its autoencoder is set to.

    Args:
        pipe: whose latents they are.

    Attributes:
        why_not: in a line, why there are no previews; None where there are, as far as is known yet.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.why_not = _unknown(pipe) or _offloaded(pipe.vae)

    def picture(self, latents: torch.Tensor, stage: Stage) -> Image.Image | None:
        """What the first of a batch of latents would be now; None, and `why_not` says why, where that is not known.

        Args:
            latents: as the pipeline has them after a step of `stage`; packed, scaled.
        """
        pipe, vae = self._pipe, self._pipe.vae
        self.why_not = self.why_not or _offloaded(vae)  # a model may be placed only when it first runs
        if self.why_not:
            return None
        try:
            with torch.no_grad(), _random_numbers_kept(vae.device):
                pixels = _decoded(vae, _pooled(_unscaled(_laid_out(latents[:1], pipe, stage), pipe), pipe))
        except Exception as error:  # a picture on the way is not worth a run
            said = next(iter(str(error).splitlines()), "") or type(error).__name__
            self.why_not = f"latents of {tuple(latents.shape)} were not to be decoded: {said}"
            return None
        if not torch.isfinite(pixels).all():
            self.why_not = f"{type(vae).__name__} gives not-a-number in {str(vae.dtype).removeprefix('torch.')}"
            return None
        array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def _unknown(pipe: Any) -> str | None:
    vae = getattr(pipe, "vae", None)
    if type(vae).__name__ not in (*OF_PICTURES, *OF_FRAMES):
        return f"previews do not know the autoencoder, {type(vae).__name__}"
    if type(pipe).__name__.startswith("Cosmos"):
        return f"{type(pipe).__name__} scales its latents in a way of its own"
    return None


def _offloaded(vae: Any) -> str | None:
    """Models would be moved to the device and back at every step."""
    for module in vae.modules():
        accelerate_hook, registry = getattr(module, "_hf_hook", None), getattr(module, "_diffusers_hook", None)
        names = [type(accelerate_hook).__name__, *getattr(registry, "hooks", ())]
        if any("offload" in name.lower() for name in names):
            return "models are offloaded, and decoding between steps would move them to and fro"
    return None


def _random_numbers_kept(device: torch.device) -> AbstractContextManager[None]:
    """Some decoders draw noise."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _laid_out(latents: torch.Tensor, pipe: Any, stage: Stage) -> torch.Tensor:
    """[1, C, H, W] or [1, C, F, H, W], as the autoencoder has them.

    Raises:
        ValueError: they are otherwise.
    """
    vae, height, width = pipe.vae, stage.height, stage.width
    if type(vae).__name__ == "AutoencoderKLFlux2":
        return _of_flux2(latents, pipe, height, width)
    if latents.ndim == 3:
        names = list(inspect.signature(pipe._unpack_latents).parameters)[1:]
        if names == ["height", "width", "vae_scale_factor"]:
            latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        elif names == ["num_frames", "height", "width", "patch_size", "patch_size_t"]:
            patch, frames = pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
            rows, columns = (side // pipe.vae_spatial_compression_ratio // patch for side in (height, width))
            count = latents.shape[1] // (rows * columns)
            latents = pipe._unpack_latents(latents, count, rows, columns, patch, frames)
        else:
            raise ValueError(f"{type(pipe).__name__} packs them in a way of its own")
    elif type(vae).__name__ == "AutoencoderKLCogVideoX":
        latents = latents.transpose(1, 2)
    channels = getattr(vae.config, "latent_channels", None) or vae.config.z_dim
    if latents.shape[1] != channels or latents.shape[-1] * height != latents.shape[-2] * width:
        raise ValueError(f"the autoencoder has {channels} channels, the picture {width}x{height} pixels")
    return latents


def _of_flux2(tokens: torch.Tensor, pipe: Any, height: int, width: int) -> torch.Tensor:
    """Tokens [1, S, 4C] by rows, normalised as patches of 2x2."""
    vae, token = pipe.vae, 2 * pipe.vae_scale_factor
    patches = tokens.transpose(1, 2).unflatten(2, (height // token, width // token)).float()
    mean, variance = (moment.float().view(1, -1, 1, 1) for moment in (vae.bn.running_mean, vae.bn.running_var))
    latents: torch.Tensor = pipe._unpatchify_latents(patches * (variance + vae.config.batch_norm_eps).sqrt() + mean)
    return latents


def _unscaled(latents: torch.Tensor, pipe: Any) -> torch.Tensor:
    """In fp32, as the encoder gave them before they were made fit for a denoiser; of a clip the frame in the middle."""
    vae = pipe.vae
    if latents.ndim == 5:
        latents = latents[:, :, latents.shape[2] // 2]
    latents = latents.float()
    if type(vae).__name__ == "AutoencoderKLFlux2":
        return latents
    latents = latents / (getattr(vae.config, "scaling_factor", None) or 1.0)
    mean, std = (_moment(vae, name, latents) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        return latents * std + mean
    # Pipelines around U-Nets have none, whatever their autoencoder says.
    shift = None if getattr(pipe, "unet", None) else getattr(vae.config, "shift_factor", None)
    return latents + (shift or 0.0)


def _moment(vae: Any, name: str, latents: torch.Tensor) -> torch.Tensor | None:
    """Of each channel: a buffer of some autoencoders, a setting of others."""
    found = vars(vae)["_buffers"].get(name)
    found = getattr(vae.config, name, None) if found is None else found
    return None if found is None else torch.as_tensor(found).to(latents).view(1, -1, 1, 1)


def _pooled(latents: torch.Tensor, pipe: Any) -> torch.Tensor:
    """Of a grid that is worth a small picture; smaller ones as they are."""
    height, width = latents.shape[-2:]
    share = min(MOST, max(LEAST, SIDE // clip.spatial_factor(pipe))) / max(height, width)
    if share >= 1:
        return latents
    return F.adaptive_avg_pool2d(latents, (max(1, round(height * share)), max(1, round(width * share))))


def _decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pixels [3, H, W], about -1..1, of latents [1, C, H, W]."""
    dtype, weights = vae.dtype, {}
    if dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        # Beyond the range of float16 on the way; pipelines make the autoencoder float32 for their one decoding.
        dtype = torch.bfloat16
        weights = {f"vae.{name}": weight.to(dtype) for name, weight in vae.named_parameters()}
    latents = latents.to(vae.device, dtype)
    if type(vae).__name__ not in OF_PICTURES:
        latents = latents.unsqueeze(2)
    timestep = [latents.new_zeros(1)] if getattr(vae.config, "timestep_conditioning", False) else []
    pixels: torch.Tensor = torch.func.functional_call(_Decoder(vae), weights, (latents, *timestep))
    if pixels.ndim == 5:
        pixels = pixels[:, :, pixels.shape[2] // 2]
    return pixels[0, :3].float()


class _Decoder(torch.nn.Module):
    """Decodes when it is called, as what exchanges weights for a call needs it."""

    def __init__(self, vae: torch.nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        # By its class: while a clip is denoised, what decodes it in the end is another.
        pixels: torch.Tensor = type(self.vae).decode(self.vae, *arguments, return_dict=False)[0]  # type: ignore[attr-defined]
        return pixels
