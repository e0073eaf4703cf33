"""Distillation of a method's weights: `attnswap distill METHOD`, one process or `accelerate launch`.

The trainings are the published ones (LinFusion: arXiv 2409.02097; CLEAR: arXiv 2412.16112, code of `Huage001`): three
squared errors, uniform timesteps, a constant rate. What differs is said in docs/linfusion.md and docs/clear.md.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..pipelines import load, save
from ..pipelines.emoji_reference import Reference, caption
from ..pipelines.errors import BadInput, near
from .distill_checkpoint import Checkpoint
from .distill_clear import ClearMethod
from .distill_data import Example, read_captions, read_folder
from .distill_linfusion import LinFusionMethod
from .distill_method import Method, Say
from .distill_settings import CAPTIONS, ClearSettings, LinFusionSettings, Settings, flag
from .distill_trainer import Run, Trainer

METHODS: dict[type[Settings], type[Method]] = {LinFusionSettings: LinFusionMethod, ClearSettings: ClearMethod}


def distill(settings: Settings, *, say: Say = lambda text: None, progress: bool = False) -> Run | None:
    """Train and write the weights to `settings.output`; None in all processes but the first.

    Args:
        settings: of the kind of the method (`METHODS`).
        say: is told what is going on, a line at a time.
        progress: draw bars.

    Raises:
        BadInput, UnsupportedModel: the request cannot be met; nothing was trained.
        JobFailed: a picture could not be drawn or read, the loss is no number, or a file could not be written.
    """
    settings.check()
    method = METHODS[type(settings)]
    accelerator = _accelerator(settings)
    checkpoint = Checkpoint(settings.output / "checkpoint")
    if accelerator.is_main_process:
        _check_output(settings, method.files, checkpoint, accelerator.num_processes)
    else:
        say, progress = (lambda text: None), False
    model = load.find(settings.model, variant=settings.variant)
    method.check(settings, model)
    examples, captions = _source(settings, model, progress)
    trainer = Trainer(settings, method, model, accelerator, checkpoint, say, progress)
    examples = examples or trainer.drawn(captions)
    trainer.train(examples)
    return trainer.finish(examples) if accelerator.is_main_process else None


def _accelerator(settings: Settings) -> Any:
    from accelerate import Accelerator

    try:
        return Accelerator(
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=settings.accumulate,
            cpu=settings.cpu,
        )
    except ValueError as error:
        raise BadInput(f"--mixed-precision {settings.mixed_precision}: {error}") from error


def _source(settings: Settings, model: load.Model, progress: bool) -> tuple[list[Example], list[str]]:
    """Pictures from a folder, or else captions for which to draw them."""
    if settings.data == CAPTIONS:
        reference = model.folder / "reference"
        if not (reference / "subjects.json").is_file():
            raise BadInput(
                f"--data {CAPTIONS}: {settings.model} comes with none; give a text file, one caption a line."
            )
        known = Reference.load(reference)
        return [], [caption(name, colour) for name in known.names for colour in (None, *known.colours)]
    path = Path(settings.data).expanduser()
    if path.is_file():
        return [], read_captions(path)
    if not path.is_dir() and not path.parent.is_dir():
        raise BadInput(f"--data {settings.data}: no such folder or file, nor the word {CAPTIONS!r}.")
    if not path.is_dir():
        others = [other.name for other in path.parent.iterdir()]
        raise BadInput(f"--data {settings.data}: no such folder or file.{near(path.name, [*others, CAPTIONS])}")
    return read_folder(path, progress=progress), []


def _check_output(settings: Settings, files: tuple[str, ...], checkpoint: Checkpoint, processes: int) -> None:
    output = settings.output
    if output.exists() and not output.is_dir():
        raise BadInput(f"-o {output}: that is a file.")
    ours = ("checkpoint", "data", "report", *files)
    # A run killed while writing leaves a part of a file.
    found = sorted(path.name for path in output.glob("*") if not path.match(".*.part"))
    strange = [name for name in found if not any(fnmatch(name, pattern) for pattern in ours)]
    is_run = bool({"checkpoint", "data"} & set(found)) and not strange
    if settings.resume and not is_run:
        raise BadInput(f"--resume: there is no run in {output}.")
    if is_run and not settings.resume:
        raise BadInput(f"-o {output} holds a run: --resume goes on with it, another folder starts anew.")
    if found and not is_run:
        raise BadInput(f"-o {output} is not empty (it has {[*strange, *found][0]}): give a folder of its own.")
    if checkpoint.exists():
        facts = checkpoint.facts()
        before, now = facts["settings"], settings.fixed()
        for name in {**now, **before}:
            if before.get(name) != now.get(name):
                raise BadInput(f"--resume: {flag(name)} was {before.get(name)}, not {now.get(name)}.")
        if (were := facts.get("processes", processes)) != processes:
            raise BadInput(f"--resume: the number of processes was {were}, not {processes}.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        save.check_writable(output / "report.json", ".json")
    except OSError as error:
        raise BadInput(f"-o {output} cannot be made ({error.strerror}).") from error
