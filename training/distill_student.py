"""Teacher and student of a distillation in one model: frozen weights, two kinds of attention."""

from __future__ import annotations

import abc
import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..accel.errors import AttnswapWarning
from ..accel.install import installed_in
from ..accel.methods.base import Config
from ..accel.swap import enable


@dataclass(frozen=True)
class Inputs:
    """Arguments of a denoiser call by name, and what it should predict."""

    arguments: dict[str, Any]
    target: Tensor


class Student(abc.ABC):
    """A method with weights to train in a denoiser; everything else is frozen.

    A subclass puts trainable layers into the attention layers of the strategy, and then calls `_watch`.

    Args:
        model: changed in place until `remove`.
        config: of the method, without weights.

    Raises:
        UnsupportedModel: the method does not apply to the model.
    """

    #: The name under which an attention layer holds its trainable layer, which has `published()`.
    child: ClassVar[str]

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model = model.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttnswapWarning)  # that its weights are not distilled yet
            self._handle = enable(model, config)
        self._strategy = cast(Any, installed_in(model)).strategies[0]
        self.attention: dict[str, Any] = self._strategy.attention
        self._outputs: dict[str, Tensor] = {}
        self._recording = False
        self._hooks: list[Any] = []

    def tensors(self) -> dict[str, dict[str, nn.Parameter]]:
        """What is trained: layer → published name → parameter."""
        return {layer: dict(getattr(attn, self.child).published()) for layer, attn in self.attention.items()}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The same by layer and name in one."""
        return {f"{layer}.{name}": p for layer, named in self.tensors().items() for name, p in named.items()}

    @contextlib.contextmanager
    def as_teacher(self) -> Iterator[None]:
        """In this block the model is the stock one, and no gradient is kept.

        Bit for bit, where it is called as it would be without training: one that Accelerate prepared for mixed
        precision runs in autocast as teacher, too.
        """
        self._strategy.active = False
        try:
            with torch.no_grad():
                yield
        finally:
            self._strategy.active = True

    def losses(self, model: Any, inputs: Inputs) -> Tensor:
        """The three terms of the published trainings, mean squared errors `[3]` in fp32: against the data's target,
        the teacher's prediction, and the teacher's output in each layer that is compared, a mean over the layers.

        Args:
            model: what to call for the student: the denoiser, or a wrapper of it for several processes.
        """
        self._recording = True
        try:
            with self.as_teacher():
                taught = self.model(**inputs.arguments).sample
            taught_layers = self._take()
            predicted = model(**inputs.arguments).sample
        finally:
            self._recording = False
            layers = self._take()
        by_layer = [_squared_error(layers[name], taught_layers[name]) for name in layers]
        return torch.stack(
            [_squared_error(predicted, inputs.target), _squared_error(predicted, taught), torch.stack(by_layer).mean()]
        )

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Write the weights in the published layout.

        Raises:
            JobFailed: they could not be written.
        """

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._handle.disable()

    def _watch(self, layers: Iterable[str]) -> None:
        """Compare what these attention layers return."""
        self._hooks = [self.attention[name].register_forward_hook(self._recorder(name)) for name in layers]

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            # Gradient checkpointing calls the layers once more in the backward pass; kept, that would take the memory
            # it saves.
            if self._recording:
                self._outputs[name] = output if isinstance(output, Tensor) else torch.cat(output, 1)

        return record

    def _take(self) -> dict[str, Tensor]:
        taken, self._outputs = self._outputs, {}
        return taken


def _squared_error(first: Tensor, second: Tensor) -> Tensor:
    return F.mse_loss(first.float(), second.float())
