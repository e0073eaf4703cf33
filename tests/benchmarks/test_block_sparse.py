"""The benchmark of block-sparse attention: what is computed, counted, compared and aimed at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attnswap import kernels
from attnswap.benchmarks import block_sparse, runner
from attnswap.benchmarks.block_sparse_cases import (
    CASES,
    FUSED,
    HUNYUAN,
    LSE_SHIFT,
    MIXED,
    SEARCH,
    SPARSE,
    THIRDS,
    USUAL,
    cost,
    densities_of,
    make_inputs,
    tokens_of,
)
from attnswap.benchmarks.registry import Case
from attnswap.benchmarks.result import Measurement, Record

CPU = torch.device("cpu")
SHAPE = {
    "call": SPARSE,
    "batch": 1,
    "grid": [3, 8, 12],
    "heads": 3,
    "head_dim": 16,
    "density": USUAL,
    "block": [32, 16],
}


def case(**changes) -> Case:
    return Case("small", {**SHAPE, **changes}, "cpu", (torch.float32,), True)


def inputs_of(case: Case) -> dict:
    return dict(make_inputs(case, torch.float32, CPU, 0))


def seen_by_hand(case: Case) -> torch.Tensor:
    """bool `[heads, tokens, tokens]`, from the mask of the case."""
    tokens, (rows, columns) = tokens_of(case), case.shape["block"]
    kept = inputs_of(case)["mask"].to_dense()[0]
    return kept.repeat_interleave(rows, 1).repeat_interleave(columns, 2)[:, :tokens, :tokens]


SIZES = {
    "whole blocks": {},
    "dense": {"grid": [3, 9, 11], "density": 1.0},
    "mixed heads": {"density": MIXED},
    "text that begins inside a block, and a short last block": {"text": 45, "grid": [3, 9, 11], "density": MIXED},
    "text of whole blocks": {"text": 64},
}


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
def test_the_work_is_that_of_the_pairs_in_the_mask(changes):
    small = case(**changes)
    assert cost(small, torch.float32).flops == pytest.approx(4 * 16 * int(seen_by_hand(small).sum()), rel=1e-12)


def test_a_short_last_block_counts_as_the_mean_where_it_is_up_to_the_scores_who_keeps_it():
    ragged = case(grid=[3, 9, 11])  # 297 tokens: 18 blocks of 16 and one of 9
    a_row = seen_by_hand(ragged).sum(-1)
    assert sorted(set(a_row.flatten().tolist())) == [3 * 16 + 9, 4 * 16]
    assert cost(ragged, torch.float32).flops == pytest.approx(4 * 16 * a_row.numel() * 4 * 297 / 19)


def test_heads_of_mixed_densities_keep_as_much_in_all_as_with_the_usual_one():
    large = case(heads=24, density=MIXED)
    assert densities_of(large) == [0.1] * 8 + [0.2] * 8 + [0.3] * 8
    assert sum(THIRDS) / 3 == pytest.approx(USUAL)
    mask = inputs_of(case(density=MIXED))["mask"]
    assert mask.counts.unique(dim=-1).flatten().tolist() == [2, 4, 6]  # of 18


def test_every_row_sees_text_and_text_sees_everything():
    seen = seen_by_hand(case(text=45, grid=[3, 9, 11]))
    assert seen[:, :, 297:].all()
    assert seen[:, 297:].all()
    assert not seen.all()


def test_a_search_takes_half_the_work_of_dense_attention_and_reads_no_values():
    search, fused = (cost(case(call=what), torch.float32) for what in (SEARCH, FUSED))
    dense = 4 * 3 * 16 * 288**2
    assert (search.flops, fused.flops) == (dense / 2, dense)
    assert (search.bytes, fused.bytes) == (2 * 4 * 288 * 48, 4 * 4 * 288 * 48)


def test_a_search_starts_from_a_log_sum_exp_of_before():
    found = inputs_of(case(call=SEARCH))
    _, lse = kernels.dense_attention(found["query"], found["key"], found["value"], return_lse=True)
    assert torch.allclose(found["lse"], lse - LSE_SHIFT, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"text": 45, "density": MIXED}, {"call": SEARCH}, {"call": FUSED, "text": 45}])
def test_contenders_agree_with_the_definition(changes, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the interpreter is no contender
    ragged = case(**{"grid": [3, 9, 11], **changes})
    benchmark = replace(block_sparse.BENCHMARK, cases=(ragged,))
    (record,) = runner.run_benchmarks([benchmark], device="cpu", quick=True).records
    triton, eager, dense = record.measurements
    assert (triton.status, eager.status, dense.status) == ("unavailable", "ok", "ok"), eager.reason
    assert eager.error <= eager.error_limit
    assert dense.error is None
    assert dense.flops == 4 * 3 * 16 * tokens_of(ragged) ** 2
    assert eager.flops == record.flops


def outputs(small: Case, found: dict) -> tuple[torch.Tensor, ...]:
    ours = block_sparse._ours("eager", small, found)
    with ours.around():
        return ours.restore(ours.call())


def errors(small: Case, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Relative to the definition."""
    check = block_sparse.check(small, inputs_of(small))
    return (check.sample(tensors) - check.exact).norm() / check.exact.norm()


