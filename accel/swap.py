"""Swapping attention in and out: `enable`, `disable`, `enabled`, `inspect`, `attn_processors`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from . import auto
from .context import Clock
from .errors import AttnswapWarning, UnsupportedModel
from .families import family_of
from .families.base import attention_layers
from .install import Installation, check_combination, installed_in
from .methods import config_of
from .methods.base import Config
from .report import Inspection, Report

Method = str | Config | Sequence[str | Config]

_DENOISERS = ("unet", "transformer", "transformer_2")


class Handle:
    """What `enable` returns: the way to the report and the way back."""

    def __init__(self, installations: list[Installation], clock: Clock) -> None:
        self._installations = installations
        self._clock = clock

    def report(self) -> Report:
        """What ran since `enable` or `reset`."""
        return Report.of([installation.recorder for installation in self._installations])

    def reset(self) -> None:
        """Forget the run and the counts. New runs are noticed by themselves; this is for measuring."""
        for installation in self._installations:
            installation.reset()

    def set_timesteps(self, timesteps: torch.Tensor | Sequence[float]) -> None:
        """Begin a run in a sampling loop of one's own.

        Args:
            timesteps: exactly those that will be run, such as `scheduler.timesteps`; then the timestep given to the
                model is enough.

        Raises:
            ValueError: if it is not a non-empty list.
        """
        self._clock.set_timesteps(timesteps)

    def disable(self) -> None:
        """Take the method out; outputs are bit-identical to stock again. Calling it twice does nothing more."""
        for installation in self._installations:
            if installed_in(installation.model) is installation:
                installation.remove()

    @property
    def active(self) -> bool:
        """Whether the method is still in place, in at least one denoiser."""
        return any(installed_in(installation.model) is installation for installation in self._installations)

    def __repr__(self) -> str:
        names = ", ".join(" + ".join(i.recorder.methods) + f" on {i.recorder.model}" for i in self._installations)
        return f"<attnswap.Handle {names}{'' if self.active else ', disabled'}>"


def enable(target: Any, method: Method) -> Handle:
    """Swap a method into a pipeline's denoisers, or into a bare denoiser.

    Enabling again replaces what was enabled before.

    Args:
        target: a pipeline, a modular pipeline, or a denoiser such as `pipe.unet`.
        method: a name (`attnswap.methods()`), a configuration, or a list of these; or "auto", which takes what suits
            the model and is installed, and leaves calls dense that are too small for it.

    Raises:
        UnsupportedModel: if the method cannot apply to any layer; nothing has been changed then.
        ValueError: for an unknown method, or methods that cannot be combined.
    """
    planned, clock = _planned(target, method)
    for installation in planned:
        installation.prepare()
    disable(target)
    handle = Handle(planned, clock)
    try:
        for installation in planned:
            installation.install()
    except BaseException:
        handle.disable()
        raise
    return handle


def disable(target: Any) -> None:
    """Undo `enable` on a pipeline or a denoiser; does nothing where nothing is enabled."""
    for model, _ in _denoisers(target):
        if (installation := installed_in(model)) is not None:
            installation.remove()


@contextlib.contextmanager
def enabled(target: Any, method: Method) -> Iterator[Handle]:
    """`enable` for the length of a `with` block, also when it ends in an exception."""
    handle = enable(target, method)
    try:
        yield handle
    finally:
        handle.disable()


def inspect(target: Any, method: Method) -> Inspection:
    """A dry run of `enable`: each attention layer, accelerated or not, and why. Changes nothing.

    Raises:
        UnsupportedModel: as `enable` does.
    """
    planned, _ = _planned(target, method)
    return Inspection(
        model=", ".join(installation.recorder.model for installation in planned),
        method=" + ".join(planned[0].recorder.methods),
        layers=tuple(record.plan for installation in planned for record in installation.recorder.layers.values()),
        remarks=tuple(text for installation in planned for text in installation.recorder.remarks.values()),
    )


def attn_processors(model: nn.Module, method: Method) -> dict[str, Any]:
    """Processors for `model.set_attn_processor`, Diffusers' own road to the same attention.

    The model gets one hook, idle until the processors are set, and the method's weights where it has any; both stay
    until `disable`. What a method does outside attention, such as HiDiffusion's resolution-aware U-Net, cannot come by
    this road; that is said once.

    Args:
        model: a denoiser.
        method: as in `enable`.

    Returns:
        A processor for every key that `set_attn_processor` expects.
    """
    [installation], _ = _planned(model, method)
    model = installation.model
    installation.prepare()
    if (before := installed_in(model)) is not None:
        before.remove()
    try:
        installation.install(passive=True)
    except BaseException:
        installation.remove()
        raise
    for strategy in installation.strategies:
        if beyond := strategy.beyond_attention():
            warnings.warn(
                f"attnswap: processors alone carry no {beyond}; use attnswap.enable for it",
                AttnswapWarning,
                stacklevel=2,
            )
    return {
        f"{name}.processor": installation.slots[name].processor if name in installation.slots else module.processor
        for name, module in attention_layers(model).items()
    }


def _planned(target: Any, method: Method) -> tuple[list[Installation], Clock]:
    """What is to be installed in each denoiser of a target, and the clock that they share."""
    is_auto = isinstance(method, str) and method == auto.AUTO
    configs = [] if is_auto else _configs(method)
    denoisers = _denoisers(target)
    pipeline = None if isinstance(target, nn.Module) else target
    choice = auto.Choice(tuple(configs), "")
    if is_auto:
        choice = auto.choose_for(denoisers[0][0], pipeline)
    clock = Clock()
    planned = [
        Installation(
            model,
            choice.configs,
            clock,
            pipeline=pipeline,
            entry=None if entry is model else entry,
            gate=choice.gate,
        )
        for model, entry in denoisers
    ]
    if choice.why:
        for installation in planned:
            installation.recorder.remarks["auto"] = choice.why
    return planned, clock


def _configs(method: Method) -> list[Config]:
    given: list[Any] = list(method) if isinstance(method, list | tuple) else [method]
    if any(isinstance(entry, str) and entry == auto.AUTO for entry in given):
        raise ValueError("auto chooses by itself: give it alone, not in a list")
    configs = sorted((config_of(entry) for entry in given), key=lambda config: config.name)
    check_combination(configs)
    return configs


def _denoisers(target: Any) -> list[tuple[nn.Module, nn.Module]]:
    """(denoiser, the module that is called for it) of a target; they differ where `torch.compile` wrapped one."""
    if isinstance(target, nn.Module):
        return [(_unwrapped(target), target)]
    found = [(name, getattr(target, name, None)) for name in _DENOISERS]
    denoisers = [(_unwrapped(module), module) for _, module in found if isinstance(module, nn.Module)]
    if not denoisers:
        components = getattr(target, "components", None)
        has = ", ".join(sorted(components)) if isinstance(components, dict) and components else "none"
        raise UnsupportedModel(
            f"{type(target).__name__} has no denoiser ({', '.join(_DENOISERS)}); its components: {has}"
        )
    for model, _ in denoisers:
        family_of(model)
    return denoisers


def _unwrapped(module: nn.Module) -> nn.Module:
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner
