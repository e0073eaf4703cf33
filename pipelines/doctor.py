"""What this machine has and what would run on it, on one screen."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import platform
from typing import Any

import torch

from .. import kernels
from . import load

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "av", "gradio")
WIDTH = 100
# A typical self-attention of the top level of an SD 1.5 U-Net at 1024 px: batch, heads, head dim.
TYPICAL_SHAPE = (2, 128 * 128, 8, 40)
# What an op must be told beside its tensors.
TYPICAL = {"grid": (128, 128), "radius": 16.0}


def screen() -> str:
    """At most 25 lines of at most 100 columns; nothing is downloaded and no memory to speak of is taken."""
    device = load.pick_device()
    rows = [
        ("attnswap", f"{_version('attnswap')} on Python {platform.python_version()}, {platform.platform(terse=True)}")
    ]
    rows += _packages()
    rows += [("device", text) for text in _devices(device)]
    rows += [("op", text) for op in kernels.ops() for text in _op(op, device)]
    rows.append(("backend", f"ATTNSWAP_BACKEND={os.environ.get('ATTNSWAP_BACKEND', 'auto')}"))
    rows.append(("models", ", ".join(_bundled()) or "none bundled: this installation is incomplete"))
    rows.append(("Hub", _hub()))
    lines, previous = [], ""
    for label, text in rows:
        line = f"{label if label != previous else '':<10}{text}"
        lines.append(line if len(line) <= WIDTH else line[: WIDTH - 3] + "...")
        previous = label
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> list[tuple[str, str]]:
    found = {name: _version(name) for name in PACKAGES}
    there = [f"{name} {version}" for name, version in found.items() if version]
    half = (len(there) + 1) // 2
    rows = [("packages", ", ".join(there[:half])), ("packages", ", ".join(there[half:]))]
    if missing := [name for name, version in found.items() if not version]:
        rows.append(("packages", f"not installed: {', '.join(missing)}"))
    return rows


def _devices(chosen: torch.device) -> list[str]:
    found = [f"cpu: {torch.get_num_threads()} threads, {_host_memory()}"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
            found.append(
                f"cuda:{index}: {name}, sm_{capability[0]}{capability[1]}, {_gib(free)} of {_gib(total)} GiB free"
            )
    elif chosen.type != "cpu":
        found.append(f"{chosen.type}: available")
    return [*found[:5], f"used by default: {chosen.type}"]


def _host_memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{_gib(memory.available)} of {_gib(memory.total)} GiB free"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def _op(op: str, device: torch.device) -> list[str]:
    try:
        explanation = explain(op, device)
    except ValueError as error:  # a backend asked for by name that cannot run, or that there is not
        return [f"{op}: {error}"]
    refused = [f"  not {entry.backend}: {entry.reason}" for entry in explanation.considered if not entry.can]
    # Where something better was refused, that is the reason for the choice.
    return (
        [f"{op}: {explanation.backend}", *refused]
        if refused
        else [f"{op}: {explanation.backend} ({explanation.reason})"]
    )


def explain(op: str, device: torch.device) -> Any:
    """`kernels.explain` for a typical call of `op`, on a tensor that has a shape and no memory."""
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    tensor = torch.empty(1, dtype=dtype, device=device).expand(TYPICAL_SHAPE)
    takes = inspect.signature(getattr(kernels, op)).parameters
    others = {name: TYPICAL[name] for name in TYPICAL if name in takes}
    if "mask" in takes:
        batch, tokens, heads, _ = TYPICAL_SHAPE
        blocks = -(-tokens // 64)
        kept = torch.ones((batch, heads, blocks, blocks), dtype=torch.bool, device=device)
        others["mask"] = kernels.BlockMask.from_dense(kept)
    return kernels.explain(op, tensor, tensor, tensor, **others)


def _bundled() -> list[str]:
    sizes = {
        name: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for name, folder in load.bundled().items()
    }
    return [f"{name} ({size / 1e6:.1f} MB)" for name, size in sizes.items()]


def _hub() -> str:
    from huggingface_hub import constants

    state = "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "online, asked for Hub ids only"
    return f"{state}; cache {constants.HF_HUB_CACHE}"
