"""With everything else that changes attention: fused projections, slicing, caches, foreign processors, FreeU."""

from __future__ import annotations

import types
from typing import Any

import attnswap
import pytest
import torch
from diffusers import ModularPipeline
from diffusers.hooks import HookRegistry, PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0

from .slim import sample, slim
from .watching import unchanged

WINDOWS = attnswap.HiDiffusion(raunet=False)


def windowed(handle: Any) -> list[str]:
    return [layer["name"] for layer in handle.report().to_dict()["denoisers"][0]["layers"] if layer["accelerated"]]


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for another order of sums, which the steps amplify."""
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-3)


def test_fused_first(pipe: Any) -> None:
    with attnswap.enabled(pipe, "hidiffusion"):
        enabled = sample(pipe)
    pipe.fuse_qkv_projections(vae=False)
    stock = sample(pipe)
    with unchanged(pipe.unet), attnswap.enabled(pipe, "hidiffusion") as handle:
        close(sample(pipe), enabled)
        assert handle.report().density < 1
    assert torch.equal(sample(pipe), stock)


def test_fused_later(pipe: Any) -> None:
    stock, processors = sample(pipe), dict(pipe.unet.attn_processors)
    handle = attnswap.enable(pipe, "hidiffusion")
    enabled, density = sample(pipe), handle.report().density
    pipe.fuse_qkv_projections(vae=False)
    handle.reset()
    close(sample(pipe), enabled)
    assert handle.report().density == pytest.approx(density)
    assert "FusedAttnProcessor2_0 was put in place" in str(handle.report())

    # Unfused, nothing may read the fused weights any more: they are stale as soon as others change.
    pipe.unfuse_qkv_projections(vae=False)
    for module in pipe.unet.modules():
        if hasattr(module, "to_qkv"):
            torch.nn.init.constant_(module.to_qkv.weight, torch.nan)
    assert torch.equal(sample(pipe), enabled)
    handle.disable()
    assert pipe.unet.attn_processors == processors
    assert torch.equal(sample(pipe), stock)


@pytest.mark.parametrize("called", [False, True], ids=["at once", "after a call"])
def test_disabled_while_fused_and_then_unfused(called: bool) -> None:
    pipe = slim("sd15")
    stock, processors = sample(pipe), dict(pipe.unet.attn_processors)
    handle = attnswap.enable(pipe, "hidiffusion")
    pipe.fuse_qkv_projections(vae=False)
    if called:
        sample(pipe)
    handle.disable()
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {FusedAttnProcessor2_0}
    pipe.unfuse_qkv_projections(vae=False)
    assert pipe.unet.attn_processors == processors
    assert torch.equal(sample(pipe), stock)


class Scaled(AttnProcessor2_0):
    """A processor with a parameter of its own, given through `cross_attention_kwargs`."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, strength: float = 1.0, **kwargs: Any) -> Any:
        return strength * super().__call__(attn, hidden_states, *args, **kwargs)


def test_a_foreign_processor_gets_its_own_arguments(pipe: Any) -> None:
    pipe.unet.set_attn_processor(Scaled())
    stock = sample(pipe, side=8, cross_attention_kwargs={"strength": 0.5})
    assert not torch.equal(stock, sample(pipe, side=8))
    with attnswap.enabled(pipe, WINDOWS):
        assert torch.equal(sample(pipe, side=8, cross_attention_kwargs={"strength": 0.5}), stock)
        half = sample(pipe, steps=1, cross_attention_kwargs={"strength": 0.5})
        assert not torch.equal(half, sample(pipe, steps=1))


class Foreign:
    """Somebody's own processor: it is kept, and called on windows."""

    def __init__(self) -> None:
        self.stock = AttnProcessor2_0()
        self.shapes: set[tuple[int, ...]] = set()

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.shapes.add(tuple(hidden_states.shape))
        return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


