"""Whole models, stock against each method, at 1, 4, 16 and 64 times the native area: one denoiser call, and a picture
from prompt to pixels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..accel.errors import UnsupportedModel, WeightsError
from ..accel.methods.base import Config
from ..accel.swap import enabled
from ..pipelines import guidance, load, presets, settings
from ..pipelines.job import Job
from ..pipelines.resolve import native_side
from .registry import Benchmark, Case, Contender, Inputs, Prepared, Unavailable
from .result import Result
from .runner import Progress, run_benchmarks

FACTORS = (1, 2, 4, 8)
QUICK_FACTORS = (1, 2)
DEFAULT_STEPS = 50
PROMPT = "a fox"
# The methods' settings for a picture of a side in pixels.
Configured = Callable[[int], Sequence[Config]]
# From this factor on a picture is drawn in few steps: dense attention would take minutes, and the ratio is the same.
FEW_STEPS_FROM, FEW_STEPS = 8, 3


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
    first step of a run, and then a whole picture with its text encoder and autoencoder; swapping a method in and out is
    not. Cases that do not fit into `budget_s` seconds are left out and named.

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
    native = preset.native_side or native_side(pipe)
    if native is None:
        raise UnsupportedModel(f"{model} does not say for which size it was made, so that it cannot be measured")

    def configured(side: int) -> Sequence[Config]:
        return settings.build({name: preset.settings_of(name, side, side) for name in names})

    about: dict[str, Any] = {"methods": configured, "preset": preset, "native": native}
    benchmarks = [denoiser_benchmark(model, pipe, **about), picture_benchmark(model, pipe, **about)]
    return run_benchmarks(benchmarks, device=where, dtype=kind, quick=quick, progress=progress, budget_s=budget_s)


def denoiser_of(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def denoiser_benchmark(name: str, pipe: Any, *, methods: Configured, preset: presets.Preset, native: int) -> Benchmark:
    """The first call that a pipeline makes to its denoiser."""
    denoiser = denoiser_of(pipe)
    cases = tuple(
        Case(
            label=f"{native * factor} px, {factor}x the native side",
            shape={"side": native * factor},
            device=denoiser.device.type,
            dtypes=(denoiser.dtype,),
            quick=factor in QUICK_FACTORS,
        )
        for factor in FACTORS
    )

    def inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        steps = preset.steps or DEFAULT_STEPS
        return first_call(pipe, pipeline_arguments(pipe, preset, case.shape["side"], steps), seed)

    def call(inputs: Inputs) -> Any:
        return denoiser(*inputs["positional"], **inputs["named"])[0]

    return Benchmark(
        name=name,
        cases=cases,
        make_inputs=inputs,
        contenders=lambda device: _contenders(denoiser, methods, call),
        kind="model",
    )


def picture_benchmark(name: str, pipe: Any, *, methods: Configured, preset: presets.Preset, native: int) -> Benchmark:
    """A picture from prompt to pixels with a pipeline's own defaults and guidance."""
    denoiser = denoiser_of(pipe)
    steps = preset.steps or DEFAULT_STEPS

    def case(factor: int) -> Case:
        few = factor >= FEW_STEPS_FROM and steps > FEW_STEPS
        taken = FEW_STEPS if few else steps
        return Case(
            label=f"a whole picture, {native * factor} px, {factor}x the native side, {taken} steps",
            shape={"side": native * factor, "steps": taken},
            device=denoiser.device.type,
            dtypes=(denoiser.dtype,),
        )

    def inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        return pipeline_arguments(pipe, preset, case.shape["side"], case.shape["steps"])

    def call(inputs: Inputs) -> Any:
        return pipe(**inputs, generator=torch.Generator("cpu").manual_seed(0), output_type="pt").images

    return Benchmark(
        name=name,
        cases=tuple(map(case, FACTORS)),
        make_inputs=inputs,
        contenders=lambda device: _contenders(pipe, methods, call),
        kind="model",
    )


def pipeline_arguments(pipe: Any, preset: presets.Preset, side: int, steps: int) -> dict[str, Any]:
    """Those for a picture, as `attnswap generate` gives them."""
    job = guidance.complete(Job(PROMPT, Path()), pipe, preset.guidance)
    wanted = {
        "prompt": PROMPT,
        "width": side,
        "height": side,
        "num_inference_steps": steps,
        "max_sequence_length": preset.max_sequence_length,
        **guidance.arguments(job, pipe),
    }
    accepted = inspect.signature(pipe.__call__).parameters
    return {name: value for name, value in wanted.items() if name in accepted and value is not None}


class _Reached(Exception):
    """The denoiser is called: there is no need to go on."""


def first_call(pipe: Any, arguments: dict[str, Any], seed: int) -> dict[str, Any]:
    """What `pipe` gives its denoiser in the first step, and the timesteps of the run."""
    seen: dict[str, Any] = {}

    def keep(denoiser: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.update(positional=positional, named=named)
        raise _Reached

    hook = denoiser_of(pipe).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pipe(**arguments, generator=torch.Generator("cpu").manual_seed(seed))
    except _Reached:
        return {**seen, "timesteps": pipe.scheduler.timesteps}
    finally:
        hook.remove()
    raise UnsupportedModel(f"{type(pipe).__name__} did not call its denoiser")


def _contenders(target: Any, methods: Configured, call: Callable[[Inputs], Any]) -> tuple[Contender, ...]:
    """Stock, and each method with the settings for the size of the case."""

    def stock(case: Case, inputs: Inputs) -> Prepared:
        return Prepared(partial(call, inputs))

    def swapped(name: str, case: Case, inputs: Inputs) -> Prepared:
        [config] = [config for config in methods(case.shape["side"]) if config.name == name]
        densities: list[float] = []

        @contextmanager
        def around() -> Iterator[None]:
            with enabled(target, config) as handle:
                if "timesteps" in inputs:  # a denoiser's call without its pipeline
                    handle.set_timesteps(inputs["timesteps"])
                yield
                densities.append(handle.report().density)

        try:
            with around():
                pass
        except (UnsupportedModel, WeightsError) as error:
            raise Unavailable(str(error)) from error
        return Prepared(partial(call, inputs), around=around, density=lambda: densities[-1])

    names = [config.name for config in methods(0)]
    return (Contender("stock", "dense", stock), *(Contender(name, "ours", partial(swapped, name)) for name in names))
