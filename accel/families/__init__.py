"""The registry of model families: one row each."""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedModel
from .base import Family
from .unet import UNET

FAMILIES: tuple[Family, ...] = (UNET,)


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
