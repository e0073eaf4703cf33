from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from attnswap.benchmarks import runner
from attnswap.benchmarks.ops import default_registry
from attnswap.benchmarks.registry import Registry


def test_every_operation_of_the_package_has_a_benchmark():
    names = default_registry().names()
    # One may go over several operations of a family, and has its name then.
    assert [op for op in kernels.ops() if not op.startswith(names)] == []


@pytest.mark.parametrize("benchmark", default_registry().select(None), ids=lambda benchmark: benchmark.name)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_benchmark_has_cases_for_the_cpu_and_for_a_gpu_some_of_them_quick(benchmark, device):
    cases = [case for case in benchmark.cases if case.device == device]
    assert cases
    assert any(case.quick for case in cases)
    assert len({case.label for case in cases}) == len(cases)


def test_an_unknown_operation_is_refused_with_the_near_matches():
    with pytest.raises(ValueError, match=r"windw_attention.*did you mean window_attention"):
        runner.run(["windw_attention"])


def test_a_name_is_registered_once(doubling):
    with pytest.raises(ValueError, match="twice"):
        Registry([doubling(), doubling()])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"dtype": "int8"}, "unknown dtype 'int8'"), ({"device": "meta"}, "not on meta")],
    ids=["dtype", "device"],
)
def test_a_dtype_or_device_that_cannot_be_measured_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        runner.run(["window_attention"], **wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_refused():
    with pytest.raises(ValueError, match="sees no CUDA device"):
        runner.run(["window_attention"], device="cuda")
