"""What a method brings to its distillation, and what the loop asks of it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch

from ..accel.methods.base import Config
from ..pipelines import load
from ..pipelines.presets import Preset
from .distill_data import Example, Order, Pictures, Size
from .distill_drawing import Sampling
from .distill_student import Inputs, Student

Say = Callable[[str], None]


class Method(abc.ABC):
    """One distillation's own part.

    Args:
        settings: of the method's own kind.
        pipe: the teacher's pipeline, on `device`.
        preset: what the model ships of settings.

    Attributes:
        samplings: how the teacher draws pictures, taken in turn; the first is the report's.

    Raises:
        BadInput: the pipeline is none the method can be distilled for, or sizes that it cannot draw.
    """

    #: The component that is trained.
    part: ClassVar[str]
    #: Patterns of the names that a run of it leaves in the output folder, beside what every run does.
    files: ClassVar[tuple[str, ...]]
    samplings: list[Sampling]

    def __init__(self, settings: Any, pipe: Any, preset: Preset, *, device: torch.device) -> None:
        self.settings, self.pipe, self.device = settings, pipe, device

    @classmethod
    @abc.abstractmethod
    def check(cls, settings: Any, model: load.Model) -> None:
        """Before anything is loaded.

        Raises:
            BadInput: a model the method cannot be distilled for.
        """

    @classmethod
    @abc.abstractmethod
    def config(cls, settings: Any, weights: str | None) -> Config:
        """The method with weights, or as it is without any."""

    @abc.abstractmethod
    def student(self) -> Student:
        """The trainable part, put into the denoiser."""

    @abc.abstractmethod
    def sizes(self, examples: list[Example]) -> list[Size]:
        """Width and height at which each picture is used."""

    def prepare(self, pictures: Pictures, accelerator: Any, say: Say) -> None:
        """Once before the first step, in all processes."""
        self.pictures = pictures

    @abc.abstractmethod
    def batches(self, order: Order) -> Iterator[Any]:
        """What `inputs` takes, batch after batch, without end."""

    @abc.abstractmethod
    def inputs(self, batch: Any, generator: torch.Generator) -> Inputs:
        """A step's inputs; all random numbers come from `generator`, which is on the CPU."""

    def restore(self) -> None:  # noqa: B027 - optional
        """Undo what `prepare` did to the pipeline."""

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a report should say of the run."""
