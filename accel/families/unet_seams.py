"""Where a U-Net's own resolution can be changed from outside: plain torch hooks, no module is altered.

Each seam asks its owner in every call whether to act, so nothing needs undoing after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from diffusers import ControlNetModel, ControlNetUnionModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..observe import Call
from .unet import Size, UNetSizes

Predicate = Callable[[], bool]


class QuarteringDownsampler:
    """Makes a stride-2 downsampler divide by four with the same weights.

    The published convolution (stride 4, padding 2, dilation 2) reads only even rows and columns, so it equals the
    unchanged convolution on every other row and column of its input: a pre-hook, whatever wraps the convolution
    (LoRA, offloading).
    """

    def __init__(self, downsampler: nn.Module, active: Predicate) -> None:
        self._active = active
        self._handle = downsampler.register_forward_pre_hook(self._before)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (args[0][:, :, ::2, ::2], *args[1:]) if self._active() else None

    def remove(self) -> None:
        self._handle.remove()


class PooledSection:
    """Halves the map after one transformer on the way down and restores its size after another on the way up."""

    def __init__(self, down: nn.Module, up: nn.Module, active: Predicate) -> None:
        self._active = active
        self._size: Size | None = None
        self._handles: list[RemovableHandle] = [
            down.register_forward_hook(self._pool),
            up.register_forward_hook(self._restore),
        ]

    def _pool(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._active():
            self._size = None
            return None
        hidden_states = output[0]
        height, width = hidden_states.shape[-2:]
        self._size = (height, width)
        return (F.avg_pool2d(hidden_states, 2, ceil_mode=True), *output[1:])

    def _restore(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._size is None:
            return None
        return (F.interpolate(output[0], size=self._size, mode="bicubic"), *output[1:])

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class UpsampleToSkips:
    """Makes every upsampler take the size of the skip it meets instead of doubling.

    `UNet2DConditionModel.forward` does so when the latent is not divisible by 2 ** `num_upsamplers`. Nearest
    upsampling to a doubled size is doubling, bit for bit, so this may stay on.
    """

    _MORE = 12

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self._original = unet.num_upsamplers
        unet.num_upsamplers = self._original + self._MORE

    def remove(self) -> None:
        self._unet.num_upsamplers = self._original


class ControlNetSeam:
    """Lets an owner change what the ControlNets of a pipeline get, before each of their calls."""

    def __init__(self, controlnet: nn.Module, before: Callable[[Call], None]) -> None:
        self._before_call = before
        networks = [m for m in controlnet.modules() if isinstance(m, ControlNetModel | ControlNetUnionModel)]
        self._handles = [m.register_forward_pre_hook(self._before, with_kwargs=True) for m in networks]

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = Call.of(module, args, kwargs)
        self._before_call(call)
        return ((), call.arguments) if call.edited else None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def resize_controlnet_input(call: Call, latent: Size, pixels: Size, mode: str) -> None:
    """Run a ControlNet on another size: its latent and its control image, or images."""
    call.set("sample", resized(call.arguments["sample"], latent, mode))
    image = call.arguments["controlnet_cond"]
    if isinstance(image, list | tuple):
        call.set("controlnet_cond", [resized(part, pixels, mode) for part in image])
    else:
        call.set("controlnet_cond", resized(image, pixels, mode))


def fit_residuals(call: Call, sizes: UNetSizes) -> int:
    """Resize what ControlNets and T2I-Adapters add to a U-Net to the maps it now has; returns how many changed."""
    arguments = call.arguments
    down, middle = arguments.get("down_block_additional_residuals"), arguments.get("mid_block_additional_residual")
    adapters = arguments.get("down_intrablock_additional_residuals")
    changed = 0
    if down is not None and middle is None and adapters is None:
        # The legacy road of T2I-Adapters, as `UNet2DConditionModel.forward` understands it.
        changed += _fit(call, "down_block_additional_residuals", down, (*sizes.adapters, sizes.middle))
    elif down is not None:
        changed += _fit(call, "down_block_additional_residuals", down, sizes.skips)
    if middle is not None and tuple(middle.shape[-2:]) != sizes.middle:
        call.set("mid_block_additional_residual", resized(middle, sizes.middle))
        changed += 1
    if adapters is not None:
        changed += _fit(call, "down_intrablock_additional_residuals", adapters, (*sizes.adapters, sizes.middle))
    return changed


def _fit(call: Call, name: str, residuals: Iterable[Tensor], sizes: tuple[Size, ...]) -> int:
    fitted = [x if tuple(x.shape[-2:]) == size else resized(x, size) for x, size in zip(residuals, sizes, strict=False)]
    changed = sum(a is not b for a, b in zip(fitted, residuals, strict=False))
    if changed:
        call.set(name, fitted)
    return changed


def resized(x: Tensor, size: Size, mode: str = "bicubic") -> Tensor:
    """`[B, C, H, W]` at another size (H, W)."""
    return x if tuple(x.shape[-2:]) == tuple(size) else F.interpolate(x, size=size, mode=mode)
