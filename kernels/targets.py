"""The GPUs Triton kernels are configured and checked for, and how a kernel says what it ships.

A target stands for a family of GPUs: what is compiled and checked for it, without the GPU, is what its family runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """A GPU family.

    `arch` and `warp_size` are as Triton names them. `shared_limit` is the shared memory in bytes that one block may
    use on the smallest member of the family.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


@dataclass(frozen=True)
class Config:
    """Tile sizes (query rows, key rows), warps per program and software-pipelining depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Shipped:
    """One compilation of a kernel that users run.

    `signature` gives the Triton type of each argument that is not a constant, `constants` the value of each that is;
    pointers are taken to be aligned to 16 bytes, as tensors are.
    """

    kernel: Any
    target: Target
    dtype: str
    variant: str
    config: Config
    signature: dict[str, str]
    constants: dict[str, Any]


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 101376),  # of compute capability 8.6 and 8.9; 8.0 itself has 166912
    Target("sm_90", "cuda", 90, 32, 232448),
    Target("sm_100", "cuda", 100, 32, 232448),
    Target("sm_120", "cuda", 120, 32, 101376),
    Target("gfx942", "hip", "gfx942", 64, 65536),
)


def target_of(device: torch.device) -> Target:
    """The target whose configurations a device runs: for NVIDIA the latest that is not newer than the device."""
    if torch.version.hip is not None:
        return TARGETS[-1]
    if device.type != "cuda":  # the interpreter has no limits; any configuration will do
        return TARGETS[0]
    major, minor = torch.cuda.get_device_capability(device)
    older = [target for target in TARGETS if target.backend == "cuda" and int(target.arch) <= 10 * major + minor]
    return older[-1]
