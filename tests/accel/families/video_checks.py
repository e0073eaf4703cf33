"""What every family of video transformers promises, one function each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import attnswap
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as backends
from peft import LoraConfig

from ..video_models import Case
from ..watching import unchanged
from .dense_strategy import DenseStrategy, Seen, dense, notes, seen

# Primes: any two that are mistaken for one another make another number of tokens, or another picture.
GRID, TEXT = (3, 5, 2), 6


def outputs(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """All that a denoiser gives: video, and sound where there is some."""
    with torch.no_grad():
        found: tuple[torch.Tensor, ...] = model(**inputs, return_dict=False)
    return found


def same(actual: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(*pair) for pair in zip(actual, wanted, strict=True))


def agree(actual: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for x, y in zip(actual, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=5e-6, rtol=1e-5)


def plain_attention_of_ours_is_stock(case: Case, model: Any = None, **inputs: Any) -> None:
    """In every layer over video tokens, whose places are told; a method that attends to nothing gives another video."""
    model = case.make() if model is None else model
    arguments = {**case.inputs(GRID, TEXT, 2), **inputs}
    stock = outputs(model, arguments)
    with unchanged(model), dense(model) as handle:
        agree(outputs(model, arguments), stock)
        assert notes(handle) == []
        reached = seen(handle)
        assert len(reached) == case.layers
        for layer in reached.values():
            assert layer.place == case.place(GRID, TEXT)
            assert layer.shape[:2] == (2, layer.place.tokens)
        with mock.patch.object(DenseStrategy, "attend", lambda self, query, *rest, **more: torch.zeros_like(query)):
            assert (outputs(model, arguments)[0] - stock[0]).abs().max() > 1e-2
    assert same(outputs(model, arguments), stock)


def calls_without_a_plan_are_stock_bit_for_bit(case: Case) -> None:
    """And so are our processors where they are kept, or made anew, once the method is gone."""
    model, arguments = case.make(), case.inputs(GRID, TEXT, 2)
    stock = outputs(model, arguments)
    with unchanged(model), dense(model, active=False) as handle:
        assert same(outputs(model, arguments), stock)
        assert seen(handle) == {}
        slots = list(model._attnswap.slots.values())
        ours = [slot.processor for slot in slots]
        assert all(isinstance(slot.processor, type(slot.original)) for slot in slots)
    for made in (lambda processor: processor, lambda processor: type(processor)()):
        for slot, processor in zip(slots, ours, strict=True):
            slot.module.processor = made(processor)
        assert same(outputs(model, arguments), stock)


def under_autocast_it_is_as_exact_as_stock(case: Case) -> None:
    model, arguments = case.make(), case.inputs(GRID, TEXT, 2)
    exact = outputs(model, arguments)[0]
    with torch.autocast("cpu", torch.bfloat16):
        stock = outputs(model, arguments)[0]
        with dense(model) as handle:
            ours = outputs(model, arguments)[0]
            assert len(seen(handle)) == case.layers
    assert ours.dtype == stock.dtype
    assert (ours.float() - exact).norm() <= 2 * (stock.float() - exact).norm()


def a_chosen_backend_is_that_of_dense_attention_and_stays(case: Case) -> None:
    model, arguments = case.make(), case.inputs(GRID, TEXT, 2)
    stock, before = outputs(model, arguments), backends._active_backend
    try:
        with dense(model, active=False):
            slots = model._attnswap.slots.values()
            model.set_attention_backend("_native_math")
            assert {slot.processor._attention_backend.value for slot in slots} == {"_native_math"}
            agree(outputs(model, arguments), stock)
        assert {slot.original._attention_backend.value for slot in slots} == {"_native_math"}
    finally:  # the choice is of the process, too
        backends._active_backend = before


def adaspa_that_keeps_all_is_stock(case: Case) -> None:
    """With sparsity 0 bit for bit; and where all blocks are kept, in dense, searching and sparse steps."""
    model, arguments = case.make(), case.inputs(GRID, TEXT, 2)
    steps = [{**arguments, "timestep": torch.full((2,), t)} for t in (900.0, 700.0, 500.0, 300.0)]
    stock = [outputs(model, step) for step in steps]
    with attnswap.enabled(model, attnswap.AdaSpa(sparsity=0, min_tokens=0)):
        for step, wanted in zip(steps, stock, strict=True):
            assert same(outputs(model, step), wanted)
    # 1% of so few blocks is none.
    config = attnswap.AdaSpa(sparsity=0.01, block=(16, 16), search_steps=(2, 4), min_tokens=0)
    with attnswap.enabled(model, config) as handle:
        for step, wanted in zip(steps, stock, strict=True):
            agree(outputs(model, step), wanted)
        assert notes(handle) == []
        layers = handle.report().to_dict()["denoisers"][0]["layers"]
        chosen = [layer for layer in layers if layer["accelerated"]]
        assert len(chosen) == case.layers
        assert all(layer["searches"] == layer["accelerated_calls"] == 2 for layer in chosen)


def lora_takes_part(case: Case, targets: list[str]) -> None:
    model = case.make()
    before = outputs(model, case.inputs(GRID, TEXT, 2))
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    assert (outputs(model, case.inputs(GRID, TEXT, 2))[0] - before[0]).abs().max() > 1e-2
    plain_attention_of_ours_is_stock(case, model)


def pipelines_take_part(make: Callable[[], tuple[Any, dict[str, Any]]]) -> dict[str, Seen]:
    """Returns what reached the method in the last call."""
    pipe, arguments = make()

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        latent: torch.Tensor = pipe(
            **arguments, num_inference_steps=2, output_type="latent", generator=generator, return_dict=False
        )[0]
        return latent

    stock = sample()
    with dense(pipe) as handle:
        torch.testing.assert_close(sample(), stock, atol=1e-4, rtol=1e-4)
        assert notes(handle) == []
        found = seen(handle)
        assert found
    assert torch.equal(sample(), stock)
    return found


def runs_dense_because(case: Case, why: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """And bit for bit as stock."""
    model, arguments = case.make(), change(case.inputs(GRID, TEXT, 2))
    stock = outputs(model, arguments)
    with dense(model) as handle:
        with pytest.warns(attnswap.AttnswapWarning, match=why):
            assert same(outputs(model, arguments), stock)
        assert seen(handle) == {}
        assert notes(handle)
