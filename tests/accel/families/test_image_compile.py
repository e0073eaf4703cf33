"""Image transformers under `torch.compile`: no more graphs than the stock model needs, none for a layer or a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attnswap
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from .image_models import CASES, run

GRID, TEXT = (4, 6), 5


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


# Dynamo gives up at eight graphs of one function. Stock single blocks of FLUX need two: the first gets a whole tensor,
# the others a part of one.
@pytest.mark.parametrize(
    ("name", "layers", "down", "wanted"),
    [("flux", {"num_single_layers": 10}, None, 3), ("qwen_image", {"num_layers": 10}, 2, 1)],
    ids=["flux", "qwen_image, pooled"],
)
def test_repeated_blocks_share_a_graph_however_many(name: str, layers: Any, down: int | None, wanted: int) -> None:
    case, config = CASES[name], attnswap.Clear(radius=2, down_factor=down)
    model, inputs = case.make(**layers), case.inputs(GRID, TEXT, 1)
    with attnswap.enabled(model, config):
        local = run(model, inputs)
    graphs = CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    handle = attnswap.enable(model, config)
    close(run(model, inputs), local)
    inputs["timestep"] = inputs["timestep"] / 2
    run(model, inputs)
    assert graphs.frame_count == wanted
    layer = handle.report().to_dict()["denoisers"][0]["layers"][0]
    assert layer["accelerated_calls"] == 2
    assert 0 < layer["pairs"] < layer["dense_pairs"]


def test_a_whole_compiled_model_alternates_between_sizes() -> None:
    case, config = CASES["flux"], attnswap.Clear(radius=2)
    model, sizes = case.make(num_single_layers=1), [(GRID, TEXT, 1), ((6, 3), 7, 1), (GRID, TEXT, 1)]
    with attnswap.enabled(model, config):
        wanted = [run(model, case.inputs(*size)) for size in sizes]
    attnswap.enable(model, config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size, local in zip(sizes, wanted, strict=True):
        close(run(compiled, case.inputs(*size)), local)
