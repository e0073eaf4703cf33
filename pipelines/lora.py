"""Adapters (LoRA): which file one is, and how it gets into a model."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .diffusers_log import heard_from_diffusers
from .errors import SHOWN, BadInput, JobFailed, near
from .names import DENOISERS, HUB_ID, PICKLES, expanded

KEYS = ("lora_id", "lora_scale", "weight_name", "adapter_name")
# What Diffusers says of every part of a pipeline that an adapter leaves alone.
NOTHING_FOR = "No LoRA keys associated to"
READABLE = 240
USUAL_FILE = "pytorch_lora_weights.safetensors"  # what Diffusers calls it where nobody does


@dataclass(frozen=True)
class Lora:
    """An adapter: a file, a folder or a Hub id, how strongly it counts, and which file where there are several.

    Raises:
        BadInput: one of these is not what it should be.
    """

    id: str
    scale: float = 1.0
    weight_name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise BadInput(f"a LoRA is a file, a folder or a Hub id, not {self.id!r}.")
        number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if not number or not abs(self.scale) <= sys.float_info.max:
            raise BadInput(f"LoRA {self.id}: scale {self.scale!r} is no number.")
        if not isinstance(self.weight_name, str | None):
            raise BadInput(f"LoRA {self.id}: weight_name {self.weight_name!r} is no file name.")

    def __str__(self) -> str:
        return f"{self.id}/{self.weight_name}" if self.weight_name else self.id


def parse_lora(text: str) -> Lora:
    """A path or Hub id as it is, or what `diffusers-cli run --lora` takes: '{"lora_id": …, "lora_scale": 0.8}'.

    `weight_name` picks a file where there are several; `adapter_name` changes nothing here.

    Raises:
        BadInput: no such JSON.
    """
    if not text.lstrip().startswith("{"):
        return Lora(text)
    try:
        given = json.loads(text)
    except ValueError as error:
        raise BadInput(f"LoRA {text!r} is no JSON: {error}.") from None
    for key in given:
        if key not in KEYS:
            raise BadInput(f"LoRA {text!r}: no key {key}.{near(key, KEYS)}")
    if "lora_id" not in given:
        raise BadInput(f"LoRA {text!r}: lora_id is missing.")
    return Lora(given["lora_id"], given.get("lora_scale", 1.0), given.get("weight_name"))


def lora_file(lora: Lora, *, ask: bool = True) -> Path:
    """The safetensors file of an adapter.

    Only a Hub id may cause a request, and only if it is not on this machine already; with `ask=False` none does.

    Raises:
        BadInput: there is none, or more than one to choose from.
    """
    path = expanded(lora.id)
    for name in (lora.id, lora.weight_name or ""):
        if name.lower().endswith(PICKLES):
            raise BadInput(f"LoRA {name} is a pickle, which can run code when it is opened; only safetensors are read.")
    if path.is_dir():
        return path / _chosen([file.name for file in path.iterdir() if file.is_file()], lora)
    if path.is_file():
        return path
    if path.suffix != ".safetensors" and HUB_ID.fullmatch(lora.id) and not lora.id.startswith("."):
        return _from_hub(lora, ask)
    beside = [file.name for file in path.parent.glob("*.safetensors")] if path.parent.is_dir() else []
    raise BadInput(f"no LoRA {lora.id}: neither a file nor a folder here.{near(path.name, beside)}")


def load_loras(pipe: Any, loras: Sequence[Lora], model: str) -> tuple[str, ...]:
    """Puts adapters into `pipe`, all active at once, each at its scale.

    Args:
        model: what the user calls it.

    Returns:
        What of them could not be put to use, as text.

    Raises:
        BadInput: the pipeline takes none, or a file fits none of its layers.
    """
    from diffusers.utils import USE_PEFT_BACKEND

    if not loras:
        return ()
    if not hasattr(pipe, "load_lora_weights"):
        raise BadInput(f"--lora {loras[0]}: {model} is a {type(pipe).__name__}, which takes none.")
    if not USE_PEFT_BACKEND:
        raise BadInput(f"--lora {loras[0]}: adapters need peft, which is not installed or too old: pip install -U peft")
    files = [lora_file(lora) for lora in loras]
    names = [f"lora_{number}" for number in range(len(files))]
    remarks = [text for name, file in zip(names, files, strict=True) for text in _loaded(pipe, name, file, model)]
    pipe.set_adapters(names, [lora.scale for lora in loras])
    return tuple(remarks)


def _chosen(names: Sequence[str], lora: Lora) -> str:
    """The one of the files of a folder or repository that `lora` is."""
    files = sorted(name for name in names if name.endswith(".safetensors"))
    if lora.weight_name:
        if lora.weight_name in names:
            return lora.weight_name
        raise BadInput(f"LoRA {lora.id} has no {lora.weight_name}.{near(lora.weight_name, files)}")
    if USUAL_FILE in files:
        return USUAL_FILE
    if len(files) > 1:
        example = json.dumps({"lora_id": lora.id, "weight_name": files[0]})
        raise BadInput(
            f"LoRA {lora.id} has {len(files)} files, {', '.join(files[:SHOWN])}: name one, as in '{example}'."
        )
    if not files:
        pickles = [name for name in names if name.lower().endswith(PICKLES)]
        found = f"only the pickle {pickles[0]}, which can run code when it is opened" if pickles else "no .safetensors"
        raise BadInput(f"LoRA {lora.id} has {found}.")
    return files[0]


def _from_hub(lora: Lora, ask: bool) -> Path:
    from huggingface_hub import constants, hf_hub_download, list_repo_files, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import httpx

    try:
        folder = Path(snapshot_download(lora.id, local_files_only=True))
        return folder / _chosen([file.relative_to(folder).as_posix() for file in folder.rglob("*")], lora)
    except (LocalEntryNotFoundError, BadInput) as error:
        if not ask:
            where = "neither a file or folder here nor in the Hub's cache"
            raise BadInput(f"no LoRA {lora}: {where}; only --lora {lora.id} downloads it.") from error
        if constants.HF_HUB_OFFLINE:
            where = "neither a file or folder here nor in the Hub's cache, and HF_HUB_OFFLINE is set"
            raise BadInput(f"no LoRA {lora}: {where}.") from error
    try:
        return Path(hf_hub_download(lora.id, _chosen(list_repo_files(lora.id), lora)))
    except GatedRepoError as error:
        raise BadInput(f"LoRA {lora} is gated: accept its terms on the Hub, then run `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise BadInput(f"no LoRA {lora}: neither a file or folder here nor on the Hub.") from error
    except (OSError, httpx.HTTPError) as error:
        raise JobFailed(f"LoRA {lora} could not be downloaded: {_first_line(error)}") from error


def _loaded(pipe: Any, name: str, file: Path, model: str) -> list[str]:
    """Puts one adapter in, by `name`; gives what of it is not used."""
    from safetensors import SafetensorError

    parts = " or ".join(part for part in pipe._lora_loadable_modules if getattr(pipe, part, None) is not None)
    try:
        with heard_from_diffusers() as heard, warnings.catch_warnings():
            # Of a file that fits some layers only; what it changes is said below.
            warnings.filterwarnings("ignore", "While injecting the PEFT adapters", RuntimeWarning)
            pipe.load_lora_weights(str(file), adapter_name=name, use_safetensors=True, local_files_only=True)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"LoRA {file.name} cannot be read: {_first_line(error)}") from error
    except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise BadInput(f"LoRA {file.name} does not fit {model}'s {parts}: {_shortened(str(error))}") from error
    within = [part for part, adapters in pipe.get_list_adapters().items() if name in adapters]
    if not within:
        raise BadInput(f"LoRA {file.name} fits no layer of {model}'s {parts}.")
    left = [part for part in DENOISERS if getattr(pipe, part, None) is not None and part not in within]
    remarks = [f"LoRA {file.name} changes {' and '.join(within)}, not {' or '.join(left)}."] if left else []
    return remarks + [f"LoRA {file.name}: {_shortened(text)}" for text in heard if NOTHING_FOR not in text]


def _shortened(text: str) -> str:
    """One line, of a length that can be read."""
    words = " ".join(text.split())
    return words if len(words) <= READABLE else f"{words[:READABLE]}…"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
