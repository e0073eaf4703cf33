"""What is to be made, and what a picture or a clip remembers of it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from .clip import parse_fps
from .errors import BadInput
from .lora import Lora

MAX_SIDE = 16384

# What a file remembers of its job; everything else belongs to the machine that made it.
RECORDED: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "negative": (str, type(None)),
    "model": (str,),
    "variant": (str, type(None)),
    "methods": (dict,),
    "width": (int,),
    "height": (int,),
    "steps": (int,),
    "guidance": (float, int),
    "seed": (int,),
    "dtype": (str,),
    "vae_tiling": (bool,),
}
# What pictures of earlier versions do not say, and what they were made with.
ADDED: dict[str, tuple[tuple[type, ...], Any]] = {
    "route": ((str,), "direct"),
    "strengths": ((list, type(None)), None),
    "low_memory": ((bool,), False),
    "true_cfg": ((float, int, type(None)), None),
    "max_sequence_length": ((int, type(None)), None),
    "frames": ((int, type(None)), None),
    "fps": ((str, type(None)), None),
    "window": ((int, type(None)), None),
    "overlap": ((int, type(None)), None),
    "image": ((str, type(None)), None),
    "strength": ((float, int, type(None)), None),
    "loras": ((list,), []),
    "scheduler": ((str, type(None)), None),
    "compile": ((bool,), False),
    "batch": ((dict, type(None)), None),
}
# Where one of these changes, what the preset filled in for the old one no longer holds.
RESOLVES = ("model", "width", "height", "frames", "window", "steps", "route", "image")
OPEN = ("width", "height", "steps", "guidance")
# What is each picture's own where several share a call.
_OWN = ("prompt", "negative", "seed")
# Records of more are none of ours: they would make this machine paint them all.
MAX_COMPANY = 1024
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Companions:
    """What went through the pipeline in one call; in other company, a picture may be rounded differently.

    Attributes:
        index: Which of them the picture is.
        of: The prompt, negative prompt and seed of each.
    """

    index: int
    of: tuple[tuple[str, str | None, int], ...]

    def to_record(self) -> dict[str, Any]:
        return {"index": self.index, "of": [dict(zip(_OWN, each, strict=True)) for each in self.of]}


@dataclass(frozen=True)
class Job:
    """A picture or a clip to make. `None` means: as the model's preset says, else as its pipeline says.

    Attributes:
        output: .png for a picture, .mp4 or .gif for a clip; None names it by time and seed, in the current folder.
        methods: Method name → settings, as `settings.parse` gives them.
        width: Pixels, as `height`.
        dtype: A key of `load.DTYPES` or "auto".
        device: A torch device or "auto".
        cpu_offload: None, "model" or "group", as in `diffusers-cli run`.
        route: How a large picture or a long clip comes about; a key of `routes.ROUTES`.
        strengths: One a stage above the base, each in (0, 1].
        low_memory: More time for less memory; see `low_memory`.
        true_cfg: Scale of guidance by a second call, for pipelines that know it beside `guidance`.
        max_sequence_length: Tokens the prompt is padded or cut to, for pipelines that take it.
        frames: Of a clip.
        fps: Frames a second, exactly.
        window: Frames that the denoiser sees at a time, where the route goes by windows.
        overlap: Frames that a window shares with the one before.
        image: A picture to begin with: image-to-image, or the first frame where the model makes clips of pictures.
        strength: How much of the schedule image-to-image runs, in (0, 1].
        loras: Adapters, all at once.
        scheduler: Class name in Diffusers, in place of the model's own.
        compile: The denoisers by `torch.compile`.
        batch: What shared the call of the pipeline that made it; see `Companions`.
        frames_dir: A folder for the frames of a clip as PNGs; without `output` it is all that is written.
        keep_stages: Leave the pictures of the stages behind.
        asked: What a job that came from a record was asked for, before anything was filled in.
    """

    prompt: str
    output: Path | None = None
    model: str = "emoji-sd"
    variant: str | None = None
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    cpu_offload: str | None = None
    vae_tiling: bool = False
    route: str = "direct"
    strengths: tuple[float, ...] | None = None
    low_memory: bool = False
    true_cfg: float | None = None
    max_sequence_length: int | None = None
    frames: int | None = None
    fps: Fraction | None = None
    window: int | None = None
    overlap: int | None = None
    image: Path | None = None
    strength: float | None = None
    loras: tuple[Lora, ...] = ()
    scheduler: str | None = None
    compile: bool = False
    batch: Companions | None = None
    frames_dir: Path | None = None
    keep_stages: bool = False
    asked: dict[str, Any] | None = None

    def to_record(self) -> dict[str, Any]:
        """The recorded fields as JSON knows them, lists for tuples and text for fractions."""
        fields = {name: getattr(self, name) for name in (*RECORDED, *ADDED)}
        fields["loras"] = [dataclasses.asdict(lora) for lora in self.loras]
        fields["batch"] = self.batch and self.batch.to_record()
        return _plain(fields)


def from_record(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `Job` from what `save.read_record` read, which anybody may have written.

    Raises:
        BadInput: a field is missing or of the wrong type.
    """
    asked = record.get("asked")
    if asked is not None:
        if not isinstance(asked, dict):
            raise BadInput(f"the attnswap metadata does not say how the picture was made: asked is {asked!r}.")
        asked = _plain(_checked(asked, resolved=False))
    return _checked(record, resolved=True) | {"asked": asked}


