from __future__ import annotations

import json
from dataclasses import replace

import pytest
from attnswap.benchmarks import runner
from attnswap.benchmarks.result import Growth, Measurement, Result


def double(x):
    return x * 2


@pytest.fixture
def result(doubling):
    return runner.run_benchmarks(
        [doubling(ours=double, same=lambda x: x + x, dense=lambda x: x * 3, other=lambda x: x * 4)],
        device="cpu",
        quick=True,
    )


@pytest.fixture
def grown(result):
    """The same, with what a series of sizes, measured memory and a contender too slow to call add."""
    (record,) = result.records
    ours, same, _, wrong = record.measurements
    slow = Measurement("dense", "dense", "extrapolated", "not called, it would take about 40 s", extrapolated_ms=4e4)
    measurements = (replace(ours, peak_bytes=3 * 2**20), same, slow, wrong)
    growth = Growth("doubling", "vectors", "float32", "ours", 1.02, 16384, 1048576)
    return replace(result, records=(replace(record, measurements=measurements),), growths=(growth,))


def test_the_schema_of_the_json_is_stable(result):
    content = result.to_dict()
    assert set(content) == {
        *("schema", "date", "device", "versions", "commit", "quick", "ceilings", "records", "cut", "tests", "growths"),
        "targets",
    }
    assert content["schema"] == 1
    assert set(content["device"]) == {"type", "name", "threads", "cores", "load_average"}
    assert {"attnswap", "python", "torch", "triton"} <= set(content["versions"])
    assert set(content["ceilings"]["float32"]) == {"flops_per_second", "bytes_per_second"}
    (record,) = content["records"]
    assert set(record) == {
        *(
            "benchmark",
            "kind",
            "case",
            "shape",
            "dtype",
            "measurements",
            "flops",
            "bytes",
            "ideal_ms",
            "series",
            "size",
        ),
        "fit_from",
    }
    assert set(record["measurements"][0]) == {
        *("contender", "role", "status", "reason", "median_ms", "min_ms", "max_ms", "rounds", "error", "error_limit"),
        *("peak_bytes", "extrapolated_ms", "flops", "density"),
    }


def test_a_result_survives_its_json_file(grown, tmp_path):
    grown.write(tmp_path / "result.json")
    assert Result.read(tmp_path / "result.json") == grown
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_file_of_another_schema_is_refused(result, tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({**result.to_dict(), "schema": 0}))
    with pytest.raises(ValueError, match="schema 0"):
        Result.read(tmp_path / "old.json")


def test_ratios_are_against_the_fastest_of_a_role_and_the_ideal_is_for_the_op_alone(result):
    (record,) = result.records
    ours, same, dense, wrong = record.measurements
    assert record.speedup(ours, "dense") == dense.median_ms / ours.median_ms
    assert record.speedup(ours, "same") == same.median_ms / ours.median_ms
    assert record.fraction_of_ideal(ours) == record.ideal_ms / ours.median_ms
    assert record.fraction_of_ideal(dense) is None
    assert record.speedup(wrong, "dense") is None
    assert [measurement for _, measurement in result.broken()] == [wrong]


def test_the_table_fits_100_columns_and_names_what_was_not_timed(result):
    table = result.table()
    assert max(map(len, table.splitlines())) <= 100
    assert "other: wrong, error" in table
    assert "size 0" in table


def test_the_table_shows_memory_growth_and_what_is_extrapolated(grown):
    lines = grown.table().splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[2].endswith("peak MiB")
    (ours,) = (line for line in lines if line.startswith("  ours"))
    assert ours.endswith("3.0")
    (slow,) = (line for line in lines if line.startswith("  dense"))
    assert slow.split() == ["dense", "≈", "40000", "extrapolated", "–", "–", "–", "–"]
    assert grown.records[0].speedup(grown.records[0].measurements[0], "dense") is None
    assert "ours, float32, vectors: time grows as size ^ 1.02 from 16384 to 1048576" in lines


def test_progress_is_told_before_each_case_and_at_the_end(doubling):
    told = []
    runner.run_benchmarks(
        [doubling(cases=2, ours=double)], device="cpu", quick=True, progress=lambda *x: told.append(x)
    )
    assert told == [(0, 2, "doubling: size 0, float32"), (1, 2, "doubling: size 1, float32"), (2, 2, "done")]


def test_a_time_budget_cuts_cases_and_says_which(doubling):
    result = runner.run_benchmarks([doubling(cases=3, ours=double)], device="cpu", quick=True, budget_s=0.0)
    kept, left_out = [record.case for record in result.records], [cut.case for cut in result.cut]
    assert kept + left_out == ["size 0", "size 1", "size 2"]
    assert left_out
    assert all(f"not measured: doubling, {case}" in result.table() for case in left_out)


def test_benchmarks_take_turns_so_that_a_budget_leaves_none_empty(doubling):
    both = [doubling("first", cases=2, ours=double), doubling("second", cases=2, ours=double)]
    result = runner.run_benchmarks(both, device="cpu", quick=True)
    assert [record.benchmark for record in result.records] == ["first", "second", "first", "second"]


def test_the_command_prints_the_table_alone_and_writes_json(tmp_path, capsys, monkeypatch, result):
    monkeypatch.setattr(runner, "run", lambda ops, **options: result)
    assert runner.main(["--op", "doubling", "--json", str(tmp_path / "result.json")]) == 0
    assert capsys.readouterr().out == result.table() + "\n"
    assert Result.read(tmp_path / "result.json") == result


def test_the_command_refuses_an_unknown_operation_with_status_2(capsys):
    assert runner.main(["--op", "windw_attention"]) == 2
    assert capsys.readouterr().err.startswith("error: no benchmark for 'windw_attention'")
