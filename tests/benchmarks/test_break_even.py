"""The size from which a method is faster: found between measurements, and measured as it is said to be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attnswap.accel.methods.adaspa import AdaSpa
from attnswap.accel.methods.clear import Clear
from attnswap.accel.methods.hidiffusion import HiDiffusion
from attnswap.accel.methods.linfusion import LinFusion
from attnswap.benchmarks import break_even
from attnswap.benchmarks.break_even import AGAIN, CALL, FIRST, SPARSE, WITHOUT, Probe, crossing


class TestCrossing:
    def test_lies_between_the_sizes_around_it(self) -> None:
        assert crossing([(100, 0.5), (400, 2.0)]) == 200, "half-way, as a power"
        assert crossing([(100, 0.5), (400, 0.8), (900, 1.2), (1600, 2.0)]) in range(400, 900)

    def test_is_the_last_where_noise_makes_several(self) -> None:
        assert crossing([(100, 1.1), (400, 0.5), (1600, 2.0)]) == 800

    def test_of_a_method_that_was_always_faster_is_the_smallest_size(self) -> None:
        assert crossing([(100, 1.2), (400, 1.4)]) == 100

    def test_of_a_method_that_was_not_in_the_end_is_none(self) -> None:
        assert crossing([(100, 1.2), (400, 0.9)]) is None


def test_a_run_counts_each_kind_of_call_as_often_as_a_published_run_has_it() -> None:
    times = {WITHOUT: 1000.0, FIRST: 100.0, SPARSE: 10.0, AGAIN: 1.0}
    # Searches in steps 10 and 30 of 50.
    probe = Probe("emoji-video", AdaSpa(), ())
    assert break_even._of_a_run(probe, times) == (50_000.0, 9 * 1000 + 100 + 39 * 10 + 1)
    # In steps 1 and 2 of 4.
    assert break_even._of_a_run(replace(probe, steps=4), times) == (4000.0, 100 + 1 + 2 * 10)
    assert break_even._of_a_run(Probe("emoji-sd", LinFusion(), ()), {WITHOUT: 3.0, CALL: 2.0}) == (3.0, 2.0)


@pytest.mark.parametrize(
    ("probe", "calls", "tokens"),
    [
        (Probe("emoji-sd", LinFusion(), ((64, None),)), {WITHOUT, CALL}, 256),
        (Probe("emoji-sd", LinFusion(), ((96, None),), HiDiffusion()), {WITHOUT, CALL}, 576),
        (Probe("emoji-flux", Clear(radius=3), ((128, None),)), {WITHOUT, CALL}, 256),
        (Probe("emoji-flux", Clear(radius=3), ((64, None),), text=512), {WITHOUT, CALL}, 64),
        (Probe("emoji-video", AdaSpa(min_tokens=0), ((96, 1),)), {WITHOUT, FIRST, SPARSE, AGAIN}, 144),
    ],
    ids=["linfusion", "linfusion beside hidiffusion", "clear", "clear and much text", "adaspa"],
)
def test_a_method_is_timed_at_its_sizes(probe: Probe, calls: set[str], tokens: int) -> None:
    said: list[str] = []
    entry = break_even.measure(probe, device=torch.device("cpu"), rounds=1, say=said.append)
    [point] = entry["points"]
    assert point["tokens"] == tokens
    if isinstance(probe.config, Clear):
        assert point["text"] == (probe.text or 16)
    assert point["calls_ms"].keys() == calls
    assert all(time > 0 for time in point["calls_ms"].values())
    assert point["speed_up"] == pytest.approx(point["without_ms"] / point["with_ms"])
    assert len(said) == 1


def test_each_kind_of_call_of_adaspa_is_what_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a dense call could stand for a sparse one."""
    reports: list[dict[str, Any]] = []
    enabled = break_even.enabled

    class Watched:
        def __init__(self, *given: Any) -> None:
            self._entered = enabled(*given)

        def __enter__(self) -> Any:
            self._handle = self._entered.__enter__()
            return self._handle

        def __exit__(self, *error: Any) -> None:
            reports.append(self._handle.report().to_dict())
            self._entered.__exit__(*error)

    monkeypatch.setattr(break_even, "enabled", Watched)
    probe = Probe("emoji-video", AdaSpa(min_tokens=0), ((96, 1),))
    break_even.measure(probe, device=torch.device("cpu"), rounds=1, say=lambda text: None)
    for report in reports:
        [denoiser] = report["denoisers"]
        assert denoiser["remarks"][0].startswith("searches at steps 1, 3 of 3")
        ours = [layer for layer in denoiser["layers"] if layer["accelerated"]]
        assert {(x["dense_calls"], x["accelerated_calls"], x["searches"]) for x in ours} == {(1, 2, 2)}


def test_writes_the_machine_and_the_break_even_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [{"text": 512}]
    entry = {"method": "clear", "model": "emoji-flux", "compared": "a call", "points": points, "break_even": 607}
    monkeypatch.setattr(break_even, "measure", lambda probe, **how: entry)
    assert break_even.main(["--json", str(tmp_path / "found.json"), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["device"]["type"] == "cpu"
    assert found["versions"]["torch"] == torch.__version__
    assert found["methods"] == [entry] * len(break_even.PROBES)
    assert "clear on emoji-flux, a call, 512 text tokens: 607 tokens" in capsys.readouterr().out
