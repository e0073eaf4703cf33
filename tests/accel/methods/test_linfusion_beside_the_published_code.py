"""Where the released LinFusion code (Huage001/LinFusion) fails or is silently wrong, and this package must not be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import attnswap
import pytest
import torch
from attnswap.accel.methods.linfusion_layer import LinFusionLayer
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from peft import LoraConfig
from torch import nn

from .. import tiny
from ..slim import sample, slim
from ..watching import differences, unchanged
from . import linfusion_cases as cases
from .common import call, largest_difference, notes

SIZE = (12, 10)
CLOSE = 2e-5


def add_lora(unet: Any) -> None:
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "extra")


def test_a_lora_that_was_there_first_is_not_lost(pipe: Any, tmp_path: Path) -> None:
    config = cases.linfusion(tmp_path, pipe.unet)
    handle = attnswap.enable(pipe, config)
    without = sample(pipe, steps=1)
    add_lora(pipe.unet)
    lora_last = sample(pipe, steps=1)
    handle.disable()
    kept = {name for name, _ in pipe.unet.named_parameters() if "lora" in name}
    attnswap.enable(pipe, config)
    assert torch.equal(sample(pipe, steps=1), lora_last)
    assert {name for name, _ in pipe.unet.named_parameters() if "lora" in name} == kept
    assert not torch.allclose(lora_last, without)


class Louder(AttnProcessor2_0):
    """Somebody's own attention."""

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(attn, hidden_states, *args, **kwargs)


@pytest.mark.parametrize("order", ["processor first", "method first"])
def test_a_processor_set_by_somebody_else_takes_effect_and_is_reported(order: str, tmp_path: Path) -> None:
    unet, louder = tiny.sd15_unet(layers_per_block=1), Louder()
    weights = cases.write(tmp_path, unet)
    config = attnswap.LinFusion(weights=str(tmp_path))
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    if order == "processor first":
        unet.get_submodule(name).set_processor(louder)
        inspection = attnswap.inspect(unet, config)
        assert inspection.accelerated == len(weights) - 1
        assert f"- {name}  (Louder computes its own attention and is kept)" in str(inspection)
        handle = attnswap.enable(unet, config)
        assert attnswap.inspect(unet, config).to_dict() == inspection.to_dict(), "also when enabled"
    else:
        handle = attnswap.enable(unet, config)
        call(unet, SIZE)
        unet.get_submodule(name).set_processor(louder)
    with pytest.warns(attnswap.AttnswapWarning, match="Louder computes its own attention"):
        out = call(unet, SIZE)
    assert notes(handle)[f"{name} ran dense: Louder computes its own attention"] == 1
    handle.disable()
    assert unet.get_submodule(name).processor is louder
    cases.put_by_definition(unet, weights)
    unet.get_submodule(name).set_processor(louder)
    assert largest_difference(out, call(unet, SIZE)) <= CLOSE


@pytest.mark.parametrize(
    "processor", [AttnProcessor(), SlicedAttnProcessor(1), XFormersAttnProcessor()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("order", ["processor first", "method first"])
def test_a_processor_that_only_saves_memory_gives_way(processor: Any, order: str, tmp_path: Path) -> None:
    unet = tiny.sd15_unet(layers_per_block=1)
    config = cases.linfusion(tmp_path, unet)
    with attnswap.enabled(unet, config):
        wanted = call(unet, SIZE)

    def put() -> None:
        for attn in cases.self_attention(unet).values():
            attn.set_processor(processor)

    if order == "processor first":
        put()
        handle = attnswap.enable(unet, config)
    else:
        handle = attnswap.enable(unet, config)
        put()
    assert torch.equal(call(unet, SIZE), wanted)
    assert handle.report().density < 1
    handle.disable()
    assert all(attn.processor is processor for attn in cases.self_attention(unet).values())


@pytest.mark.parametrize("order", ["fused first", "method first"])
def test_fused_projections_change_nothing_and_are_not_saved_with_the_weights(order: str, tmp_path: Path) -> None:
    unet = tiny.sd15_unet(layers_per_block=1)
    config = cases.linfusion(tmp_path, unet)
    stock = call(unet, SIZE)
    with attnswap.enabled(unet, config):
        wanted = call(unet, SIZE)
    if order == "fused first":
        unet.fuse_qkv_projections()
        handle = attnswap.enable(unet, config)
    else:
        handle = attnswap.enable(unet, config)
        unet.fuse_qkv_projections()
    assert largest_difference(call(unet, SIZE), wanted) <= CLOSE
    assert all(
        "qkv" not in key for attn in cases.self_attention(unet).values() for key, _ in attn.linfusion.published()
    )
    unet.unfuse_qkv_projections()
    assert largest_difference(call(unet, SIZE), wanted) <= CLOSE
    handle.disable()
    assert largest_difference(call(unet, SIZE), stock) <= CLOSE
    assert FusedAttnProcessor2_0 not in {type(p) for p in unet.attn_processors.values()}


def test_a_controlnet_made_from_an_enabled_unet_has_its_stock_weights(pipe: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wanted = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 4, 4, 4))
    attnswap.enable(pipe, cases.linfusion(tmp_path, pipe.unet))
    torch.manual_seed(0)
    made = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 4, 4, 4))
    assert made.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in wanted.state_dict().items())
    assert {type(p) for p in made.attn_processors.values()} == {AttnProcessor2_0}


