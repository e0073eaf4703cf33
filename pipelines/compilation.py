"""Denoisers compiled by `torch.compile`."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import BadInput
from .names import DENOISERS


def check_compiler(device: torch.device) -> None:
    """
    Raises:
        BadInput: what `torch.compile` needs on `device` is missing.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch.utils._triton import has_triton

    try:
        get_cpp_compiler()
    except RuntimeError:
        raise BadInput("--compile needs a C++ compiler such as g++, and there is none here.") from None
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        raise BadInput("--compile needs the headers of Python (python3-dev), which are not here.")
    if device.type == "cuda" and not has_triton():
        raise BadInput(f"--compile needs triton on {device}, and it is not installed or does not know this device.")


def compile_denoisers(pipe: Any) -> str:
    """Compiles the repeated blocks of each denoiser where it says which they are, else the whole; gives which, as text.

    Nothing is compiled before the first step.
    """
    said = []
    for name in DENOISERS:
        denoiser = getattr(pipe, name, None)
        if not isinstance(denoiser, nn.Module):
            continue
        blocks = set(getattr(denoiser, "_repeated_blocks", None) or ())
        found = sorted(blocks & {type(module).__name__ for module in denoiser.modules()})
        if found:
            denoiser.compile_repeated_blocks()  # type: ignore[operator]
        else:
            denoiser.compile()
        said.append(f"{name} {'by its ' + ', '.join(found) if found else 'as a whole'}")
    return ", ".join(said)
