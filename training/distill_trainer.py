"""The loop of a distillation: what a method brings, trained, watched, written to disk, and gone on with."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..accel.methods.base import Config
from ..pipelines import load, presets
from ..pipelines.errors import JobFailed
from .distill_checkpoint import LOSSES, Checkpoint
from .distill_data import NOISE, Example, Order, Pictures, Size, generator, read_folder
from .distill_drawing import Sampling, draw_folder
from .distill_method import Method, Say
from .distill_settings import TERMS, Settings
from .distill_student import Inputs


@dataclass
class Run:
    """A finished distillation.

    Attributes:
        pipe: the pipeline, its denoiser stock again.
        before, after: the method without weights, and with those that were trained.
        captions: of the data.
        losses: by step, `{"step", "target", "teacher", "layers"}`.
        seconds: spent in steps, over all parts of the run.
        facts: what else a report should say.
    """

    settings: Settings
    model: load.Model
    pipe: Any
    before: Config
    after: Config
    sampling: Sampling
    captions: list[str]
    losses: list[dict[str, float]]
    seconds: float
    facts: dict[str, Any]


class Trainer:
    """One process of a distillation."""

    def __init__(
        self,
        settings: Settings,
        method: type[Method],
        model: load.Model,
        accelerator: Any,
        checkpoint: Checkpoint,
        say: Say,
        progress: bool,
    ) -> None:
        self.settings, self.accelerator, self.checkpoint = settings, accelerator, checkpoint
        self.say, self.progress = say, progress
        dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[accelerator.mixed_precision]
        self.pipe = load.load(model, dtype=dtype, variant=settings.variant).to(accelerator.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.model = model
        self.method = method(settings, self.pipe, presets.read(model.folder), device=accelerator.device)
        self.denoiser = getattr(self.pipe, method.part)
        self.losses: list[dict[str, float]] = []
        self.step, self.seconds = 0, 0.0

    def drawn(self, captions: list[str]) -> list[Example]:
        """The teacher's own pictures of captions, `settings.per_caption` of each."""
        captions = [text for text in captions for _ in range(self.settings.per_caption)]
        folder = self.settings.output / "data"
        sizes = _in_words([(sampling.width, sampling.height) for sampling in self.method.samplings])
        self.say(f"the teacher draws {len(captions)} pictures of {sizes} into {folder}")
        bar = self._bar("drawing", math.ceil(len(captions) / self.accelerator.num_processes))
        draw_folder(
            self.pipe,
            captions,
            folder,
            self.method.samplings,
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
        sizes = self.method.sizes(examples)
        self.method.prepare(Pictures(examples, sizes), accelerator, self.say)
        student = self.student = self.method.student()
        if settings.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        named = student.named_parameters()
        self.ema = EMAModel(named.values(), decay=settings.ema) if settings.ema else None
        average = None if self.ema is None else dict(zip(named, self.ema.shadow_params, strict=True))
        plain_optimizer = torch.optim.AdamW(named.values(), lr=settings.rate, weight_decay=0.0)
        if self.checkpoint.exists():
            self._resume(named, average, plain_optimizer)
        model, optimizer = accelerator.prepare(self.denoiser, plain_optimizer)
        self.say(
            f"{len(examples)} pictures of {_in_words(sizes)}, {len(student.attention)} layers, "
            f"{sum(p.numel() for p in named.values()) / 1e6:.2f} M parameters to train, from step {self.step}, "
            f"on {accelerator.device}"
        )
        weights = torch.tensor(settings.loss_weights, device=accelerator.device)
        batches = self.method.batches(self._order(sizes))
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
                    terms = student.losses(model, inputs)
                    accelerator.backward((terms * weights).sum())
                    if settings.clip is not None and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(list(named.values()), settings.clip)
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
        self.student.save(settings.output)
        self.student.remove()
        if settings.gradient_checkpointing:
            self.denoiser.disable_gradient_checkpointing()
        self.method.restore()
        facts = {
            **self.method.facts(),
            "examples": len(examples),
            "steps": self.step,
            "pictures": self.step * settings.batch * settings.accumulate * self.accelerator.num_processes,
            "seconds": round(self.seconds, 1),
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
        }
        return Run(
            settings=settings,
            model=self.model,
            pipe=self.pipe,
            before=self.method.config(settings, None),
            after=self.method.config(settings, str(settings.output)),
            sampling=self.method.samplings[0],
            captions=[example.caption for example in examples],
            losses=self.losses,
            seconds=self.seconds,
            facts=facts,
        )

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

    def _order(self, sizes: list[Size]) -> Order:
        groups: dict[Size, list[int]] = {}
        for index, size in enumerate(sizes):
            groups.setdefault(size, []).append(index)
        return Order(
            list(groups.values()),
            self.settings.batch,
            seed=self.settings.seed,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            start=self.step * self.settings.accumulate,
        )

    def _inputs(self, batches: Iterator[Any], number: int) -> Inputs:
        return self.method.inputs(
            next(batches), generator(self.settings.seed, NOISE, number, self.accelerator.process_index)
        )

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


def _in_words(sizes: list[Size]) -> str:
    """The sizes, or how many there are."""
    different = [f"{width}x{height}" for width, height in dict.fromkeys(sizes)]
    return f"{' or '.join(different) if len(different) <= 3 else f'{len(different)} sizes'} px"
