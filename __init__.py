"""attnswap: fast attention for stock Diffusers pipelines, swapped in with one line and out again exactly.

>>> import attnswap
>>> handle = attnswap.enable(pipe, "hidiffusion")
>>> image = pipe("a fox", width=2048, height=2048).images[0]
>>> print(handle.report())
>>> handle.disable()

The names are loaded on first use, so that `import attnswap` costs next to nothing beside torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "enable": "accel.swap",
    "disable": "accel.swap",
    "enabled": "accel.swap",
    "inspect": "accel.swap",
    "attn_processors": "accel.swap",
    "Handle": "accel.swap",
    "Inspection": "accel.report",
    "Report": "accel.report",
    "methods": "accel.methods",
    "AdaSpa": "accel.methods.adaspa",
    "Clear": "accel.methods.clear",
    "HiDiffusion": "accel.methods.hidiffusion",
    "LinFusion": "accel.methods.linfusion",
    "UnsupportedModel": "accel.errors",
    "WeightsError": "accel.errors",
    "AttnswapWarning": "accel.errors",
}

__all__ = [
    "AdaSpa",
    "AttnswapWarning",
    "Clear",
    "Handle",
    "HiDiffusion",
    "Inspection",
    "LinFusion",
    "Report",
    "UnsupportedModel",
    "WeightsError",
    "__version__",
    "attn_processors",
    "disable",
    "enable",
    "enabled",
    "inspect",
    "kernels",
    "methods",
]

if TYPE_CHECKING:
    from . import kernels
    from .accel.errors import AttnswapWarning, UnsupportedModel, WeightsError
    from .accel.methods import methods
    from .accel.methods.adaspa import AdaSpa
    from .accel.methods.clear import Clear
    from .accel.methods.hidiffusion import HiDiffusion
    from .accel.methods.linfusion import LinFusion
    from .accel.report import Inspection, Report
    from .accel.swap import Handle, attn_processors, disable, enable, enabled, inspect


def __getattr__(name: str) -> object:
    if name == "kernels":
        return importlib.import_module(".kernels", __name__)
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
