"""The registry of model families: one row each."""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedModel
from .base import Family
from .flux import FLUX
from .flux2 import FLUX2
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .unet import UNET
from .z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (UNET, SD3, FLUX, FLUX2, QWEN_IMAGE, Z_IMAGE)


def family_of(model: nn.Module) -> Family:
    """The family of a denoiser, by its class or one it inherits from.

    Raises:
        UnsupportedModel: for any other model; the message says which are known.
    """
    bases = {base.__name__ for base in type(model).__mro__}
    for family in FAMILIES:
        if family.model_class in bases:
            return family
    known = ", ".join(family.model_class for family in FAMILIES)
    raise UnsupportedModel(f"{type(model).__name__} is not a denoiser attnswap knows; it knows {known}")
