from __future__ import annotations

from dataclasses import replace

import pytest
from attnswap.benchmarks import render, runner


@pytest.fixture
def result(doubling):
    return runner.run_benchmarks(
        [doubling(ours=lambda x: x * 2, same=lambda x: x * 3, dense=lambda x: x)], device="cpu", quick=True
    )


def on_gpu(result):
    gpu = {"type": "cuda", "name": "Imaginary GPU", "capability": "0.0"}
    return replace(result, device=gpu, tests={"summary": "12 passed", "exit_status": 0})


def test_the_committed_page_is_the_rendering_of_the_committed_results():
    page = render.PAGE.read_text(encoding="utf-8")
    assert page == render.render(render.read_results()), "run `python -m attnswap.benchmarks.render`"


def test_the_rendering_does_not_depend_on_the_order_of_the_files(result):
    other = replace(result, date="2000-01-01")
    assert render.render({"a": result, "b": other}) == render.render({"b": other, "a": result})


def test_without_a_gpu_result_the_page_claims_nothing_about_gpus(result):
    assert "No GPU has been measured yet" in render.render({"cpu": result})


def test_a_gpu_result_stands_first_with_its_tests(result):
    page = render.render({"cpu": result, "gpu": on_gpu(result)})
    assert "No GPU has been measured" not in page
    assert page.index("### Imaginary GPU") < page.index(f"### {result.device['name']}")
    assert "Kernel tests on this device: 12 passed" in page


def test_what_was_not_timed_stands_below_its_table_with_the_reason(result):
    assert "- same: wrong, error" in render.render({"cpu": result})


@pytest.mark.parametrize(("load", "said"), [(0.0, False), (4.0, True)], ids=["idle", "busy"])
def test_a_busy_machine_is_said_to_have_been_busy(result, load, said):
    busy = replace(result, device={**result.device, "cores": 4, "load_average": load})
    assert ("The machine was busy" in render.render({"cpu": busy})) is said


def test_only_timings_are_read_from_the_folder_of_results(result, tmp_path):
    result.write(tmp_path / "cpu-2000-01-01.json")
    (tmp_path / "pictures.json").write_text("{}")
    assert list(render.read_results(tmp_path)) == ["cpu-2000-01-01.json"]
