"""What the training loops of the emoji models are made of: schedule, timesteps, average, checkpoints, CPU threads."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn


class Schedule:
    """How far a run is, by steps or by minutes, whichever ends first, and the learning rate there.

    The rate warms up, then falls along a cosine to a hundredth of its peak. Minutes count over resumed runs too, and a
    resumed run may be given another length: the rate is a function of progress alone.
    """

    def __init__(self, steps: int | None, minutes: float | None, peak: float, warm_up: int = 200):
        if not steps and not minutes:
            raise ValueError("give the length of the run: steps, minutes or both")
        self.steps, self.minutes, self.peak, self.warm_up = steps, minutes, peak, warm_up

    def progress(self, step: int, seconds: float) -> float:
        """0 at the start, 1 or more at the end."""
        by_steps = step / self.steps if self.steps else 0.0
        return max(by_steps, seconds / 60 / self.minutes if self.minutes else 0.0)

    def rate(self, step: int, progress: float) -> float:
        decay = 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress))
        return self.peak * min(1.0, (step + 1) / self.warm_up) * max(0.01, decay)


class Threads:
    """Keeps the number of CPU threads that is fastest at present.

    On shared cores every parallel region waits for its slowest thread, so one thread may beat two. Now and then a few
    steps are timed with each number.
    """

    def __init__(self, device: torch.device, trial_steps: int = 4, every_seconds: float = 90):
        self.choices = range(1, torch.get_num_threads() + 1) if device.type == "cpu" else ()
        self.trial_steps, self.every = trial_steps, every_seconds
        self.timings: dict[int, list[float]] = {}
        self.next_trial: float | None = 0.0  # None while trying
        self.last: float | None = None

    def step(self) -> None:
        """Call once per training step."""
        if len(self.choices) < 2:
            return
        now, current = time.monotonic(), torch.get_num_threads()
        if self.next_trial is None:
            if self.last is not None:
                self.timings.setdefault(current, []).append(now - self.last)
            if len(self.timings.get(current, ())) > self.trial_steps:
                self._next_choice(now)
        elif now >= self.next_trial:
            self.timings, self.next_trial = {}, None
            torch.set_num_threads(self.choices[0])
        self.last = now

    def _next_choice(self, now: float) -> None:
        untried = [count for count in self.choices if count not in self.timings]
        if untried:
            torch.set_num_threads(untried[0])
            return
        # The first step after a change also pays for new kernels, so it does not count.
        torch.set_num_threads(min(self.choices, key=lambda count: sum(self.timings[count][1:])))
        self.next_trial = now + self.every


def draw_timesteps(count: int, total: int, bias: float, device) -> torch.Tensor:
    """Stratified random timesteps `[count]`, uniform ** bias of the way to `total`.

    A bias below 1 favours high noise, where it is decided what the picture shows.
    """
    uniform = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    return (uniform[torch.randperm(count, device=device)].pow(bias) * total).long().clamp(0, total - 1)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move the exponential average of the weights; early on it forgets faster, or it would be the random start."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def save_checkpoint(path: Path, model: nn.Module, average: nn.Module, optimizer, facts: dict) -> None:
    """Weights, averaged weights, optimizer state and `facts` in one safetensors file, replaced in one move."""
    tensors = {}
    for prefix, module in (("model", model), ("average", average)):
        tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    unfinished = path.with_suffix(".unfinished")
    save_file(
        {name: value.contiguous().clone() for name, value in tensors.items()}, unfinished, {"facts": json.dumps(facts)}
    )
    unfinished.replace(path)


def load_checkpoint(path: Path, model: nn.Module | None, average: nn.Module, optimizer=None) -> dict:
    """Fill what is given from a file of `save_checkpoint`; returns its `facts`."""
    tensors = load_file(path)

    def under(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    average.load_state_dict(under("average."))
    if model is not None:
        model.load_state_dict(under("model."))
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            state = under(f"optimizer.{name}.")
            optimizer.state[parameter] = {
                key: value.clone() if key == "step" else torch.empty_like(parameter).copy_(value)
                for key, value in state.items()
            }  # in the parameter's own memory layout: the fused step reads both as flat memory
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["facts"])
