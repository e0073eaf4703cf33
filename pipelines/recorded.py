"""What a file from somebody else names, and how little of it is opened because it says so.

A picture can name any file of this machine and any repository of the Hub. Nothing is downloaded and no network share is
looked at unless its user repeats the name by a flag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..accel.methods.linfusion import AUTO
from . import fingerprints, load, lora, settings
from .errors import BadInput
from .image_input import check_file
from .job import Job
from .names import HUB_ID, SHOWN, expanded
from .printable import printable


@dataclasses.dataclass(frozen=True)
class Original:
    """A file of which a job came.

    Attributes:
        record: What it remembers, as `save.read_record` gives it.
        changes: What its user asks for otherwise or again, as fields of a `Job`.
    """

    path: Path
    record: dict[str, Any]
    changes: Mapping[str, Any]


def find(job: Job, original: Original) -> tuple[Job, load.Model, str]:
    """The job with its image where it is, its model, and in one line what the file alone asks for; "" for nothing.

    Raises:
        BadInput: something that the file alone names is not on this machine, is on a network share, or is another image
            than it was.
        UnsupportedModel: as `load.find`.
    """
    changes = original.changes
    named = _named(job, changes)
    for what, name in named:
        if name.replace("\\", "/").startswith("//"):
            raise BadInput(f"{original.path} asks for the {what} {_shown(name)}: on a network share nothing is opened.")
    if job.image is not None and "image" not in changes:
        job = dataclasses.replace(job, image=_image(job.image, original))
    try:
        model = load.find(job.model, variant=job.variant, ask="model" in changes)
    except BadInput as error:
        if "model" in changes or "--model" in str(error):
            raise
        # As `attnswap demo` calls the folders of its operator by their names alone.
        raise BadInput(f"{error} If it is in another folder, --model FOLDER says so.") from error
    if "loras" not in changes:
        for adapter in job.loras:
            lora.lora_file(adapter, ask=False)
    for config in _weighed(job, changes):
        _check_weights(config, model)
    asks = ", ".join(f"{what} {_shown(name)}" for what, name in named)
    return job, model, f"the file asks for {asks}." if asks else ""


def _named(job: Job, changes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What only the file names and does not come with attnswap, as (kind, name)."""
    bundled = load.bundled()
    named = [("model", job.model)] if "model" not in changes and job.model not in bundled else []
    if "loras" not in changes:
        named += [("LoRA", str(adapter)) for adapter in job.loras]
    weights = [(f"{config.name} weights", config.weights) for config in _weighed(job, changes)]
    named += [(what, name) for what, name in weights if name != AUTO and name not in bundled]
    if job.image is not None and "image" not in changes:
        named.append(("image", str(job.image)))
    return named


def _weighed(job: Job, changes: Mapping[str, Any]) -> list[Any]:
    """The configurations of methods whose weights only the file names."""
    said = changes.get("methods", {})
    return [
        config
        for config in settings.build(job.methods)
        if getattr(config, "weights", None) is not None and "weights" not in said.get(config.name, {})
    ]


def _check_weights(config: Any, model: load.Model) -> None:
    """
    Raises:
        BadInput: they would have to be downloaded.
    """
    from ..accel.methods import clear_weights, linfusion_weights

    expanded(config.weights)
    if config.name == "clear":
        here = clear_weights.is_here(config.weights, config.radius, config.down_factor)
    elif config.weights == AUTO:
        here = fingerprints.of_weights({config.name: {"weights": AUTO}}, model)[config.name] is not None
    else:
        here = linfusion_weights.is_here(config.weights)
    if not here:
        can = config.weights == AUTO or HUB_ID.fullmatch(config.weights)
        hint = f"; only --set {config.name}.weights={config.weights} downloads them" if can else ""
        raise BadInput(f"the {config.name} weights {_shown(config.weights)} are not on this machine{hint}.")


def _image(image: Path, original: Original) -> Path:
    """The image that the recorded one was made from: where the record says, else beside it.

    Raises:
        BadInput: it is in neither place.
    """
    check_file(image)
    prints = original.record.get("fingerprints")
    known = prints.get("image") if isinstance(prints, dict) else None
    if not isinstance(known, str):  # of an earlier version
        return image
    for path in (image, original.path.parent / image.name):
        if fingerprints.of_file(check_file(path)) == known:
            return path
    raise BadInput(
        f"the image {_shown(str(image))} is not the one that {original.path} was made from; give --image."
        if expanded(image).exists()
        else f"no image {_shown(str(image))} here or beside {original.path}; give --image."
    )


def _shown(name: str) -> str:
    return printable(name, SHOWN)
