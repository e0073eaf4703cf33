from __future__ import annotations

import attnswap
import pytest
import torch
from attnswap.accel.install import installed_in
from attnswap.benchmarks import models, runner
from attnswap.pipelines import load, presets
from attnswap.pipelines.errors import BadInput


@pytest.fixture
def unet(tiny_sd):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(tiny_sd / "unet")


def benchmark_of(unet):
    return models.unet_benchmark(
        "tiny",
        unet,
        methods=lambda side: [attnswap.HiDiffusion()],
        timesteps=torch.arange(900, -1, -100),
        pixels_per_latent=8,
        text_tokens=16,
    )


def test_every_method_is_measured_against_the_stock_model_at_native_size_and_above(tiny_sd):
    result = models.run(str(tiny_sd), device="cpu", quick=True)
    assert [record.case for record in result.records] == ["64 px, 1x the native side", "128 px, 2x the native side"]
    for record in result.records:
        assert record.kind == "model"
        assert [m.contender for m in record.measurements] == ["stock", *attnswap.methods()]
        stock, hidiffusion, linfusion = record.measurements
        assert all(m.status == "ok" and m.median_ms > 0 for m in (stock, hidiffusion))
        assert linfusion.status == "unavailable"
        assert "no LinFusion weights are known" in linfusion.reason
    assert "hidiffusion" in result.table()


def test_a_method_is_in_place_while_it_is_measured_and_gone_afterwards(unet):
    benchmark = benchmark_of(unet)
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


def test_a_method_that_does_not_apply_is_named_with_the_reason(tiny_sd, unet, monkeypatch):
    def refuse(target, method):
        raise attnswap.UnsupportedModel("no such layer")

    monkeypatch.setattr(models, "enabled", refuse)
    (record, *_) = runner.run_benchmarks([benchmark_of(unet)], quick=True, device="cpu").records
    assert [m.status for m in record.measurements] == ["ok", "unavailable"]
    assert record.measurements[1].reason == "no such layer"


def test_only_the_methods_asked_for_are_measured(tiny_sd):
    (record, *_) = models.run(str(tiny_sd), methods=["hidiffusion"], device="cpu", quick=True).records
    assert [m.contender for m in record.measurements] == ["stock", "hidiffusion"]


def test_a_whole_picture_is_timed_from_prompt_to_pixels(tiny_sd, monkeypatch):
    monkeypatch.setattr(models, "FACTORS", (1, 2))
    monkeypatch.setattr(models, "FEW_STEPS_FROM", 2)
    monkeypatch.setattr(models, "FEW_STEPS", 1)
    pipe = load.load(load.find(str(tiny_sd)), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda unet, inputs: seen.append(tuple(inputs[0].shape)))
    benchmark = models.picture_benchmark(
        "tiny", pipe, methods=lambda side: [attnswap.HiDiffusion()], preset=presets.Preset(steps=2)
    )
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