@pytest.mark.parametrize("what", [SPARSE, SEARCH, FUSED])
def test_what_is_right_passes_and_its_neighbour_does_not(what):
    small = case(call=what, grid=[3, 9, 11], text=45)
    right = outputs(small, inputs_of(small))
    assert len(right) == (2 if what == FUSED else 1)
    assert errors(small, right) < 1e-5
    for number, tensor in enumerate(right):
        wrong = [*right[:number], tensor.roll(1, dims=1), *right[number + 1 :]]
        assert errors(small, tuple(wrong)) > 0.05


def test_a_wrong_mask_is_found_out():
    small = case(grid=[3, 9, 11], text=45)
    found = inputs_of(small)
    kept = found["mask"].to_dense()
    first = kept[0, 0].clone()
    first[:, 0] = ~first[:, 0]  # one block of the 22 of a row, in the first head
    kept[0, 0] = first
    wrong = found | {"mask": kernels.BlockMask.from_dense(kept, found["mask"].block)}
    assert errors(small, outputs(small, wrong)) > 0.05


def test_scores_of_the_last_block_that_is_short_are_checked():
    small = case(call=SEARCH, grid=[3, 9, 11])
    (scores,) = outputs(small, inputs_of(small))
    wrong = scores.clone()
    wrong[..., -1] *= 16 / 9  # as if its keys were as many as others'
    assert errors(small, (wrong,)) > 0.01


def test_flex_attention_is_given_the_same_blocks_as_whole_ones():
    small = case(grid=[3, 9, 11], text=45, density=MIXED)
    mask = inputs_of(small)["mask"]
    theirs = block_sparse.flex_mask(mask, tokens_of(small))
    assert torch.equal(theirs.to_dense().bool(), mask.to_dense())
    assert int(theirs.kv_num_blocks.sum()) == 0
    assert theirs.seq_lengths == (342, 342)
    assert theirs.BLOCK_SIZE == (32, 16)
    counts, order = theirs.full_kv_num_blocks[0, 1, 0], theirs.full_kv_indices[0, 1, 0]
    assert torch.equal(order[:counts], mask.to_dense()[0, 1, 0].nonzero()[:, 0])


def test_flex_attention_is_a_contender_on_a_gpu_and_the_eager_road_is_not():
    on_gpu = [contender.name for contender in block_sparse.contenders(torch.device("cuda"))]
    assert on_gpu == ["attnswap triton", block_sparse.FLEX, "dense SDPA, cuDNN", "dense SDPA, flash"]
    on_cpu = [contender.name for contender in block_sparse.contenders(CPU)]
    assert on_cpu == ["attnswap triton", "attnswap eager", "dense SDPA, flash"]


@pytest.mark.parametrize("large", [case for case in CASES if case.device == "cpu"], ids=lambda case: case.label)
def test_every_case_for_a_cpu_has_its_tokens_in_its_name_and_a_tenth_of_it_can_be_made(large):
    named = [int(word) for word in large.label.replace(",", " ").split(" tokens")[0].split() if word.isdigit()]
    assert sum(named) == tokens_of(large)
    assert 7_500 < tokens_of(large) < 9_000
    height = large.shape["grid"][1] // 8
    small = replace(large, shape={**large.shape, "grid": [large.shape["grid"][0], height, 16], "head_dim": 8})
    found = inputs_of(small)
    assert found["query"].shape == (1, tokens_of(small), large.shape["heads"], 8)
    assert ("mask" in found) is (large.shape["call"] == SPARSE)


