"""LinFusion under `torch.compile`: no graph for a step or a layer, none broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attnswap
import pytest
import torch
from diffusers import UNet2DConditionModel

from . import tiny
from .methods import linfusion_cases as cases
from .methods.common import call
from .methods.test_linfusion_adapters import add_lora
from .test_compile import close, fresh, graphs

__all__ = ["fresh", "graphs"]  # fixtures


def one_level() -> UNet2DConditionModel:
    """Four transformer blocks of one width: tracing takes time."""
    return tiny.sd15_unet(
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )


def at(unet: Any, step: int) -> torch.Tensor:
    return call(unet, (8, 10), torch.tensor(900 - 100 * step))


def calls(handle: Any) -> set[tuple[int, int]]:
    """(linear, dense) calls of the layers, as reported."""
    [denoiser] = handle.report().to_dict()["denoisers"]
    return {(x["accelerated_calls"], x["dense_calls"]) for x in denoiser["layers"] if x["accelerated"]}


def test_repeated_blocks_need_no_graph_for_a_step_or_a_layer(tmp_path: Path, graphs: Any) -> None:
    unet = one_level()
    add_lora(unet)
    stock, config = at(unet, 0), cases.linfusion(tmp_path, unet, 3)
    with attnswap.enabled(unet, config):
        enabled = [at(unet, step) for step in range(3)]
    handle = attnswap.enable(unet, config)
    unet.compile_repeated_blocks(fullgraph=True, backend=graphs)
    close(at(unet, 0), enabled[0])
    assert graphs.frame_count == 1, "four blocks of the same shape and kind share a graph"
    close(at(unet, 1), enabled[1])
    close(at(unet, 2), enabled[2])
    assert graphs.frame_count == 1
    assert calls(handle) == {(3, 0)}
    handle.disable()
    close(at(unet, 0), stock)


@pytest.mark.parametrize("order", ["compiled first", "in place"])
def test_the_whole_model_is_one_graph(order: str, tmp_path: Path, graphs: Any) -> None:
    unet = one_level()
    config = cases.linfusion(tmp_path, unet)
    with attnswap.enabled(unet, config):
        enabled = [at(unet, step) for step in range(3)]
    entry: Any = unet
    if order == "compiled first":
        entry = torch.compile(unet, backend=graphs, fullgraph=True)
        handle = attnswap.enable(entry, config)
    else:
        unet.compile(backend=graphs, fullgraph=True)
        handle = attnswap.enable(unet, config)
    for step in range(3):
        close(at(entry, step), enabled[step])
    assert graphs.frame_count == 1
    assert calls(handle) == {(3, 0)}
    handle.disable()
