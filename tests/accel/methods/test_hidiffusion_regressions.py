"""What breaks the published code, loudly or silently, works: one test for each."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import attnswap
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from attnswap import HiDiffusion
from diffusers import (
    DDIMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionSAGPipeline,
    StableDiffusionXLInpaintPipeline,
    T2IAdapter,
)
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig
from torch import nn

from .. import tiny
from .common import ALWAYS, call, inputs, largest_difference, last_run, notes, runs

# Of schedulers with default settings.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TIMESTEPS = list(range(900, -1, -100))


def a_run(unet: Any, handle: attnswap.Handle, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    """The predictions of all steps, in a loop of one's own."""
    handle.set_timesteps(TIMESTEPS)
    return torch.stack([call(unet, size, timestep) for timestep in TIMESTEPS])


# Loud failures of the published code.


def test_a_pipeline_without_a_name_runs() -> None:
    pipe = tiny.sdxl()
    assert pipe.name_or_path is None
    with attnswap.enabled(pipe, "hidiffusion") as handle:
        tiny.run(pipe, steps=13)
        assert last_run(handle) == (13, 2, 3)


@pytest.mark.parametrize("unet", [tiny.sd15_unet, tiny.sdxl_unet])
def test_a_bare_unet_runs(unet: Any) -> None:
    model = unet()
    stock = call(model, (16, 16), 900)
    handle = attnswap.enable(model, "hidiffusion")
    assert largest_difference(a_run(model, handle)[0], stock) > 1e-3


def test_freeu_works_on_pooled_maps() -> None:
    pipe = tiny.sdxl()
    plain = attnswap.enable(pipe, HiDiffusion(aggressive=False))
    without = tiny.run(pipe)
    pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    assert largest_difference(tiny.run(pipe), without) > 1e-3
    assert last_run(plain) == (5, 0, 2)


@pytest.mark.parametrize("place", ["down_blocks.0.downsamplers.0.conv", "down_blocks.0.attentions.0.proj_in"])
def test_lora_on_the_quartered_convolution_takes_part_in_the_same_geometry(place: str) -> None:
    """Adapter and base agree on the size of the map, and the adapter works as its merged weights do."""
    unet = tiny.sd15_unet()
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, target_modules=[place], init_lora_weights=False))
    handle = attnswap.enable(unet, ALWAYS)
    with_lora = a_run(unet, handle)
    assert last_run(handle) == (10, 4, 0)
    unet.disable_adapters()
    assert largest_difference(a_run(unet, handle), with_lora) > 1e-3
    unet.enable_adapters()
    unet.fuse_lora()
    torch.testing.assert_close(a_run(unet, handle), with_lora, rtol=0, atol=1e-5)


def test_the_sample_may_come_by_keyword_or_by_position() -> None:
    unet = tiny.sd15_unet()
    given = inputs(unet, (16, 20))
    with attnswap.enabled(unet, ALWAYS) as handle, torch.no_grad():
        handle.set_timesteps(TIMESTEPS)
        by_keyword = unet(timestep=900, **given).sample
        by_position = unet(given["sample"], 900, given["encoder_hidden_states"], return_dict=False)[0]
    assert torch.equal(by_keyword, by_position)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_a_copied_or_pickled_unet_works_by_itself(duplicate: Any) -> None:
    unet = tiny.sd15_unet()
    stock = call(unet, (16, 16), 900)
    handle = attnswap.enable(unet, ALWAYS)
    expected = a_run(unet, handle)[-1]
    other = duplicate(unet)
    # Its last known step is that of the original, and both go on without each other.
    assert torch.equal(call(other, (16, 16), TIMESTEPS[-1]), expected)
    handle.disable()
    assert largest_difference(call(other, (16, 16), TIMESTEPS[-1]), call(unet, (16, 16), TIMESTEPS[-1])) > 1e-3
    attnswap.disable(other)
    assert torch.equal(call(other, (16, 16), 900), stock)
    assert other.num_upsamplers == 3


def test_a_copy_of_the_unet_does_not_carry_the_controlnet() -> None:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    unet = tiny.sd15_unet()
    pipe = tiny.sd15(unet, cls=StableDiffusionControlNetPipeline, controlnet=ControlNetModel.from_unet(unet))
    before = len(pickle.dumps(unet))
    attnswap.enable(pipe, "hidiffusion")
    assert len(pickle.dumps(unet)) < before + 100_000
    assert len(pickle.dumps(pipe.controlnet.state_dict())) > 200_000


