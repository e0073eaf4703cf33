"""What a distillation is asked for: its settings, their defaults, and which of them make no sense."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..accel.methods.clear import Clear
from ..pipelines.errors import BadInput

CAPTIONS = "captions"
TERMS = ("target", "teacher", "layers")
# What a resumed run may change; the rest decides what it would have come to.
FREE = ("steps", "minutes", "output", "resume", "save_every", "workers", "cpu", "report_pictures", "report_captions")


@dataclass(frozen=True)
class Settings:
    """A distillation, whatever the method.

    Attributes:
        model: bundled name, folder or Hub id of the teacher.
        output: folder for the weights, the report and the checkpoint.
        data: a folder of pictures with captions, a text file of captions, or "captions" for those a bundled model
            comes with; from captions the teacher draws the pictures itself.
        size: side of the pictures in pixels; None is the model's own.
        steps, minutes: length of the run, earlier parts of a resumed one included; whichever ends first.
        batch: pictures a process takes at once.
        accumulate: such batches a step.
        rate: learning rate, constant.
        clip: largest norm of the gradient; None for any.
        loss_weights: of the three terms of the loss, see `Student.losses`.
        caption_dropout: share of captions left out.
        ema: decay of an average of the weights, which is then what is saved; None for none.
        mixed_precision: "no", "fp16" or "bf16"; the weights that are trained stay float32.
        per_caption: pictures drawn a caption, where the teacher draws.
        resume: go on with the run in `output`.
        report_pictures: pictures drawn for the report.
        report_captions: captions by which a model with reference pictures is measured for it, before and after.
    """

    model: str
    output: Path
    data: str = CAPTIONS
    size: int | None = None
    steps: int | None = None
    minutes: float | None = None
    batch: int = 4
    accumulate: int = 1
    rate: float = 1e-4
    clip: float | None = None
    loss_weights: tuple[float, float, float] = (1.0, 0.5, 0.5)
    caption_dropout: float = 0.0
    ema: float | None = None
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    seed: int = 0
    per_caption: int = 1
    variant: str | None = None
    resume: bool = False
    save_every: int = 500
    workers: int = 0
    cpu: bool = False
    report_pictures: int = 6
    report_captions: int = 24

    def check(self) -> None:
        """Refuse what cannot be run.

        Raises:
            BadInput: with the option and its value.
        """
        positive = ("size", "steps", "minutes", "batch", "accumulate", "rate", "clip", "per_caption", "save_every")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise BadInput(f"{flag(name)} {value}: must be above 0.")
        for name in ("workers", "report_pictures", "report_captions"):
            if getattr(self, name) < 0:
                raise BadInput(f"{flag(name)} {getattr(self, name)}: must not be below 0.")
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"--seed {self.seed} is out of range: 0 to 2^63 - 1.")
        if not 0 <= self.caption_dropout < 1:
            raise BadInput(f"--caption-dropout {self.caption_dropout}: must be from 0 up to, not including, 1.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise BadInput(f"--ema {self.ema}: must be between 0 and 1.")
        if len(self.loss_weights) != len(TERMS):
            raise BadInput(f"--loss-weights {','.join(map(str, self.loss_weights))}: three numbers are expected.")
        if not all(0 <= weight < math.inf for weight in self.loss_weights) or not any(self.loss_weights):
            raise BadInput(f"--loss-weights {','.join(map(str, self.loss_weights))}: none below 0, and not all 0.")
        if self.steps is None and self.minutes is None:
            raise BadInput("how long? Give --steps, --minutes or both.")

    def fixed(self) -> dict[str, Any]:
        """What a resumed run must have as it was, as JSON knows it."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
            if name not in FREE
        }


@dataclass(frozen=True)
class LinFusionSettings(Settings):
    """A distillation of LinFusion weights.

    Attributes:
        mid: width of the MLPs ("C", "C/16", a number); None is as published for this kind of model.
    """

    mid: str | None = None


@dataclass(frozen=True)
class ClearSettings(Settings):
    """A distillation of CLEAR weights.

    Attributes:
        radius, down_factor: of the attention that is trained, see `Clear`.
        every: of the model's attention layers, counted from 0, those whose number this divides are compared with the
            teacher's, where they are in single blocks (4, as published: the single blocks 1, 5, … 37 of FLUX.1).
        width, height: sizes of the pictures in pixels, in pairs; each picture takes the one nearest to its shape.
            Without them a folder's pictures keep their shapes, about as large as a square of `size`.
        guidance: what the model is told in training and when it draws, where it takes that as a number.
    """

    clip: float | None = 1.0
    radius: float = 16
    down_factor: int | None = None
    every: int = 4
    width: tuple[int, ...] = ()
    height: tuple[int, ...] = ()
    guidance: float = 3.5

    def check(self) -> None:
        super().check()
        try:
            Clear(radius=self.radius, down_factor=self.down_factor)
        except ValueError as error:
            raise BadInput(str(error)) from error
        if self.every < 1:
            raise BadInput(f"--every {self.every}: must be above 0.")
        if not 0 <= self.guidance < math.inf:
            raise BadInput(f"--guidance {self.guidance}: must not be below 0.")
        if len(self.width) != len(self.height):
            raise BadInput(f"{len(self.width)} numbers for --width, {len(self.height)} for --height: give pairs.")
        for name in ("width", "height"):
            for side in getattr(self, name):
                if side < 1:
                    raise BadInput(f"{flag(name)} {side}: must be above 0.")
        if self.width and self.size is not None:
            raise BadInput("--size goes without --width and --height.")


def flag(name: str) -> str:
    """The option of a setting."""
    return "--" + name.replace("_", "-")
