"""LinFusion with everything else: other methods, ControlNets, IP-Adapters, copies, precisions, gradients."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import attnswap
import pytest
import torch
from attnswap.accel.families.unet import UNetAttnProcessor
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLControlNetPipeline,
)

from . import tiny
from .methods import linfusion_cases as cases
from .methods.common import call, inputs, largest_difference
from .slim import sample, slim
from .test_compose_adapters import load_ip_adapter, with_image
from .watching import unchanged

CLOSE = 2e-5


def layers(handle: Any) -> dict[str, dict[str, Any]]:
    """The accelerated layers of the report."""
    [denoiser] = handle.report().to_dict()["denoisers"]
    return {layer["name"]: layer for layer in denoiser["layers"] if layer["accelerated"]}


def is_linear(handle: Any, calls: int) -> None:
    """Every self-attention layer ran linear attention in every call."""
    found = layers(handle)
    assert found
    assert {(x["accelerated_calls"], x["dense_calls"]) for x in found.values()} == {(calls, 0)}


# With HiDiffusion.


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_with_hidiffusion_the_maps_are_pooled_and_every_layer_is_linear(name: str, tmp_path: Path) -> None:
    pipe = slim(name)
    linear = cases.linfusion(tmp_path, pipe.unet)
    with attnswap.enabled(pipe, linear):
        only_linear = sample(pipe, steps=5)
    with attnswap.enabled(pipe, "hidiffusion"):
        only_hidiffusion = sample(pipe, steps=5)
    outs = []
    for methods in (["hidiffusion", linear], [linear, "hidiffusion"]):
        with unchanged(pipe.unet):
            handle = attnswap.enable(pipe, methods)
            outs.append(sample(pipe, steps=5))
            report = handle.report().to_dict()
            handle.disable()
        [run] = report["denoisers"][0]["runs"]
        assert run["conv_steps"] + run["pool_steps"] > 0
        found = {x["name"]: x for x in report["denoisers"][0]["layers"] if x["accelerated"]}
        assert found.keys() == cases.self_attention(pipe.unet).keys()
        assert {(x["accelerated_calls"], x["dense_calls"]) for x in found.values()} == {(5, 0)}
        reasons = {x["reason"] for x in found.values()}
        assert reasons == {"global linear attention", "global linear attention, in place of hidiffusion"}
        assert report["config"].keys() == {"hidiffusion", "linfusion"}
    assert torch.equal(*outs)
    assert not torch.allclose(outs[0], only_linear)
    assert not torch.allclose(outs[0], only_hidiffusion)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_with_hidiffusion_the_linear_layers_see_the_pooled_maps(name: str, tmp_path: Path) -> None:
    """By the formulas, put into a U-Net on which the resolution-aware part alone is enabled."""
    pipe = slim(name)
    weights = cases.write(tmp_path, pipe.unet)
    with attnswap.enabled(pipe, ["hidiffusion", attnswap.LinFusion(weights=str(tmp_path))]) as handle:
        both = sample(pipe, side=(16, 12), steps=5)
    cases.put_by_definition(pipe.unet, weights)
    with attnswap.enabled(pipe, attnswap.HiDiffusion(window_attention=False)):
        torch.testing.assert_close(both, sample(pipe, side=(16, 12), steps=5), rtol=1e-3, atol=1e-4)
    assert handle.report().density < 1


def test_at_native_size_hidiffusion_rests_and_the_layers_stay_linear(pipe: Any, tmp_path: Path) -> None:
    linear = cases.linfusion(tmp_path, pipe.unet)
    with attnswap.enabled(pipe, linear):
        wanted = sample(pipe, side=8)
    with attnswap.enabled(pipe, ["hidiffusion", linear]) as handle:
        assert torch.equal(sample(pipe, side=8), wanted)
    is_linear(handle, 3)


def test_weights_that_do_not_fit_leave_both_out(pipe: Any) -> None:
    with unchanged(pipe.unet), pytest.raises(attnswap.WeightsError):
        attnswap.enable(pipe, ["hidiffusion", "linfusion"])


# With ControlNets, IP-Adapters and guidance that sets processors.


@pytest.mark.parametrize("cls", [StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_controlnet_takes_part_and_keeps_its_own_attention(cls: Any, tmp_path: Path) -> None:
    name = "sdxl" if "XL" in cls.__name__ else "sd15"
    plain = slim(name)
    torch.manual_seed(0)
    network = ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(4, 4, 4, 4)).eval()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    pipe = getattr(tiny, name)(plain.unet, scheduler, cls=cls, controlnet=network)
    picture = {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))}
    stock = sample(pipe, side=8, **picture)
    with unchanged(pipe.unet), unchanged(network):
        handle = attnswap.enable(pipe, cases.linfusion(tmp_path, pipe.unet))
        enabled = sample(pipe, side=8, **picture)
        without = sample(pipe, side=8, **picture, controlnet_conditioning_scale=0.0)
        is_linear(handle, 6)
        handle.disable()
    assert not torch.allclose(enabled, stock)
    assert not torch.allclose(enabled, without)
    assert torch.equal(sample(pipe, side=8, **picture), stock)


@pytest.mark.parametrize("order", ["adapter first", "method first"])
def test_an_ip_adapter_takes_part(order: str, pipe: Any, tmp_path: Path) -> None:
    config = cases.linfusion(tmp_path, pipe.unet)
    with attnswap.enabled(pipe, config):
        without = sample(pipe)
    stock = sample(pipe)
    if order == "adapter first":
        load_ip_adapter(pipe)
        handle = attnswap.enable(pipe, config)
    else:
        handle = attnswap.enable(pipe, config)
        load_ip_adapter(pipe)  # makes every self-attention processor anew from its class
    enabled = with_image(pipe)
    is_linear(handle, 3)
    by_formulas = slim("sdxl" if "XL" in type(pipe).__name__ else "sd15")
    load_ip_adapter(by_formulas)
    cases.put_by_definition(by_formulas.unet, cases.random_weights(by_formulas.unet))
    torch.testing.assert_close(enabled, with_image(by_formulas), rtol=1e-3, atol=1e-4)
    pipe.unload_ip_adapter()
    assert torch.equal(sample(pipe), without)
    handle.disable()
    assert torch.equal(sample(pipe), stock)


@pytest.mark.filterwarnings("ignore::attnswap.AttnswapWarning")
def test_perturbed_attention_guidance_keeps_its_layer(tmp_path: Path) -> None:
    plain = slim("sd15")
    pipe = tiny.sd15(plain.unet, plain.scheduler, cls=StableDiffusionPAGPipeline, pag_applied_layers=["mid"])
    config = cases.linfusion(tmp_path, pipe.unet)
    off = {}
    with attnswap.enabled(pipe, config) as handle:
        for scale in (0.0, 3.0):
            off[scale] = sample(pipe, pag_scale=scale)
    assert not torch.allclose(off[0.0], off[3.0])
    assert "mid_block.attentions.0.transformer_blocks.0.attn1 ran dense: PAG" in str(handle.report())
    assert sum(x["dense_calls"] for x in layers(handle).values()) == 3


# Roads in and out, copies, other weights.


def test_diffusers_own_road_gives_the_same(pipe: Any, tmp_path: Path) -> None:
    config = cases.linfusion(tmp_path, pipe.unet)
    with attnswap.enabled(pipe, config):
        wanted = sample(pipe)
    stock, unet, saved = sample(pipe), pipe.unet, dict(pipe.unet.attn_processors)
    with unchanged(unet):
        processors = attnswap.attn_processors(unet, config)
        assert torch.equal(sample(pipe), stock), "idle until the processors are set"
        unet.set_attn_processor(processors)
        assert torch.equal(sample(pipe), wanted)
        unet.set_attn_processor(dict(saved))
        assert torch.equal(sample(pipe), stock)
        attnswap.disable(unet)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_an_enabled_unet_is_enabled_and_its_own(how: str, pipe: Any, tmp_path: Path) -> None:
    stock, unet = sample(pipe), pipe.unet
    handle = attnswap.enable(pipe, cases.linfusion(tmp_path, unet))
    enabled = sample(pipe)
    twin = copy.deepcopy(unet) if how == "deepcopy" else pickle.loads(pickle.dumps(unet))
    ours = {buffer.data_ptr() for buffer in unet.buffers()}
    assert ours.isdisjoint(buffer.data_ptr() for buffer in twin.buffers())
    pipe.unet = twin
    assert torch.equal(sample(pipe), enabled)
    attnswap.disable(twin)
    assert torch.equal(sample(pipe), stock)
    assert not list(twin.buffers())
    pipe.unet = unet
    assert torch.equal(sample(pipe), enabled)
    handle.disable()


def test_other_stock_weights_loaded_meanwhile_are_those_of_the_rest(tmp_path: Path) -> None:
    other = tiny.sd15_unet(seed=1, layers_per_block=1)
    unet = tiny.sd15_unet(layers_per_block=1)
    config = cases.linfusion(tmp_path, unet)
    with attnswap.enabled(other, config):
        wanted = call(other, (8, 8))
    handle = attnswap.enable(unet, config)
    unet.load_state_dict(other.state_dict())
    assert torch.equal(call(unet, (8, 8)), wanted)
    handle.disable()
    assert torch.equal(call(unet, (8, 8)), call(other, (8, 8)))


def test_two_pipelines_share_an_enabled_unet(tmp_path: Path) -> None:
    pipe = slim("sd15")
    other = tiny.sd15(pipe.unet, DDIMScheduler(clip_sample=False, steps_offset=1))
    handle = attnswap.enable(pipe, cases.linfusion(tmp_path, pipe.unet))
    assert torch.equal(sample(other), sample(pipe))
    is_linear(handle, 6)


# Precision and gradients.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("order", ["cast first", "method first"])
def test_half_precision(dtype: torch.dtype, order: str, tmp_path: Path) -> None:
    unet = tiny.sdxl_unet(layers_per_block=1)
    config = cases.linfusion(tmp_path, unet)
    with attnswap.enabled(unet, config):
        exact = call(unet, (12, 10))
    if order == "cast first":
        unet.to(dtype)
        handle = attnswap.enable(unet, config)
    else:
        handle = attnswap.enable(unet, config)
        unet.to(dtype)
    assert {buffer.dtype for buffer in unet.buffers()} == {dtype}
    given = {
        key: {name: y.to(dtype) for name, y in x.items()} if isinstance(x, dict) else x.to(dtype)
        for key, x in inputs(unet, (12, 10)).items()
    }
    with torch.no_grad():
        out = unet(timestep=500, **given).sample
    assert out.dtype == dtype
    assert largest_difference(out.float(), exact) <= (0.02 if dtype == torch.float16 else 0.15)
    is_linear(handle, 1)


def test_autocast(tmp_path: Path) -> None:
    unet = tiny.sd15_unet(layers_per_block=1)
    handle = attnswap.enable(unet, cases.linfusion(tmp_path, unet))
    exact = call(unet, (12, 10))
    with torch.autocast("cpu", torch.bfloat16):
        assert largest_difference(call(unet, (12, 10)).float(), exact) <= 0.15
    is_linear(handle, 2)


def test_gradients_are_the_same_with_and_without_checkpointing(tmp_path: Path) -> None:
    unet = tiny.sd15_unet(layers_per_block=1).train()
    attnswap.enable(unet, cases.linfusion(tmp_path, unet))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        given = inputs(unet, (8, 8))
        given["sample"].requires_grad_(True)
        unet(timestep=500, **given).sample.square().mean().backward()
        found.append(given["sample"].grad)
        assert unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1").to_q.weight.grad is None
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found)


def test_gradients_are_those_of_the_formulas(tmp_path: Path) -> None:
    unet = tiny.sd15_unet(layers_per_block=1)
    weights = cases.write(tmp_path, unet)
    attn = cases.self_attention(unet)["down_blocks.1.attentions.0.transformer_blocks.0.attn1"]
    tokens = torch.randn(2, 6 * 5, 16, generator=torch.Generator().manual_seed(0))
    ours, defined = tokens.clone().requires_grad_(True), tokens.clone().requires_grad_(True)
    with attnswap.enabled(unet, attnswap.LinFusion(weights=str(tmp_path))):
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in attn.linfusion.project(attn, ours))
        out = attn.linfusion.output(attn, attnswap.kernels.linear_attention(query, key, value).flatten(-2))
    index = list(cases.self_attention(unet).values()).index(attn)
    wanted = cases.layer(weights[index], defined, attn.heads)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(slope)
    wanted.backward(slope.double())
    torch.testing.assert_close(ours.grad, defined.grad, rtol=1e-4, atol=1e-5)


# What is said.


def test_the_report_names_weights_backend_and_cost(tmp_path: Path) -> None:
    """Density counts a token's cost of linear attention as that of as many keys as a head is wide."""
    unet = tiny.sd15_unet(layers_per_block=1)
    handle = attnswap.enable(unet, cases.linfusion(tmp_path, unet))
    call(unet, (16, 12))
    text = str(handle.report())
    assert f"  weights: {tmp_path}\n" in text
    assert "backend eager" in text
    for name, layer in layers(handle).items():
        attn = unet.get_submodule(name)
        head_width = attn.to_q.out_features // attn.heads
        tokens = layer["dense_pairs"] ** 0.5
        assert layer["pairs"] == tokens * head_width
    total = sum(layer["dense_pairs"] for layer in layers(handle).values())
    assert handle.report().density == sum(layer["pairs"] for layer in layers(handle).values()) / total
    with attnswap.kernels.use_backend("reference"):
        handle.reset()
        call(unet, (16, 12))
    assert "backend reference" in str(handle.report())


