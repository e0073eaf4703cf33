"""The denoisers of a model without their weights: enough to say which attention layers a method would take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..accel.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import nn

    from .load import Model


def skeletons(model: Model) -> dict[str, nn.Module]:
    """Component name → module on the meta device, built from its config.json alone.

    Raises:
        UnsupportedModel: a denoiser that Diffusers does not know, or without a configuration.
    """
    import diffusers

    found = {}
    for part, class_name in model.denoisers.items():
        cls = getattr(diffusers, class_name, None)
        if cls is None or model.components[part][0] != "diffusers":
            raise UnsupportedModel(f"{model.name}: {part} is a {class_name}, which is no model of Diffusers.")
        try:
            config = cls.load_config(model.folder / part, local_files_only=True)
        except OSError:
            raise UnsupportedModel(f"{model.name}: {part} ({class_name}) has no config.json.") from None
        with torch.device("meta"):
            found[part] = cls.from_config(config)
    return found
