"""Dilation without touching a module equals dilation by changing every module of a copy."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attnswap.pipelines.routes.dilation import Dilated
from torch import nn


def called(unet: nn.Module, pipe: Any, side: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim
    more = {}
    if unet.config.addition_embed_type:
        more = {"added_cond_kwargs": {"text_embeds": torch.ones(2, 16), "time_ids": torch.ones(2, 6)}}
    text = torch.randn(2, 5, width, generator=generator)
    with torch.no_grad():
        output: torch.Tensor = unet(torch.randn(2, 4, side, side, generator=generator), 500, text, **more).sample
    return output


def dilate_modules(unet: nn.Module, scale: int) -> nn.Module:
    """What the published code does: every convolution itself is changed."""
    for module in unet.modules():
        if type(module) is nn.Conv2d:
            module.dilation = tuple(scale * part for part in module.dilation)
            module.padding = tuple(scale * part for part in module.padding)
    return unet


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_equals_changed_modules(pipe: Any, scale: int) -> None:
    expected = called(dilate_modules(copy.deepcopy(pipe.unet), scale), pipe)
    with Dilated(scale):
        assert torch.equal(called(pipe.unet, pipe), expected)
    assert (scale == 1) == torch.equal(called(pipe.unet, pipe), expected)


def test_low_rank_adapters_give_what_their_merged_weights_give(sd: Any) -> None:
    peft = pytest.importorskip("peft")
    # A 3x3 convolution, a 1x1, and a strided one.
    names = ["conv1", "conv_shortcut", "downsamplers.0.conv"]
    sd.unet.add_adapter(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    assert any("lora_A" in name for name, _ in sd.unet.named_modules())
    with Dilated(2):
        wrapped = called(sd.unet, sd)
    sd.unet.fuse_lora()
    sd.unet.unload_lora()
    merged = called(dilate_modules(sd.unet, 2), sd)
    torch.testing.assert_close(wrapped, merged, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", [1, (1, 1), "same"])
def test_every_way_to_write_a_padding(padding: Any) -> None:
    picture, weight = torch.randn(1, 2, 9, 9), torch.randn(3, 2, 3, 3)
    expected = F.conv2d(picture, weight, padding=2, dilation=2)
    with Dilated(2):
        assert torch.equal(F.conv2d(picture, weight, padding=padding), expected)
        assert torch.equal(F.conv2d(input=picture, weight=weight, bias=None, stride=1, padding=padding), expected)


def test_ends_with_the_block_also_by_an_exception() -> None:
    picture, weight = torch.randn(1, 1, 5, 5), torch.randn(1, 1, 3, 3)
    expected = F.conv2d(picture, weight, padding=1)
    with pytest.raises(ZeroDivisionError), Dilated(2):
        raise ZeroDivisionError
    assert torch.equal(F.conv2d(picture, weight, padding=1), expected)


def test_other_threads_are_left_alone() -> None:
    picture, weight = torch.randn(1, 1, 5, 5), torch.randn(1, 1, 3, 3)
    expected, found = F.conv2d(picture, weight, padding=1), []
    with Dilated(2):
        thread = threading.Thread(target=lambda: found.append(F.conv2d(picture, weight, padding=1)))
        thread.start()
        thread.join()
        assert not torch.equal(F.conv2d(picture, weight, padding=1), expected)
    assert torch.equal(found[0], expected)


def test_a_scale_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Dilated(0)
