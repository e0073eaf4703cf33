"""Wan's and HunyuanVideo's families: with the middle of attention exchanged for the same, models are what they were."""

from __future__ import annotations

import copy

import attnswap
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ..video_models import CASES, Case
from ..watching import unchanged
from . import video_checks as checks
from .dense_strategy import dense, notes, seen

FAMILIES = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@FAMILIES
def test_plain_attention_of_ours_is_stock(case: Case) -> None:
    """Of the two videos the second has less text, where text is masked."""
    checks.plain_attention_of_ours_is_stock(case)


@FAMILIES
def test_calls_without_a_plan_are_stock_bit_for_bit(case: Case) -> None:
    checks.calls_without_a_plan_are_stock_bit_for_bit(case)


@FAMILIES
def test_adaspa_that_keeps_all_is_stock(case: Case) -> None:
    checks.adaspa_that_keeps_all_is_stock(case)


@FAMILIES
def test_a_chosen_backend_is_that_of_dense_attention_and_stays(case: Case) -> None:
    checks.a_chosen_backend_is_that_of_dense_attention_and_stays(case)


@FAMILIES
def test_lora_takes_part(case: Case) -> None:
    checks.lora_takes_part(case, ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_v_proj", "to_add_out"])


@FAMILIES
def test_under_autocast_it_is_as_exact_as_stock(case: Case) -> None:
    checks.under_autocast_it_is_as_exact_as_stock(case)


@FAMILIES
def test_sizes_may_change_from_call_to_call(case: Case) -> None:
    model, sizes = case.make(), [((3, 5, 7), 6, 2), ((4, 3, 2), 5, 1), ((3, 5, 7), 6, 2)]
    stock = [checks.outputs(model, case.inputs(*size)) for size in sizes]
    with dense(model) as handle:
        for size, wanted in zip(sizes, stock, strict=True):
            checks.agree(checks.outputs(model, case.inputs(*size)), wanted)
            assert {call.place for call in seen(handle).values()} == {case.place(*size[:2])}
        assert notes(handle) == []


@FAMILIES
def test_every_layer_over_video_tokens_is_chosen_and_no_other(case: Case) -> None:
    layers = attnswap.inspect(case.make(), "adaspa").layers
    chosen = {layer.name for layer in layers if layer.accelerated}
    left = {layer.name for layer in layers if not layer.accelerated}
    assert len(chosen) == case.layers
    assert all(name.endswith((".attn1", "transformer_blocks.0.attn", "transformer_blocks.1.attn")) for name in chosen)
    assert all(name.endswith(".attn2") or name.startswith(("context_embedder.", "face_adapter.")) for name in left)


@FAMILIES
def test_a_copy_of_an_enabled_model_is_enabled_and_its_own(case: Case) -> None:
    model, inputs = case.make(), case.inputs(checks.GRID, checks.TEXT, 2)
    stock = checks.outputs(model, inputs)
    with dense(model):
        twin = copy.deepcopy(model)
    checks.agree(checks.outputs(twin, inputs), stock)
    strategy = twin._attnswap.strategies[0]
    assert strategy.model is twin
    assert len(strategy.seen) == case.layers


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_repeated_blocks_need_no_more_graphs_than_those_of_the_stock_model(name: str) -> None:
    case = CASES[name]
    model, inputs = case.make(num_layers=3), case.inputs(checks.GRID, checks.TEXT, 2)
    (stock,) = checks.outputs(model, inputs)

    def graphs() -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        torch.testing.assert_close(checks.outputs(model, inputs)[0], stock, atol=1e-5, rtol=1e-4)
        checks.outputs(model, {**inputs, "timestep": inputs["timestep"] / 2})
        return counter.frame_count

    wanted = graphs()
    with dense(model):
        assert graphs() == wanted
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["clear", "linfusion"])
def test_a_method_for_pictures_is_refused_in_one_line(method: str) -> None:
    model = CASES["wan"].make()
    wanted = rf"{method} does not work on WanTransformer3DModel, which takes adaspa; {method} works on \w+"
    with unchanged(model), pytest.raises(attnswap.UnsupportedModel, match=wanted) as refused:
        attnswap.enable(model, method)
    assert "\n" not in str(refused.value)
