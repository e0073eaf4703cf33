"""Convolutions that see as far, in the picture, as at the size they were trained at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


class Dilated(TorchFunctionMode):
    """`with Dilated(2): unet(…)`: dilation and padding of every 2-D convolution of this thread times two.

    No module is touched, so nothing can be left behind by an exception. Low-rank adapters come along by themselves:
    of a 3x3 convolution they are a 3x3 of the same padding (dilated like it) and a 1x1 (which has no reach), so the
    sum is that of the merged weights. The dilation is DemoFusion's (arXiv 2311.16973).

    Args:
        scale: a whole number, 1 changes nothing.
    """

    def __init__(self, scale: int) -> None:
        super().__init__()
        if scale < 1:
            raise ValueError(f"scale must be at least 1, got {scale}")
        self._scale = scale

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not torch.conv2d:
            return func(*args, **(kwargs or {}))
        call = {**_DEFAULTS, **dict(zip(_NAMES, args, strict=False)), **(kwargs or {})}
        call["dilation"] = self._scaled(call["dilation"])
        if not isinstance(call["padding"], str):  # "same" follows the dilation, "valid" is none
            call["padding"] = self._scaled(call["padding"])
        return func(**call)

    def _scaled(self, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        return value * self._scale if isinstance(value, int) else tuple(part * self._scale for part in value)
