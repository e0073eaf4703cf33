"""With weights added to a model, before or after: LoRA and IP-Adapter."""

from __future__ import annotations

from typing import Any

import attnswap
import pytest
import torch
from attnswap.accel.families.unet import UNetAttnProcessor
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from peft import LoraConfig

from . import tiny
from .slim import sample, slim

WINDOWS = attnswap.HiDiffusion(raunet=False)


def add_lora(pipe: Any) -> None:
    """On what the methods touch: self-attention's projections and the downsamplers' convolutions."""
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "downsamplers.0.conv"]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "extra")


def ip_adapter_weights(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """A checkpoint in the published layout: two projections for each cross-attention, and the image projection."""
    generator = torch.Generator().manual_seed(3)
    keys: dict[str, torch.Tensor] = {}
    for number, (name, processor) in enumerate(unet.attn_processors.items()):
        if "attn2" in name:
            channels = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for part in ("to_k_ip", "to_v_ip"):
                keys[f"{number}.{part}.weight"] = torch.randn(channels, tiny.TEXT, generator=generator)
        del processor
    image = {
        "proj.weight": torch.randn(4 * tiny.TEXT, 8, generator=generator),
        "proj.bias": torch.zeros(4 * tiny.TEXT),
        "norm.weight": torch.ones(tiny.TEXT),
        "norm.bias": torch.zeros(tiny.TEXT),
    }
    return {"image_proj": image, "ip_adapter": keys}


def load_ip_adapter(pipe: Any) -> None:
    pipe.unet._load_ip_adapter_weights(ip_adapter_weights(pipe.unet), low_cpu_mem_usage=False)


def with_image(pipe: Any) -> torch.Tensor:
    embeds = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(4))
    return sample(pipe, ip_adapter_image_embeds=[embeds])


def classes_of(unet: Any) -> set[type]:
    return {type(processor) for processor in unet.attn_processors.values()}


@pytest.mark.parametrize("order", ["lora first", "method first"])
def test_lora_takes_part_in_whichever_order(pipe: Any, order: str) -> None:
    stock = sample(pipe)
    with attnswap.enabled(pipe, "hidiffusion"):
        without = sample(pipe)
    if order == "lora first":
        add_lora(pipe)
        stock_with_lora = sample(pipe)
        handle = attnswap.enable(pipe, "hidiffusion")
        enabled = sample(pipe)
        pipe.unet.delete_adapters("extra")
        assert torch.equal(sample(pipe), without)
        add_lora(pipe)
    else:
        handle = attnswap.enable(pipe, "hidiffusion")
        sample(pipe)
        add_lora(pipe)
        enabled = sample(pipe)
        with_lora_first = slim("sd15" if "XL" not in type(pipe).__name__ else "sdxl")
        add_lora(with_lora_first)
        stock_with_lora = sample(with_lora_first)
        attnswap.enable(with_lora_first, "hidiffusion")
        assert torch.equal(sample(with_lora_first), enabled)
    assert not torch.allclose(enabled, without)
    handle.disable()
    assert torch.equal(sample(pipe), stock_with_lora)
    pipe.unet.delete_adapters("extra")
    assert torch.equal(sample(pipe), stock)


def test_an_ip_adapter_loaded_before_stays_and_takes_part(pipe: Any) -> None:
    load_ip_adapter(pipe)
    stock = with_image(pipe)
    kept = dict(pipe.unet.attn_processors)
    with attnswap.enabled(pipe, "hidiffusion") as handle:
        assert not torch.equal(with_image(pipe), stock)
        assert IPAdapterAttnProcessor2_0 in classes_of(pipe.unet)
        assert handle.report().density < 1
    assert pipe.unet.attn_processors == kept
    assert torch.equal(with_image(pipe), stock)


def test_an_ip_adapter_loaded_later_does_not_end_the_acceleration(pipe: Any) -> None:
    """Loading makes every self-attention processor anew from its class."""
    without = sample(pipe)
    reference = slim("sd15" if "XL" not in type(pipe).__name__ else "sdxl")
    load_ip_adapter(reference)
    stock = with_image(reference)
    with attnswap.enabled(reference, "hidiffusion") as first:
        wanted = with_image(reference)

    handle = attnswap.enable(pipe, "hidiffusion")
    enabled = sample(pipe)
    load_ip_adapter(pipe)
    handle.reset()
    assert torch.equal(with_image(pipe), wanted)
    assert handle.report().density == pytest.approx(first.report().density)
    assert "re-created and armed again" in str(handle.report())

    pipe.unload_ip_adapter()
    assert torch.equal(sample(pipe), enabled)
    handle.disable()
    assert classes_of(pipe.unet) == {AttnProcessor2_0}
    assert torch.equal(sample(pipe), without)
    load_ip_adapter(pipe)
    assert torch.equal(with_image(pipe), stock)


@pytest.mark.parametrize("then", ["disable", "enable again"])
def test_processors_recreated_since_the_last_call_are_taken_out_as_well(then: str) -> None:
    pipe = slim("sd15")
    handle = attnswap.enable(pipe, WINDOWS)
    load_ip_adapter(pipe)
    if then == "enable again":
        handle = attnswap.enable(pipe, WINDOWS)
        with_image(pipe)
    handle.disable()
    assert UNetAttnProcessor not in classes_of(pipe.unet)


def test_a_single_processor_given_to_all_layers_is_told_apart(pipe: Any) -> None:
    with attnswap.enabled(pipe, WINDOWS):
        wanted = sample(pipe)
    stock = sample(pipe)
    handle = attnswap.enable(pipe, WINDOWS)
    pipe.unet.set_attn_processor(UNetAttnProcessor())
    assert torch.equal(sample(pipe), wanted)
    handle.disable()
    assert torch.equal(sample(pipe), stock)


def test_a_processor_with_weights_is_kept_and_reported(pipe: Any) -> None:
    class Weighted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stock = AttnProcessor2_0()

        def forward(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
            return self.stock(attn, hidden_states, encoder_hidden_states)

    stock = sample(pipe)
    handle = attnswap.enable(pipe, WINDOWS)
    names = [layer["name"] for layer in handle.report().to_dict()["denoisers"][0]["layers"] if layer["accelerated"]]
    mine = Weighted()
    for name in names:
        pipe.unet.get_submodule(name).set_processor(mine)
    with pytest.warns(attnswap.AttnswapWarning, match="replaced by Weighted, which holds weights"):
        assert torch.equal(sample(pipe), stock)
    assert "Weighted" in str(handle.report())
    handle.disable()
    assert all(pipe.unet.get_submodule(name).processor is mine for name in names)
    inspection = attnswap.inspect(pipe, WINDOWS)
    assert inspection.accelerated == 0
    assert "Weighted holds weights and is kept" in str(inspection)
