from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from attnswap.benchmarks import linear_attention, runner, window_attention
from attnswap.benchmarks.registry import Case, Contender, Unavailable


def measure(benchmark):
    """The measurements of its only case, by contender."""
    (record,) = runner.run_benchmarks([benchmark], device="cpu", quick=True).records
    return {measurement.contender: measurement for measurement in record.measurements}


def double(x):
    return x * 2


def test_a_contender_with_wrong_numbers_is_reported_as_wrong_and_not_timed(doubling):
    found = measure(doubling(ours=lambda x: x * 2.001, same=double))
    assert found["ours"].status == "wrong"
    assert found["ours"].median_ms is None
    assert "against the reference" in found["ours"].reason
    assert found["same"].status == "ok"
    assert found["same"].median_ms > 0


def test_not_a_number_is_wrong(doubling):
    assert measure(doubling(ours=lambda x: x * torch.nan))["ours"].status == "wrong"


def test_dense_attention_computes_something_else_and_is_not_compared(doubling):
    found = measure(doubling(ours=double, dense=lambda x: x * 3))["dense"]
    assert (found.status, found.error) == ("ok", None)
    assert found.median_ms > 0


def test_a_contender_that_breaks_is_kept_with_the_reason_and_the_warnings_that_explain_it(doubling):
    def breaks(x):
        warnings.warn("head dimension 999 is too large", stacklevel=1)
        raise RuntimeError("no available kernel\nand a long tail")

    found = measure(doubling(ours=double, same=breaks))
    assert found["same"].status == "failed"
    assert found["same"].reason == "RuntimeError: no available kernel (head dimension 999 is too large)"
    assert found["ours"].status == "ok"


def test_a_contender_that_is_not_meant_for_this_machine_is_unavailable_not_broken(doubling):
    def refuse(case, inputs):
        raise Unavailable("needs a GPU")

    benchmark = doubling(ours=double)
    with_refusal = replace(benchmark, contenders=lambda device: (Contender("gpu only", "ours", refuse),))
    found = measure(with_refusal)["gpu only"]
    assert (found.status, found.reason) == ("unavailable", "needs a GPU")


def test_inputs_that_cannot_be_made_fail_this_case_and_no_other(doubling):
    def too_large(case, dtype, device, seed):
        raise torch.OutOfMemoryError("out of memory")

    broken = replace(doubling("broken", ours=double), make_inputs=too_large)
    result = runner.run_benchmarks([broken, doubling(ours=double)], device="cpu", quick=True)
    assert [record.measurements[0].status for record in result.records] == ["failed", "ok"]


ODD = Case(
    "odd",
    {"batch": 2, "heads": 3, "head_dim": 8, "grid": [7, 10], "windows": [2, 3], "shift": [1, 2]},
    "cpu",
    (torch.float32,),
    True,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_window_attention_and_its_baselines_agree_with_the_reference_on_an_uneven_grid(dtype, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the interpreter is no contender
    benchmark = replace(window_attention.BENCHMARK, cases=(replace(ODD, dtypes=(dtype,)),))
    found = measure(benchmark)
    right = [name for name, measurement in found.items() if measurement.error is not None]
    assert right == ["attnswap eager", "SDPA on windows, flash", "SDPA on windows, math"]
    assert all(found[name].status == "ok" for name in right)
    assert found["attnswap triton"].status == "unavailable"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gets_the_mask_of_the_windows(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    inputs = window_attention.make_inputs(ODD, torch.float32, torch.device("cpu"), 0)
    (flex,) = [c for c in window_attention.contenders(torch.device("cuda")) if c.name.startswith("FlexAttention")]
    prepared = flex.prepare(ODD, inputs)
    check = window_attention.check(ODD, inputs)
    torch.testing.assert_close(
        check.sample(prepared.restore(prepared.call())), check.exact.float(), rtol=1e-4, atol=1e-5
    )


def test_the_cost_of_one_window_is_that_of_dense_attention():
    shape = {"batch": 1, "heads": 1, "head_dim": 4, "grid": [3, 5], "windows": [1, 1], "shift": [0, 0]}
    cost = window_attention.cost(replace(ODD, shape=shape), torch.float16)
    assert cost.flops == 4 * 15 * 15 * 4
    assert cost.bytes == 4 * 15 * 4 * 2


LINEAR = Case("odd", {"batch": 2, "tokens": 70, "heads": 3, "head_dim": 8}, "cpu", (torch.float32,), True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_linear_attention_and_its_baseline_agree_with_the_reference(dtype, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the interpreter is no contender
    found = measure(replace(linear_attention.BENCHMARK, cases=(replace(LINEAR, dtypes=(dtype,)),)))
    right = [name for name, measurement in found.items() if measurement.error is not None]
    assert right == ["attnswap eager", "published form in PyTorch"]
    assert all(found[name].status == "ok" for name in right)
    assert found["attnswap triton"].status == "unavailable"
    assert found["dense SDPA, flash"].status == "ok"
    assert found["attnswap eager"].peak_bytes < found["published form in PyTorch"].peak_bytes


def test_the_cost_of_linear_attention_is_two_products_with_a_square_matrix_for_each_token():
    cost = linear_attention.cost(LINEAR, torch.float16)
    assert cost.flops == 2 * 70 * 3 * 2 * (2 * 8 * 8)
    assert cost.bytes == 4 * (2 * 70 * 3 * 8) * 2


def test_only_dense_attention_is_extrapolated_and_with_the_square_of_the_tokens():
    orders = {contender.role: contender.order for contender in linear_attention.contenders(torch.device("cpu"))}
    assert orders == {"ours": None, "same": None, "dense": 2}