def test_inspect_reads_no_weights(pipe: Any) -> None:
    with unchanged(pipe.unet):
        inspection = attnswap.inspect(pipe, attnswap.LinFusion(weights="somebody/weights-that-do-not-exist"))
    assert inspection.remarks == ("weights: somebody/weights-that-do-not-exist",)
    assert inspection.accelerated == len(cases.self_attention(pipe.unet)) == len(inspection.layers) // 2


def test_a_processor_of_ours_that_was_kept_is_stock_attention_after_disable(pipe: Any, tmp_path: Path) -> None:
    stock = sample(pipe)
    handle = attnswap.enable(pipe, cases.linfusion(tmp_path, pipe.unet))
    kept = dict(pipe.unet.attn_processors)
    sample(pipe)
    handle.disable()
    pipe.unet.set_attn_processor(kept)
    assert UNetAttnProcessor in {type(p) for p in pipe.unet.attn_processors.values()}
    assert torch.equal(sample(pipe), stock)


def test_windows_that_gave_way_are_not_said_to_run(tmp_path: Path) -> None:
    pipe = slim("sd15")
    windows = attnswap.HiDiffusion(raunet=False, active_above=0)
    with attnswap.enabled(pipe, [windows, cases.linfusion(tmp_path, pipe.unet)]) as handle:
        sample(pipe, steps=1)
    [run] = handle.report().to_dict()["denoisers"][0]["runs"]
    assert run["state"] == "nothing: windows gave way"


def test_the_report_names_the_backend_of_the_latest_run(tmp_path: Path) -> None:
    pipe = slim("sd15")
    with attnswap.enabled(pipe, cases.linfusion(tmp_path, pipe.unet)) as handle:
        sample(pipe, steps=1)
        assert {x["backend"] for x in layers(handle).values()} == {"eager"}
        with attnswap.kernels.use_backend("reference"):
            sample(pipe, steps=1)
        assert {x["backend"] for x in layers(handle).values()} == {"reference"}
