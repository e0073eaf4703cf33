"""AdaSpa beside what else can be done to a model: offloading, LoRA, caches, copies, Diffusers' own road."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import attnswap
import pytest
import torch
from attnswap import AdaSpa
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig

from . import tiny_dit
from .families import image_models
from .methods import adaspa_cases as cases
from .methods.adaspa_cases import SMALL
from .methods.common import notes
from .watching import unchanged

CONFIG = AdaSpa(sparsity=0.5, min_tokens=0, block=(16, 16), search_steps=(1, 3))


def sample(pipe: Any, arguments: dict[str, Any], steps: int = 4) -> torch.Tensor:
    """Of several blocks: 104 tokens of FLUX, 72 of Wan."""
    size = {"height": 64, "width": 96} if hasattr(pipe, "transformer_2") else {"height": 32, "width": 48}
    changes = {"num_inference_steps": steps, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    out: torch.Tensor = pipe(**{**arguments, **size, **changes})[0]
    return out


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def group_offload(pipe: Any) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.transformer, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def lora(pipe: Any) -> None:
    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "extra")


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("change", [model_offload, group_offload, lora], ids=lambda change: change.__name__)
def test_what_is_done_before_and_after_enabling_is_the_same(name: str, change: Callable[[Any], None]) -> None:
    found = []
    for first in ("change", "method"):
        pipe, arguments = tiny_dit.PIPELINES[name]()
        torch.manual_seed(0)
        for model in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            for parameter in () if model is None else model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        if first == "change":
            change(pipe)
        handle = attnswap.enable(pipe, CONFIG)
        if first == "method":
            change(pipe)
        runs = [sample(pipe, arguments) for _ in range(2)]
        assert torch.equal(*runs)
        handle.disable()
        found.append((runs[0], sample(pipe, arguments), handle.report().searches))
    (sparse, stock, searches), again = found
    assert torch.equal(sparse, again[0])
    assert torch.equal(stock, again[1])
    assert not torch.equal(sparse, stock)
    assert searches == again[2] > 0


def first_block_cache(model: Any) -> None:
    model.enable_cache(FirstBlockCacheConfig(threshold=10.0))


def broadcast(model: Any) -> None:
    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 2000),
            current_timestep_callback=lambda: 500,
            spatial_attention_block_identifiers=("transformer_blocks", "single_transformer_blocks"),
        )
    )


@pytest.mark.parametrize(
    ("cache", "searches"),
    # The first block is always there, in both branches, others in step 1 only; or all layers in every second call.
    [(first_block_cache, [2 * 2, 0]), (broadcast, [2, 2])],
    ids=["first_block_cache", "broadcast"],
)
def test_layers_that_a_cache_leaves_out_search_when_they_are_next_there(
    cache: Callable[[Any], None], searches: list[int]
) -> None:
    pipe, arguments = tiny_dit.flux()
    cache(pipe.transformer)
    handle = attnswap.enable(pipe, replace(CONFIG, search_steps=(2, 3)))
    first = sample(pipe, arguments, 6)
    layers = cases.layers_of(handle)
    calls = [layer["dense_calls"] + layer["accelerated_calls"] for layer in layers]
    assert min(calls) < 2 * 6, "it does leave some out"
    assert [layer["searches"] for layer in layers] == searches
    assert first.isfinite().all()
    assert torch.equal(sample(pipe, arguments, 6), first)


def small() -> tuple[Any, cases.Steps]:
    model = cases.flux(heads=2, dtype=torch.float32, num_layers=1, num_single_layers=1)
    return model, cases.steps(grid=(6, 8), text=7, dtype=torch.float32)


def next_call(model: Any, run: cases.Steps, step: int) -> torch.Tensor:
    inputs = {**run.inputs, "encoder_hidden_states": run.texts[0], "timestep": torch.tensor([run.timesteps[step - 1]])}
    with torch.no_grad():
        out: torch.Tensor = model(**inputs)[0]
    return out


def test_a_copy_in_the_middle_of_a_run_goes_on_by_itself() -> None:
    model, run = small()
    handle = attnswap.enable(model, SMALL)
    run.of(model, handle, until=3)
    twin = copy.deepcopy(model)
    states = [m._attnswap.strategies[0]._states for m in (model, twin)]
    assert states[0].keys() == states[1].keys() != set()
    wanted = next_call(model, run, 4)
    assert {state.searched_at for state in states[0].values()} == {4}
    assert {state.searched_at for state in states[1].values()} == {2}, "not with the original"
    handle.disable()
    assert torch.equal(next_call(twin, run, 4), wanted)
    attnswap.disable(twin)
    assert torch.equal(next_call(twin, run, 5), next_call(model, run, 5))


def test_a_model_that_can_be_pickled_still_can() -> None:
    """One without Diffusers' own hooks."""
    case = image_models.CASES["sd3"]
    model, run = case.make(), cases.Steps(case.inputs((6, 8), 7, 1))
    handle = attnswap.enable(model, SMALL)
    wanted = run.of(model, handle)
    twin = pickle.loads(pickle.dumps(model))
    assert cases.counts_of(handle) == (2, 2, 3)
    again = attnswap.enable(twin, SMALL)
    assert all(map(torch.equal, run.of(twin, again), wanted))


def test_enabled_twice_is_enabled_once() -> None:
    model, run = small()
    stock = run.of(model)
    with unchanged(model):
        first = attnswap.enable(model, SMALL)
        second = attnswap.enable(model, replace(SMALL, sparsity=0.7))
        run.of(model, second)
        assert (first.active, second.active) == (False, True)
        assert cases.counts_of(first) == (0, 0, 0)
        assert cases.counts_of(second) == (2, 2, 3)
        first.disable()
        assert second.active
        attnswap.disable(model)
    assert all(map(torch.equal, run.of(model), stock))


def test_diffusers_own_road_gives_the_same() -> None:
    model, run = small()
    with attnswap.enabled(model, SMALL) as handle:
        wanted = run.of(model, handle)
    stock = run.of(model)
    model.set_attn_processor(attnswap.attn_processors(model, SMALL))
    # Steps are known by their change alone; that is enough for whole numbers of steps.
    found = run.of(model)
    assert all(map(torch.equal, found, wanted))
    assert not torch.equal(found[-1], stock[-1])


def test_half_precision_and_autocast() -> None:
    model, run = small()
    with attnswap.enabled(model, SMALL) as handle:
        wanted = run.of(model, handle)
    for dtype, near in ((torch.bfloat16, 0.15), (torch.float16, 0.03)):
        half, shorter = copy.deepcopy(model).to(dtype), copy.copy(run)
        shorter.inputs = cases.in_dtype(run.inputs, dtype)
        shorter.texts = [text.to(dtype) for text in run.texts]
        handle = attnswap.enable(half, SMALL)
        found = shorter.of(half, handle)
        assert cases.counts_of(handle) == (2, 2, 3)
        assert notes(handle) == {}
        assert (found[2].float() - wanted[2]).abs().max() < near
        assert found[2].dtype == dtype
    handle = attnswap.enable(model, SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        found = run.of(model, handle)
    assert cases.counts_of(handle) == (2, 2, 3)
    assert (found[2].float() - wanted[2]).abs().max() < 0.15
