from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from attnswap.benchmarks import gpu, models, runner
from attnswap.benchmarks.result import Result


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_script_says_so_in_one_line_and_exits_2(tmp_path):
    script = gpu.ROOT / "benchmarks" / "gpu.py"
    finished = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("error: no CUDA device")
    assert len(finished.stderr.splitlines()) == 1


@pytest.fixture
def cuda(monkeypatch, doubling):
    """A machine that says it has CUDA; tests and timings are stand-ins."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Imaginary 1")
    passed = {"summary": "3 passed", "exit_status": 0, "failures": [], "seconds": 1.0, "command": "pytest"}
    stand_in = SimpleNamespace(tests=passed, ours=lambda x: x * 2, budgets=[], models=[])

    def time_ops(budget_s):
        stand_in.budgets.append(budget_s)
        return runner.run_benchmarks([doubling(ours=stand_in.ours)], device="cpu", quick=True)

    monkeypatch.setattr(gpu, "run_tests", lambda folder, timeout_s: stand_in.tests)

    def time_model(result, model, budget_s):
        stand_in.budgets.append(budget_s)
        stand_in.models.append(model)
        return result

    monkeypatch.setattr(gpu, "time_ops", time_ops)
    monkeypatch.setattr(gpu, "time_model", time_model)
    return stand_in


def test_with_cuda_tests_and_timings_go_into_one_json(cuda, tmp_path):
    assert gpu.main(["--json", str(tmp_path / "gpu.json"), "--budget", "100"]) == 0
    result = Result.read(tmp_path / "gpu.json")
    assert result.tests == cuda.tests
    assert len(result.records) == 1
    assert cuda.models == list(gpu.MODELS)
    # Nothing takes any time here: each gets its share of all that is left.
    shares = (gpu.OPS_SHARE, 1 / 3, 1 / 2, 1)
    assert all(0.9 < given / (100 * share) <= 1 for given, share in zip(cuda.budgets, shares, strict=True))


def test_what_was_timed_is_there_even_if_a_model_breaks_the_run(cuda, tmp_path, monkeypatch):
    def breaks(*_):
        raise RuntimeError("no such model")

    monkeypatch.setattr(gpu, "time_model", breaks)
    with pytest.raises(RuntimeError):
        gpu.main(["--json", str(tmp_path / "gpu.json")])
    assert len(Result.read(tmp_path / "gpu.json").records) == 1


def test_failing_tests_exit_1_and_the_json_is_still_written(cuda, tmp_path):
    cuda.tests = {**cuda.tests, "exit_status": 1}
    assert gpu.main(["--json", str(tmp_path / "gpu.json")]) == 1
    assert Result.read(tmp_path / "gpu.json").tests["exit_status"] == 1


def test_a_kernel_with_wrong_numbers_exits_1(cuda, tmp_path, capsys):
    cuda.ours = lambda x: x * 3
    assert gpu.main(["--json", str(tmp_path / "gpu.json")]) == 1
    assert "broken: size 0, float32, ours: error" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_said_before_anything_runs(cuda, tmp_path, capsys):
    assert gpu.main(["--json", str(tmp_path / "missing" / "gpu.json")]) == 2
    assert "missing is no folder" in capsys.readouterr().err
    assert cuda.budgets == []


def test_operations_are_timed_where_there_is_no_diffusers():
    program = """
import sys
sys.modules.update(diffusers=None, transformers=None)
from dataclasses import replace
from attnswap.benchmarks import block_sparse, machine, ops, runner
machine.measure_ceiling = lambda *_: machine.Ceiling(1e11, 1e10)
assert "block_sparse" in ops.default_registry().names()
case = block_sparse.CASES[0]
small = replace(case, shape={**case.shape, "grid": [2, 8, 8]}, quick=True)
record, = runner.run_benchmarks([replace(block_sparse.BENCHMARK, cases=(small,))], device="cpu", quick=True).records
assert record.fastest("ours") and record.fastest("dense"), record
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture
def of_ops(doubling):
    return runner.run_benchmarks([doubling(ours=lambda x: x * 2)], device="cpu", quick=True)


def test_a_bundled_model_is_timed_after_the_operations(of_ops, doubling, monkeypatch):
    asked = []

    def run(model, **how):
        asked.append((model, how["device"], how["budget_s"]))
        return runner.run_benchmarks([doubling(ours=lambda x: x * 2)], device="cpu", quick=True)

    monkeypatch.setattr(models, "run", run)
    both = gpu.time_model(of_ops, "emoji-sd", 50.0)
    assert asked == [("emoji-sd", "cuda", 50.0)]
    assert len(both.records) == 2
    assert both.records[0] == of_ops.records[0]


def test_without_diffusers_the_model_is_left_out_with_the_reason(of_ops, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    (cut,) = gpu.time_model(of_ops, "emoji-sd", 50.0).cut
    assert (cut.benchmark, cut.reason) == ("emoji-sd", "diffusers is not installed")


def test_the_default_file_name_holds_the_device_and_the_date(cuda):
    assert gpu._default_path("NVIDIA H200 (80GB)").name.startswith("gpu-nvidia-h200-80gb-20")


def test_the_kernel_tests_see_the_checkout_as_the_package_without_installing(tmp_path, monkeypatch):
    package = tmp_path / "path" / "attnswap"
    package.parent.mkdir()
    package.symlink_to(gpu.ROOT, target_is_directory=True)
    where = tmp_path / "test_where.py"
    where.write_text(f"def test_where():\n    import attnswap\n    assert attnswap.__path__ == [{str(package)!r}]\n")
    monkeypatch.setattr(gpu, "TESTS", (str(where),))
    tests = gpu.run_tests(package.parent, timeout_s=60)
    assert (tests["exit_status"], tests["failures"]) == (0, []), tests


def test_tests_that_do_not_finish_are_stopped_and_count_as_failed(tmp_path, monkeypatch):
    (tmp_path / "test_endless.py").write_text("def test_endless():\n    import time\n    time.sleep(60)\n")
    monkeypatch.setattr(gpu, "TESTS", (str(tmp_path / "test_endless.py"),))
    tests = gpu.run_tests(tmp_path, timeout_s=2)
    assert tests["exit_status"] == 124
    assert "not finished after 2 s" in tests["summary"]
