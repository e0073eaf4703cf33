"""LinFusion's weights go where those of the model go: offloading whole models, layers or groups, casting layerwise."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import attnswap
import pytest
import torch
from diffusers.hooks import group_offloading

from .methods import linfusion_cases as cases
from .methods.common import call
from .slim import sample, slim
from .test_compose_offload import MOVERS, casting, ours_left_in, sequential_offload


@pytest.mark.parametrize("order", ["mover first", "method first"])
@pytest.mark.parametrize("mover", MOVERS, ids=lambda mover: mover.__name__)
def test_moving_weights_changes_neither_what_is_enabled_nor_the_way_back(
    mover: Any, order: str, tmp_path: Path
) -> None:
    pipe = slim("sd15")
    if mover is casting:  # weights lose bits: compare with the rounded ones
        with torch.no_grad():
            for parameter in pipe.unet.parameters():
                parameter.copy_(parameter.bfloat16())
    config = cases.linfusion(tmp_path, pipe.unet)
    steps = 1 if mover is sequential_offload else 3  # it takes a second a step
    stock = sample(pipe, steps=steps)
    with attnswap.enabled(pipe, config) as handle:
        enabled, report = sample(pipe, steps=steps), handle.report().to_dict()
    if order == "mover first":
        mover(pipe)
        assert torch.equal(sample(pipe, steps=steps), stock)
        handle = attnswap.enable(pipe, config)
    else:
        handle = attnswap.enable(pipe, config)
        mover(pipe)
    # Two runs, because offloading puts its hooks anew at the end of each.
    for _ in range(2):
        handle.reset()
        assert torch.equal(sample(pipe, steps=steps), enabled)
        assert handle.report().to_dict() == report
    handle.disable()
    assert torch.equal(sample(pipe, steps=steps), stock)
    assert not ours_left_in(pipe.unet)
    assert not [name for name, _ in pipe.unet.named_modules() if "linfusion" in name]


@pytest.mark.filterwarnings("ignore::attnswap.AttnswapWarning")
def test_a_units_own_projections_are_fetched_from_where_they_are_offloaded() -> None:
    pipe = slim("sd15")
    with attnswap.enabled(pipe, attnswap.LinFusion(weights=None)):
        wanted = sample(pipe, steps=1)
    sequential_offload(pipe)
    assert pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1").to_q.weight.is_meta
    with attnswap.enabled(pipe, attnswap.LinFusion(weights=None)):
        assert torch.equal(sample(pipe, steps=1), wanted)
    assert pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1").to_q.weight.is_meta


def test_weights_cast_for_storage_leave_ours_in_the_precision_of_the_computation(tmp_path: Path) -> None:
    pipe = slim("sd15")
    casting(pipe)
    attnswap.enable(pipe, cases.linfusion(tmp_path, pipe.unet))
    attn = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    assert (attn.to_q.weight.dtype, attn.linfusion.query.dtype) == (torch.bfloat16, torch.float32)


def test_they_follow_the_model_to_another_device(tmp_path: Path) -> None:
    unet = slim("sd15").unet
    attnswap.enable(unet, cases.linfusion(tmp_path, unet))
    unet.to("meta")
    assert {buffer.device.type for buffer in unet.buffers()} == {"meta"}


def test_loading_needs_no_second_copy_in_the_model(tmp_path: Path) -> None:
    """The stock weights stay the model's own, those of the checkpoint are what is added."""
    unet = slim("sd15").unet
    config = cases.linfusion(tmp_path, unet)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    attnswap.enable(unet, config)
    added = sum(buffer.nbytes for buffer in unet.buffers())
    assert file.stat().st_size - 40_000 < added < file.stat().st_size
    call(unet, (8, 8))
    assert sum(buffer.nbytes for buffer in unet.buffers()) == added


class NoStream:
    """Enough of a stream for `ModuleGroup` to keep its list of tensors as it does on an accelerator."""

    def synchronize(self) -> None:
        pass

    def current_stream(self) -> NoStream:
        return self

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def test_group_offloading_with_a_stream_learns_of_our_weights_and_that_they_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", lambda *_: NoStream())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    unet = slim("sd15").unet
    stock = call(unet, (8, 8))
    cpu = torch.device("cpu")
    blocks = group_offloading.GroupOffloadingType.BLOCK_LEVEL
    # Not `apply_group_offloading`: it refuses streams without an accelerator.
    group_offloading._apply_group_offloading(
        unet,
        group_offloading.GroupOffloadingConfig(
            cpu, cpu, blocks, False, False, False, num_blocks_per_group=1, stream=NoStream()
        ),
    )
    with attnswap.enabled(unet, cases.linfusion(tmp_path, unet)):
        assert not torch.equal(call(unet, (8, 8)), stock)
    assert torch.equal(call(unet, (8, 8)), stock)
