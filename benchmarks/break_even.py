"""From how many tokens on is a method faster than dense attention? Calls of bundled models' denoisers at growing sizes.

    OMP_NUM_THREADS=1 python -m attnswap.benchmarks.break_even --json benchmarks/results/break-even-cpu-DATE.json

Calls without and with a method take turns. On a CPU, what counts is the time that this process had of it, so that it
does not matter what else the machine is doing, and of several calls the fastest. AdaSpa is dense at first and searches,
so that what counts is a run: of each of its kinds of call one is timed, and their times are added up as a run has them,
of the 50 steps that were published and of 4. CLEAR is timed with little text and with the 512 tokens that FLUX gets by
default. `accel/auto.py` holds what was found.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..accel import auto
from ..accel.methods.adaspa import AdaSpa
from ..accel.methods.adaspa_schedule import steps_of_run
from ..accel.methods.base import Config
from ..accel.methods.clear import Clear
from ..accel.methods.hidiffusion import HiDiffusion
from ..accel.methods.linfusion import LinFusion
from ..accel.observe import Call
from ..accel.swap import enabled
from ..pipelines import load, presets
from . import machine
from .models import Size, calls_at, denoiser_of, pipeline_arguments
from .registry import Inputs
from .timing import Clock, CudaClock

ROUNDS = 9
#: That the published search steps are for, and of a distilled model.
STEPS, FEW_STEPS = 50, 4
WITHOUT, CALL = "without", "a call"
FIRST, SPARSE, AGAIN = "dense with the first search", "sparse", "sparse with a later search"


@dataclass(frozen=True)
class Probe:
    """A method on a bundled model.

    Attributes:
        sizes: in pixels a side, and frames of clips; they grow.
        beside: a method that acts with it, against which it is measured in place of dense attention.
        text: tokens of it; those of the model's preset without.
        steps: of a run, of which AdaSpa's calls are counted.
    """

    model: str
    config: Config
    sizes: tuple[tuple[int, int | None], ...]
    beside: Config | None = None
    text: int | None = None
    steps: int = STEPS

    @property
    def name(self) -> str:
        return self.config.name


PROBES = (
    Probe("emoji-sd", LinFusion(), ((64, None), (96, None), (128, None), (192, None))),
    Probe("emoji-sd", LinFusion(), ((96, None), (128, None), (192, None), (256, None)), HiDiffusion(t1=1.0)),
    Probe("emoji-flux", Clear(radius=3, weights="emoji-flux"), ((128, None), (192, None), (256, None))),
    Probe("emoji-flux", Clear(radius=3, weights="emoji-flux"), ((128, None), (192, None), (256, None)), text=512),
    # The published radius, with the model's own weights: the time is the same.
    Probe("emoji-flux", Clear(radius=16), ((256, None), (320, None), (384, None))),
    Probe("emoji-flux", Clear(radius=16), ((320, None), (384, None), (448, None)), text=512),
    Probe("emoji-video", AdaSpa(min_tokens=0), ((96, 1), (96, 5), (96, 9), (96, 17))),
    Probe("emoji-video", AdaSpa(min_tokens=0), ((96, 9), (96, 17), (96, 25)), steps=FEW_STEPS),
)


class ProcessClock:
    """The time that this process computes, in all its threads."""

    def measure(self, call: Callable[[], Any]) -> Callable[[], float]:
        start = time.process_time()
        call()
        elapsed_ms = (time.process_time() - start) * 1e3
        return lambda: elapsed_ms

    def synchronize(self) -> None:
        pass


def crossing(points: Sequence[tuple[int, float]]) -> int | None:
    """The tokens from which a method is the faster one; None if it never was, the smallest size if it always was.

    Args:
        points: tokens and speed-up, by growing tokens. Between two, the speed-up grows as a power of the tokens.
    """
    if points[-1][1] < 1:
        return None
    for (tokens, slower), (more, faster) in reversed(list(pairwise(points))):
        if slower < 1:
            share = math.log(1 / slower) / math.log(faster / slower)
            return math.ceil(tokens * (more / tokens) ** share)
    return points[0][0]


def measure(probe: Probe, *, device: torch.device, rounds: int = ROUNDS, say: Callable[[str], None]) -> dict[str, Any]:
    """Time a method at all its sizes."""
    found = load.find(probe.model)
    preset = presets.read(found.folder)
    pipe = load.load(found, dtype=load.pick_dtype("auto", device, found))
    pipe.to(device).set_progress_bar_config(disable=True)
    denoiser = denoiser_of(pipe)
    clock = CudaClock(device) if device.type == "cuda" else ProcessClock()
    points: list[dict[str, Any]] = []
    for side, frames in probe.sizes:
        arguments = pipeline_arguments(pipe, preset, Size("", side, side, frames), preset.steps or STEPS)
        if probe.text is not None:
            arguments["max_sequence_length"] = probe.text
        inputs = calls_at(pipe, arguments, 0, {1})[1]
        size = _size(denoiser, inputs)
        # As `auto` counts them for a method.
        tokens = auto.tokens_for(probe.name, size)
        times = _times(denoiser, probe, inputs, clock, rounds)
        without_ms, with_ms = _of_a_run(probe, times)
        points.append(
            {
                "tokens": tokens,
                "text": size.text,
                "side": side,
                "frames": frames,
                "without_ms": without_ms,
                "with_ms": with_ms,
                "speed_up": without_ms / with_ms,
                "calls_ms": times,
            }
        )
        say(f"{probe.model}, {probe.name}: {tokens:,} tokens, {without_ms / with_ms:.2f}x")
    return {
        "method": probe.name,
        "model": probe.model,
        "config": probe.config.to_dict(),
        "beside": probe.beside and probe.beside.to_dict(),
        "compared": f"a run of {probe.steps} steps" if isinstance(probe.config, AdaSpa) else "a denoiser call",
        "rounds": rounds,
        "points": points,
        "break_even": crossing([(point["tokens"], point["speed_up"]) for point in points]),
    }


def _size(denoiser: Any, inputs: Inputs) -> auto.Size:
    return auto.size_of(denoiser, Call.of(denoiser, inputs["positional"], inputs["named"]).arguments)


def _times(denoiser: Any, probe: Probe, inputs: Inputs, clock: Clock, rounds: int) -> dict[str, float]:
    """Milliseconds of the fastest call without the method, and of each kind of call with it, after one to warm up."""
    config, timesteps, calls = probe.config, inputs["timesteps"], {CALL: inputs}
    if isinstance(config, AdaSpa):
        config, timesteps = replace(config, search_steps=(1, 3)), torch.linspace(900, 1, 3)
        calls = {kind: _at(inputs, t) for kind, t in zip((FIRST, SPARSE, AGAIN), timesteps, strict=True)}
    others = [] if probe.beside is None else [probe.beside]
    samples: dict[str, list[float]] = {kind: [] for kind in (WITHOUT, *calls)}
    with torch.no_grad():
        for _ in range(rounds + 1):
            readings = {}
            for configs, named in ((others, {WITHOUT: inputs}), ([*others, config], calls)):
                with enabled(denoiser, configs) if configs else nullcontext() as handle:
                    if handle is not None:
                        handle.set_timesteps(timesteps)
                    for name, given in named.items():
                        readings[name] = clock.measure(partial(denoiser, *given["positional"], **given["named"]))
            clock.synchronize()
            for kind, reading in readings.items():
                samples[kind].append(reading())
    return {kind: min(times[1:]) for kind, times in samples.items()}


def _at(inputs: Inputs, timestep: torch.Tensor) -> Inputs:
    """The same call at another timestep."""
    given = inputs["named"]["timestep"]
    return {**inputs, "named": {**inputs["named"], "timestep": timestep.to(given.device).expand(given.shape)}}


def _of_a_run(probe: Probe, times: dict[str, float]) -> tuple[float, float]:
    """Milliseconds without the method and with it, in a run or in one call."""
    dense, steps = times[WITHOUT], probe.steps
    if not isinstance(probe.config, AdaSpa):
        return dense, times[CALL]
    first, *later = steps_of_run(probe.config.search_steps, steps)
    sparse = steps - first - len(later)
    whole = (first - 1) * dense + times[FIRST] + len(later) * times[AGAIN] + sparse * times[SPARSE]
    return steps * dense, whole


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m attnswap.benchmarks.break_even", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True, metavar="PATH")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed at each size (default: %(default)s)")
    options = parser.parse_args(arguments)
    device = load.pick_device(options.device)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": machine.describe_device(device),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "methods": [measure(probe, device=device, rounds=options.rounds, say=print) for probe in PROBES],
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for entry in result["methods"]:
        what = f"{entry['method']} on {entry['model']}, {entry['compared']}"
        print(f"{what}, {entry['points'][0]['text']} text tokens: {entry['break_even']} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
