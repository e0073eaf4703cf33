"""Whether files are those that a picture was made with, told without reading them whole."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..accel.errors import UnsupportedModel
from .errors import BadInput, JobFailed
from .names import expanded

if TYPE_CHECKING:
    from .load import Model
    from .lora import Lora

# What a pipeline reads beside its weights. Indices only tell which part of the weights is in which file.
TEXTS = (".json", ".txt", ".model", ".jinja")
INDEX = ".index."
# Files up to the first size are read whole; of larger ones so many pieces, evenly spread, so that what was merged into
# some layers only is seen too.
WHOLE, PIECES, PIECE = 2**20, 64, 2**12


def fingerprint(path: Path, names: tuple[str, ...] | None = None) -> str | None:
    """16 hexadecimal digits of a file or folder; None where it cannot be read.

    Another content changes them, of a file above `WHOLE` very likely, as only pieces of it are read.

    Args:
        names: Of the files in the folder that count; all that models consist of if not given. Links are followed.
    """
    try:
        if path.is_file():
            return _pieces(path)[:16]
        names = names if names is not None else tuple(_files(path, None))
        digest = hashlib.sha256()
        for name in sorted(names):
            digest.update(f"{name}\0{_pieces(path / name)}\n".encode())
        return digest.hexdigest()[:16] if names else None
    except (OSError, ValueError):  # the second for a name with a NUL in it
        return None


def of_file(path: Path) -> str | None:
    """The SHA-256 of a whole file; None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return None


def of_model(model: Model, variant: str | None) -> str | None:
    """Of the files that its pipeline reads; a preset is none of them, as jobs record what it fills in."""
    try:
        parts = [f"{part}/{name}" for part in model.components for name in _files(model.folder / part, variant)]
    except OSError:
        return None
    return fingerprint(model.folder, ("model_index.json", *parts))


def of_lora(lora: Lora) -> str | None:
    """Of the file of an adapter; None where it is not on this machine."""
    from .lora import lora_file

    try:
        return fingerprint(lora_file(lora)) if _on_this_machine(lora.id) else None
    except (BadInput, JobFailed):
        return None


def of_weights(methods: Mapping[str, Mapping[str, Any]], model: Model) -> dict[str, str | None]:
    """Of the weights that methods bring along, by the method."""
    found: dict[str, str | None] = {}
    for method, settings in methods.items():
        if settings.get("weights") is not None:
            path = _weights(method, settings, model)
            found[method] = fingerprint(path) if path else None
    return found


def _files(folder: Path, variant: str | None) -> list[str]:
    """Names of the files in the folder of a component that are read: its texts, and its weights of one variant."""
    names = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    weights = [name for name in names if name.endswith(".safetensors")]
    chosen = [name for name in weights if _variant(name) == variant]
    chosen = chosen or [name for name in weights if _variant(name) is None] or weights
    return [*chosen, *(name for name in names if name.endswith(TEXTS) and INDEX not in name)]


def _variant(name: str) -> str | None:
    """ "fp16" of model.fp16.safetensors and of model.fp16-00001-of-00002.safetensors."""
    return name.removesuffix(".safetensors").partition(".")[2].partition("-")[0] or None


def _pieces(path: Path) -> str:
    found = path.stat()
    return _read(str(path.resolve()), found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=4096)  # a batch asks for every row
def _read(path: str, size: int, changed: int) -> str:
    digest = hashlib.sha256(f"{size}\n".encode())
    with open(path, "rb") as file:
        if size <= WHOLE:
            digest.update(file.read(WHOLE))  # some of the system's have no end, and say that they are empty
        else:
            for number in range(PIECES):
                file.seek(number * (size - PIECE) // (PIECES - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()


def _weights(method: str, settings: Mapping[str, Any], model: Model) -> Path | None:
    from ..accel.methods import checkpoints, clear_weights

    weights = settings["weights"]
    if method == "linfusion" and weights == "auto" and (weights := _automatic(model.folder)) is None:
        return None
    path = _there(checkpoints.BUNDLED / weights / method) or _on_this_machine(weights)
    if method == "clear" and path is not None and path.is_dir():
        file = path / clear_weights.file_name(settings["radius"], settings["down_factor"])
        return file if file.is_file() else path
    return path


@functools.lru_cache(maxsize=16)
def _automatic(folder: Path) -> str | None:
    """What LinFusion's weights "auto" stand for in the model in `folder`."""
    from ..accel.methods import linfusion_weights
    from . import load, skeleton

    try:
        unet = skeleton.skeletons(load.find(str(folder), weights=False))["unet"]
    except (UnsupportedModel, BadInput, KeyError):
        return None
    attention = {name: module for name, module in unet.named_modules() if name.endswith("attn1")}
    return linfusion_weights.automatic(linfusion_weights.layers_of(attention))


def _on_this_machine(name: str) -> Path | None:
    """The file or folder here, or of the Hub's cache, that `name` stands for. Nobody is asked."""
    from huggingface_hub import snapshot_download

    if path := _there(name):
        return path
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not there, or no id
        return None


def _there(name: str | Path) -> Path | None:
    try:
        path = expanded(name)
    except BadInput:  # a name that nothing could have
        return None
    return path if path.exists() else None
