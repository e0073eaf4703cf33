"""In with one line, out again exactly: `enable`, `disable`, `enabled`, `inspect`, handles."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import attnswap
import pytest
import torch
from attnswap.accel.methods.hidiffusion import HiDiffusionStrategy
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline

from . import tiny, tiny_dit
from .slim import sample, slim
from .watching import Aborted, unchanged

WINDOWS = attnswap.HiDiffusion(raunet=False)
TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def test_enabled_differs_and_disabled_is_stock_again_bit_for_bit(pipe: Any) -> None:
    stock = sample(pipe)
    with unchanged(pipe.unet):
        handle = attnswap.enable(pipe, "hidiffusion")
        assert handle.active
        enabled = sample(pipe)
        assert not torch.equal(enabled, stock)
        assert torch.equal(sample(pipe), enabled), "a second run does as the first"
        handle.disable()
        assert not handle.active
    assert torch.equal(sample(pipe), stock)


def test_at_native_size_enabled_is_stock_bit_for_bit(pipe: Any) -> None:
    stock = sample(pipe, side=8)
    with attnswap.enabled(pipe, "hidiffusion") as handle:
        assert torch.equal(sample(pipe, side=8), stock)
    assert handle.report().density == 1.0


@pytest.mark.parametrize("how", ["handle", "pipeline", "denoiser", "with"])
@pytest.mark.parametrize("bare", [False, True], ids=["pipeline", "denoiser"])
def test_every_way_out_is_complete(how: str, bare: bool) -> None:
    pipe = slim("sd15")
    target = pipe.unet if bare else pipe
    with unchanged(pipe.unet):
        if how == "with":
            with attnswap.enabled(target, "hidiffusion"):
                sample(pipe, steps=1)
        else:
            handle = attnswap.enable(target, "hidiffusion")
            sample(pipe, steps=1)
            {"handle": handle.disable, "pipeline": lambda: attnswap.disable(pipe)}.get(
                how, lambda: attnswap.disable(pipe.unet)
            )()
            assert not handle.active


def test_disabling_twice_or_what_was_never_enabled_does_nothing(pipe: Any) -> None:
    with unchanged(pipe.unet):
        attnswap.disable(pipe)
        handle = attnswap.enable(pipe, "hidiffusion")
        handle.disable()
        handle.disable()
        attnswap.disable(pipe)


def test_enabling_again_replaces(pipe: Any) -> None:
    with attnswap.enabled(pipe, WINDOWS):
        windows_only = sample(pipe)
    with unchanged(pipe.unet):
        first = attnswap.enable(pipe, "hidiffusion")
        second = attnswap.enable(pipe, "hidiffusion")
        third = attnswap.enable(pipe.unet, WINDOWS)
        assert [handle.active for handle in (first, second, third)] == [False, False, True]
        first.disable()
        second.disable()
        assert torch.equal(sample(pipe), windows_only), "an old handle must not take out what replaced it"
        attnswap.disable(pipe)
        assert not third.active


def test_an_exception_in_the_middle_of_a_run_leaves_nothing_behind(pipe: Any) -> None:
    stock = sample(pipe)
    with unchanged(pipe.unet):
        handle = attnswap.enable(pipe, "hidiffusion")
        enabled = sample(pipe)

        def out_of_memory(*_: Any) -> None:
            raise Aborted

        for block in (pipe.unet.mid_block, pipe.unet.up_blocks[0], pipe.unet.conv_out):
            hook = block.register_forward_pre_hook(out_of_memory)
            with pytest.raises(Aborted):
                sample(pipe)
            hook.remove()
        assert torch.equal(sample(pipe), enabled), "nor in the next run"
        hook = pipe.unet.mid_block.register_forward_pre_hook(out_of_memory)
        with pytest.raises(Aborted):
            sample(pipe)
        hook.remove()
        handle.disable()
    assert torch.equal(sample(pipe), stock)


def test_an_exception_in_a_with_block_takes_the_method_out() -> None:
    pipe = slim("sd15")
    with unchanged(pipe.unet), pytest.raises(Aborted), attnswap.enabled(pipe, "hidiffusion"):
        raise Aborted


@pytest.mark.parametrize("method", ["hidifusion", attnswap.HiDiffusion(family="sdxl"), [], ["hidiffusion"] * 2, 3])
def test_what_is_refused_changes_nothing(method: Any) -> None:
    pipe = slim("sd15")
    with unchanged(pipe.unet), pytest.raises((ValueError, TypeError)):
        attnswap.enable(pipe, method)
    handle = attnswap.enable(pipe, WINDOWS)
    with unchanged(pipe.unet), pytest.raises((ValueError, TypeError)):
        attnswap.enable(pipe, method)
    assert handle.active, "what was enabled before stays"


def test_what_fails_half_way_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = slim("sd15")

    def fail(self: Any, *, passive: bool) -> None:
        raise Aborted

    monkeypatch.setattr(HiDiffusionStrategy, "install", fail)
    with unchanged(pipe.unet), pytest.raises(Aborted):
        attnswap.enable(pipe, "hidiffusion")


def test_an_unknown_method_is_met_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no method 'hidifusion'; did you mean hidiffusion"):
        attnswap.enable(slim("sd15"), "hidifusion")
    with pytest.raises(ValueError, match=r"there is .*hidiffusion"):
        attnswap.enable(slim("sd15"), "quantise")
    with pytest.raises(TypeError, match="not int"):
        attnswap.enable(slim("sd15"), 3)


def test_a_combination_that_makes_no_sense_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="hidiffusion is given twice"):
        attnswap.enable(slim("sd15"), ["hidiffusion", attnswap.HiDiffusion(raunet=False)])
    with pytest.raises(ValueError, match="no method given"):
        attnswap.enable(slim("sd15"), [])


def test_the_methods_are_named() -> None:
    assert "hidiffusion" in attnswap.methods()
    assert list(attnswap.methods()) == sorted(attnswap.methods())


def test_unsupported_targets_are_told_what_was_found_and_what_is_known() -> None:
    pipe = slim("sd15")
    pipe.unet = None
    with pytest.raises(attnswap.UnsupportedModel, match=r"StableDiffusionPipeline has no denoiser.*scheduler.*vae"):
        attnswap.enable(pipe, "hidiffusion")
    with pytest.raises(attnswap.UnsupportedModel, match=r"AutoencoderKL is not a denoiser.*UNet2DConditionModel"):
        attnswap.enable(pipe.vae, "hidiffusion")
    with pytest.raises(attnswap.UnsupportedModel, match="object has no denoiser"):
        attnswap.enable(object(), "hidiffusion")
    # A class attnswap knows, in a structure the method does not.
    with pytest.raises(attnswap.UnsupportedModel, match=r"down blocks.*SD 1.5/2.1"):
        attnswap.enable(tiny.sd15_unet(**TWO_LEVELS), "hidiffusion")


def test_hidiffusion_does_not_apply_to_a_transformer() -> None:
    pipe, _ = tiny_dit.sd3()
    with unchanged(pipe.transformer), pytest.raises(attnswap.UnsupportedModel, match="SD3Transformer2DModel"):
        attnswap.enable(pipe, "hidiffusion")


def test_inspect_tells_every_layer_and_changes_nothing(pipe: Any) -> None:
    with unchanged(pipe.unet):
        inspection = attnswap.inspect(pipe, "hidiffusion")
    names = {layer.name for layer in inspection.layers}
    assert {f"{name}.processor" for name in names} == set(pipe.unet.attn_processors)
    chosen = [layer.name for layer in inspection.layers if layer.accelerated]
    assert inspection.accelerated == len(chosen) > 0
    assert all(name.endswith(".attn1") for name in chosen)
    assert all(layer.reason for layer in inspection.layers)
    with attnswap.enabled(pipe, "hidiffusion") as handle:
        ran = handle.report().to_dict()["denoisers"][0]["layers"]
        assert [layer["name"] for layer in ran if layer["accelerated"]] == chosen
        # A dry run on top of what is enabled sees through it.
        assert attnswap.inspect(pipe, "hidiffusion").to_dict() == inspection.to_dict()
    assert f"{len(chosen)} of {len(names)} attention layers" in str(inspection)


def test_diffusers_own_road_gives_the_same_windows_bit_for_bit(pipe: Any) -> None:
    with attnswap.enabled(pipe, WINDOWS):
        windows = sample(pipe)
    stock = sample(pipe)
    unet, saved = pipe.unet, dict(pipe.unet.attn_processors)
    with unchanged(unet):
        with pytest.warns(attnswap.AttnswapWarning, match="resolution-aware U-Net"):
            attnswap.attn_processors(unet, "hidiffusion")
        attnswap.disable(unet)
        processors = attnswap.attn_processors(unet, WINDOWS)
        assert processors.keys() == saved.keys()
        assert torch.equal(sample(pipe), stock), "idle until the processors are set"
        unet.set_attn_processor(processors)
        assert torch.equal(sample(pipe), windows)
        unet.set_attn_processor(dict(saved))
        assert torch.equal(sample(pipe), stock)
        assert sum(len(module._forward_pre_hooks) for module in unet.modules()) <= 1
        attnswap.disable(unet)


def test_disable_takes_back_processors_that_were_set_by_hand() -> None:
    pipe = slim("sd15")
    with unchanged(pipe.unet):
        pipe.unet.set_attn_processor(attnswap.attn_processors(pipe.unet, WINDOWS))
        attnswap.disable(pipe.unet)


def test_a_processor_kept_after_disable_is_stock_attention(pipe: Any) -> None:
    stock = sample(pipe)
    handle = attnswap.enable(pipe, WINDOWS)
    kept = dict(pipe.unet.attn_processors)
    sample(pipe)
    handle.disable()
    pipe.unet.set_attn_processor(kept)
    assert torch.equal(sample(pipe), stock)


def test_a_pipeline_that_shares_the_denoiser_takes_part() -> None:
    pipe = slim("sd15")
    other = tiny.sd15(pipe.unet, EulerDiscreteScheduler(steps_offset=1))
    stock = sample(other, steps=4)
    handle = attnswap.enable(pipe, "hidiffusion")
    mixed = [sample(pipe), sample(other, steps=4), sample(pipe, steps=2), sample(other, steps=4)]
    assert torch.equal(mixed[1], mixed[3])
    assert not torch.equal(mixed[1], stock)
    with attnswap.enabled(other, "hidiffusion") as own:
        assert not handle.active
        assert torch.equal(sample(other, steps=4), mixed[1]), "as if it had been enabled itself"
        handle.disable()
        assert own.active
    handle = attnswap.enable(other, "hidiffusion")
    attnswap.disable(pipe)
    assert not handle.active
    assert torch.equal(sample(other, steps=4), stock)


def test_pipelines_made_from_each_other_share_a_scheduler_and_keep_their_own_number_of_steps() -> None:
    text = tiny.sd15()
    image = StableDiffusionImg2ImgPipeline(**text.components, requires_safety_checker=False)
    image.set_progress_bar_config(disable=True)
    picture = torch.zeros(1, 3, 128, 128)
    for enabled_one in (text, image):
        with attnswap.enabled(enabled_one, "hidiffusion") as handle:
            tiny.run(text, steps=10)
            tiny.run(image, steps=10, image=picture, strength=0.5)
            tiny.run(text, steps=10)
            runs = handle.report().to_dict()["denoisers"][0]["runs"]
        assert [(run["steps"], run["conv"]) for run in runs] == [(10, [0, 4]), (5, [0, 2]), (10, [0, 4])]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_an_enabled_unet_is_enabled_and_its_own(pipe: Any, how: str) -> None:
    stock = sample(pipe)
    handle = attnswap.enable(pipe, "hidiffusion")
    enabled = sample(pipe)
    unet = pipe.unet
    twin = copy.deepcopy(unet) if how == "deepcopy" else pickle.loads(pickle.dumps(unet))
    calls = handle.report().to_dict()["denoisers"][0]["calls"]
    pipe.unet = twin
    assert torch.equal(sample(pipe), enabled)
    assert handle.report().to_dict()["denoisers"][0]["calls"] == calls, "the copy counts for itself"
    attnswap.disable(twin)
    assert torch.equal(sample(pipe), stock)
    assert handle.active
    pipe.unet = unet
    assert torch.equal(sample(pipe), enabled)
    handle.disable()
    assert torch.equal(sample(pipe), stock)


def test_the_denoiser_stays_enabled_when_its_pipeline_is_gone() -> None:
    pipe = slim("sd15")
    handle = attnswap.enable(pipe, "hidiffusion")
    enabled, unet, gone = sample(pipe), pipe.unet, weakref.ref(pipe)
    pipe = None
    gc.collect()
    assert gone() is None, "a handle does not keep a pipeline alive"
    pipe = tiny.sd15(unet, DDIMScheduler(clip_sample=False, steps_offset=1))
    assert torch.equal(sample(pipe), enabled)
    handle.disable()


def test_inference_mode_changes_nothing(pipe: Any) -> None:
    with attnswap.enabled(pipe, "hidiffusion"):
        usual = sample(pipe)
        with torch.inference_mode():
            assert torch.equal(sample(pipe), usual)
        assert torch.equal(sample(pipe), usual)


def test_a_loop_of_ones_own_gets_what_a_pipeline_gets() -> None:
    pipe = slim("sd15")
    text = torch.randn(2, 7, tiny.TEXT, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def loop(hand: Any) -> torch.Tensor:
        pipe.scheduler.set_timesteps(5)
        latents = noise
        handle.set_timesteps(pipe.scheduler.timesteps)
        for t in pipe.scheduler.timesteps:
            with torch.no_grad():
                out = pipe.unet(torch.cat([latents] * 2), hand(t), text).sample
            negative, positive = out.chunk(2)
            latents = pipe.scheduler.step(negative + 3.0 * (positive - negative), t, latents).prev_sample
        return latents

    handle = attnswap.enable(pipe, "hidiffusion")
    arguments = {"prompt_embeds": text[1:], "negative_prompt_embeds": text[:1], "latents": noise}
    wanted = sample(pipe, steps=5, **arguments)
    handle.disable()
    handle = attnswap.enable(pipe.unet, "hidiffusion")
    for hand in (lambda t: t, lambda t: t.clone(), float, int):
        torch.testing.assert_close(loop(hand), wanted)
