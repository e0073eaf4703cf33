"""What the engine's tests look at: the clock at every denoiser call, and the state that must be as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from attnswap.accel.context import Clock
from attnswap.accel.observe import Call, Observer
from torch import nn

_DENOISERS = ("unet", "transformer", "transformer_2")


class Aborted(Exception):
    """Stands for a stopped run, or one out of memory."""


@dataclass(frozen=True)
class Seen:
    """The clock at one denoiser call."""

    step: int | None
    branch: int
    run: int
    steps: int | None


class Watch:
    """Observers on the denoisers of a pipeline, or on one denoiser, with one clock, and what they see."""

    def __init__(self, target: Any) -> None:
        self.clock = Clock()
        self.calls: list[Seen] = []
        self.abort_at: int | None = None
        pipeline = None if isinstance(target, nn.Module) else target
        found = [target] if pipeline is None else [getattr(target, name, None) for name in _DENOISERS]
        self.observers = [
            Observer(model, self.clock, self._note, pipeline=pipeline) for model in found if model is not None
        ]

    def _note(self, call: Call) -> None:
        self.calls.append(Seen(self.clock.step, self.clock.branch, self.clock.run, self.clock.steps))
        if self.clock.step == self.abort_at:
            raise Aborted

    def remove(self) -> None:
        for observer in self.observers:
            observer.remove()

    def of(self, run: Any, *, abort_at: int | None = None) -> list[Seen]:
        """The calls made by `run()`, which is aborted before the first call of a step if one is given."""
        self.calls, self.abort_at = [], abort_at
        try:
            run()
        except Aborted:
            assert abort_at is not None
        self.abort_at = None
        return self.calls


def steps_of(calls: list[Seen]) -> list[int | None]:
    return [call.step for call in calls]


def branches_of(calls: list[Seen]) -> list[int]:
    return [call.branch for call in calls]


def lengths_of(calls: list[Seen]) -> set[int | None]:
    return {call.steps for call in calls}


def runs_of(calls: list[Seen]) -> set[int]:
    return {call.run for call in calls}


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_state_dict_hooks")


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything about the modules of a model that taking a method out must leave as it was, weights excepted."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name, "class"] = type(module)
        found[name, "attributes"] = frozenset(vars(module))
        found[name, "hooks"] = {kind: dict(vars(module).get(kind) or {}) for kind in _HOOKS}
        found[name, "processor"] = getattr(module, "processor", None)
        found[name, "forward"] = vars(module).get("forward")
        found[name, "diffusers hooks"] = (
            sorted(module._diffusers_hook.hooks) if hasattr(module, "_diffusers_hook") else []
        )
    found["num_upsamplers"] = getattr(model, "num_upsamplers", None)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[Any, tuple[Any, Any]]:
    """Entries that are not the very same: for objects, identity counts."""
    missing = object()
    keys = before.keys() | after.keys()
    return {
        key: (before.get(key, missing), after.get(key, missing))
        for key in keys
        if before.get(key, missing) != after.get(key, missing)
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Checks that a block leaves a model exactly as it found it: anatomy and weights."""
    before, weights = anatomy(model), {name: value.clone() for name, value in model.state_dict().items()}
    yield
    assert differences(before, anatomy(model)) == {}
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
