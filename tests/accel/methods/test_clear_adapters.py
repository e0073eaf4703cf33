"""CLEAR's weights beside LoRA, which adds to them what it adds to the stock projections, and under offloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attnswap
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from attnswap import Clear
from attnswap.accel.methods import clear_weights as weights_files
from diffusers.hooks import apply_group_offloading, group_offloading
from peft import LoraConfig

from ..test_compose_linfusion_memory import NoStream
from . import clear_cases as cases
from .common import largest_difference

GRID = (6, 8)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_out"]
CPU = torch.device("cpu")


@pytest.fixture
def model() -> Any:
    return cases.transformer()


@pytest.fixture
def config(model: Any, tmp_path: Path) -> Clear:
    cases.write(tmp_path, model, 3, 2)
    return Clear(radius=3, down_factor=2, weights=str(tmp_path))


def add_lora(model: Any) -> None:
    torch.manual_seed(5)
    model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, init_lora_weights=False), "extra")


def with_products(model: Any) -> torch.Tensor:
    """By the definition, with what the adapter adds to the weights of the checkpoint and to all others."""
    plain = cases.transformer()
    weights = cases.random_weights(plain, 2)
    products: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            products[name] = 1.5 * (module.lora_B["extra"].weight @ module.lora_A["extra"].weight).detach()
    for name, product in products.items():
        layer, _, projection = name.partition(".attn.")
        if projection:
            weights[f"{layer}.attn"][f"{projection}.weight"] += product
    with torch.no_grad():
        for name, product in products.items():
            if ".attn." not in name:
                plain.get_submodule(name).weight += product
    return cases.by_definition(plain, GRID, 3, weights)


@pytest.mark.parametrize("order", ["lora first", "method first"])
def test_a_lora_adds_its_product_to_the_checkpoints_weights(order: str, model: Any, config: Clear) -> None:
    if order == "lora first":
        add_lora(model)
    handle = attnswap.enable(model, config)
    if order == "method first":
        without = cases.call(model, GRID)
        add_lora(model)
        assert largest_difference(cases.call(model, GRID), without) > 100 * cases.CLOSE
    wanted = with_products(model)
    assert largest_difference(cases.call(model, GRID), wanted) <= cases.CLOSE
    model.fuse_lora()
    assert largest_difference(cases.call(model, GRID), wanted) <= cases.CLOSE
    model.unfuse_lora()
    model.delete_adapters("extra")
    if order == "method first":
        torch.testing.assert_close(cases.call(model, GRID), without, rtol=0, atol=cases.CLOSE)
    handle.disable()


def test_no_adapter_lands_on_the_checkpoints_weights(model: Any, config: Clear) -> None:
    attnswap.enable(model, config)
    torch.manual_seed(5)
    names = ["query", "key", "value", "to_q"]
    model.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False), "extra")
    assert not [name for name, _ in model.named_parameters() if "lora" in name and "to_q" not in name]


def test_a_lora_is_trained_through_the_checkpoints_weights(model: Any, config: Clear) -> None:
    model.requires_grad_(False)
    add_lora(model)
    attnswap.enable(model, config)
    with torch.enable_grad():
        model(**cases.inputs(GRID)).sample.square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "lora" in name}


def test_own_weights_with_a_lora_fused_into_them_are_no_start_for_a_student(model: Any) -> None:
    add_lora(model)
    model.fuse_lora()
    with pytest.raises(attnswap.WeightsError, match="own to_q cannot be taken over while extra is fused into it"):
        weights_files.from_stock(model.transformer_blocks[0].attn)


def whole_model(model: Any) -> None:
    cpu_offload_with_hook(model, execution_device=CPU)


def layers(model: Any) -> None:
    cpu_offload(model, execution_device=CPU)


def groups(model: Any, **how: Any) -> None:
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **how)


def leaves(model: Any) -> None:
    groups(model, offload_type="leaf_level")


def blocks(model: Any) -> None:
    groups(model, offload_type="block_level", num_blocks_per_group=1)


@pytest.mark.parametrize("order", ["offload first", "method first"])
@pytest.mark.parametrize("offload", [whole_model, layers, leaves, blocks], ids=lambda offload: offload.__name__)
def test_offloading_changes_neither_what_is_enabled_nor_the_way_back(
    offload: Any, order: str, model: Any, config: Clear
) -> None:
    stock = cases.call(model, GRID)
    with attnswap.enabled(model, config):
        wanted = cases.call(model, GRID)
    if order == "offload first":
        offload(model)
    handle = attnswap.enable(model, config)
    if order == "method first":
        offload(model)
    for _ in range(2):
        assert torch.equal(cases.call(model, GRID), wanted)
    handle.disable()
    assert torch.equal(cases.call(model, GRID), stock)
    assert not [name for name, _ in model.named_modules() if name.endswith(".clear")]
    if offload in (whole_model, layers):
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(cases.call(model, GRID), stock)


def test_a_students_first_weights_are_fetched_from_where_they_are_offloaded(model: Any) -> None:
    attn = model.transformer_blocks[0].attn
    wanted = weights_files.from_stock(attn, 2)
    layers(model)
    assert attn.to_q.weight.is_meta
    found = weights_files.from_stock(attn, 2)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_group_offloading_with_a_stream_learns_of_the_weights_and_that_they_are_gone(
    model: Any, config: Clear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", lambda *_: NoStream())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    stock = cases.call(model, GRID)
    level = group_offloading.GroupOffloadingType.BLOCK_LEVEL
    group_offloading._apply_group_offloading(
        model,
        group_offloading.GroupOffloadingConfig(
            CPU, CPU, level, False, False, False, num_blocks_per_group=1, stream=NoStream()
        ),
    )
    with attnswap.enabled(model, config):
        assert not torch.equal(cases.call(model, GRID), stock)
    assert torch.equal(cases.call(model, GRID), stock)