def test_a_second_pipeline_that_shares_the_unet_has_its_own_steps() -> None:
    first = tiny.sd15()
    second = tiny.sd15(first.unet, DDIMScheduler())
    with attnswap.enabled(first, "hidiffusion") as handle:
        tiny.run(first, steps=10)
        tiny.run(second, steps=5)
        tiny.run(first, steps=10)
        found = [(run["steps"], run["conv_steps"]) for run in runs(handle)]
    assert found == [(10, 4), (5, 2), (10, 4)]


def test_inpainting_with_nine_channels_is_not_aggressive() -> None:
    pipe = tiny.sdxl(tiny.sdxl_unet(in_channels=9), cls=StableDiffusionXLInpaintPipeline)
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 128, 128)
    mask[:, :, 32:96] = 1
    with attnswap.enabled(pipe, "hidiffusion") as handle:
        tiny.run(pipe, steps=13, image=picture, mask_image=mask, height=128, width=128, strength=1.0)
        assert "aggressive False" in str(handle.report())
        assert last_run(handle) == (13, 0, 5)


def test_a_four_channel_model_in_an_inpainting_pipeline_stays_aggressive() -> None:
    pipe = tiny.sdxl(cls=StableDiffusionXLInpaintPipeline)
    assert "aggressive True" in str(attnswap.inspect(pipe, "hidiffusion"))


def test_feed_forward_chunking_changes_nothing() -> None:
    unet = tiny.sd15_unet()
    handle = attnswap.enable(unet, ALWAYS)
    expected = a_run(unet, handle)
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.set_chunk_feed_forward(1, 1)
    torch.testing.assert_close(a_run(unet, handle), expected, rtol=0, atol=1e-5)


def test_t2i_adapter_features_are_fitted_to_pooled_maps() -> None:
    adapter = T2IAdapter(in_channels=3, channels=[8, 16, 16, 16], num_res_blocks=1, downscale_factor=8)
    pipe = tiny.sd15(cls=StableDiffusionAdapterPipeline, adapter=adapter.eval())
    picture = torch.rand(1, 3, 17 * 8, 15 * 8, generator=torch.Generator().manual_seed(0))
    with attnswap.enabled(pipe, HiDiffusion(t1=0.6, t2=0.4, active_above=0)) as handle:
        with_adapter = tiny.run(pipe, image=picture, height=17 * 8, width=15 * 8)
        without = tiny.run(pipe, image=picture, height=17 * 8, width=15 * 8, adapter_conditioning_scale=0.0)
        assert last_run(handle) == (5, 3, 2)
        assert any("adapter residuals resized" in note for note in notes(handle))
    assert largest_difference(with_adapter, without) > 1e-3


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_pools_and_restores_and_gradients_arrive(checkpointed: bool) -> None:
    """Checkpointed blocks run again in the backward pass, with the same windows and sizes."""

    def gradients(checkpointing: bool, config: HiDiffusion | None) -> dict[str, torch.Tensor]:
        unet = tiny.sdxl_unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        if config is not None:
            attnswap.enable(unet, config).set_timesteps(TIMESTEPS)
        given = inputs(unet, (18, 14))
        loss = unet(timestep=900, **given).sample.square().mean()
        loss.backward()
        return {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}

    pooled = HiDiffusion(aggressive=False, active_above=0)
    found = gradients(checkpointed, pooled)
    expected = gradients(False, pooled)
    assert found.keys() == expected.keys() == gradients(False, None).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)
    stock = gradients(False, None)
    assert any(largest_difference(stock[name], gradient) > 1e-3 for name, gradient in expected.items())


# Silent wrong results of the published code.


def test_no_state_leaks_from_one_size_to_another() -> None:
    unet = tiny.sdxl_unet()
    config = HiDiffusion(large_side=24, active_above=0)

    def large() -> torch.Tensor:
        return a_run(unet, attnswap.enable(unet, config), (24, 24))

    fresh = large()
    handle = attnswap.enable(unet, config)
    a_run(unet, handle, (16, 16))
    assert runs(handle)[-1]["state"] == "small, aggressive schedule"
    assert torch.equal(a_run(unet, handle, (24, 24)), fresh)
    assert last_run(handle) == (10, 3, 7)


