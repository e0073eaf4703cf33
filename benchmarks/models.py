"""Whole models, stock against each method: one denoiser call, and a picture or a clip from prompt to pixels.

Pictures are measured at 1, 4, 16 and 64 times the native area, clips at 1, 2 and 4 times the native length and at 4
times the native area.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..accel.errors import UnsupportedModel, WeightsError
from ..accel.methods.adaspa import AdaSpa
from ..accel.methods.adaspa_schedule import steps_of_run
from ..accel.methods.base import Config
from ..accel.report import Report
from ..accel.swap import enabled
from ..pipelines import clip, guidance, load, presets, settings
from ..pipelines.job import Job
from ..pipelines.names import DENOISERS
from ..pipelines.resolve import native_side
from .registry import Benchmark, Case, Contender, Inputs, Prepared, Unavailable
from .result import Result
from .runner import Progress, run_benchmarks

FACTORS = (1, 2, 4, 8)
FRAME_FACTORS = (1, 2, 4)
QUICK_FACTORS = (1, 2)
DEFAULT_STEPS = 50
PROMPT = "a fox"
# The methods' settings for a picture or clip of a side in pixels.
Configured = Callable[[int], Sequence[Config]]
# From this factor on a picture is drawn in few steps: dense attention would take minutes, and the ratio is the same.
FEW_STEPS_FROM, FEW_STEPS = 8, 3
# A long clip, too: in so many steps that as large a part of them is dense as in a long run.
FEW_STEPS_OF_CLIPS = 6


@dataclass(frozen=True)
class Size:
    """Of a picture, or of a clip, which has frames.

    Attributes:
        name: what it is to the size that the model was made for.
        steps: at most, for a whole picture or clip; None for as many as the model takes, 0 for none to be made.
        quick: part of a quick run.
    """

    name: str
    width: int
    height: int
    frames: int | None = None
    steps: int | None = None
    quick: bool = False

    @property
    def shape(self) -> dict[str, int]:
        """For `Case.shape`."""
        sides = {"side": self.width} if self.width == self.height else {"width": self.width, "height": self.height}
        return sides if self.frames is None else {**sides, "frames": self.frames}

    def __str__(self) -> str:
        side = f"{self.width}" if self.width == self.height else f"{self.width} x {self.height}"
        frames = "" if self.frames is None else f", {self.frames} frames"
        return f"{side} px{frames}, {self.name}"


def run(
    model: str,
    *,
    methods: Sequence[str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quick: bool = False,
    progress: Progress | None = None,
    budget_s: float | None = None,
) -> Result:
    """Measures `model` (a bundled name, a folder or a Hub id) with `methods`, or every method that applies.

    Each method runs with the settings that the model ships for the size. What is timed is the denoiser's call in the
    first step of a run (for AdaSpa, which is dense there, in its first sparse step), and then a whole picture or clip
    with its text encoder and autoencoder; swapping a method in and out is not. Cases that do not fit into `budget_s`
    seconds are left out and named.

    Raises:
        ValueError: for an unknown model, method, device or dtype, and for a model that does not say its native size.
    """
    names = list(settings.known_methods()) if methods is None else list(methods)
    settings.parse(names, [])
    found = load.find(model)
    where = load.pick_device(device or "auto")
    kind = load.pick_dtype(dtype or "auto", where, found)
    preset = presets.read(found.folder)
    pipe = load.load(found, dtype=kind)
    pipe.to(where).set_progress_bar_config(disable=True)
    sizes = clip_sizes(pipe, preset) if clip.frames_argument(pipe) else picture_sizes(pipe, preset)
    if not sizes:
        raise UnsupportedModel(f"{model} does not say for which size it was made, so that it cannot be measured")

    def configured(side: int) -> Sequence[Config]:
        return settings.build({name: preset.settings_of(name, side, side) for name in names})

    about: dict[str, Any] = {"methods": configured, "preset": preset, "sizes": sizes}
    benchmarks = [denoiser_benchmark(model, pipe, **about), whole_benchmark(model, pipe, **about)]
    return run_benchmarks(benchmarks, device=where, dtype=kind, quick=quick, progress=progress, budget_s=budget_s)


def picture_sizes(pipe: Any, preset: presets.Preset) -> tuple[Size, ...]:
    """None where nothing tells the native one."""
    native = preset.native_side or native_side(pipe) or 0
    return tuple(
        Size(
            f"{factor}x the native side",
            native * factor,
            native * factor,
            steps=FEW_STEPS if factor >= FEW_STEPS_FROM else None,
            quick=factor in QUICK_FACTORS,
        )
        for factor in FACTORS
        if native
    )


def clip_sizes(pipe: Any, preset: presets.Preset) -> tuple[Size, ...]:
    """None where nothing tells the native one."""
    side, frames = preset.native_side, preset.frames or clip.native_frames(pipe)
    native = (side, side) if side else clip.native_size(pipe)
    if native is None or frames is None:
        return ()
    few = {1: None, max(FRAME_FACTORS): FEW_STEPS_OF_CLIPS}
    longer = [
        Size(
            f"{factor}x the native frames",
            *native,
            # The first latent frame is of one frame alone.
            frames=(frames - 1) * factor + 1,
            steps=few.get(factor, 0),
            quick=factor in QUICK_FACTORS,
        )
        for factor in FRAME_FACTORS
    ]
    return (*longer, Size("2x the native side", 2 * native[0], 2 * native[1], frames, steps=0))


def denoiser_of(pipe: Any) -> Any:
    return denoisers_of(pipe)[0]


def denoisers_of(pipe: Any) -> list[Any]:
    found = (getattr(pipe, name, None) for name in DENOISERS)
    return [denoiser for denoiser in found if denoiser is not None]


def denoiser_benchmark(
    name: str, pipe: Any, *, methods: Configured, preset: presets.Preset, sizes: Sequence[Size]
) -> Benchmark:
    """The first call that a pipeline makes to its denoiser; with AdaSpa, its first call of a sparse step."""
    denoiser, steps = denoiser_of(pipe), preset.steps or DEFAULT_STEPS
    by_label = {str(size): size for size in sizes}
    cases = tuple(
        Case(label, size.shape, denoiser.device.type, (denoiser.dtype,), quick=size.quick)
        for label, size in by_label.items()
    )

    def calls(case: Case, seed: int, wanted: Collection[int]) -> dict[int, Inputs]:
        return calls_at(pipe, pipeline_arguments(pipe, preset, by_label[case.label], steps), seed, wanted)

    def inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        return {**calls(case, seed, {1})[1], "seed": seed}

    def call(inputs: Inputs) -> Any:
        return denoiser(*inputs["positional"], **inputs["named"])[0]

    def sparse(config: AdaSpa, case: Case, inputs: Inputs) -> tuple[Inputs, Inputs]:
        step, search = first_sparse_step(config, steps)
        found = calls(case, inputs["seed"], {search, step})
        return found[search], found[step]

    return Benchmark(
        name=name,
        cases=cases,
        make_inputs=inputs,
        contenders=lambda device: _contenders(denoiser, methods, call, sparse),
        kind="model",
    )


def first_sparse_step(config: AdaSpa, steps: int) -> tuple[int, int]:
    """The first step after a search that does not search itself, and the step of that search; counted from 1.

    Raises:
        Unavailable: there is none in a run of so many steps.
    """
    searches = steps_of_run(config.search_steps, steps)
    for step in range(searches[0] + 1, steps + 1):
        if step not in searches:
            return step, max(search for search in searches if search < step)
    at = ", ".join(map(str, searches))
    raise Unavailable(f"a run of {steps} steps that searches at {at} has no step that is sparse and does not search")


def whole_benchmark(
    name: str, pipe: Any, *, methods: Configured, preset: presets.Preset, sizes: Sequence[Size]
) -> Benchmark:
    """A picture or a clip from prompt to pixels with a pipeline's own defaults and guidance."""
    denoiser = denoiser_of(pipe)
    usual = preset.steps or DEFAULT_STEPS
    found: dict[str, tuple[Size, int]] = {}
    for size in sizes:
        steps = usual if size.steps is None else min(size.steps, usual)
        if steps:
            what = "picture" if size.frames is None else "clip"
            found[f"a whole {what}, {size}, {steps} steps"] = size, steps

    def inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        return pipeline_arguments(pipe, preset, *found[case.label])

    def call(inputs: Inputs) -> Any:
        return pipe(**inputs, generator=torch.Generator("cpu").manual_seed(0), output_type="pt")[0]

    return Benchmark(
        name=name,
        cases=tuple(
            Case(label, {**size.shape, "steps": steps}, denoiser.device.type, (denoiser.dtype,))
            for label, (size, steps) in found.items()
        ),
        make_inputs=inputs,
        contenders=lambda device: _contenders(pipe, methods, call),
        kind="model",
    )


