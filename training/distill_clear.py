"""CLEAR's part of a distillation: circular local attention with weights to train in FLUX.1 (arXiv 2412.16112)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..accel.methods import clear_weights as weights_files
from ..accel.methods.clear import Clear
from ..accel.methods.clear_layer import CHILD, ClearLayer
from ..pipelines import load
from ..pipelines.errors import BadInput
from ..pipelines.presets import Preset
from ..pipelines.resolve import check_side, native_side, size_multiple
from .distill_checkpoint import writing
from .distill_data import Example, Order, Pictures, Size, nearest_shape, picture_size, same_area
from .distill_drawing import DEFAULT_STEPS, Sampling
from .distill_inputs_flux import FluxInputs
from .distill_method import Method, Say
from .distill_settings import ClearSettings
from .distill_student import Inputs, Student

CACHE = "cache"
PIPELINE = "FluxPipeline"
# Sides of pictures that keep their shapes are multiples of this share of the native side: 64 px at 1024 px.
SHAPES = 16


class ClearStudent(Student):
    """Circular local attention with weights to train in every attention layer of an image transformer.

    It starts from the transformer's own projections, and from cells pooled to their mean. What single blocks return is
    compared before their projection, text and image.

    Args:
        transformer: changed in place until `remove`.
        radius, down_factor: of `Clear`.
        every: which layers are compared with the teacher's, see `compared`.
    """

    child = CHILD

    def __init__(
        self, transformer: nn.Module, *, radius: float, down_factor: int | None = None, every: int = 4
    ) -> None:
        super().__init__(transformer, Clear(radius=radius, down_factor=down_factor))
        self.radius, self.down_factor = radius, down_factor
        for attn in self.attention.values():
            tensors = weights_files.from_stock(attn, down_factor)
            attn.add_module(CHILD, ClearLayer({name: x.float() for name, x in tensors.items()}, trainable=True))
        self.compared = compared(list(self.attention), every)
        self._watch(self.compared)

    def save(self, folder: Path) -> None:
        layers = {
            layer: {name: tensor.detach().to("cpu", torch.float16) for name, tensor in named.items()}
            for layer, named in self.tensors().items()
        }
        with writing(folder):
            name = weights_files.file_name(self.radius, self.down_factor)
            weights_files.save(folder / name, layers, radius=self.radius)


class ClearMethod(Method):
    """CLEAR for FLUX.1, on pictures of any shapes that are encoded once."""

    part = "transformer"
    files = ("clear_local_*.safetensors", CACHE)
    settings: ClearSettings

    def __init__(self, settings: ClearSettings, pipe: Any, preset: Preset, *, device: torch.device) -> None:
        super().__init__(settings, pipe, preset, device=device)
        # Cells that are pooled must fill the grid.
        self.multiple = size_multiple(pipe) * (settings.down_factor or 1)
        who = "this model" + (f" with --down-factor {settings.down_factor}" if settings.down_factor else "")
        self.side = settings.size or preset.native_side or native_side(pipe) or 0
        self.shapes: list[Size] = list(zip(settings.width, settings.height, strict=True))
        for width, height in self.shapes:
            check_side("--width", width, self.multiple, who)
            check_side("--height", height, self.multiple, who)
        if not self.shapes:
            check_side("--size", self.side, self.multiple, who)
        # Drawn as it is trained: without a number to take, guidance is a second call, which the student never sees.
        guidance = settings.guidance if pipe.transformer.config.guidance_embeds else preset.guidance
        self.samplings = [
            Sampling(width, height, preset.steps or DEFAULT_STEPS, guidance, preset.max_sequence_length)
            for width, height in self.shapes or [(self.side, self.side)]
        ]
        self.flux_inputs = FluxInputs(
            pipe,
            device=device,
            guidance=settings.guidance,
            caption_dropout=settings.caption_dropout,
            max_sequence_length=preset.max_sequence_length,
        )

    @classmethod
    def check(cls, settings: ClearSettings, model: load.Model) -> None:
        if model.pipeline != PIPELINE:
            raise BadInput(f"{settings.model}: CLEAR is distilled for {PIPELINE}, this is a {model.pipeline}.")

    @classmethod
    def config(cls, settings: ClearSettings, weights: str | None) -> Clear:
        return Clear(radius=settings.radius, down_factor=settings.down_factor, weights=weights)

    def student(self) -> ClearStudent:
        settings = self.settings
        return ClearStudent(
            self.pipe.transformer, radius=settings.radius, down_factor=settings.down_factor, every=settings.every
        )

    def sizes(self, examples: list[Example]) -> list[Size]:
        found = [picture_size(example.path) for example in examples]
        if self.shapes:
            return [nearest_shape(size, self.shapes) for size in found]
        step = self.multiple * max(1, self.side // (SHAPES * self.multiple))
        return [same_area(size, self.side, step) for size in found]

    def prepare(self, pictures: Pictures, accelerator: Any, say: Say) -> None:
        super().prepare(pictures, accelerator, say)
        self.cache = self.settings.output / CACHE
        self.flux_inputs.encode(
            pictures,
            self.cache,
            batch=self.settings.batch,
            workers=self.settings.workers,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            wait=accelerator.wait_for_everyone,
        )
        size = sum(path.stat().st_size for path in self.cache.iterdir())
        say(f"{len(pictures)} pictures and their captions encoded into {self.cache}: {size / 1e6:.1f} MB")
        self._move_encoders("cpu")

    def batches(self, order: Order) -> Iterator[list[int]]:
        return iter(order)

    def inputs(self, batch: list[int], generator: torch.Generator) -> Inputs:
        return self.flux_inputs(batch, generator)

    def restore(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)
        self._move_encoders(self.device)

    def facts(self) -> dict[str, Any]:
        sizes = [f"{width}x{height}" for width, height in dict.fromkeys(self.pictures.sizes)]
        return {"radius": self.settings.radius, "down_factor": self.settings.down_factor, "sizes": sizes}

    def _move_encoders(self, to: Any) -> None:
        for name in ("text_encoder", "text_encoder_2", "vae"):
            getattr(self.pipe, name).to(to)


def compared(layers: list[str], every: int) -> list[str]:
    """Those of a model's attention layers whose number `every` divides and that are in single blocks.

    With 4 these are the single blocks 1, 5, … 37 of FLUX.1, as published. A small model has one at least: its last
    single block; one without single blocks its own layers by that rule.
    """
    single = [name for name in layers if name.startswith("single_")] or layers
    return [name for i, name in enumerate(layers) if i % every == 0 and name in single] or single[-1:]
