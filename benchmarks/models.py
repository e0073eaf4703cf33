"""Whole models, stock against each method, at 1, 4, 16 and 64 times the native area: one denoiser call, and a picture
from prompt to pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..accel.errors import UnsupportedModel, WeightsError
from ..accel.methods.base import Config
from ..accel.swap import enabled
from ..pipelines import load, presets, settings
from .registry import Benchmark, Case, Contender, Inputs, Prepared, Unavailable
from .result import Result
from .runner import Progress, run_benchmarks

FACTORS = (1, 2, 4, 8)
QUICK_FACTORS = (1, 2)
DEFAULT_STEPS = 50
GUIDANCE_BATCH = 2
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

    Each method runs with the settings that the model ships for the size. What is timed is the first step of a run, on
    random latents and text, and then a whole picture with its text encoder and autoencoder; swapping a method in and
    out is not. Cases that do not fit into `budget_s` seconds are left out and named.

    Raises:
        ValueError: for an unknown model, method, device or dtype, and for a denoiser that cannot be measured yet.
    """
    names = list(settings.known_methods()) if methods is None else list(methods)
    settings.parse(names, [])
    found = load.find(model)
    where = load.pick_device(device or "auto")
    kind = load.pick_dtype(dtype or "auto", where, found)
    if "unet" not in found.denoisers:
        raise UnsupportedModel(f"only U-Nets can be measured so far; {model} has {', '.join(found.denoisers.values())}")
    preset = presets.read(found.folder)
    pipe = load.load(found, dtype=kind)
    pipe.to(where).set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(preset.steps or DEFAULT_STEPS)

    def configured(side: int) -> Sequence[Config]:
        return settings.build({name: preset.settings_of(name, side, side) for name in names})

    call = unet_benchmark(
        model,
        pipe.unet,
        methods=configured,
        timesteps=pipe.scheduler.timesteps,
        pixels_per_latent=pipe.vae_scale_factor,
        text_tokens=pipe.tokenizer.model_max_length,
    )
    picture = picture_benchmark(model, pipe, methods=configured, preset=preset)
    benchmarks = [call, picture]
    return run_benchmarks(benchmarks, device=where, dtype=kind, quick=quick, progress=progress, budget_s=budget_s)


def unet_benchmark(
    name: str,
    unet: Any,
    *,
    methods: Configured,
    timesteps: torch.Tensor,
    pixels_per_latent: int,
    text_tokens: int,
) -> Benchmark:
    """One call of a `UNet2DConditionModel` for a guidance batch of two."""
    native = unet.config.sample_size
    cases = tuple(
        Case(
            label=f"{native * factor * pixels_per_latent} px, {factor}x the native side",
            shape={
                "batch": GUIDANCE_BATCH,
                "latent": [native * factor] * 2,
                "side": native * factor * pixels_per_latent,
                "text_tokens": text_tokens,
            },
            device=unet.device.type,
            dtypes=(unet.dtype,),
            quick=factor in QUICK_FACTORS,
        )
        for factor in FACTORS
    )

    def call(inputs: Inputs) -> Any:
        return unet(**inputs, return_dict=False)[0]

    return Benchmark(
        name=name,
        cases=cases,
        make_inputs=partial(_unet_inputs, unet, timesteps),
        contenders=lambda device: _contenders(unet, methods, timesteps, call),
        kind="model",
    )


def picture_benchmark(name: str, pipe: Any, *, methods: Configured, preset: presets.Preset) -> Benchmark:
    """A picture from prompt to pixels with a pipeline's own defaults and guidance."""
    native = pipe.unet.config.sample_size * pipe.vae_scale_factor
    steps = preset.steps or DEFAULT_STEPS

    def case(factor: int) -> Case:
        few = factor >= FEW_STEPS_FROM and steps > FEW_STEPS
        taken = FEW_STEPS if few else steps
        return Case(
            label=f"a whole picture, {native * factor} px, {factor}x the native side, {taken} steps",
            shape={"side": native * factor, "steps": taken},
            device=pipe.unet.device.type,
            dtypes=(pipe.unet.dtype,),
        )

    def inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        guidance = {} if preset.guidance is None else {"guidance_scale": preset.guidance}
        side, steps = case.shape["side"], case.shape["steps"]
        return {"prompt": PROMPT, "width": side, "height": side, "num_inference_steps": steps, **guidance}

    def call(inputs: Inputs) -> Any:
        return pipe(**inputs, generator=torch.Generator("cpu").manual_seed(0), output_type="pt").images

    return Benchmark(
        name=name,
        cases=tuple(map(case, FACTORS)),
        make_inputs=inputs,
        contenders=lambda device: _contenders(pipe, methods, None, call),
        kind="model",
    )


def _contenders(
    target: Any, methods: Configured, timesteps: torch.Tensor | None, call: Callable[[Inputs], Any]
) -> tuple[Contender, ...]:
    """Stock, and each method with the settings for the size of the case; `timesteps` of a denoiser without pipeline."""

    def stock(case: Case, inputs: Inputs) -> Prepared:
        return Prepared(partial(call, inputs))

    def swapped(name: str, case: Case, inputs: Inputs) -> Prepared:
        [config] = [config for config in methods(case.shape["side"]) if config.name == name]

        @contextmanager
        def around() -> Iterator[None]:
            with enabled(target, config) as handle:
                if timesteps is not None:
                    handle.set_timesteps(timesteps)
                yield

        try:
            with around():
                pass
        except (UnsupportedModel, WeightsError) as error:
            raise Unavailable(str(error)) from error
        return Prepared(partial(call, inputs), around=around)

    names = [config.name for config in methods(0)]
    return (Contender("stock", "dense", stock), *(Contender(name, "ours", partial(swapped, name)) for name in names))


def _unet_inputs(
    unet: Any, timesteps: torch.Tensor, case: Case, dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    config, batch = unet.config, case.shape["batch"]
    inputs: dict[str, Any] = {
        "sample": random(batch, config.in_channels, *case.shape["latent"]),
        "timestep": timesteps[0],
        "encoder_hidden_states": random(batch, case.shape["text_tokens"], config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":  # SDXL: pooled text, and six numbers of sizes and crops
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": random(batch, pooled), "time_ids": random(batch, 6)}
    return inputs
