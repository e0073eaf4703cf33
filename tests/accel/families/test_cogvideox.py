"""CogVideoX and 1.5: stock attention of each layer, by the road that methods take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .. import tiny_dit
from ..video_models import Case
from ..video_models_more import COGVIDEOX
from . import video_checks as checks
from .dense_strategy import dense, seen

CASES = pytest.mark.parametrize("case", COGVIDEOX.values(), ids=list(COGVIDEOX))


@CASES
def test_plain_attention_of_ours_is_stock(case: Case) -> None:
    checks.plain_attention_of_ours_is_stock(case)


@CASES
def test_calls_without_a_plan_are_stock_bit_for_bit(case: Case) -> None:
    checks.calls_without_a_plan_are_stock_bit_for_bit(case)


@CASES
def test_under_autocast_it_is_as_exact_as_stock(case: Case) -> None:
    checks.under_autocast_it_is_as_exact_as_stock(case)


@CASES
def test_adaspa_that_keeps_all_is_stock(case: Case) -> None:
    checks.adaspa_that_keeps_all_is_stock(case)


def test_lora_takes_part() -> None:
    checks.lora_takes_part(COGVIDEOX["cogvideox15"], ["to_q", "to_k", "to_v", "to_out.0"])


def test_fused_projections_take_part() -> None:
    case = COGVIDEOX["cogvideox15"]
    model, inputs = case.make(), case.inputs(checks.GRID, checks.TEXT, 2)
    stock = checks.outputs(model, inputs)
    with dense(model) as handle:
        model.fuse_qkv_projections()
        with torch.no_grad():
            model.transformer_blocks[0].attn1.to_q.weight.zero_()
        checks.agree(checks.outputs(model, inputs), stock)
        assert len(seen(handle)) == case.layers
        model.unfuse_qkv_projections()
        assert (checks.outputs(model, inputs)[0] - stock[0]).abs().max() > 1e-3
        assert len(seen(handle)) == case.layers
    model.fuse_qkv_projections()
    fused = checks.outputs(model, inputs)
    with dense(model) as handle:
        checks.agree(checks.outputs(model, inputs), fused)
        assert len(seen(handle)) == case.layers


def test_pipelines_are_accelerated() -> None:
    assert checks.pipelines_take_part(tiny_dit.cogvideox)


def test_a_mask_runs_dense() -> None:
    def masked(inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, "attention_kwargs": {"attention_mask": torch.zeros(2, 1, 36)}}

    checks.runs_dense_because(COGVIDEOX["cogvideox"], "an attention mask was given, which CogVideoX", masked)


def test_gradients_are_those_of_stock_attention() -> None:
    case = COGVIDEOX["cogvideox"]
    model, inputs = case.make(), case.inputs(checks.GRID, checks.TEXT, 1)
    grads = []
    for active in (False, True):
        model.zero_grad()
        with dense(model, active=active):
            model(**inputs, return_dict=False)[0].square().sum().backward()
        grads.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-3, rtol=1e-4)
