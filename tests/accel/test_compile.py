"""Under `torch.compile`: one graph for what differs in shape only, none for a step, a layer or a shift."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attnswap
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from . import tiny
from .slim import sample, slim

#: Every quarter in turn, by step and by layer.
SHIFTING = attnswap.HiDiffusion(raunet=False, shift=lambda step, layer: (step + len(layer)) % 4)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs() -> CompileCounterWithBackend:
    return CompileCounterWithBackend("eager")


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-3)


def eager(config: Any, **how: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A pipeline, what it gives as it is, and what it gives enabled."""
    pipe = slim("sd15")
    stock = sample(pipe, **how)
    with attnswap.enabled(pipe, config):
        return pipe, stock, sample(pipe, **how)


def test_repeated_blocks_need_no_graph_for_a_step_a_shift_or_a_layer() -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    pipe, stock, enabled = eager(SHIFTING, steps=5)
    handle = attnswap.enable(pipe, SHIFTING)
    sample(pipe, steps=1)
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend=graphs)
    sample(pipe, steps=1)
    first = graphs.frame_count
    blocks = sum(type(module).__name__ == "BasicTransformerBlock" for module in pipe.unet.modules())
    assert 0 < first < blocks, "blocks of the same shape and kind share a graph"
    close(sample(pipe, steps=5), enabled)
    assert graphs.frame_count == first
    report = handle.report().to_dict()["denoisers"][0]
    assert report["calls"] == 7
    counted = {layer["accelerated_calls"] for layer in report["layers"] if layer["accelerated"]}
    assert counted == {7}, "the call before compiling among them"
    handle.disable()
    close(sample(pipe, steps=5), stock)


def test_more_layers_need_no_more_graphs(graphs: Any) -> None:
    counts = []
    for layers in (2, 3):
        torch._dynamo.reset()
        graphs.frame_count = 0
        pipe = tiny.sdxl(tiny.sdxl_unet(layers_per_block=1, transformer_layers_per_block=(1, layers, layers)))
        attnswap.enable(pipe, SHIFTING)
        pipe.unet.compile_repeated_blocks(fullgraph=True, backend=graphs)
        sample(pipe, steps=2)
        counts.append(graphs.frame_count)
    assert counts[0] == counts[1]


def test_another_size_needs_graphs_once(graphs: Any) -> None:
    pipe = slim("sd15")
    attnswap.enable(pipe, SHIFTING)
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend=graphs, dynamic=False)
    counts = []
    for side in (12, 16, 12, 16):
        sample(pipe, side=side, steps=1)
        counts.append(graphs.frame_count)
    assert counts[0] < counts[1] == counts[2] == counts[3]


def test_the_whole_of_hidiffusion_in_compiled_blocks(graphs: Any) -> None:
    pipe, stock, enabled = eager("hidiffusion", steps=5)
    handle = attnswap.enable(pipe, "hidiffusion")
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend=graphs)
    close(sample(pipe, steps=5), enabled)
    before = graphs.frame_count
    close(sample(pipe, steps=5), enabled)
    assert graphs.frame_count == before
    handle.disable()
    close(sample(pipe, steps=5), stock)


def compiled_before(pipe: Any, config: Any, backend: Any) -> Any:
    pipe.unet = torch.compile(pipe.unet, backend=backend)
    return attnswap.enable(pipe, config)


def compiled_after(pipe: Any, config: Any, backend: Any) -> Any:
    handle = attnswap.enable(pipe, config)
    pipe.unet = torch.compile(pipe.unet, backend=backend)
    return handle


def compiled_in_place(pipe: Any, config: Any, backend: Any) -> Any:
    pipe.unet.compile(backend=backend)
    return attnswap.enable(pipe, config)


ORDERS: list[Callable[[Any, Any, Any], Any]] = [compiled_before, compiled_after, compiled_in_place]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
def test_the_whole_model_compiled(order: Any, graphs: Any) -> None:
    pipe, stock, enabled = eager(SHIFTING, steps=2)
    unet = pipe.unet
    handle = order(pipe, SHIFTING, graphs)
    sample(pipe, steps=1)
    first = graphs.frame_count
    assert first > 0
    close(sample(pipe, steps=2), enabled)
    assert graphs.frame_count == first, "no graph for a step or a shift"
    report = handle.report().to_dict()
    assert report["denoisers"][0]["calls"] == 3
    counted = [layer for layer in report["denoisers"][0]["layers"] if layer["accelerated"]]
    assert {(layer["accelerated_calls"], layer["backend"]) for layer in counted} == {(3, "in a compiled graph")}
    assert report["density"] == pytest.approx(0.25)
    handle.disable()
    assert "_attnswap" not in vars(unet)
    if order is compiled_before:  # tracing takes seconds: one order stands for all
        close(sample(pipe, steps=2), stock)
