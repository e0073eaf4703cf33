"""What a report says of AdaSpa is what was done."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import attnswap
import pytest
import torch
from attnswap import kernels
from attnswap.accel.methods.adaspa_state import pairs_of
from attnswap.accel.report import Report

from .. import tiny_dit
from . import adaspa_cases as cases
from .adaspa_cases import SMALL
from .common import notes


@pytest.mark.parametrize(("tokens", "block"), [(64, (16, 16)), (55, (16, 16)), (137, (32, 16)), (130, (16, 128))])
def test_pairs_are_counted_one_by_one_in_blocks_of_any_length(tokens: int, block: tuple[int, int]) -> None:
    shape = [-(-tokens // side) for side in block]
    kept = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0)) < 0.4
    by_token = kept.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[..., :tokens, :tokens]
    found = pairs_of(kernels.BlockMask.from_dense(kept, block), tokens)
    assert float(found) == pytest.approx(float(by_token.sum((2, 3)).double().mean()), rel=1e-12)


def test_density_is_that_of_a_count_by_hand_with_and_without_the_warm_up() -> None:
    """137 tokens, in blocks of which the last is shorter: pairs of query and key, of two pictures and all heads."""
    model, run = cases.flux(), cases.steps(batch=2)
    _, oracle = cases.by_definition(model, run, SMALL, search_at=(2,))
    handle = attnswap.enable(model, replace(SMALL, search_steps=(2,)))
    run.of(model, handle)
    dense, sparse = 2, 3
    total = 0.0
    for number, layer in enumerate(cases.layers_of(handle)):
        seen = oracle.memory[0, number].sees.double().sum((2, 3)).mean()
        pairs = 2 * (dense * 137**2 + sparse * float(seen))
        assert layer["dense_pairs"] == 2 * 5 * 137**2
        assert layer["pairs"] == round(pairs)
        # Up to a pair, of which there is no part.
        assert layer["density"] == pytest.approx(pairs / (2 * 5 * 137**2), abs=1 / (2 * 5 * 137**2))
        assert layer["density_accelerated"] == pytest.approx(float(seen) / 137**2, abs=1 / (2 * 3 * 137**2))
        total += pairs
    report = handle.report()
    assert report.density == report.to_dict()["density"] == pytest.approx(total / (4 * 2 * 5 * 137**2), abs=1e-5)
    assert report.searches == 4


def small_run(**more: Any) -> tuple[Any, cases.Steps]:
    model = cases.flux(heads=2, dtype=torch.float32, num_layers=1, num_single_layers=1)
    return model, cases.steps(**{"grid": (6, 8), "text": 7, "dtype": torch.float32, **more})


def keys_of(report: Report) -> list[Any]:
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    [denoiser] = document["denoisers"]
    return [sorted(document), sorted(denoiser), *(sorted(layer) for layer in denoiser["layers"])]


def test_the_document_is_json_and_has_the_same_keys_before_a_run_and_after() -> None:
    model, run = small_run(branches=2)
    handle = attnswap.enable(model, SMALL)
    before = handle.report()
    run.of(model, handle)
    after = handle.report()
    assert keys_of(before) == keys_of(after)
    [layer, _] = after.to_dict()["denoisers"][0]["layers"]
    for name in ("searches", "density", "density_accelerated", "search_seconds", "mask_seconds", "backend", "branches"):
        assert name in layer
    first, second = layer["branches"]
    assert first.keys() == second.keys()
    assert {len(first[what][0]) for what in ("density", "recall", "kept", "level")} == {2}
    assert first["state_bytes"] > 0
    # Of a layer that met no numbers, too.
    model._attnswap.strategies[0]._states[0, "transformer_blocks.0.attn"].give_up()
    assert keys_of(handle.report()) == keys_of(after)


def test_seconds_and_bytes_of_the_parts_make_the_whole() -> None:
    model, run = small_run()
    handle = attnswap.enable(model, SMALL)
    run.of(model, handle)
    [denoiser] = handle.report().to_dict()["denoisers"]
    for part in ("search_seconds", "mask_seconds"):
        assert denoiser[part] == pytest.approx(sum(layer[part] for layer in denoiser["layers"]))
        assert 0 < denoiser[part] < denoiser["run_seconds"]
    state = next(iter(model._attnswap.strategies[0]._states.values()))
    # fp32 log-sum-exp of two heads, and bits and counts of 4 x 4 blocks.
    assert state.peak_bytes == 2 * 55 * 4 + 2 * 4 * (1 + 4)
    assert denoiser["state_bytes"] == 2 * state.peak_bytes


def test_a_first_search_in_one_pass_with_dense_attention_is_timed_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnswap.accel.methods.adaspa_state.CallShape.fuses", True)
    model, run = small_run()
    handle = attnswap.enable(model, replace(SMALL, search_steps=(2,)))
    run.of(model, handle)
    [denoiser] = handle.report().to_dict()["denoisers"]
    assert denoiser["search_seconds"] == 0
    assert denoiser["dense_search_seconds"] == pytest.approx(
        sum(layer["dense_search_seconds"] for layer in denoiser["layers"])
    )
    assert denoiser["dense_search_seconds"] > 0
    assert "in those that are one with dense attention" in str(handle.report())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_last_search_that_met_no_numbers_is_told(value: float) -> None:
    """No call comes after it that could."""
    model, run = small_run()
    now = [0]

    def told(step: int, branch: int) -> None:
        now[0] = step

    run.told = told
    spoilt = model.transformer_blocks[0].attn
    spoilt.norm_q.register_forward_hook(lambda module, args, out: out * value if now[0] == 5 else out)
    spoilt.register_forward_hook(lambda module, args, out: tuple(x.nan_to_num(0, 0, 0) for x in out))
    handle = attnswap.enable(model, replace(SMALL, search_steps=(2, 5)))
    run.of(model, handle)
    said = "1 layers met no numbers in their last search: transformer_blocks.0.attn"
    assert said in str(handle.report())
    assert [layer["branches"][0]["kept"] is None for layer in cases.layers_of(handle)] == [True, False]


def test_recall_that_came_of_no_numbers_is_not_given() -> None:
    """It may look as if it were one, as the exponents of scores are clamped."""
    model, run = small_run()
    handle = attnswap.enable(model, SMALL)
    run.of(model, handle)
    state = model._attnswap.strategies[0]._states[0, "transformer_blocks.0.attn"]
    state.finite = torch.tensor(False)
    assert state.recall.isfinite().all()
    [branch] = cases.layers_of(handle)[0]["branches"]
    assert [branch[what] for what in ("recall", "kept", "level")] == [None] * 3
    assert "1 layers met no numbers in their last search" in str(handle.report())


def test_it_is_one_readable_screen() -> None:
    pipe, arguments = tiny_dit.wan()
    settings = {"min_tokens": 0, "block": (16, 16), "search_steps": (1,), "dense_layers": (0,)}
    handle = attnswap.enable(pipe, attnswap.AdaSpa(sparsity=0.5, **settings))  # type: ignore[arg-type]
    pipe(**arguments, num_inference_steps=4, output_type="latent")
    lines = str(handle.report()).splitlines()
    assert len(lines) < 25
    assert max(map(len, lines)) < 160
    assert sum("adaspa on WanTransformer3DModel" in line for line in lines) == 2
    for said in (
        "searches at step 1 of 4",
        "density in these layers",
        "recall",
        "backend",
        "dense_layers names it",
        "lower sparsity",
        "MiB",
    ):
        assert any(said in line for line in lines), said


def test_it_is_there_after_disabling_and_goes_on_no_more() -> None:
    model, run = small_run()
    with attnswap.enabled(model, SMALL) as handle:
        run.of(model, handle)
        before = handle.report()
    run.of(model)
    assert handle.report().to_dict() == before.to_dict()
    assert str(handle.report()) == str(before)
    image = handle.report().mask_image(0, 1)
    assert image.size == before.mask_image(0, 1).size


def test_reset_forgets_it_all() -> None:
    model, run = small_run()
    handle = attnswap.enable(model, SMALL)
    fresh = handle.report().to_dict()
    run.of(model, handle)
    handle.reset()
    assert handle.report().to_dict() | {"denoisers": []} == fresh | {"denoisers": []}
    assert cases.counts_of(handle) == (0, 0, 0)
    assert notes(handle) == {}
    assert all(layer["branches"] == [] for layer in cases.layers_of(handle))
    run.of(model, handle)
    assert cases.counts_of(handle) == (2, 2, 3)


def test_rows_that_drifted_beyond_what_is_exact_are_counted() -> None:
    """Queries grow by a factor after the first search, and their scores by more than 60."""
    model, run = small_run()
    attention = model.transformer_blocks[0].attn
    factor = [1.0]
    for norm in (attention.norm_q, attention.norm_added_q):
        norm.register_forward_hook(lambda module, args, out: out * factor[0])

    def told(step: int, branch: int) -> None:
        factor[0] = 1.0 if step < 4 else 100.0

    run.told = told
    handle = attnswap.enable(model, SMALL)
    found = run.of(model, handle)
    assert all(x.isfinite().all() for x in found)
    drifted, other = (layer["branches"][0]["clamped_rows"] for layer in cases.layers_of(handle))
    assert drifted > 0
    assert other == 0
    assert f"{drifted} query rows drifted too far" in str(handle.report())


@pytest.mark.parametrize(("shift", "counted"), [(58.0, False), (59.5, True), (-59.0, False), (-61.0, True)])
def test_rows_are_exact_within_59_above_their_reference_and_60_below(
    monkeypatch: pytest.MonkeyPatch, shift: float, counted: bool
) -> None:
    search = kernels.block_scores

    def moved(query: Any, key: Any, lse: Any, **call: Any) -> Any:
        scores, present = search(query, key, lse, **call)
        return scores, present if lse is None else lse + shift

    monkeypatch.setattr(kernels, "block_scores", moved)
    model, run = small_run()
    handle = attnswap.enable(model, SMALL)
    run.of(model, handle)
    for layer in cases.layers_of(handle):
        [branch] = layer["branches"]
        assert (branch["clamped_rows"] > 0) == counted