def test_cases_for_a_gpu_have_the_models_lengths_and_the_most_valuable_come_first():
    large = [case for case in CASES if case.device == "cuda"]
    lengths = {case.label.split(",")[0]: tokens_of(case) for case in large}
    assert lengths == {
        "HunyuanVideo 720p": 119_056,
        "Wan 14B 720p": 75_600,
        "Wan 1.3B 480p": 32_760,
        "CogVideoX 1.5": 85_906,
        "sliding tiles' shape": 115_200,
        "VSA's shape": 49_152,
        "SLA's shape": 32_760,
    }
    assert [case.label for case in large[:8]] == [
        "HunyuanVideo 720p, density 0.2",
        "Wan 14B 720p, density 0.2",
        "HunyuanVideo 720p, search",
        "HunyuanVideo 720p, dense and search",
        "Wan 14B 720p, search",
        "Wan 14B 720p, dense and search",
        "HunyuanVideo 720p, density 1.0",
        "Wan 14B 720p, density 1.0",
    ]
    assert {case.dtypes for case in large} == {(torch.bfloat16,)}
    flops = {case.label: cost(case, torch.bfloat16).flops for case in large}
    assert flops["HunyuanVideo 720p, dense and search"] == pytest.approx(174e12, rel=0.01)
    # 1856 blocks without text, of which 372 are kept, and 272 tokens in those with text.
    sparse = 118_784 * (372 * 64 + 272) + 272 * 119_056
    share = flops["HunyuanVideo 720p, density 0.2"] / flops["HunyuanVideo 720p, dense and search"]
    assert share == pytest.approx(sparse / 119_056**2)


def record(label: str, what: str, ours_ms: float, dense_ms: float, density=USUAL) -> Record:
    """What is executed is a fifth of dense attention's work where it is sparse."""
    shape = {"call": what, **({"density": density} if what == SPARSE else {})}
    measured = (
        Measurement("attnswap", "ours", "ok", "", ours_ms, flops=20.0),
        Measurement("dense, slower", "dense", "ok", "", 2 * dense_ms, flops=100.0),
        Measurement("dense", "dense", "ok", "", dense_ms, flops=100.0),
    )
    return Record("block_sparse", "op", label, shape, "float32", measured, flops=20.0)


def met(records, kind="cpu"):
    return [aim.met for aim in block_sparse.targets(records, {"type": kind, "name": "any"})]


def test_the_aims_on_a_cpu_are_the_efficiency_at_the_usual_density_and_the_cost_of_a_search():
    sweep = block_sparse.SWEEP_NAME
    good = [record(sweep, SPARSE, 1.0, 2.5), record("any", SEARCH, 0.7, 1.0)]
    assert met(good) == [True, True]
    assert met([record(sweep, SPARSE, 1.0, 2.4), record("any", SEARCH, 0.71, 1.0)]) == [False, False]
    beside = [record(sweep, SPARSE, 1.0, 1.0, density=1.0), record("other", SPARSE, 1.0, 1.0)]
    assert met(beside) == [None, None]
    efficiency, _ = block_sparse.targets(good, {"type": "cpu", "name": "any"})
    assert efficiency.found == f"0.50 ({sweep})"


def test_the_aims_on_a_gpu_are_rates_against_the_best_dense_kernel():
    good = [record(HUNYUAN[0], SPARSE, 1.0, 3.8), record("s", SEARCH, 0.6, 1.0), record("f", FUSED, 1.15, 1.0)]
    assert met(good, "cuda") == [True, True, True, True]
    fair = [record(HUNYUAN[0], SPARSE, 1.0, 3.3), record("s", SEARCH, 0.61, 1.0), record("f", FUSED, 1.16, 1.0)]
    assert met(fair, "cuda") == [True, False, False, False]
    assert met([], "cuda") == [None] * 4