def again(record: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Job` that makes a recorded picture again, with `changes` (the settings of methods are merged).

    Another model, size, window, number of steps or route is filled in anew from what was asked for; otherwise nothing
    moves but the changes. Strengths stay with their route.

    Raises:
        BadInput: as `from_record`.
    """
    fields = from_record(record)
    if fields["asked"] is None:
        return _changed(fields, changes)
    asked = _changed(_checked(record["asked"], resolved=False), changes)
    anew = any(name in changes and changes[name] != fields[name] for name in RESOLVES)
    return (asked if anew else _changed(fields, changes)) | {"asked": _plain(asked)}


def is_another(record: dict[str, Any], changes: Mapping[str, Any]) -> bool:
    """Whether `changes` ask for another picture than the recorded one; a device, which no record names, does not.

    Raises:
        BadInput: as `from_record`.
    """
    fields = from_record(record)
    return _differ(fields, _changed(fields, changes))


def _changed(fields: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    changed = {**fields, **changes}
    if changed["route"] != fields["route"] and "strengths" not in changes:
        changed["strengths"] = None
    if "methods" in changes:
        stored = fields["methods"]
        merged = {name: {**stored.get(name, {}), **values} for name, values in changes["methods"].items()}
        changed["methods"] = _plain(merged)  # as they are recorded
    if _differ(fields, changed):
        changed["batch"] = None  # another picture has no company to keep
    return changed


def _differ(fields: dict[str, Any], changed: dict[str, Any]) -> bool:
    return any(changed[name] != fields[name] for name in fields)


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return plain


def _checked(record: dict[str, Any], *, resolved: bool) -> dict[str, Any]:
    """The fields by name; what was asked for may leave them open, what was resolved may not."""
    kinds = {**RECORDED, **{name: allowed for name, (allowed, _) in ADDED.items()}}
    fields: dict[str, Any] = {name: record.get(name, ADDED[name][1] if name in ADDED else None) for name in kinds}
    for name, value in fields.items():
        allowed = kinds[name] if resolved or name not in OPEN else (*kinds[name], type(None))
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise BadInput(f"the attnswap metadata does not say how the picture was made: {name} is {value!r}.")
    if not all(isinstance(values, dict) for values in fields["methods"].values()):
        raise BadInput("the attnswap metadata does not say how the picture was made: methods without settings.")
    strengths = fields["strengths"]
    if strengths is not None:
        if not all(isinstance(value, float | int) and not isinstance(value, bool) for value in strengths):
            raise BadInput(f"the attnswap metadata does not say how the picture was made: strengths is {strengths!r}.")
        fields["strengths"] = tuple(strengths)
    if fields["fps"] is not None:
        fields["fps"] = parse_fps(fields["fps"])
    if fields["image"] is not None:
        fields["image"] = Path(fields["image"])
    try:
        fields["loras"] = tuple(Lora(**lora) for lora in fields["loras"])
        if fields["batch"] is not None:
            fields["batch"] = _companions(fields)
    except (TypeError, ValueError) as error:
        raise BadInput(f"the attnswap metadata does not say how the picture was made: {error}.") from error
    return fields


def _companions(fields: dict[str, Any]) -> Companions:
    """
    Raises:
        TypeError, ValueError: not what `Companions.to_record` gives, or not of this job.
    """
    index, of = fields["batch"].get("index"), fields["batch"].get("of")
    if not isinstance(of, list) or not 0 < len(of) <= MAX_COMPANY or type(index) is not int:
        raise ValueError(f"batch is not a list of 1 to {MAX_COMPANY} prompts and seeds with a place in it")
    company = tuple(_companion(each) for each in of)
    if not 0 <= index < len(company) or company[index] != tuple(fields[name] for name in _OWN):
        raise ValueError("batch does not hold this prompt and seed at its place")
    if len({negative is None for _, negative, _ in company}) > 1:
        raise ValueError("batch has a negative prompt for some alone")
    if fields["route"] != "direct" or fields["image"] is not None:
        raise ValueError("batch goes neither by a route nor from an image")
    return Companions(index, company)


def _companion(each: Any) -> tuple[str, str | None, int]:
    prompt, negative, seed = (each.get(name) for name in _OWN) if isinstance(each, dict) else (None, None, None)
    texts = [text for text in (prompt, negative) if text is not None]
    whole = isinstance(prompt, str) and all(isinstance(text, str) and not SURROGATE.search(text) for text in texts)
    if not whole or type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError("batch has what is no prompt or seed")
    return prompt, negative, seed  # type: ignore[return-value]
