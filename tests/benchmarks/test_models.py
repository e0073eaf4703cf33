from __future__ import annotations

import json

import attnswap
import pytest
import torch
from attnswap.accel.install import installed_in
from attnswap.benchmarks import models, runner
from attnswap.kernels.local_attention import ideal_pairs
from attnswap.pipelines import load, presets
from attnswap.pipelines.errors import BadInput


@pytest.fixture
def pipe(tiny_sd):
    pipe = load.load(load.find(str(tiny_sd)), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def about(**changes):
    return {
        "methods": lambda side: [attnswap.HiDiffusion()],
        "preset": presets.Preset(steps=2),
        "native": 64,
        **changes,
    }


def test_every_method_is_measured_against_the_stock_model_at_native_size_and_above(tiny_sd):
    result = models.run(str(tiny_sd), device="cpu", quick=True)
    assert [record.case for record in result.records] == ["64 px, 1x the native side", "128 px, 2x the native side"]
    for record in result.records:
        assert record.kind == "model"
        assert [m.contender for m in record.measurements] == ["stock", *attnswap.methods()]
        found = {measurement.contender: measurement for measurement in record.measurements}
        assert all(found[name].status == "ok" and found[name].median_ms > 0 for name in ("stock", "hidiffusion"))
        assert found["linfusion"].status == found["clear"].status == "unavailable"
        assert "no LinFusion weights are known" in found["linfusion"].reason
    assert "hidiffusion" in result.table()


def test_a_method_is_in_place_while_it_is_measured_and_gone_afterwards(pipe):
    unet, benchmark = pipe.unet, models.denoiser_benchmark("tiny", pipe, **about())
    stock, swapped = benchmark.contenders(unet.device)
    case = benchmark.cases[1]
    inputs = benchmark.make_inputs(case, unet.dtype, unet.device, 0)
    prepared = swapped.prepare(case, inputs)
    with torch.no_grad():
        before = stock.prepare(case, inputs).call()
        with prepared.around():
            assert installed_in(unet) is not None
            assert not torch.equal(prepared.call(), before)
        assert installed_in(unet) is None
        assert torch.equal(stock.prepare(case, inputs).call(), before)


def test_a_method_that_does_not_apply_is_named_with_the_reason(pipe, monkeypatch):
    def refuse(target, method):
        raise attnswap.UnsupportedModel("no such layer")

    monkeypatch.setattr(models, "enabled", refuse)
    benchmark = models.denoiser_benchmark("tiny", pipe, **about())
    (record, *_) = runner.run_benchmarks([benchmark], quick=True, device="cpu").records
    assert [m.status for m in record.measurements] == ["ok", "unavailable"]
    assert record.measurements[1].reason == "no such layer"


def test_a_transformer_is_measured_as_its_pipeline_calls_it(tiny_flux, monkeypatch):
    monkeypatch.setattr(models, "FACTORS", (1, 2))
    small = {"clear": {"radius": 2}}
    given = json.loads((tiny_flux / "attnswap.json").read_text())
    monkeypatch.setattr(presets, "read", lambda folder: presets.Preset(**{**given, "methods": small}))
    monkeypatch.setitem(runner.SECONDS_PER_CASE, "cpu", 0.001)
    records = {record.case: record for record in models.run(str(tiny_flux), methods=["clear"], device="cpu").records}
    assert list(records) == [
        "32 px, 1x the native side",
        "a whole picture, 32 px, 1x the native side, 2 steps",
        "64 px, 2x the native side",
        "a whole picture, 64 px, 2x the native side, 2 steps",
    ]
    for record, side in zip(records.values(), (8, 8, 16, 16), strict=True):
        stock, clear = record.measurements
        assert (stock.status, clear.status) == ("ok", "ok"), clear.reason
        tokens = side**2 + given["max_sequence_length"]
        assert clear.density == ideal_pairs((side, side), 2, dense=given["max_sequence_length"]) / tokens**2
        assert stock.density is None


def test_the_first_call_of_a_run_is_taken_from_the_pipeline(tiny_flux):
    pipe = load.load(load.find(str(tiny_flux)), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    arguments = models.pipeline_arguments(pipe, presets.read(tiny_flux), 48, 5)
    assert (arguments["true_cfg_scale"], arguments["negative_prompt"]) == (2.0, "")  # no guidance from inside
    found = models.first_call(pipe, arguments, 0)
    assert found["named"]["hidden_states"].shape == (1, 12 * 12, 16)
    assert found["named"]["encoder_hidden_states"].shape == (1, 8, 16)
    assert len(found["timesteps"]) == 5
    assert not pipe.transformer._forward_pre_hooks


def test_only_the_methods_asked_for_are_measured(tiny_sd):
    (record, *_) = models.run(str(tiny_sd), methods=["hidiffusion"], device="cpu", quick=True).records
    assert [m.contender for m in record.measurements] == ["stock", "hidiffusion"]


def test_a_whole_picture_is_timed_from_prompt_to_pixels(pipe, monkeypatch):
    monkeypatch.setitem(runner.SECONDS_PER_CASE, "cpu", 0.001)
    monkeypatch.setattr(models, "FACTORS", (1, 2))
    monkeypatch.setattr(models, "FEW_STEPS_FROM", 2)
    monkeypatch.setattr(models, "FEW_STEPS", 1)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda unet, inputs: seen.append(tuple(inputs[0].shape)))
    benchmark = models.picture_benchmark("tiny", pipe, **about())
    native, double = runner.run_benchmarks([benchmark], device="cpu").records
    assert native.case == "a whole picture, 64 px, 1x the native side, 2 steps"
    assert double.case == "a whole picture, 128 px, 2x the native side, 1 steps"
    assert all(m.status == "ok" for record in (native, double) for m in record.measurements)
    assert set(seen) == {(2, 4, 8, 8), (2, 4, 16, 16)}


def test_an_unknown_method_is_refused(tiny_sd):
    with pytest.raises(BadInput, match=r"unknown method 'linfuson'\. Did you mean linfusion"):
        models.run(str(tiny_sd), methods=["linfuson"], device="cpu")


def test_an_unknown_model_is_refused():
    with pytest.raises(BadInput, match="no model"):
        models.run("./no-such-model", device="cpu")
