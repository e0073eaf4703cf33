"""Recognising a U-Net by its blocks, never by its name: where HiDiffusion's parts go and which schedule it takes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UnsupportedModel
from . import hidiffusion_schedule as schedule

if TYPE_CHECKING:
    from .hidiffusion import HiDiffusion

_INPAINTING_CHANNELS = 9


@dataclass(frozen=True)
class Structure:
    """A U-Net as HiDiffusion sees it.

    Attributes:
        family: "sd15", "sdxl" or "sdxl-turbo".
        native_size: (h, w) of the latent it was trained on.
        aggressive: whether, or for which fraction of the steps, the deep convolution goes first (SDXL, small sizes).
        text_controlnet: a ControlNet in a text-to-image pipeline.
        levels: number of resolutions.
        restored_after: index of the transformer, on the way up, after which the pooled map gets its size back.
        why: how family and flags were found.
    """

    family: str
    native_size: tuple[int, int]
    aggressive: bool | float
    text_controlnet: bool
    levels: int
    restored_after: int
    why: str

    @property
    def places(self) -> schedule.Places:
        return schedule.PLACES[self.family]

    def is_windowed(self, layer: str) -> bool:
        level = self.places.windows
        return layer.startswith(
            (f"down_blocks.{level}.attentions.", f"up_blocks.{self.levels - 1 - level}.attentions.")
        )

    def pooled_transformers(self, unet: Any) -> tuple[nn.Module, nn.Module]:
        """The transformers after which the map is halved (down) and restored (up)."""
        up = unet.up_blocks[self.levels - 1 - self.places.pool]
        return unet.down_blocks[self.places.pool].attentions[0], up.attentions[self.restored_after]

    def downsampler(self, unet: Any) -> nn.Module | None:
        """The downsampler that divides by four, where the family has one."""
        if self.places.conv is None:
            return None
        found: nn.Module = unet.down_blocks[self.places.conv].downsamplers[0]
        return found

    def phases(self, config: HiDiffusion, size: tuple[int, int], steps: int) -> schedule.Phases:
        return schedule.phases(
            self.family,
            steps=steps,
            large=schedule.is_large(self.family, size, config.large_side),
            aggressive=self.aggressive,
            t1=config.t1,
            t2=config.t2,
            text_controlnet=self.text_controlnet,
            round_up=config.round_up,
        )

    def __str__(self) -> str:
        height, width = self.native_size
        flags = [f"family {self.family} ({self.why})", f"native latent {height}x{width}"]
        if self.family == "sdxl":
            flags.append(f"aggressive {self.aggressive}")
        if self.text_controlnet:
            flags.append("text-to-image ControlNet")
        return ", ".join(flags)


def structure_of(unet: Any, pipeline: Any, config: HiDiffusion) -> Structure:
    """Recognise a U-Net.

    Raises:
        UnsupportedModel: if its blocks are those of no known family, or not those of the family asked for.
    """
    found = _shape(unet)
    asked = config.family
    if found is None or (asked is not None and asked.startswith("sdxl") != (found == "sdxl")):
        blocks = ", ".join(unet.config.down_block_types)
        wanted = f"asked for {asked}" if asked else "known"
        raise UnsupportedModel(
            f"{type(unet).__name__} with the down blocks {blocks} does not have the structure hidiffusion needs "
            f"({wanted}): SD 1.5/2.1 (four levels, attention in all but the last) or SDXL (three levels, attention in "
            f"all but the first), a downsampler after each level but the last"
        )
    name = f"{getattr(pipeline, 'name_or_path', '') or ''} {unet.config.get('_name_or_path') or ''}".lower()
    sample_size = unet.config.sample_size
    family: str
    if asked is not None:
        family, why = asked, "as asked"
    elif found == "sdxl" and (sample_size == 64 or "turbo" in name):
        family, why = "sdxl-turbo", "a guess from the native size or the name; settle it with family="
    else:
        family, why = found, "by its blocks"
    side = sample_size or schedule.NATIVE_SIDE[family]
    native = (side, side) if isinstance(side, int) else tuple(side)
    aggressive = config.aggressive
    if aggressive is None:
        aggressive = unet.config.in_channels != _INPAINTING_CHANNELS and "playground" not in name
    return Structure(
        family=family,
        native_size=native,
        aggressive=aggressive,
        text_controlnet=family == "sdxl" and _is_text_controlnet(pipeline),
        levels=len(unet.down_blocks),
        restored_after=len(unet.down_blocks[schedule.PLACES[family].pool].resnets) - 1,
        why=why,
    )


def _shape(unet: Any) -> str | None:
    """ "sd15" or "sdxl" by which levels attend, None for anything else."""
    attends = [getattr(block, "attentions", None) is not None for block in unet.down_blocks]
    downsamples = [block.downsamplers is not None for block in unet.down_blocks]
    mirrored = attends == [getattr(block, "attentions", None) is not None for block in reversed(unet.up_blocks)]
    if not mirrored or not all(downsamples[:-1]) or len(attends) < 3:
        return None
    if attends == [True, True, True, False]:
        return "sd15"
    if attends == [False, True, True]:
        return "sdxl"
    return None


def _is_text_controlnet(pipeline: Any) -> bool:
    """Whether a pipeline has a ControlNet and no picture to start from."""
    if getattr(pipeline, "controlnet", None) is None:
        return False
    return not {"image", "control_image"} <= set(inspect.signature(pipeline.__call__).parameters)
