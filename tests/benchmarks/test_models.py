from __future__ import annotations

import attnswap
import pytest
import torch
from attnswap.accel.install import installed_in
from attnswap.benchmarks import models, runner
from attnswap.pipelines.errors import BadInput


@pytest.fixture
def unet(tiny_sd):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(tiny_sd / "unet")


def benchmark_of(unet):
    return models.unet_benchmark(
        "tiny",
        unet,
        methods=[attnswap.HiDiffusion()],
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
        assert all(m.status == "ok" and m.median_ms > 0 for m in record.measurements)
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


def test_an_unknown_model_is_refused():
    with pytest.raises(BadInput, match="no model"):
        models.run("./no-such-model", device="cpu")
