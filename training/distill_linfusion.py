"""LinFusion's part of a distillation: linear attention with weights to train in a U-Net."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..accel.methods import linfusion_weights as weights_files
from ..accel.methods.linfusion import LinFusion
from ..accel.methods.linfusion_layer import CHILD, LinFusionLayer, from_stock
from ..accel.methods.linfusion_weights import CONFIG, WEIGHTS
from ..pipelines import load
from ..pipelines.errors import BadInput
from ..pipelines.presets import Preset
from ..pipelines.resolve import check_side, size_multiple
from .distill_checkpoint import writing
from .distill_data import Batch, Example, Order, Pictures, Size, loader
from .distill_drawing import DEFAULT_STEPS, Sampling
from .distill_inputs import InputMaker
from .distill_method import Method, Say
from .distill_settings import LinFusionSettings
from .distill_student import Inputs, Student

# The published SDXL weights have MLPs of a sixteenth of the layer's width, those for SD 1.5 and 2.1 of the full width.
SDXL_MID = "C/16"
FULL_MID = "C"


class LinFusionStudent(Student):
    """Linear attention with weights to train in every self-attention layer of a U-Net (arXiv 2409.02097).

    It starts from the U-Net's own projections with MLPs that add nothing. All layers are compared with the teacher's.

    Args:
        unet: changed in place until `remove`.
        mid: width of the MLPs: a number, or "C/N" for a share of each layer's width.
        seed: of the MLPs' first layers.

    Raises:
        UnsupportedModel: the U-Net has no self-attention.
        BadInput: a width that is none.
    """

    child = CHILD

    def __init__(self, unet: nn.Module, *, mid: str = FULL_MID, seed: int = 0) -> None:
        super().__init__(unet, LinFusion(weights=None))
        self.shapes = [
            replace(layer, projection_mid_dim=_published(width, layer.dim_n))
            for layer in weights_files.layers_of(self.attention)
            for width in (width_of(mid, layer.dim_n),)
        ]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for attn, layer in zip(self.attention.values(), self.shapes, strict=True):
                tensors = from_stock(attn, layer.projection_mid_dim)
                trained = {name: tensor.float() for name, tensor in tensors.items()}
                attn.add_module(CHILD, LinFusionLayer(trained, trainable=True))
        self._watch(self.attention)

    def tensors(self) -> dict[str, dict[str, nn.Parameter]]:
        # The published files number the layers.
        return {str(i): named for i, named in enumerate(super().tensors().values())}

    def save(self, folder: Path) -> None:
        layers = [
            {name: tensor.detach().to("cpu", torch.float16) for name, tensor in named.items()}
            for named in self.tensors().values()
        ]
        with writing(folder):
            weights_files.save(folder, self.shapes, layers)


def width_of(mid: str, channels: int) -> int:
    """`mid` of a layer: "C" its channels, "C/16" a share of them, else the number itself.

    Raises:
        BadInput: it is none of these, or less than 1.
    """
    if not (match := re.fullmatch(r"C(?:/([1-9]\d*))?|([1-9]\d*)", mid)):
        raise BadInput(f"--mid {mid}: write C, C/16 or a number of channels.")
    share, number = match.groups()
    width = int(number) if number else channels // int(share or 1)
    if not width:
        raise BadInput(f"--mid {mid}: a layer has {channels} channels, so that nothing is left.")
    return width


def _published(width: int, channels: int) -> int | None:
    return None if width == channels else width


class LinFusionMethod(Method):
    """LinFusion for the U-Nets of SD 1.5, SD 2.1 and SDXL, on square pictures that are encoded in each step."""

    part = "unet"
    files = (CONFIG, WEIGHTS)
    settings: LinFusionSettings

    def __init__(self, settings: LinFusionSettings, pipe: Any, preset: Preset, *, device: torch.device) -> None:
        super().__init__(settings, pipe, preset, device=device)
        side = settings.size or preset.native_side or pipe.unet.config.sample_size * pipe.vae_scale_factor
        check_side("--size", side, size_multiple(pipe))
        self.samplings = [Sampling(side, side, preset.steps or DEFAULT_STEPS, preset.guidance)]
        self.input_maker = InputMaker(pipe, settings.model, device=device, caption_dropout=settings.caption_dropout)
        self.mid = settings.mid or (SDXL_MID if self.input_maker.is_xl else FULL_MID)

    @classmethod
    def check(cls, settings: LinFusionSettings, model: load.Model) -> None:
        if "unet" not in model.denoisers:
            has = ", ".join(f"{part} ({kind})" for part, kind in model.denoisers.items())
            raise BadInput(f"{settings.model}: LinFusion is for U-Nets, it has {has}.")

    @classmethod
    def config(cls, settings: LinFusionSettings, weights: str | None) -> LinFusion:
        return LinFusion(weights=weights)

    def student(self) -> LinFusionStudent:
        return LinFusionStudent(self.pipe.unet, mid=self.mid, seed=self.settings.seed)

    def sizes(self, examples: list[Example]) -> list[Size]:
        return [(self.samplings[0].width, self.samplings[0].height)] * len(examples)

    def prepare(self, pictures: Pictures, accelerator: Any, say: Say) -> None:
        super().prepare(pictures, accelerator, say)
        if self.input_maker.upcast():
            say("the autoencoder encodes in float32: this one overflows in float16")

    def batches(self, order: Order) -> Iterator[Batch]:
        return loader(self.pictures, order, self.settings.workers)

    def inputs(self, batch: Batch, generator: torch.Generator) -> Inputs:
        return self.input_maker(batch, generator)

    def restore(self) -> None:
        if self.pipe.vae.dtype != self.input_maker.dtype:
            self.pipe.vae.to(self.input_maker.dtype)

    def facts(self) -> dict[str, Any]:
        return {"mid": self.mid, "size": self.samplings[0].width}
