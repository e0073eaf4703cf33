"""The machine under the figures: its name, the versions, the commit, and the ceilings that it reaches."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__
from .timing import Timed, clock_for, interleave

ROOT = Path(__file__).resolve().parents[1]
# Large enough to fill the chip and to leave its caches, small enough to take about a second.
MATMUL_SIDE = {"cuda": 8192, "cpu": 1536}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
CEILING_SECONDS = 1.0


@dataclass(frozen=True)
class Ceiling:
    """The best that this machine did in this run: a large matrix product of one dtype, and a large copy."""

    flops_per_second: float
    bytes_per_second: float

    def ideal_ms(self, flops: float, num_bytes: float) -> float:
        """The time that the slower of the two would take if nothing else did."""
        return max(flops / self.flops_per_second, num_bytes / self.bytes_per_second) * 1e3


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """Random data, because zeros draw less power and run faster than anything a model computes."""
    side = MATMUL_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    timings = interleave(
        {"matmul": Timed(lambda: left @ right), "copy": Timed(lambda: target.copy_(source))},
        clock_for(device),
        seconds=CEILING_SECONDS,
    )
    copied_bytes = 2 * source.numel() * source.element_size()  # read and written
    return Ceiling(2 * side**3 / timings["matmul"].min_ms * 1e3, copied_bytes / timings["copy"].min_ms * 1e3)


def describe_device(device: torch.device) -> dict[str, str | int | float]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return {
        "type": "cpu",
        "name": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 1,
        # What others had running: asked for before the first case, it says how far to trust the figures.
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else -1,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"attnswap": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "diffusers", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` where it was changed; None outside a checkout of this project."""
    if _git("rev-parse", "--show-toplevel") != str(ROOT):
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