@pytest.mark.parametrize("order", ["processor first", "method first"])
def test_a_foreign_processor_is_called_on_windows(order: str) -> None:
    pipe, foreign = slim("sd15"), Foreign()
    with attnswap.enabled(pipe, WINDOWS) as handle:
        enabled, names = sample(pipe, steps=1), windowed(handle)

    def put() -> None:
        for name in names:
            pipe.unet.get_submodule(name).set_processor(foreign)

    if order == "processor first":
        put()
        handle = attnswap.enable(pipe, WINDOWS)
    else:
        handle = attnswap.enable(pipe, WINDOWS)
        put()
    close(sample(pipe, steps=1), enabled)
    # Two guidance branches on 16 x 16 tokens, eight channels.
    assert foreign.shapes == {(4 * 2, 16 * 16 // 4, 8)}
    assert "original processor in windows" in str(handle.report())
    handle.disable()
    assert all(pipe.unet.get_submodule(name).processor is foreign for name in names)


@pytest.mark.parametrize("order", ["slicing first", "method first"])
def test_attention_slicing(pipe: Any, order: str) -> None:
    with attnswap.enabled(pipe, WINDOWS):
        enabled = sample(pipe)
    stock = sample(pipe)
    if order == "slicing first":
        pipe.enable_attention_slicing(1)
        handle = attnswap.enable(pipe, WINDOWS)
    else:
        handle = attnswap.enable(pipe, WINDOWS)
        pipe.enable_attention_slicing(1)
    close(sample(pipe), enabled)
    assert handle.report().density < 1
    pipe.disable_attention_slicing()
    close(sample(pipe), enabled)
    handle.disable()
    close(sample(pipe), stock)


def test_freeu(pipe: Any) -> None:
    stock = sample(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with_freeu = sample(pipe)
    handle = attnswap.enable(pipe, "hidiffusion")
    both = sample(pipe)
    pipe.disable_freeu()
    only_ours = sample(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert torch.equal(sample(pipe), both)
    assert not torch.equal(both, only_ours)
    handle.disable()
    assert torch.equal(sample(pipe), with_freeu)
    pipe.disable_freeu()
    assert torch.equal(sample(pipe), stock)


def broadcast(pipe: Any) -> None:
    """Diffusers' attention cache on a U-Net: every other call of a self-attention layer repeats its last output."""
    now: list[float] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: now.append(float(args[1])))
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: now[-1],
    )
    apply_pyramid_attention_broadcast(pipe.unet, config)


@pytest.mark.parametrize("order", ["cache first", "method first"])
@pytest.mark.parametrize("config", [WINDOWS, attnswap.HiDiffusion()], ids=["windows", "hidiffusion"])
def test_a_cache_of_attention_outputs(pipe: Any, config: Any, order: str) -> None:
    with attnswap.enabled(pipe, config) as handle:
        without = sample(pipe, steps=8)
        calls = calls_of(handle)
    if order == "cache first":
        broadcast(pipe)
        handle = attnswap.enable(pipe, config)
    else:
        handle = attnswap.enable(pipe, config)
        broadcast(pipe)
    cached = sample(pipe, steps=8)
    assert cached.isfinite().all()
    assert not torch.equal(cached, without)
    assert 0 < calls_of(handle) < calls, "the cache skips calls of ours"
    HookRegistry.check_if_exists_or_initialize(pipe.unet).reset_stateful_hooks()
    assert torch.equal(sample(pipe, steps=8), cached)
    handle.disable()


def calls_of(handle: Any) -> int:
    return sum(layer["accelerated_calls"] for layer in handle.report().to_dict()["denoisers"][0]["layers"])


def test_a_modular_pipeline_is_a_target() -> None:
    pipe = slim("sdxl")
    modular = ModularPipeline.__new__(ModularPipeline)
    vars(modular).update(unet=pipe.unet, scheduler=pipe.scheduler)
    stock = sample(pipe)
    with unchanged(pipe.unet), attnswap.enabled(modular, "hidiffusion") as handle:
        assert not torch.equal(sample(pipe), stock)
        assert handle.report().to_dict()["denoisers"][0]["calls"] == 3


def test_anything_that_holds_a_denoiser_is_a_target() -> None:
    pipe = slim("sd15")
    holder = types.SimpleNamespace(unet=pipe.unet)
    with attnswap.enabled(holder, "hidiffusion") as handle:
        sample(pipe)
        assert handle.report().density < 1
    attnswap.disable(holder)
