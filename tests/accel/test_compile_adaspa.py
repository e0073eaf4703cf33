"""AdaSpa under `torch.compile`: no graph for a step, a layer or a search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import attnswap
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch._dynamo.testing import CompileCounterWithBackend

from . import video_models
from .methods import adaspa_cases as cases
from .methods.adaspa_cases import SMALL


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_repeated_blocks_need_one_graph_more_whatever_they_do_and_however_many() -> None:
    """One for the warm-up, which is stock attention; one for searches and sparse steps in all layers and branches."""
    case = video_models.CASES["wan"]
    model = cases.sharpen(case.make(num_layers=3), 2.0)
    texts = [video_models.noise(1, 6, 16, seed=seed) for seed in (1, 2)]
    run = cases.Steps(case.inputs((2, 4, 6), 6, 1), texts=texts, name_branches=True)
    with attnswap.enabled(model, SMALL) as handle:
        wanted, eager = run.of(model, handle), cases.layers_of(handle)
    graphs = CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    handle = attnswap.enable(model, SMALL)
    close(run.of(model, handle), wanted)
    assert graphs.frame_count == 2
    assert cases.counts_of(handle) == (2 * 2, 2 * 2, 2 * 3)
    for layer, before in zip(cases.layers_of(handle), eager, strict=True):
        assert layer["backend"] == before["backend"] is not None
        assert layer["pairs"] == before["pairs"]
        assert [branch["level"] for branch in layer["branches"]] == [branch["level"] for branch in before["branches"]]


def test_a_whole_compiled_model_needs_one_graph_more() -> None:
    run = cases.steps(grid=(6, 8), text=7, dtype=torch.float32)
    model = cases.flux(dtype=torch.float32, num_layers=1, num_single_layers=1)
    config = replace(SMALL, reorder="tile")
    with attnswap.enabled(model, config) as handle:
        wanted, report = run.of(model, handle), handle.report()
    graphs = CompileCounterWithBackend("eager")
    handle = attnswap.enable(model, config)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    close(run.of(compiled, handle), wanted)
    assert graphs.frame_count == 2
    assert cases.counts_of(handle) == (2, 2, 3)
    assert (handle.report().density, handle.report().searches) == (report.density, report.searches)


def test_blocks_that_a_cache_leaves_out_are_not_said_to_have_searched() -> None:
    """Graphs do not tell, so what layers were to do is counted where they did it."""
    run = cases.steps(grid=(6, 8), text=7, dtype=torch.float32, name_branches=True)
    model = cases.flux(heads=2, dtype=torch.float32, num_layers=2, num_single_layers=1)
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    found = []
    for compiled in (False, True):
        if compiled:
            model.transformer_blocks[1].compile(backend="eager")
        with attnswap.enabled(model, SMALL) as handle:
            run.of(model, handle)
            found.append([(x["searches"], x["accelerated_calls"]) for x in cases.layers_of(handle)])
        model._reset_stateful_cache()
    assert found[0] == found[1]
    assert found[0] == [(2, 3), (0, 0), (0, 0)], "only the first block is run after the first step"
