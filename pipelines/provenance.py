"""What beside its job made a picture what it is, and what of that is otherwise here and now."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from . import fingerprints
from .pixels import Pixels, compare_pixels
from .printable import printable

if TYPE_CHECKING:
    from .job import Job
    from .load import Model

__all__ = ["Pixels", "compare_pixels", "differences", "surroundings"]

AUTO_BACKEND = "auto"
# More than any name or version has; a record may hold anything.
LONGEST = 100


def surroundings(model: Model, job: Job, device: torch.device) -> dict[str, Any]:
    """What a record says beside the job, as JSON knows it. Nothing is asked of the Hub; what cannot be read is None.

    Args:
        job: with every setting of its methods.
    """
    return {
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "backend": os.environ.get("ATTNSWAP_BACKEND", AUTO_BACKEND),
        "versions": versions(job, device),
        "fingerprints": {
            "model": fingerprints.of_model(model, job.variant),
            "loras": [fingerprints.of_lora(lora) for lora in job.loras],
            "weights": fingerprints.of_weights(job.methods, model),
            "image": fingerprints.of_file(job.image) if job.image else None,
        },
    }


def versions(job: Job, device: torch.device) -> dict[str, str]:
    """Of Python and the packages that have a hand in the pixels of `job`."""
    kind = job.output.suffix.lower() if job.output and job.frames else ""
    used = {
        "torch": True,
        "diffusers": True,
        "transformers": True,
        "peft": bool(job.loras),
        "triton": device.type == "cuda" and bool(job.methods or job.compile),
        "av": kind == ".mp4",
        "pillow": kind == ".gif" or job.image is not None,
    }
    found = {"attnswap": __version__, "python": platform.python_version()}
    if device.type == "cuda" and torch.version.cuda:
        found["cuda"] = torch.version.cuda
    installed = {name: _version(name) for name in used if used[name]}
    return found | {name: version for name, version in installed.items() if version}


@functools.cache  # a batch asks for every row
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """What the hardware calls itself, for a CPU with the instructions that torch makes use of."""
    if named := getattr(torch.get_device_module(device), "get_device_name", None):
        return str(named(device))
    name = _cpu_name()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else name


@functools.cache  # slow where there are hundreds of cores
def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def differences(record: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is otherwise than when a file was made, one thing a line, and fit for a terminal.

    Args:
        record: as `save.read_record` read it; what it does not say, or not as `surroundings` does, is not compared.
        now: a record with the surroundings of the same job here and now.
    """
    return [*_versions(record, now), *_hardware(record, now), *_files(record, now)]


def _versions(record: dict[str, Any], now: dict[str, Any]) -> list[str]:
    before, after = _dict(record, "versions"), _dict(now, "versions")
    return [
        f"{name} {printable(before[name], LONGEST)} then, {after[name]} now"
        for name in after
        if isinstance(before.get(name), str) and before[name] != after[name]
    ]


def _hardware(record: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    of_another_kind = _kind(record) and _kind(record) != _kind(now)
    if of_another_kind or _differ(record, now, "device_name", str):
        found.append(f"{_device(record)} then, {_device(now)} now")
    if not of_another_kind and _differ(record, now, "threads", int):
        found.append(f"{record['threads']} threads of the CPU then, {now['threads']} now")
    if _differ(record, now, "backend", str):
        found.append(f"ATTNSWAP_BACKEND {printable(record['backend'], LONGEST)} then, {now['backend']} now")
    return found


def _files(record: dict[str, Any], now: dict[str, Any]) -> list[str]:
    before, after = _dict(record, "fingerprints"), _dict(now, "fingerprints")
    if not isinstance(before.get("model"), str):
        return ["the model's files are not known to be the same, as the file does not say which they were"]
    found = [_file("the model's files", before["model"], after.get("model"))]
    loras = zip(_list(now, "loras"), _list(before, "loras"), _list(after, "loras"), strict=False)
    found += [_file(f"the files of the LoRA {printable(str(lora['id']), LONGEST)}", *both) for lora, *both in loras]
    weights = _dict(before, "weights")
    found += [
        _file(f"the weights of {name}", weights.get(name), here) for name, here in _dict(after, "weights").items()
    ]
    image = printable(str(now.get("image")), LONGEST)
    found.append(_file(f"the contents of the image {image}", before.get("image"), after.get("image")))
    return [line for line in found if line]


def _file(what: str, then: Any, here: str | None) -> str:
    if not isinstance(then, str) or then == here:
        return ""
    return f"{what} differ" if here else f"{what} are not to be had here"


def _differ(record: dict[str, Any], now: dict[str, Any], name: str, kind: type) -> bool:
    return type(record.get(name)) is kind and type(now.get(name)) is kind and record[name] != now[name]


def _dict(record: dict[str, Any], name: str) -> dict[str, Any]:
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def _list(record: dict[str, Any], name: str) -> list[Any]:
    found = record.get(name)
    return found if isinstance(found, list) else []


def _kind(record: dict[str, Any]) -> str:
    """ "cuda" of "cuda:1"."""
    device = record.get("device")
    return device.partition(":")[0] if isinstance(device, str) else ""


def _device(record: dict[str, Any]) -> str:
    name = record.get("device_name")
    said = f"{record['device']} ({name})" if isinstance(name, str) else str(record["device"])
    return printable(said, LONGEST)
