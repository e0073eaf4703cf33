"""The benchmark of local attention: what is computed, counted, compared and aimed at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attnswap.benchmarks import local_attention, runner
from attnswap.benchmarks.flex_blocks import Tokens, blocks_of
from attnswap.benchmarks.registry import Case, Scale
from attnswap.benchmarks.result import Measurement, Record
from attnswap.benchmarks.table import work_rows
from attnswap.kernels.targets import TARGETS
from torch.nn.attention.flex_attention import create_block_mask

CPU = torch.device("cpu")
SHAPE = {"batch": 1, "text": 5, "grid": [12, 20], "radius": 3, "heads": 2, "head_dim": 8}
CASE = Case("small", SHAPE, "cpu", (torch.float32,), True)


def seen_by_hand(tokens: Tokens) -> torch.Tensor:
    """bool `[queries, keys]`, pair by pair."""
    width = tokens.grid[1]

    def sees(i: int, j: int) -> bool:
        if j >= tokens.queries:
            return i >= tokens.text
        if min(i, j) < tokens.text:
            return True
        (yi, xi), (yj, xj) = divmod(i - tokens.text, width), divmod(j - tokens.text, width)
        return (yi - yj) ** 2 + (xi - xj) ** 2 < tokens.radius**2

    return torch.tensor([[sees(i, j) for j in range(tokens.keys)] for i in range(tokens.queries)])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("pooling", [None, 4], ids=["local", "pooled"])
def test_contenders_agree_with_the_definition(pooling, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the interpreter is no contender
    # Compiling takes a quarter of a minute; without it the mask is the same.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = replace(CASE, shape=SHAPE | ({"pooling": pooling} if pooling else {}))
    benchmark = replace(local_attention.BENCHMARK, cases=(case,))
    (record,) = runner.run_benchmarks([benchmark], device="cpu", quick=True).records
    found = {m.contender: m for m in record.measurements}
    assert found["attnswap triton"].status == "unavailable"
    for name in ("attnswap eager", local_attention.FLEX):
        assert found[name].status == "ok", found[name].reason
        assert found[name].error <= found[name].error_limit
    assert found["dense SDPA, flash"].error is None
    pairs = int(seen_by_hand(local_attention.tokens_of(case)).sum())
    assert record.flops == 4 * 2 * 8 * pairs
    assert found["dense SDPA, flash"].flops == 4 * 2 * 8 * 245**2
    assert record.flops < found["attnswap eager"].flops


@pytest.mark.parametrize("pooling", [None, 4], ids=["local", "pooled"])
def test_a_wrong_circle_is_found_out(pooling, monkeypatch):
    case = replace(CASE, shape=SHAPE | ({"pooling": pooling} if pooling else {}))
    inputs = local_attention.make_inputs(case, torch.float32, CPU, 0)
    check = local_attention.check(case, inputs)
    arguments = local_attention._arguments(case, inputs)
    right = check.sample(local_attention.kernels.local_attention(**arguments))
    wrong = check.sample(local_attention.kernels.local_attention(**arguments | {"radius": 3.1}))
    assert (right - check.exact).abs().max() < 1e-5 < 1e-3 < (wrong - check.exact).abs().max()


TOKENS = [
    Tokens(0, (17, 13), 5),
    Tokens(130, (12, 20), 3),
    Tokens(128, (16, 32), 6.5),
    Tokens(5, (24, 24), 4, pooled=36),
    Tokens(16, (3, 3), 9),
]


@pytest.mark.parametrize("tokens", TOKENS, ids=lambda tokens: f"{tokens.text}-{tokens.grid[0]}x{tokens.grid[1]}")
def test_the_blocks_of_flex_attention_are_those_that_pytorch_finds(tokens):
    seen = seen_by_hand(tokens)
    mask_mod = tokens.mask_mod(CPU)
    queries, keys = torch.arange(tokens.queries)[:, None], torch.arange(tokens.keys)
    zero = torch.tensor(0)
    assert torch.equal(tokens.visible(queries, keys), seen)
    assert torch.equal(mask_mod(zero, zero, queries, keys), seen)
    assert torch.equal(tokens.mask_mod(torch.device("cuda"))(zero, zero, queries, keys), seen)  # its form, anywhere
    blocks = blocks_of(tokens, CPU)
    ours = blocks.block_mask(mask_mod, CPU)
    theirs = create_block_mask(mask_mod, None, None, tokens.queries, tokens.keys, device="cpu")
    for kind in ("kv", "full_kv"):
        (count, order), (count_, order_) = (
            (getattr(mask, f"{kind}_num_blocks")[0, 0], getattr(mask, f"{kind}_indices")[0, 0])
            for mask in (ours, theirs)
        )
        assert torch.equal(count, count_)
        for row, number in enumerate(count):
            assert torch.equal(order[row, :number], order_[row, :number])
    assert ours.seq_lengths == theirs.seq_lengths
    dense = theirs.to_dense()[0, 0].bool()
    by_hand = sum(
        min(128, tokens.queries - 128 * row) * min(128, tokens.keys - 128 * column)
        for row, column in dense.nonzero().tolist()
    )
    assert blocks.pairs == by_hand


def test_executed_work_is_counted_for_every_case_and_is_never_less_than_the_ideal():
    for case in local_attention.CASES:
        if min(case.shape["grid"]) > 128:
            continue
        ideal = local_attention.cost(case, case.dtypes[0]).flops
        for contender in local_attention.contenders(torch.device(case.device)):
            small = case.device == "cpu" and min(case.shape["grid"]) < 64  # blocks take long to find in others
            if contender.flops and (contender.role != "same" or small):
                assert contender.flops(case) >= ideal, (case.label, contender.name)


def test_the_work_expected_on_a_gpu_is_that_of_the_kernels_tiles():
    records = [gpu_record(case) for case in local_attention.CASES if case.device == "cuda"]
    work, ahead, layer = local_attention.targets(records, {"type": "cuda", "name": "NVIDIA H200"})
    assert work.met, work.found
    assert work.found.endswith(f"cases: {len(local_attention.EXPECTED_TFLOP)}")
    assert (ahead.met, layer.met) == (None, None)


def test_the_work_of_smaller_tiles_is_not_the_expected(monkeypatch):
    triton = pytest.importorskip("attnswap.kernels.local_attention.triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    targets_by_name = {target.name: target for target in TARGETS}
    case = next(case for case in local_attention.CASES if case.label == "FLUX, 4096 px, r = 32")
    for name, met in (("sm_90", True), ("sm_80", False)):
        monkeypatch.setattr(triton, "target_of", lambda device, name=name: targets_by_name[name])
        work, _ = local_attention.targets([gpu_record(case)], {"type": "cuda", "name": "Imaginary"})
        assert work.met is met, (name, work.found)


def gpu_record(case: Case, **times_ms: float) -> Record:
    flops = {contender.name: contender.flops for contender in local_attention.contenders(torch.device("cuda"))}
    found = tuple(
        Measurement(name, role, "ok", "", times_ms.get(role), flops=flops[name](case) if role == "ours" else None)
        for name, role in (("attnswap triton", "ours"), (local_attention.FLEX, "same"))
    )
    return Record("local_attention", "op", case.label, case.shape, "bfloat16", found)


def test_a_layer_slower_than_aimed_at_is_said_on_an_h200_only():
    (case,) = (c for c in local_attention.CASES if c.label == "FLUX, 8192 px, r = 16")
    _, ahead, layer = local_attention.targets(
        [gpu_record(case, ours=27.0, same=100.0)], {"type": "cuda", "name": "NVIDIA H200"}
    )
    assert (ahead.met, layer.met) == (None, False)
    assert "27.0 ms" in layer.found
    other = local_attention.targets([gpu_record(case, ours=27.0, same=26.0)], {"type": "cuda", "name": "Imaginary"})
    assert [target.met for target in other] == [True, False]


def test_flex_attention_is_beaten_everywhere_only_where_every_size_was_measured():
    cases = [case for case in local_attention.CASES if case.device == "cuda" and "pooling" not in case.shape]
    records = [gpu_record(case, ours=1.0, same=2.0) for case in cases]
    too_slow = tuple(replace(m, median_ms=None, extrapolated_ms=9e3) for m in records[-1].measurements[1:])
    extrapolated = replace(records[-1], measurements=records[-1].measurements[:1] + too_slow)

    def ahead(records):
        return local_attention.targets(records, {"type": "cuda", "name": "Imaginary"})[1].met

    assert ahead(records) is True
    assert ahead(records[:-1]) is None
    assert ahead([*records[:-1], extrapolated]) is True
    assert ahead([gpu_record(cases[0], ours=1.0, same=0.9)]) is False


def cpu_record(
    side: int, radius: int, ours_ms: float, dense_ms: float | None, *, peak: int = 0, **dense: float
) -> Record:
    """Dense attention computes ten times what is executed, and twelve times the ideal."""
    measured = (
        Measurement("attnswap eager", "ours", "ok", "", ours_ms, peak_bytes=peak or side**2, flops=12.0),
        Measurement("dense SDPA, flash", "dense", "ok", "", dense_ms, flops=120.0, **dense),
    )
    shape = {"grid": [side, side], "radius": radius}
    return Record(
        *("local_attention", "op", f"{side}, {radius}", shape, "float32", measured),
        flops=10.0,
        series=f"r = {radius}",
        size=side**2,
        fit_from=4096,
    )


def met(records):
    return [target.met for target in local_attention.targets(records, {"type": "cpu", "name": "any"})]


def test_the_aims_on_a_cpu_are_about_speed_work_and_memory():
    good = [cpu_record(32, 8, 2.0, 1.0), cpu_record(64, 8, 1.0, 1.1), cpu_record(128, 8, 1.0, 6.0)]
    good += [cpu_record(128, 32, 1.0, 6.0)]
    assert met(good) == [None, True, True]
    good += [cpu_record(256, 8, 1.0, None, extrapolated_ms=2e4)]
    assert met(good) == [True, True, True]
    assert met([*good, cpu_record(64, 8, 1.0, 0.9)])[0] is False
    assert met([*good, cpu_record(128, 16, 1.0, 5.9)])[1] is False
    assert met([cpu_record(side, 8, 1.0, 1.1, peak=side**4) for side in (64, 128)])[2] is False
    assert met([]) == [None, None, None]


def test_ratios_to_the_work_that_is_executed_and_to_the_least():
    record = cpu_record(128, 8, 1.0, 6.0)
    ours, _ = record.measurements
    assert record.excess(ours) == 1.2
    assert (record.allowed(ours.flops), record.allowed(record.flops)) == (10, 12)
    assert (record.reached(ours, ours.flops), record.reached(ours, record.flops)) == (0.6, 0.5)
    assert work_rows(record) == [("attnswap eager", "1.20x", "6.00x", "10.00x", "60%", "12.00x", "50%")]


def test_only_what_is_too_slow_to_call_is_extrapolated():
    orders = {contender.name: contender.order for contender in local_attention.contenders(CPU)}
    assert orders == {
        "attnswap triton": None,
        "attnswap eager": None,
        local_attention.FLEX: 1.5,
        "dense SDPA, flash": 2,
    }
    small = next(case for case in local_attention.CASES if case.shape["grid"] == [64, 64])
    assert small.scale == Scale("r = 8", 4096, fit_from=4096)


def test_the_table_says_which_aims_were_met(doubling):
    benchmark = replace(
        doubling(ours=lambda x: x * 2),
        targets=lambda records, device: local_attention.targets([], device),
    )
    result = runner.run_benchmarks([benchmark], device="cpu", quick=True)
    assert [target.aim for target in result.targets] == [
        "faster than dense SDPA from 64 x 64 up at r = 8",
        "at 128 x 128 at least 0.6 of the speed-up that the executed work allows",
        "memory linear in the tokens",
    ]
    shown = replace(result, targets=tuple(replace(target, benchmark="doubling") for target in result.targets))
    assert "target open: memory linear in the tokens; not measured" in shown.table()
    assert type(result).from_dict(result.to_dict()) == result
