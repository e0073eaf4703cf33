"""The models that a server offers, what each can do, and the one that is in memory."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...accel import auto
from ...accel.errors import UnsupportedModel
from ...accel.methods import checkpoints, methods
from ...accel.swap import inspect
from ...pipelines import clip, image_input, load, presets, render, resolve, settings, skeleton, task
from ...pipelines.errors import BadInput
from ...pipelines.job import Job
from ...pipelines.names import HUB_ID, expanded
from ...pipelines.routes.plan import CLIP_ROUTES, ROUTES
from ...pipelines.session import Result, Session
from ...pipelines.task import Task
from .live import SAID, without_folders

DENSE = "dense"


class Offer:
    """A model, as pages and requests know it; most of it is found out when it is first asked for.

    Args:
        label: what it is called.
        model: of the same name, so that no message and no record holds the folder it is in.

    Attributes:
        label, model
    """

    def __init__(self, label: str, model: load.Model) -> None:
        self.label, self.model = label, dataclasses.replace(model, name=label)

    @cached_property
    def preset(self) -> presets.Preset:
        return presets.read(self.model.folder)

    @cached_property
    def clips(self) -> bool:
        return task.makes_clips(self.model)

    @cached_property
    def pipe(self) -> Any:
        """Without weights; it says what the model would do, and is never run.

        Raises:
            UnsupportedModel: it cannot be built.
        """
        return skeleton.skeleton_pipe(self.model)

    @cached_property
    def native(self) -> Job:
        """What is made where nothing but a prompt, or a picture of the native size, is given.

        Raises:
            BadInput: nothing can.
        """
        job = Job("", model=self.label)
        if not self.needs_picture:
            return self._complete(job)
        side = self.preset.native_side or resolve.native_side(self.pipe)
        size = (side, side) if side else clip.native_size(self.pipe) or (512, 512)
        with tempfile.TemporaryDirectory() as folder:
            stand_in = Path(folder) / "picture.png"
            Image.new("RGB", size).save(stand_in)
            complete = self._complete(dataclasses.replace(job, image=stand_in))
        return dataclasses.replace(complete, image=None)

    def _complete(self, job: Job) -> Job:
        return resolve.complete(job, self.pipe, self.preset, torch.float32)[0]

    @cached_property
    def multiple(self) -> int:
        """Pixels of which both sides must be multiples."""
        return clip.size_multiple(self.pipe) if self.clips else resolve.size_multiple(self.pipe)

    @cached_property
    def takes_negative(self) -> bool:
        return "negative_prompt" in signature(self.pipe.__call__).parameters

    @cached_property
    def takes_picture(self) -> bool:
        return self._takes(Job("", model=self.label, image=Path("picture.png")))

    @cached_property
    def needs_picture(self) -> bool:
        return not self._takes(Job("", model=self.label))

    def _takes(self, job: Job) -> bool:
        try:
            image_input.taker(job, self.pipe)
        except BadInput:
            return False
        return True

    @cached_property
    def routes(self) -> tuple[str, ...]:
        """Those that the model can go, "direct" first."""
        if self.needs_picture:  # the others begin with noise
            return ("direct",)
        known = CLIP_ROUTES if self.clips else [route for route in ROUTES if route != "windows"]
        return tuple(route for route in known if self._goes(route))

    def _goes(self, route: str) -> bool:
        try:
            render.check_route(self.pipe, route)
        except BadInput:
            return False
        return True

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """What can be chosen: "dense", "auto", single methods, then pairs such as "hidiffusion+linfusion"."""
        single = [name for name in methods() if name not in self.refusals]
        pairs = [pair for pair in itertools.combinations(single, 2) if self._refusal(pair) is None]
        return (DENSE, auto.AUTO, *single, *("+".join(pair) for pair in pairs))

    @cached_property
    def refusals(self) -> dict[str, str]:
        """Method → in one line, why it does not apply."""
        found = {name: self._refusal((name,)) for name in methods()}
        return {name: why for name, why in found.items() if why is not None}

    def _refusal(self, names: tuple[str, ...]) -> str | None:
        """Why methods cannot act on the model together; None where they can."""
        configs = settings.build({name: self.preset.settings_of(name) for name in names})
        try:
            inspect(self.pipe, configs)
        except UnsupportedModel as error:
            return str(error).partition(";")[0]
        return None


class Shelf:
    """
    Args:
        names: of models, as `load.find` takes them; all that come with attnswap follow.
        job: device, dtype and what else goes for all jobs.
        weights: of methods, as their `weights` setting takes them.

    Raises:
        BadInput, UnsupportedModel: one of them cannot be had, or makes nothing.

    Attributes:
        device: that everything runs on.
    """

    def __init__(self, names: Sequence[str] = (), job: Job = Job(""), weights: Sequence[str] = ()) -> None:  # noqa: B008 - frozen
        self.device = load.pick_device(job.device)
        if job.cpu_offload and self.device.type == "cpu":
            raise BadInput("--cpu-offload: this server runs on the CPU already.")
        self.weights = tuple(weights)
        for name in self.weights:
            _check_weights(name)
        self._job = job
        self._names: dict[str, Offer] = {}
        given = {name: load.find(name, variant=job.variant) for name in dict.fromkeys(names)}
        usual = sorted(load.bundled(), key=lambda name: name != Job.model)  # the default of commands first
        found = {**given, **{name: load.find(name) for name in usual if name not in given}}
        labels = _labels(found)
        # By their folders, as one may be given by two names.
        offers: dict[Path, Offer] = {}
        for name, model in found.items():
            offer = offers.setdefault(model.folder.resolve(), Offer(labels[name], model))
            self._names[name] = offer
            if name in given:
                _ = offer.native  # or there is nothing to offer
        self.offers = tuple(offers.values())
        self._session: Session | None = None
        self._loaded: Offer | None = None

    def offer(self, label: str) -> Offer:
        """
        Raises:
            BadInput: nothing is offered under this name.
        """
        for offer in self.offers:
            if offer.label == label:
                return offer
        raise BadInput(f"no model {str(label)[:100]!r} here; there is {', '.join(each.label for each in self.offers)}.")

    def of_record(self, model: str) -> Offer | None:
        """What a picture calls `model` that may have been made here or by a command; None where it is not offered."""
        known = {**{offer.label: offer for offer in reversed(self.offers)}, **self._names}
        return known.get(model)

    def job(self, offer: Offer, **fields: Any) -> Job:
        """A job for the model, as the operator wants it run, with these fields."""
        fields = {"prompt": "", **fields, "model": offer.label}
        return dataclasses.replace(self._job, **fields)

    def session(self, offer: Offer) -> Session:
        """The model in memory, after the one before was let go. For the worker's thread alone.

        Raises:
            BadInput, UnsupportedModel, JobFailed: as `Session`; none is in memory then.
        """
        if self._session is None or self._loaded is not offer:
            self.close()
            self._session, self._loaded = _Session(self.job(offer), model=offer.model), offer
        return self._session

    def is_free_for(self, offer: Offer) -> bool:
        """Whether no other model is in memory."""
        return self._loaded in (None, offer)

    def close(self) -> None:
        """Frees the memory."""
        if self._session is None:
            return
        self._session.close()
        self._session = self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Session(Session):
    """That tells visitors, and the files that they take away, nothing of the folders of this machine."""

    def plan(self, job: Job) -> Task:
        planned = super().plan(job)
        record = {**planned.record, **_image_alone(planned.record), "asked": _image_alone(planned.record["asked"])}
        return dataclasses.replace(planned, record=record)

    def make(self, tasks: Sequence[Task], **named: Any) -> tuple[Result, ...]:
        try:
            made = super().make(tasks, **named)
        except SAID as error:
            error.args = (without_folders(str(error)),)
            raise
        return tuple(
            dataclasses.replace(result, notices=tuple(map(without_folders, result.notices))) for result in made
        )


def _image_alone(record: dict[str, Any]) -> dict[str, Any]:
    """With the picture to begin with by its name: it is looked for beside the file, too (`recorded.find`)."""
    return {**record, "image": record["image"] and Path(record["image"]).name}


def _labels(models: Mapping[str, load.Model]) -> dict[str, str]:
    """Of each name that was given: a folder's own, with as many of those it is in as tell it from the others."""
    own = {model.folder: name for name, model in models.items() if not expanded(name).is_dir()}
    parts = {
        name: [own[model.folder]] if model.folder in own else list(model.folder.resolve().parts[1:])
        for name, model in models.items()
    }
    labels = {name: each[-1] for name, each in parts.items()}
    for depth in range(2, max(len(each) for each in parts.values()) + 1):
        folders = {name: models[name].folder.resolve() for name in labels}
        taken = Counter(label for label, _ in {(labels[name], folders[name]) for name in labels})
        for name, each in parts.items():
            if taken[labels[name]] > 1:
                labels[name] = "/".join(each[-depth:])
    return labels


def _check_weights(name: str) -> None:
    """
    Raises:
        BadInput: they are not on this machine; once visitors come, nothing is downloaded.
        WeightsError: a file of another kind.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if name in load.bundled() or checkpoints.on_disk(name).exists():
        return
    try:
        snapshot_download(name, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        hint = f": hf download {name} gets them" if HUB_ID.fullmatch(name) else ""
        raise BadInput(f"--weights {name}: there are none on this machine{hint}.") from None
