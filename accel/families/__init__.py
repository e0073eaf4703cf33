"""The registry of model families: one row each."""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedModel
from .base import Family
from .cogvideox import COGVIDEOX
from .flux import FLUX
from .flux2 import FLUX2
from .hunyuan_video import FRAMEPACK, HUNYUAN_VIDEO
from .hunyuan_video15 import HUNYUAN_VIDEO_15
from .ltx import LTX
from .ltx2 import LTX2
from .mochi import MOCHI
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .unet import UNET
from .wan import CHRONO_EDIT, SKYREELS_V2, WAN, WAN_ANIMATE, WAN_VACE
from .z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (
    UNET,
    *(SD3, FLUX, FLUX2, QWEN_IMAGE, Z_IMAGE),
    *(WAN, WAN_VACE, WAN_ANIMATE, SKYREELS_V2, CHRONO_EDIT),
    *(HUNYUAN_VIDEO, FRAMEPACK, HUNYUAN_VIDEO_15),
    *(COGVIDEOX, LTX, LTX2, MOCHI),
)


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
