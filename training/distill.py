"""Distillation of LinFusion weights for a U-Net: `attnswap distill linfusion`, one process or `accelerate launch`.

The training is the published one (arXiv 2409.02097, code of `Huage001/LinFusion`): AdamW at a constant rate without
weight decay, uniform timesteps, three squared errors. It differs in the start, which copies the base's projections.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..accel.methods.linfusion_weights import CONFIG, WEIGHTS
from ..pipelines import load, presets, save
from ..pipelines.emoji_reference import Reference, caption
from ..pipelines.errors import BadInput, JobFailed, near
from ..pipelines.resolve import check_side, size_multiple
from .distill_checkpoint import LOSSES, Checkpoint
from .distill_data import NOISE, Example, Order, Pictures, generator, loader, read_captions, read_folder
from .distill_drawing import DEFAULT_STEPS, Sampling, draw_folder
from .distill_inputs import InputMaker
from .distill_linfusion import FULL_MID, SDXL_MID, LinFusionStudent
from .distill_settings import CAPTIONS, TERMS, Settings, flag


@dataclass
class Run:
    """A finished distillation.

    Attributes:
        pipe: the pipeline, its U-Net stock again.
        captions: of the data.
        losses: by step, `{"step", "target", "teacher", "layers"}`.
        seconds: spent in steps, over all parts of the run.
        facts: what else a report should say.
    """

    settings: Settings
    pipe: Any
    sampling: Sampling
    captions: list[str]
    losses: list[dict[str, float]]
    seconds: float
    facts: dict[str, Any]


def distill(
    settings: Settings, *, say: Callable[[str], None] = lambda text: None, progress: bool = False
) -> Run | None:
    """Train and write the weights to `settings.output`; None in all processes but the first.

    Args:
        say: is told what is going on, a line at a time.
        progress: draw bars.

    Raises:
        BadInput, UnsupportedModel: the request cannot be met; nothing was trained.
        JobFailed: a picture could not be drawn or read, the loss is no number, or a file could not be written.
    """
    settings.check()
    accelerator = _accelerator(settings)
    checkpoint = Checkpoint(settings.output / "checkpoint")
    if accelerator.is_main_process:
        _check_output(settings, checkpoint, accelerator.num_processes)
    else:
        say, progress = (lambda text: None), False
    model = load.find(settings.model, variant=settings.variant)
    if "unet" not in model.denoisers:
        has = ", ".join(f"{part} ({kind})" for part, kind in model.denoisers.items())
        raise BadInput(f"{settings.model}: LinFusion is for U-Nets, it has {has}.")
    examples, captions = _source(settings, model, progress)
    trainer = _Trainer(settings, model, accelerator, checkpoint, say, progress)
    examples = examples or trainer.drawn(captions)
    trainer.train(examples)
    return trainer.finish(examples) if accelerator.is_main_process else None


class _Trainer:
    def __init__(
        self,
        settings: Settings,
        model: load.Model,
        accelerator: Any,
        checkpoint: Checkpoint,
        say: Callable[[str], None],
        progress: bool,
    ) -> None:
        self.settings, self.accelerator, self.checkpoint = settings, accelerator, checkpoint
        self.say, self.progress = say, progress
        dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[accelerator.mixed_precision]
        self.pipe = load.load(model, dtype=dtype, variant=settings.variant).to(accelerator.device)
        self.pipe.set_progress_bar_config(disable=True)
        preset = presets.read(model.folder)
        native = preset.native_side or self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        self.sampling = Sampling(settings.size or native, preset.steps or DEFAULT_STEPS, preset.guidance)
        check_side("--size", self.sampling.side, size_multiple(self.pipe))
        self.inputs = InputMaker(
            self.pipe, settings.model, device=accelerator.device, caption_dropout=settings.caption_dropout
        )
        self.mid = settings.mid or (SDXL_MID if self.inputs.is_xl else FULL_MID)
        self.losses: list[dict[str, float]] = []
        self.step, self.seconds = 0, 0.0

    def drawn(self, captions: list[str]) -> list[Example]:
        """The teacher's own pictures of captions, `settings.per_caption` of each."""
        captions = [text for text in captions for _ in range(self.settings.per_caption)]
        folder = self.settings.output / "data"
        self.say(f"the teacher draws {len(captions)} pictures of {self.sampling.side} px into {folder}")
        bar = self._bar("drawing", math.ceil(len(captions) / self.accelerator.num_processes))
        draw_folder(
            self.pipe,
            captions,
            folder,
            self.sampling,
            seed=self.settings.seed,
            batch=self.settings.batch,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            progress=bar.update,
        )
        bar.close()
        self.accelerator.wait_for_everyone()
        return read_folder(folder, progress=self.progress)

    def train(self, examples: list[Example]) -> None:
        from diffusers.training_utils import EMAModel

        settings, accelerator = self.settings, self.accelerator
        if self.inputs.upcast():
            self.say("the autoencoder encodes in float32: this one overflows in float16")
        unet = self.pipe.unet
        student = self.student = LinFusionStudent(unet, mid=self.mid, seed=settings.seed)
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        named = student.named_parameters()
        self.ema = EMAModel(named.values(), decay=settings.ema) if settings.ema else None
        average = None if self.ema is None else dict(zip(named, self.ema.shadow_params, strict=True))
        plain_optimizer = torch.optim.AdamW(named.values(), lr=settings.rate, weight_decay=0.0)
        if self.checkpoint.exists():
            self._resume(named, average, plain_optimizer)
        model, optimizer = accelerator.prepare(unet, plain_optimizer)
        self.say(
            f"{len(examples)} pictures of {self.sampling.side} px, {len(student.shapes)} layers, "
            f"{sum(p.numel() for p in named.values()) / 1e6:.2f} M parameters to train, from step {self.step}, "
            f"on {accelerator.device}"
        )
        weights = torch.tensor(settings.loss_weights, device=accelerator.device)
        batches = self._batches(examples)
        bar = self._bar("distilling", settings.steps)
        bar.update(self.step)
        unsaved: list[dict[str, float]] = []
        began = time.monotonic() - self.seconds

        def write() -> None:
            if accelerator.is_main_process:
                facts: dict[str, Any] = {"step": self.step, "seconds": self.seconds, "settings": settings.fixed()}
                facts["processes"] = accelerator.num_processes
                facts["scaler"] = None if accelerator.scaler is None else accelerator.scaler.state_dict()
                self.checkpoint.write(facts, named, average, plain_optimizer, unsaved)
            unsaved.clear()

        while not self._over():
            seen = torch.zeros(3, device=accelerator.device)
            for micro in range(settings.accumulate):
                try:
                    inputs = self._inputs(batches, self.step * settings.accumulate + micro)
                except JobFailed:
                    if unsaved:
                        write()
                    raise
                with accelerator.accumulate(model):
                    terms = student.losses(model, inputs.noisy, inputs.timesteps, inputs.target, inputs.conditions)
                    accelerator.backward((terms * weights).sum())
                    optimizer.step()
                    optimizer.zero_grad()
                seen += terms.detach() / settings.accumulate
            # All processes must agree on when to stop, hence on the time.
            clock = torch.tensor([time.monotonic() - began], device=accelerator.device)
            *means, self.seconds = accelerator.reduce(torch.cat([seen, clock]), "mean").tolist()
            if not all(map(math.isfinite, means)):
                raise JobFailed(f"the loss is no number at step {self.step + 1}: lower --rate, or train in bf16.")
            self.step += 1
            if self.ema is not None:
                self.ema.step(named.values())
            row = {"step": self.step, **dict(zip(TERMS, means, strict=True))}
            self.losses.append(row)
            unsaved.append(row)
            bar.update(1)
            bar.set_postfix({name: f"{row[name]:.4f}" for name in TERMS}, refresh=False)
            if self.step % settings.save_every == 0:
                write()
                self.say(self._state(settings.save_every))
        if unsaved:
            write()
        bar.close()
        if self.ema is not None:
            self.ema.copy_to(named.values())
        accelerator.wait_for_everyone()
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    def finish(self, examples: list[Example]) -> Run:
        """Write the weights and hand the pipeline back as it was."""
        settings = self.settings
        self.student.save(settings.output, self.student.named_parameters())
        self.student.remove()
        if settings.gradient_checkpointing:
            self.pipe.unet.disable_gradient_checkpointing()
        if self.pipe.vae.dtype != self.inputs.dtype:
            self.pipe.vae.to(self.inputs.dtype)
        pictures = self.step * settings.batch * settings.accumulate * self.accelerator.num_processes
        facts = {
            "mid": self.mid,
            "size": self.sampling.side,
            "examples": len(examples),
            "steps": self.step,
            "pictures": pictures,
            "seconds": round(self.seconds, 1),
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
        }
        captions = [example.caption for example in examples]
        return Run(settings, self.pipe, self.sampling, captions, self.losses, self.seconds, facts)

    def _resume(self, named: Any, average: Any, optimizer: torch.optim.Optimizer) -> None:
        facts = self.checkpoint.read(named, average, optimizer)
        self.step, self.seconds = facts["step"], facts["seconds"]
        if self.ema is not None:
            self.ema.optimization_step = self.step
        if facts["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        if self.accelerator.is_main_process:
            self.losses = self.checkpoint.losses(self.step)
            if missing := self.step - len(self.losses):
                self.say(f"{missing} of {self.step} steps are missing in the damaged {LOSSES}, and so in the report")

    def _batches(self, examples: list[Example]) -> Iterator[Any]:
        order = Order(
            len(examples),
            self.settings.batch,
            seed=self.settings.seed,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            start=self.step * self.settings.accumulate,
        )
        return iter(loader(Pictures(examples, self.sampling.side), order, self.settings.workers))

    def _inputs(self, batches: Iterator[Any], number: int) -> Any:
        try:
            batch = next(batches)
        except JobFailed as error:
            # A worker process hands on the whole traceback as the message.
            raise JobFailed(str(error).strip().splitlines()[-1].removeprefix(f"{JobFailed.__module__}.")) from error
        return self.inputs(batch, generator(self.settings.seed, NOISE, number, self.accelerator.process_index))

    def _over(self) -> bool:
        steps, minutes = self.settings.steps, self.settings.minutes
        return (steps is not None and self.step >= steps) or (minutes is not None and self.seconds >= 60 * minutes)

    def _state(self, last: int) -> str:
        rows = self.losses[-last:]
        means = ", ".join(f"{name} {sum(row[name] for row in rows) / len(rows):.5f}" for name in TERMS)
        return f"step {self.step}, {self.seconds:.0f} s: {means}"

    def _bar(self, what: str, total: int | None) -> Any:
        from tqdm.auto import tqdm

        return tqdm(desc=what, total=total, disable=not self.progress)


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


def _check_output(settings: Settings, checkpoint: Checkpoint, processes: int) -> None:
    output = settings.output
    if output.exists() and not output.is_dir():
        raise BadInput(f"-o {output}: that is a file.")
    ours = {"checkpoint", "data", "report", CONFIG, WEIGHTS}
    # A run killed while writing leaves a part of a file.
    found = sorted(path.name for path in output.glob("*") if not path.match(".*.part"))
    is_run = bool({"checkpoint", "data"} & set(found)) and ours.issuperset(found)
    if settings.resume and not is_run:
        raise BadInput(f"--resume: there is no run in {output}.")
    if is_run and not settings.resume:
        raise BadInput(f"-o {output} holds a run: --resume goes on with it, another folder starts anew.")
    if found and not is_run:
        strange = next((name for name in found if name not in ours), found[0])
        raise BadInput(f"-o {output} is not empty (it has {strange}): give a folder of its own.")
    if checkpoint.exists():
        facts = checkpoint.facts()
        before = facts["settings"]
        for name, value in settings.fixed().items():
            if before.get(name) != value:
                raise BadInput(f"--resume: {flag(name)} was {before.get(name)}, not {value}.")
        if (were := facts.get("processes", processes)) != processes:
            raise BadInput(f"--resume: the number of processes was {were}, not {processes}.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        save.check_writable(output / CONFIG, ".json")
    except OSError as error:
        raise BadInput(f"-o {output} cannot be made ({error.strerror}).") from error