def pipeline_arguments(pipe: Any, preset: presets.Preset, size: Size, steps: int) -> dict[str, Any]:
    """Those for a picture or a clip, as `attnswap generate` gives them."""
    job = guidance.complete(Job(PROMPT, Path()), pipe, preset.guidance)
    wanted = {
        "prompt": PROMPT,
        "width": size.width,
        "height": size.height,
        clip.frames_argument(pipe) or "frames": size.frames,
        "num_inference_steps": steps,
        "max_sequence_length": preset.max_sequence_length,
        **guidance.arguments(job, pipe),
    }
    accepted = inspect.signature(pipe.__call__).parameters
    return {name: value for name, value in wanted.items() if name in accepted and value is not None}


class _Reached(Exception):
    """The denoiser is called: there is no need to go on."""


def calls_at(pipe: Any, arguments: dict[str, Any], seed: int, steps: Collection[int]) -> dict[int, Inputs]:
    """What `pipe` gives its denoiser first in each of the steps, counted from 1, and the timesteps of the run.

    Raises:
        UnsupportedModel: it does not come so far, or does not tell when a step ends.
    """
    seen: dict[int, dict[str, Any]] = {}
    step = 1

    def keep(denoiser: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        if step in steps:
            seen.setdefault(step, {"positional": positional, "named": named})
        if len(seen) == len(steps):
            raise _Reached

    def count(*_: Any) -> dict[str, Any]:
        nonlocal step
        step += 1
        return {}

    more = {} if set(steps) == {1} else {"callback_on_step_end": count}
    if not more.keys() <= inspect.signature(pipe.__call__).parameters.keys():
        raise UnsupportedModel(f"{type(pipe).__name__} does not tell when a step ends")
    hooks = [denoiser.register_forward_pre_hook(keep, with_kwargs=True) for denoiser in denoisers_of(pipe)]
    try:
        pipe(**arguments, **more, generator=torch.Generator("cpu").manual_seed(seed))
    except _Reached:
        return {step: {**call, "timesteps": pipe.scheduler.timesteps} for step, call in seen.items()}
    finally:
        for hook in hooks:
            hook.remove()
    raise UnsupportedModel(f"{type(pipe).__name__} did not call its denoiser at step {max(steps)}")


def _contenders(
    target: Any,
    methods: Configured,
    call: Callable[[Inputs], Any],
    sparse: Callable[[AdaSpa, Case, Inputs], tuple[Inputs, Inputs]] | None = None,
) -> tuple[Contender, ...]:
    """Stock, and each method with the settings for the size of the case.

    Args:
        call: of what is timed.
        sparse: the call that searches, which is not timed, and the one that is; None where a search is part of it.
    """

    def stock(case: Case, inputs: Inputs) -> Prepared:
        return Prepared(partial(call, inputs))

    def swapped(name: str, case: Case, inputs: Inputs) -> Prepared:
        side = case.shape.get("side") or min(case.shape["width"], case.shape["height"])
        [config] = [config for config in methods(side) if config.name == name]
        try:
            with enabled(target, config):
                pass
        except (UnsupportedModel, WeightsError) as error:
            raise Unavailable(str(error)) from error
        search, timed = None, inputs
        if sparse and isinstance(config, AdaSpa):
            search, timed = sparse(config, case, inputs)
        densities: list[float] = []

        @contextmanager
        def around() -> Iterator[None]:
            with enabled(target, config) as handle:
                if "timesteps" in timed:  # a denoiser's call without its pipeline
                    handle.set_timesteps(timed["timesteps"])
                if search is not None:
                    call(search)
                yield
                report = handle.report()
                densities.append(report.density if search is None else density_after_search(report))

        return Prepared(partial(call, timed), around=around, density=lambda: densities[-1])

    found = [Contender("stock", "dense", stock)]
    for config in methods(0):
        label = f"{config.name}, a sparse step" if sparse and isinstance(config, AdaSpa) else config.name
        found.append(Contender(label, "ours", partial(swapped, config.name)))
    return tuple(found)


def density_after_search(report: Report) -> float:
    """Of the calls that were not dense; 1 where all were."""
    layers = [layer for denoiser in report.denoisers for layer in denoiser["layers"]]
    dense, warm, pairs = (sum(layer[name] for layer in layers) for name in ("dense_pairs", "warm_pairs", "pairs"))
    return (pairs - warm) / (dense - warm) if dense > warm else 1.0
