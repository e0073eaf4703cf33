"""Whole models: one denoiser call, stock against each method, at the native size and at two and four times the side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..accel.errors import UnsupportedModel
from ..accel.methods.base import Config
from ..accel.swap import enabled
from ..pipelines import load, presets, settings
from .registry import Benchmark, Case, Contender, Inputs, Prepared, Unavailable
from .result import Result
from .runner import Progress, run_benchmarks

FACTORS = (1, 2, 4)
QUICK_FACTORS = (1, 2)
DEFAULT_STEPS = 50
GUIDANCE_BATCH = 2


def run(
    model: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    quick: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Measures the denoiser of `model` (a bundled name, a folder or a Hub id) with every method that applies.

    Each method runs with the settings that the model ships for it. What is timed is the first step of a run, on random
    latents and text; swapping a method in and out is not.

    Raises:
        ValueError: for an unknown model, device or dtype, and for a denoiser that cannot be measured yet.
    """
    found = load.find(model)
    where = load.pick_device(device or "auto")
    kind = load.pick_dtype(dtype or "auto", where, found)
    if "unet" not in found.denoisers:
        raise UnsupportedModel(f"only U-Nets can be measured so far; {model} has {', '.join(found.denoisers.values())}")
    preset = presets.read(found.folder)
    pipe = load.load(found, dtype=kind)
    pipe.scheduler.set_timesteps(preset.steps or DEFAULT_STEPS)
    names = settings.known_methods()
    benchmark = unet_benchmark(
        model,
        pipe.unet.to(where),
        methods=settings.build({name: preset.settings_of(name) for name in names}),
        timesteps=pipe.scheduler.timesteps,
        pixels_per_latent=pipe.vae_scale_factor,
        text_tokens=pipe.tokenizer.model_max_length,
    )
    return run_benchmarks([benchmark], device=where, dtype=kind, quick=quick, progress=progress)


def unet_benchmark(
    name: str,
    unet: Any,
    *,
    methods: Sequence[Config],
    timesteps: torch.Tensor,
    pixels_per_latent: int,
    text_tokens: int,
) -> Benchmark:
    """One call of a `UNet2DConditionModel` for a guidance batch of two."""
    native = unet.config.sample_size
    cases = tuple(
        Case(
            label=f"{native * factor * pixels_per_latent} px, {factor}x the native side",
            shape={"batch": GUIDANCE_BATCH, "latent": [native * factor] * 2, "text_tokens": text_tokens},
            device=unet.device.type,
            dtypes=(unet.dtype,),
            quick=factor in QUICK_FACTORS,
        )
        for factor in FACTORS
    )
    stock = Contender("stock", "dense", partial(_prepare, unet, None, timesteps))
    swapped = [Contender(config.name, "ours", partial(_prepare, unet, config, timesteps)) for config in methods]
    return Benchmark(
        name=name,
        cases=cases,
        make_inputs=partial(_unet_inputs, unet, timesteps),
        contenders=lambda device: (stock, *swapped),
        kind="model",
    )


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


def _prepare(unet: Any, config: Config | None, timesteps: torch.Tensor, case: Case, inputs: Inputs) -> Prepared:
    def call() -> torch.Tensor:
        return unet(**inputs, return_dict=False)[0]

    if config is None:
        return Prepared(call)

    @contextmanager
    def around() -> Iterator[None]:
        with enabled(unet, config) as handle:
            handle.set_timesteps(timesteps)
            yield

    try:
        with around():
            pass
    except UnsupportedModel as error:
        raise Unavailable(str(error)) from error
    return Prepared(call, around=around)