def test_an_enabled_unet_is_saved_as_the_stock_one(pipe: Any, tmp_path: Path) -> None:
    stock = sample(pipe)
    attnswap.enable(pipe, cases.linfusion(tmp_path / "weights", pipe.unet))
    enabled = sample(pipe)
    pipe.unet.save_pretrained(tmp_path / "unet")
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    assert torch.equal(sample(pipe), stock)
    attnswap.enable(pipe, attnswap.LinFusion(weights=str(tmp_path / "weights")))
    assert torch.equal(sample(pipe), enabled)


def test_taken_out_nothing_is_left_bit_for_bit(pipe: Any, tmp_path: Path) -> None:
    stock, keys = sample(pipe), list(pipe.unet.state_dict())
    count, modules = pipe.unet.num_parameters(), [name for name, _ in pipe.unet.named_modules()]
    addresses = {name: parameter.data_ptr() for name, parameter in pipe.unet.named_parameters()}
    with unchanged(pipe.unet):
        handle = attnswap.enable(pipe, cases.linfusion(tmp_path, pipe.unet))
        assert not torch.equal(sample(pipe), stock)
        assert list(pipe.unet.state_dict()) == keys
        assert pipe.unet.num_parameters() == count
        assert {name: parameter.data_ptr() for name, parameter in pipe.unet.named_parameters()} == addresses
        handle.disable()
    assert [name for name, _ in pipe.unet.named_modules()] == modules
    assert not list(pipe.unet.buffers())
    assert torch.equal(sample(pipe), stock)


def test_a_pipeline_built_in_memory_and_known_by_no_name_is_a_target(pipe: Any, tmp_path: Path) -> None:
    assert "_name_or_path" not in pipe.config
    handle = attnswap.enable(pipe, cases.linfusion(tmp_path, pipe.unet))
    sample(pipe, steps=1)
    assert handle.report().density < 1
    with pytest.raises(attnswap.WeightsError, match="no LinFusion weights are known for a U-Net with"):
        attnswap.enable(pipe, "linfusion")
    assert handle.active


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_every_scheduler_runs(name: str, scheduler: Any, tmp_path: Path) -> None:
    pipe = slim(
        name, scheduler=scheduler(steps_offset=1, **({"clip_sample": False} if scheduler is DDIMScheduler else {}))
    )
    handle = attnswap.enable(pipe, cases.linfusion(tmp_path, pipe.unet))
    out = sample(pipe)
    assert out.isfinite().all()
    assert torch.equal(sample(pipe), out)
    report = handle.report().to_dict()["denoisers"][0]
    chosen = [layer for layer in report["layers"] if layer["accelerated"]]
    assert {(layer["accelerated_calls"], layer["dense_calls"]) for layer in chosen} == {(6, 0)}


@pytest.mark.parametrize("std", [100, 200])
def test_large_activations_in_half_precision_stay_finite(std: float) -> None:
    tensors = {key: x.half() for key, x in cases.random_tensors(64).items()}
    tokens = (std * torch.randn(1, 64 * 64, 64, generator=torch.Generator().manual_seed(0))).half()
    attn, layer = nn.Module(), LinFusionLayer(tensors)
    attn.to_q = attn.to_k = attn.to_v = nn.Linear(64, 64)
    attn.to_out = nn.ModuleList([nn.Linear(64, 64)])
    with torch.no_grad():
        parts = (x.unflatten(-1, (1, 64)) for x in layer.project(attn, tokens))
        out = layer.output(attn, attnswap.kernels.linear_attention(*parts).flatten(-2))
        assert not cases.as_published(tensors, tokens, 1).isfinite().all(), "as large as that"
        exact = cases.layer(tensors, tokens, 1)
    assert out.isfinite().all()
    assert (out.double() - exact).norm() <= 5e-3 * exact.norm()


def test_an_attention_mask_is_never_ignored(tmp_path: Path) -> None:
    # Stock Diffusers fits a mask to no other level than the first.
    one_level = {"block_out_channels": (16,), "layers_per_block": 1, "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = tiny.sd15_unet(**one_level, down_block_types=("CrossAttnDownBlock2D",))
    mask = torch.ones(1, 8 * 8)
    mask[:, ::3] = 0
    stock = call(unet, (8, 8), attention_mask=mask)
    assert not torch.equal(stock, call(unet, (8, 8)))
    why = "an attention mask was given, which the method cannot honour"
    handle = attnswap.enable(unet, cases.linfusion(tmp_path, unet))
    with pytest.warns(attnswap.AttnswapWarning, match=why):
        assert torch.equal(call(unet, (8, 8), attention_mask=mask), stock)
    assert notes(handle) == {f"{name} ran dense: {why}": 1 for name in cases.self_attention(unet)}
    assert not torch.allclose(call(unet, (8, 8)), stock)


def test_enabling_twice_starts_from_the_stock_layers(tmp_path: Path) -> None:
    unet = tiny.sd15_unet(layers_per_block=1)
    config = cases.linfusion(tmp_path, unet)
    twin = copy.deepcopy(unet)
    attnswap.enable(unet, config)
    before = {name for name, _ in unet.named_modules()}
    attnswap.enable(unet, config)
    assert {name for name, _ in unet.named_modules()} == before
    attnswap.enable(twin, config)
    assert torch.equal(call(unet, SIZE), call(twin, SIZE))
    attnswap.disable(unet)
    assert differences(dict(unet.named_buffers()), {}) == {}