def test_an_interrupted_run_does_not_shift_the_next() -> None:
    pipe = tiny.sd15()
    with attnswap.enabled(pipe, "hidiffusion") as handle:
        expected = tiny.run(pipe, steps=4)

        def stop(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = step >= 1
            return kwargs

        tiny.run(pipe, steps=4, callback_on_step_end=stop)

        def fail(*args: Any) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tiny.run(pipe, steps=4, callback_on_step_end=fail)
        assert torch.equal(tiny.run(pipe, steps=4), expected)
        assert last_run(handle) == (4, 1, 0)


def test_two_unet_calls_a_step_are_one_step() -> None:
    pipe = tiny.sd15(cls=StableDiffusionSAGPipeline, image_encoder=None)
    with attnswap.enabled(pipe, "hidiffusion") as handle:
        tiny.run(pipe, steps=10, sag_scale=0.75)
        report = handle.report().to_dict()["denoisers"][0]
        assert report["calls"] == 20
        assert last_run(handle) == (10, 4, 0)


def test_perturbed_attention_guidance_sees_windows_and_is_whole_afterwards() -> None:
    pipe = tiny.sd15(cls=StableDiffusionPAGPipeline, image_encoder=None, pag_applied_layers=["down_blocks.0"])
    arguments: dict[str, Any] = {"steps": 3, "pag_scale": 3.0}
    stock = tiny.run(pipe, **arguments)
    with attnswap.enabled(pipe, HiDiffusion(raunet=False)) as handle:
        first = tiny.run(pipe, **arguments)
        assert torch.equal(tiny.run(pipe, **arguments), first)
        assert handle.report().density == 0.25
    assert largest_difference(first, stock) > 1e-3
    assert torch.equal(tiny.run(pipe, **arguments), stock)


@pytest.mark.parametrize("place", ["down_blocks.0.downsamplers.0.conv", "down_blocks.1.attentions.1", "mid_block"])
def test_an_exception_in_the_middle_leaves_nothing_behind(place: str) -> None:
    unet = tiny.sd15_unet()
    stock = call(unet, (16, 16), 900)
    config = HiDiffusion(t1=0.7, t2=0.3, active_above=0)
    handle = attnswap.enable(unet, config)
    expected = a_run(unet, handle)

    def out_of_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("as if")

    hook = unet.get_submodule(place).register_forward_hook(out_of_memory)
    handle.set_timesteps(TIMESTEPS)
    with pytest.raises(torch.OutOfMemoryError):
        call(unet, (16, 16), TIMESTEPS[0])
    hook.remove()
    assert torch.equal(a_run(unet, handle), expected)
    hook = unet.get_submodule(place).register_forward_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        call(unet, (16, 16), TIMESTEPS[0])
    hook.remove()
    handle.disable()
    assert torch.equal(call(unet, (16, 16), 900), stock)
    conv = unet.down_blocks[0].downsamplers[0].conv
    assert (conv.stride, conv.padding, conv.dilation) == ((2, 2), (1, 1), (1, 1))


@pytest.mark.parametrize("hooks_first", [True, False])
def test_hooks_of_accelerate_on_every_module_are_no_obstacle(hooks_first: bool) -> None:
    expected = a_run(unet := tiny.sdxl_unet(), attnswap.enable(unet, ALWAYS))

    def add_hooks(model: nn.Module) -> None:
        for module in model.modules():
            if next(module.children(), None) is None:
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))

    unet = tiny.sdxl_unet()
    stock = call(unet, (16, 16), 900)
    if hooks_first:
        add_hooks(unet)
    handle = attnswap.enable(unet, ALWAYS)
    if not hooks_first:
        add_hooks(unet)
    assert torch.equal(a_run(unet, handle), expected)
    handle.disable()
    assert torch.equal(call(unet, (16, 16), 900), stock)


def test_enabling_twice_is_enabling_once() -> None:
    unet = tiny.sdxl_unet()
    stock, upsamplers = call(unet, (16, 16), 900), unet.num_upsamplers
    once = a_run(unet, attnswap.enable(unet, ALWAYS))
    twice = attnswap.enable(unet, ALWAYS)
    assert torch.equal(a_run(unet, twice), once)
    attnswap.disable(unet)
    assert unet.num_upsamplers == upsamplers
    assert torch.equal(call(unet, (16, 16), 900), stock)


@pytest.mark.parametrize("shift", ["step", "layer"])
def test_the_picture_depends_on_the_seed_alone_and_no_generator_is_consumed(shift: str) -> None:
    pipe = tiny.sd15()

    def picture_and_states(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(3)
        picture = tiny.run(pipe, steps=3, generator=generator, eta=1.0)
        return picture, torch.get_rng_state(), generator.get_state()

    _, global_state, own_state = picture_and_states(1)
    with attnswap.enabled(pipe, HiDiffusion(shift=shift)):
        first = picture_and_states(1)
        second = picture_and_states(2)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], global_state)
    assert torch.equal(first[2], own_state)
