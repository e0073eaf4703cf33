"""Teacher and student of a LinFusion distillation in one U-Net: frozen weights, two kinds of self-attention."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..accel.errors import AttnswapWarning
from ..accel.install import installed_in
from ..accel.methods import linfusion_weights as weights_files
from ..accel.methods.linfusion import LinFusion, LinFusionStrategy
from ..accel.methods.linfusion_layer import CHILD, LinFusionLayer, from_stock
from ..accel.swap import enable
from ..pipelines.errors import BadInput
from .distill_checkpoint import writing

# The published SDXL weights have MLPs of a sixteenth of the layer's width, those for SD 1.5 and 2.1 of the full width.
SDXL_MID = "C/16"
FULL_MID = "C"


class LinFusionStudent:
    """Linear attention with weights to train in every self-attention layer of a U-Net (arXiv 2409.02097).

    It starts from the U-Net's own projections with MLPs that add nothing. Everything else is frozen.

    Args:
        unet: changed in place until `remove`.
        mid: width of the MLPs: a number, or "C/N" for a share of each layer's width.
        seed: of the MLPs' first layers.

    Raises:
        UnsupportedModel: the U-Net has no self-attention.
        BadInput: a width that is none.
    """

    def __init__(self, unet: nn.Module, *, mid: str = FULL_MID, seed: int = 0) -> None:
        self.unet = unet.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttnswapWarning)  # that its weights are not distilled yet
            self._handle = enable(unet, LinFusion(weights=None))
        self._strategy = cast(LinFusionStrategy, installed_in(unet).strategies[0])  # type: ignore[union-attr]
        attention = self._strategy.attention
        self.shapes = [
            replace(layer, projection_mid_dim=_published(width, layer.dim_n))
            for layer in weights_files.layers_of(attention)
            for width in (width_of(mid, layer.dim_n),)
        ]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for attn, layer in zip(attention.values(), self.shapes, strict=True):
                tensors = from_stock(attn, layer.projection_mid_dim)
                trained = {name: tensor.float() for name, tensor in tensors.items()}
                attn.add_module(CHILD, LinFusionLayer(trained, trainable=True))
        self._outputs: dict[str, Tensor] = {}
        self._recording = False
        self._hooks = [attn.register_forward_hook(self._recorder(name)) for name, attn in attention.items()]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by the names it will have in the checkpoint."""
        return {
            f"{i}.{name}": cast(nn.Parameter, parameter)
            for i, attn in enumerate(self._strategy.attention.values())
            for name, parameter in getattr(attn, CHILD).published()
        }

    @contextlib.contextmanager
    def as_teacher(self) -> Iterator[None]:
        """In this block the U-Net is the stock one, and no gradient is kept.

        Bit for bit, where it is called as it would be without training: one that Accelerate prepared for mixed
        precision runs in autocast as teacher, too.
        """
        self._strategy.active = False
        try:
            with torch.no_grad():
                yield
        finally:
            self._strategy.active = True

    def losses(
        self, model: Any, noisy: Tensor, timesteps: Tensor, target: Tensor, conditions: dict[str, Any]
    ) -> Tensor:
        """The three terms of the published training, mean squared errors `[3]` in fp32: against the data's target,
        the teacher's prediction, and the teacher's output in each self-attention layer, a mean over the layers.

        Args:
            model: what to call for the student: the U-Net, or a wrapper of it for several processes.
            noisy, target: `[B, C, h, w]`.
            timesteps: `[B]`.
            conditions: further arguments of the U-Net.
        """
        self._recording = True
        try:
            with self.as_teacher():
                taught = self.unet(noisy, timesteps, **conditions).sample
            taught_layers = self._take()
            predicted = model(noisy, timesteps, **conditions).sample
        finally:
            self._recording = False
            layers = self._take()
        by_layer = [_squared_error(layers[name], taught_layers[name]) for name in layers]
        return torch.stack(
            [_squared_error(predicted, target), _squared_error(predicted, taught), torch.stack(by_layer).mean()]
        )

    def save(self, folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float16) -> None:
        """Write `tensors`, named as `named_parameters`, in the published layout.

        Raises:
            JobFailed: it could not be written.
        """
        layers: list[dict[str, Tensor]] = [{} for _ in self.shapes]
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            layers[int(index)][name] = tensor.detach().to("cpu", dtype)
        with writing(folder):
            weights_files.save(folder, self.shapes, layers)

    def remove(self) -> None:
        """Leave the U-Net as it was."""
        for hook in self._hooks:
            hook.remove()
        self._handle.disable()

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # Gradient checkpointing calls the layers once more in the backward pass; kept, that would take the memory
            # it saves.
            if self._recording:
                self._outputs[name] = output

        return record

    def _take(self) -> dict[str, Tensor]:
        taken, self._outputs = self._outputs, {}
        return taken


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


def _squared_error(first: Tensor, second: Tensor) -> Tensor:
    return F.mse_loss(first.float(), second.float())
