"""What FLUX.1 is given in a training step, from pictures and captions that are encoded once, into files.

Each caption and picture is encoded before the first step, so that no step pays for it and the encoders need no room on
the accelerator. The files are raw tensors that are mapped, not read: they may be larger than memory.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .distill_checkpoint import writing
from .distill_data import Pictures, Size, loader
from .distill_student import Inputs


class FluxInputs:
    """From indices of pictures to inputs, by a pipeline's own parts.

    Args:
        pipe: a `FluxPipeline`; its autoencoder and text encoders are on `device`.
        guidance: where the transformer takes it as a number.
        max_sequence_length: tokens a caption is padded to; None is the pipeline's own number.
        caption_dropout: share of captions replaced by an empty one.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        device: torch.device,
        guidance: float = 3.5,
        caption_dropout: float = 0.0,
        max_sequence_length: int | None = None,
    ) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.pipe, self.device, self.guidance, self.caption_dropout = pipe, device, guidance, caption_dropout
        self.dtype = pipe.transformer.dtype
        self._length = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        # Those of training, evenly spaced but for a fixed shift; the pipeline's own shift with the size of a picture.
        self.sigmas: Tensor = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config).sigmas
        self._image_ids: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def encode(
        self,
        pictures: Pictures,
        folder: Path,
        *,
        batch: int,
        workers: int = 0,
        process: int = 0,
        processes: int = 1,
        wait: Callable[[], None] = lambda: None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Encode pictures and captions into `folder`, which is made anew.

        Args:
            batch: encoded together.
            process, processes: which share of the work is this process's.
            wait: until all processes are as far.
            progress: told how many more pictures are done.

        Raises:
            JobFailed: a picture could not be read, or a file not be written.
        """
        if process == 0:
            with writing(folder):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
        wait()
        with writing(folder):
            self._encode_captions(pictures, folder, batch, process, processes)
            self._encode_pictures(pictures, folder, batch, workers, process, processes, progress)
        wait()

    def __call__(self, indices: Sequence[int], generator: torch.Generator) -> Inputs:
        """Inputs in the transformer's dtype for pictures of one size; all random numbers come from `generator`, which
        is on the CPU."""
        clean = self._latents(indices, generator)
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        sigmas = self.sigmas[torch.randint(len(self.sigmas), (len(clean),), generator=generator)].to(self.device)
        dropped = torch.rand(len(clean), generator=generator) < self.caption_dropout
        captions = torch.where(dropped, 0, self._caption_of[list(indices)])
        level = sigmas.view(-1, 1, 1, 1)
        noisy = (1 - level) * clean + level * noise
        transformer = self.pipe.transformer
        arguments = {
            "hidden_states": self.pack(noisy).to(self.dtype),
            "timestep": sigmas,
            "guidance": torch.full_like(sigmas, self.guidance) if transformer.config.guidance_embeds else None,
            "pooled_projections": self._pooled[captions].to(self.device),
            "encoder_hidden_states": self._text[captions].to(self.device),
            "txt_ids": self._text_ids,
            "img_ids": self.image_ids(clean.shape[2], clean.shape[3]),
        }
        return Inputs(arguments, self.pack(noise - clean))

    def pack(self, latents: Tensor) -> Tensor:
        """`[B, C, h, w]` to tokens `[B, h / 2 * w / 2, 4 C]`."""
        packed: Tensor = self.pipe._pack_latents(latents, *latents.shape)
        return packed

    def image_ids(self, height: int, width: int) -> Tensor:
        """Positions `[h / 2 * w / 2, 3]` of the tokens of a latent of (h, w): Diffusers asks for them in tokens since
        0.32, in latent pixels before. One tensor a size, as reading a grid from a new one waits for the device."""
        if (height, width) not in self._image_ids:
            self._image_ids[height, width] = self.pipe._prepare_latent_image_ids(
                1, height // 2, width // 2, self.device, self.dtype
            )
        return self._image_ids[height, width]

    def _latents(self, indices: Sequence[int], generator: torch.Generator) -> Tensor:
        """Clean latents `[B, C, h, w]` in fp32, scaled as the transformer knows them."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        places = [self._place_of[index] for index in indices]
        encoded = torch.stack([self._encoded[size][row] for size, row in places]).to(self.device).float()
        config = self.pipe.vae.config
        if encoded.shape[1] == 2 * config.latent_channels:  # mean and logarithm of the variance
            encoded = DiagonalGaussianDistribution(encoded).sample(generator)
        clean: Tensor = (encoded - (config.shift_factor or 0)) * config.scaling_factor
        return clean

    def _encode_captions(self, pictures: Pictures, folder: Path, batch: int, process: int, processes: int) -> None:
        # The empty one comes first, for captions that are left out.
        captions = list(dict.fromkeys(["", *(example.caption for example in pictures.examples)]))
        number = {caption: i for i, caption in enumerate(captions)}
        self._caption_of = torch.tensor([number[example.caption] for example in pictures.examples])
        one_text, one_pooled, self._text_ids = self._encode_text(captions[:1])
        self._text = _mapped(folder / "text", (len(captions), *one_text.shape[1:]), one_text.dtype)
        self._pooled = _mapped(folder / "pooled", (len(captions), *one_pooled.shape[1:]), one_pooled.dtype)
        for first in range(process * batch, len(captions), processes * batch):
            text, pooled, _ = self._encode_text(captions[first : first + batch])
            self._text[first : first + batch] = text.cpu()
            self._pooled[first : first + batch] = pooled.cpu()

    def _encode_text(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        text, pooled, ids = self.pipe.encode_prompt(
            prompt=captions, prompt_2=None, device=self.device, num_images_per_prompt=1, **self._length
        )
        return text.to(self.dtype), pooled.to(self.dtype), ids

    def _encode_pictures(
        self,
        pictures: Pictures,
        folder: Path,
        batch: int,
        workers: int,
        process: int,
        processes: int,
        progress: Callable[[int], None],
    ) -> None:
        members: dict[Size, list[int]] = {}
        for index, size in enumerate(pictures.sizes):
            members.setdefault(size, []).append(index)
        self._place_of = {index: (size, row) for size, group in members.items() for row, index in enumerate(group)}
        self._encoded: dict[Size, Tensor] = {}
        for size, group in members.items():
            parts = [group[i : i + batch] for i in range(process * batch, len(group), processes * batch)]
            # A process without a share of its own still has to know the shape.
            batches = loader(pictures, parts or [group[:1]], workers)
            for part, loaded in zip(parts or [[]], batches, strict=True):
                encoded = self._encode_pixels(loaded.pictures)
                if size not in self._encoded:
                    name = f"latents-{size[0]}x{size[1]}"
                    self._encoded[size] = _mapped(folder / name, (len(group), *encoded.shape[1:]), encoded.dtype)
                for index, latent in zip(part, encoded, strict=False):
                    self._encoded[size][self._place_of[index][1]] = latent
                progress(len(part))

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """`[B, C, h, w]`, or mean and logarithm of the variance `[B, 2 C, h, w]`, on the CPU."""
        vae = self.pipe.vae
        encoded = vae.encode(pixels.to(self.device, vae.dtype))
        latents: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.parameters
        return latents.cpu()


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that is a file, shared by the processes that map it."""
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
