"""LoRA and its kin under LinFusion: what they add to the stock projections, they add to the linear ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attnswap
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoKrConfig, LoraConfig
from peft.utils import get_peft_model_state_dict

from .. import tiny
from ..slim import sample, slim
from . import linfusion_cases as cases
from .common import call, largest_difference

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
SIZE = (12, 10)
CLOSE = 2e-5


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny.sd15_unet(layers_per_block=1)


@pytest.fixture
def config(unet: UNet2DConditionModel, tmp_path: Path) -> attnswap.LinFusion:
    return cases.linfusion(tmp_path, unet)


def add_lora(unet: Any, name: str = "extra", seed: int = 5, **settings: Any) -> None:
    torch.manual_seed(seed)
    settings = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS, "init_lora_weights": False, **settings}
    unet.add_adapter(LoraConfig(**settings), name)


def with_lora(unet: Any, **scales: float) -> torch.Tensor:
    """By the formulas: each LinFusion weight plus the products of the adapters, times a scale each.

    Everything but self-attention runs as it stands in the U-Net.
    """
    weights = cases.random_weights(unet)
    stock = {name: attn.processor for name, attn in cases.self_attention(unet).items()}
    for attn, tensors in zip(cases.self_attention(unet).values(), weights, strict=True):
        for target in TARGETS:
            layer = attn.get_submodule(target)
            for name, scale in scales.items():
                product = layer.lora_B[name].weight @ layer.lora_A[name].weight
                tensors[f"{target}.weight"] = tensors[f"{target}.weight"] + scale * product.detach()
    cases.put_by_definition(unet, weights)
    out = call(unet, SIZE)
    for name, processor in stock.items():
        unet.get_submodule(name).set_processor(processor)
    return out


@pytest.mark.parametrize("order", ["lora first", "method first"])
def test_a_lora_adds_its_product_to_the_linear_weights(order: str, unet: Any, config: Any) -> None:
    with attnswap.enabled(unet, config):
        without = call(unet, SIZE)
    if order == "lora first":
        add_lora(unet)
        handle = attnswap.enable(unet, config)
    else:
        handle = attnswap.enable(unet, config)
        add_lora(unet)
    enabled = call(unet, SIZE)
    unet.delete_adapters("extra")
    assert torch.equal(call(unet, SIZE), without)
    handle.disable()
    add_lora(unet)
    assert largest_difference(enabled, with_lora(unet, extra=1.5)) <= CLOSE
    assert largest_difference(enabled, without) > 100 * CLOSE


def test_adapters_are_weighted_switched_off_and_on(unet: Any, config: Any) -> None:
    add_lora(unet, "one", 1)
    add_lora(unet, "two", 2)
    scales = {"one": 0.3, "two": -0.7}
    unet.set_adapters(list(scales), list(scales.values()))
    both = with_lora(unet, one=0.45, two=-1.05)
    handle = attnswap.enable(unet, config)
    assert largest_difference(call(unet, SIZE), both) <= CLOSE
    unet.set_adapters(["two"], [1.0])
    only_two = call(unet, SIZE)
    unet.disable_lora()
    neither = call(unet, SIZE)
    unet.enable_lora()
    assert torch.equal(call(unet, SIZE), only_two)
    handle.disable()
    assert largest_difference(only_two, with_lora(unet, two=1.5)) <= CLOSE
    unet.unload_lora()
    with attnswap.enabled(unet, config):
        assert torch.equal(call(unet, SIZE), neither)


def test_a_scale_given_with_the_call_reaches_the_linear_layers(unet: Any, config: Any) -> None:
    add_lora(unet)
    wanted = {scale: with_scale(unet, scale) for scale in (0.0, 0.5)}
    with attnswap.enabled(unet, config):
        for scale, out in wanted.items():
            given = call(unet, SIZE, cross_attention_kwargs={"scale": scale})
            assert largest_difference(given, out) <= CLOSE


def with_scale(unet: Any, scale: float) -> torch.Tensor:
    unet.set_adapters(["extra"], [scale])
    out = with_lora(unet, extra=1.5 * scale)
    unet.set_adapters(["extra"], [1.0])
    return out


@pytest.mark.parametrize("order", ["fused first", "method first"])
def test_a_fused_lora_counts_as_it_did(order: str, unet: Any, config: Any) -> None:
    add_lora(unet)
    unet.set_adapters(["extra"], [0.7])
    wanted = with_lora(unet, extra=0.7 * 1.5)
    unet.set_adapters(["extra"], [1.0])
    if order == "fused first":
        unet.fuse_lora(lora_scale=0.7)
        handle = attnswap.enable(unet, config)
    else:
        handle = attnswap.enable(unet, config)
        unet.fuse_lora(lora_scale=0.7)
    assert largest_difference(call(unet, SIZE), wanted) <= CLOSE
    unet.unfuse_lora()
    assert largest_difference(call(unet, SIZE), wanted) <= CLOSE
    handle.disable()


def test_of_several_adapters_those_fused_count(unet: Any, config: Any) -> None:
    """As in stock layers: what is not fused has no part any more, active or not."""
    add_lora(unet, "one", 1)
    add_lora(unet, "two", 2)
    unet.set_adapters(["one", "two"])
    unet.fuse_lora(adapter_names=["one"])
    with attnswap.enabled(unet, config):
        enabled = call(unet, SIZE)
    assert largest_difference(enabled, with_lora(unet, one=1.5)) <= CLOSE


def test_a_bias_of_a_lora_is_added_also_when_fused(unet: Any, config: Any) -> None:
    add_lora(unet, target_modules=["to_out.0"])
    with attnswap.enabled(unet, config):
        without_bias = call(unet, SIZE)
    unet.delete_adapters("extra")
    add_lora(unet, target_modules=["to_out.0"], lora_bias=True)
    with attnswap.enabled(unet, config):
        with_bias = call(unet, SIZE)
        assert largest_difference(with_bias, without_bias) > 100 * CLOSE
        unet.fuse_lora()
        assert largest_difference(call(unet, SIZE), with_bias) <= CLOSE


def test_a_lora_that_was_fused_and_unloaded_belongs_to_the_base_which_the_checkpoint_replaces(
    unet: Any, config: Any
) -> None:
    add_lora(unet)
    unet.fuse_lora()
    unet.unload_lora()
    with attnswap.enabled(unet, config):
        enabled = call(unet, SIZE)
    cases.put_by_definition(unet, cases.random_weights(unet))
    assert largest_difference(enabled, call(unet, SIZE)) <= CLOSE


KINDS = {
    "dora": LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "lokr": LoKrConfig(r=2, target_modules=TARGETS, init_weights=False),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_any_other_kind_adds_the_difference_it_makes_to_the_layer(kind: str, unet: Any, config: Any) -> None:
    """Weights as the adapter sees them: its layer applied to unit vectors."""
    torch.manual_seed(5)
    unet.add_adapter(KINDS[kind], "extra")
    with attnswap.enabled(unet, config):
        enabled = call(unet, SIZE)
        unet.fuse_lora()
        with pytest.raises(ValueError, match=r"extra: an adapter that is no plain LoRA cannot be fused.*unfuse_lora"):
            call(unet, SIZE)
        unet.unfuse_lora()
        assert largest_difference(call(unet, SIZE), enabled) <= CLOSE
    weights = cases.random_weights(unet)
    with torch.no_grad():
        for attn, tensors in zip(cases.self_attention(unet).values(), weights, strict=True):
            for target in TARGETS:
                layer = attn.get_submodule(target)
                units = torch.eye(layer.in_features)
                tensors[f"{target}.weight"] = tensors[f"{target}.weight"] + (layer(units) - layer.base_layer(units)).T
    cases.put_by_definition(unet, weights)
    assert largest_difference(enabled, call(unet, SIZE)) <= CLOSE


@pytest.mark.parametrize(
    "targets", [TARGETS, "all-linear", ["to_q", "query", "key", "value"]], ids=["usual", "all", "other names"]
)
def test_an_adapter_never_lands_on_the_linear_weights(targets: Any, unet: Any, config: Any) -> None:
    handle = attnswap.enable(unet, config)
    before = {name for name, _ in unet.named_modules() if "linfusion" in name}
    assert before
    add_lora(unet, target_modules=targets)
    assert {name for name, _ in unet.named_modules() if "linfusion" in name} == before
    call(unet, SIZE)
    unet.delete_adapters("extra")
    handle.disable()


def test_a_lora_is_trained_through_the_linear_layers(unet: Any, config: Any) -> None:
    unet.requires_grad_(False)
    add_lora(unet)
    attnswap.enable(unet, config)
    with torch.enable_grad():
        unet(torch.ones(1, 4, 8, 8), 500, torch.ones(1, 5, tiny.TEXT)).sample.square().mean().backward()
    trained = {name for name, parameter in unet.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in unet.named_parameters() if "lora" in name}
    assert all(parameter.grad.abs().max() > 0 for name, parameter in unet.named_parameters() if name in trained)


def test_a_pipelines_own_lora_functions_work_while_enabled(tmp_path: Path) -> None:
    donor = slim("sd15").unet
    add_lora(donor)
    saved = {f"unet.{key}": value for key, value in get_peft_model_state_dict(donor, adapter_name="extra").items()}
    pipe = slim("sd15")
    config = cases.linfusion(tmp_path, pipe.unet)
    stock = sample(pipe)
    handle = attnswap.enable(pipe, config)
    without = sample(pipe)
    pipe.load_lora_weights(saved, adapter_name="extra")
    loaded = sample(pipe)
    assert not torch.allclose(loaded, without)
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), without)
    pipe.load_lora_weights(saved, adapter_name="extra")
    pipe.fuse_lora(components=["unet"])
    torch.testing.assert_close(sample(pipe), loaded, rtol=1e-3, atol=1e-4)
    handle.disable()
    pipe.unfuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    torch.testing.assert_close(sample(pipe), stock, rtol=1e-3, atol=1e-4)


def test_a_lora_on_some_projections_leaves_query_key_and_value_of_one_dtype_under_autocast(
    unet: UNet2DConditionModel, config: attnswap.LinFusion
) -> None:
    add_lora(unet, target_modules=["to_q", "to_v"])
    attnswap.enable(unet, config)
    attn = cases.self_attention(unet)["mid_block.attentions.0.transformer_blocks.0.attn1"]
    tokens = torch.randn(1, 6, attn.to_q.in_features)  # a normalisation leaves fp32 under a GPU's autocast
    with torch.autocast("cpu", torch.bfloat16):
        projected = attn.linfusion.project(attn, tokens)
    assert {x.dtype for x in projected} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore::attnswap.AttnswapWarning")
def test_own_projections_with_an_adapter_fused_into_them_are_refused(unet: UNet2DConditionModel) -> None:
    add_lora(unet)
    unet.fuse_lora()
    with pytest.raises(attnswap.WeightsError, match="cannot be taken over while extra is fused into it: unfuse it"):
        attnswap.enable(unet, attnswap.LinFusion(weights=None))
    unet.unfuse_lora()
    attnswap.enable(unet, attnswap.LinFusion(weights=None))
