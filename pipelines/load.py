"""From what the user calls a model to a pipeline in memory. Safetensors only: no pickle is ever opened."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..accel.errors import UnsupportedModel
from .errors import BadInput, JobFailed, near
from .names import DENOISERS, HUB_ID, PICKLES, expanded

BUNDLED = Path(__file__).parent / "bundled"
DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Model:
    """A pipeline folder on this machine.

    Attributes:
        name: What the user calls it.
        pipeline: Its class, as `components` (name → library and class) from its model_index.json.
    """

    name: str
    folder: Path
    pipeline: str
    components: dict[str, tuple[str, str]]

    @property
    def denoisers(self) -> dict[str, str]:
        """Component name → class name of every model that denoises."""
        return {name: self.components[name][1] for name in DENOISERS if name in self.components}


def bundled() -> dict[str, Path]:
    """The models that ship with the package."""
    return {path.parent.name: path.parent for path in sorted(BUNDLED.glob("*/model_index.json"))}


def find(name: str, *, variant: str | None = None, weights: bool = True, ask: bool = True) -> Model:
    """Finds a bundled model, a local folder or a Hub id, in this order, and checks that it can be used.

    Only a Hub id may cause a request: for what is not here yet, and whether it has changed. With HF_HUB_OFFLINE set,
    none does. `weights=False` asks the Hub for the configuration files alone, `ask=False` for nothing.

    Raises:
        BadInput: there is no such model, or its weights are pickles.
        UnsupportedModel: a folder without a pipeline, or a pipeline without a denoiser; the message says what it has.
    """
    folder = bundled().get(name) or _local(name) or _from_hub(name, variant, weights, ask)
    model = _read(name, folder)
    if weights:
        _refuse_pickles(model)
    return model


def load(model: Model, *, dtype: torch.dtype, variant: str | None = None) -> Any:
    """The Diffusers pipeline in `model.folder`, on the CPU."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    if model.folder.parent == BUNDLED:
        # Diffusers remarks that the small autoencoder is not the usual class; here that is meant.
        logging.set_verbosity_error()
    try:
        return DiffusionPipeline.from_pretrained(
            model.folder, dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # whatever a damaged folder makes its many readers stumble over
        raise JobFailed(f"{model.name} could not be loaded: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def pipeline_class(model: Model) -> type | None:
    """The class of its pipeline; None where Diffusers does not have it, which `load` says better."""
    import diffusers

    return getattr(diffusers, model.pipeline, None)


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the accelerator of this machine where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device {name}: no such device. Try cpu, cuda, cuda:0 or mps.") from None
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise BadInput(f"--device {name}: this machine has {accelerator or 'no accelerator'}.")
    if device.index is not None and device.index >= max(1, torch.accelerator.device_count()):
        raise BadInput(f"--device {name}: this machine has {torch.accelerator.device_count()} of them, from 0.")
    return device


def pick_dtype(name: str, device: torch.device, model: Model) -> torch.dtype:
    """`auto` is float32 on the CPU; elsewhere what the weights were published in: float16 U-Nets, bfloat16 DiTs."""
    if name != "auto":
        if name not in DTYPES:
            raise BadInput(f"no dtype {name!r}: there is {', '.join(DTYPES)}.")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if "unet" in model.denoisers else torch.bfloat16


def _local(name: str) -> Path | None:
    path = expanded(name)
    if path.suffix.lower() in PICKLES:
        raise BadInput(
            f"{name} is a pickle checkpoint, which can run code when it is opened; only safetensors are read."
        )
    if path.is_dir():
        return path
    if path.is_file():
        raise BadInput(
            f"{name} is a file; --model takes a pipeline folder. For a single-file checkpoint, write one with "
            "StableDiffusionPipeline.from_single_file(…).save_pretrained(FOLDER)."
        )
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return None
    folders = [other.name for other in path.parent.glob("*/")] if path.parent.is_dir() else []
    if close := difflib.get_close_matches(path.name, folders, n=3, cutoff=0.7):
        hint = f" Did you mean {' or '.join(str(path.with_name(other)) for other in close)}?"
    else:
        hint = near(name, bundled())
    raise BadInput(f"no model {name}: neither bundled nor a folder.{hint}")


def _from_hub(name: str, variant: str | None, weights: bool, ask: bool) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    from ..accel.methods.checkpoints import in_cache

    if not ask and in_cache(name, "model_index.json") is None:
        where = "neither a folder here nor in the Hub's cache"
        raise BadInput(f"no model {name}: {where}; only --model {name} downloads it.")
    try:
        offline = constants.HF_HUB_OFFLINE or not ask
        if not weights:
            return Path(snapshot_download(name, allow_patterns=["*.json"], local_files_only=offline))
        return Path(DiffusionPipeline.download(name, use_safetensors=True, variant=variant, local_files_only=offline))
    except (OSError, ValueError) as error:
        if not ask:
            raise BadInput(f"{name} is not whole in the Hub's cache; only --model {name} downloads it.") from error
        if constants.HF_HUB_OFFLINE:
            where = "neither a folder here nor in the Hub's cache, and HF_HUB_OFFLINE is set"
            raise BadInput(f"no model {name}: {where}.{near(name, bundled())}") from error
        if isinstance(error, GatedRepoError):
            raise BadInput(f"{name} is gated: accept its terms on the Hub, then run `hf auth login`.") from error
        if isinstance(error, RepositoryNotFoundError | EntryNotFoundError):
            where = "neither a folder here nor a pipeline on the Hub"
            raise BadInput(f"no model {name}: {where}.{near(name, bundled())}") from error
        if "safetensors" in str(error):
            raise BadInput(f"{name} has no safetensors weights on the Hub; pickle checkpoints are refused.") from error
        raise JobFailed(f"{name} could not be downloaded: {_first_line(error)}") from error


def _read(name: str, folder: Path) -> Model:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        pipeline = index["_class_name"]
    except FileNotFoundError:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UnsupportedModel(f"{name} is no pipeline folder: no model_index.json, found {found}.") from None
    except (ValueError, KeyError, TypeError):
        raise UnsupportedModel(f"{name} is no pipeline folder: its model_index.json names no pipeline.") from None
    if not isinstance(pipeline, str):
        raise UnsupportedModel(f"{name} has a pipeline of its own, which is not run; only those of Diffusers are.")
    components = {
        part: (str(entry[0]), str(entry[1]))
        for part, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }
    if not any(part in components for part in DENOISERS):
        found = ", ".join(f"{part} ({entry[1]})" for part, entry in components.items()) or "no component"
        raise UnsupportedModel(f"{name} ({pipeline}) has no denoiser, neither unet nor transformer: found {found}.")
    return Model(name, folder, pipeline, components)


def _refuse_pickles(model: Model) -> None:
    for part in model.components:
        files = [path.name for path in (model.folder / part).glob("*")]
        pickles = sorted(name for name in files if name.lower().endswith(PICKLES))
        if pickles and not any(name.endswith(".safetensors") for name in files):
            raise BadInput(
                f"{model.name} keeps {part} in the pickle {part}/{pickles[0]}, which can run code when it is opened; "
                "only safetensors are read."
            )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
