from __future__ import annotations

import json

import attnswap
import pytest
import torch
from attnswap.accel.install import installed_in
from attnswap.benchmarks import models, runner, timing
from attnswap.benchmarks.registry import Unavailable
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
        "sizes": [
            models.Size("1x the native side", 64, 64, quick=True),
            models.Size("2x the native side", 128, 128, steps=1, quick=True),
        ],
        **changes,
    }


def test_every_method_is_measured_against_the_stock_model_at_native_size_and_above(tiny_sd):
    result = models.run(str(tiny_sd), device="cpu", quick=True)
    assert [record.case for record in result.records] == ["64 px, 1x the native side", "128 px, 2x the native side"]
    for record in result.records:
        assert record.kind == "model"
        found = {measurement.contender.split(",")[0]: measurement for measurement in record.measurements}
        assert list(found) == ["stock", *attnswap.methods()]
        assert all(found[name].status == "ok" and found[name].median_ms > 0 for name in ("stock", "hidiffusion"))
        assert {found[name].status for name in ("adaspa", "clear", "linfusion")} == {"unavailable"}
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
    arguments = models.pipeline_arguments(pipe, presets.read(tiny_flux), models.Size("any", 48, 48), 5)
    assert (arguments["true_cfg_scale"], arguments["negative_prompt"]) == (2.0, "")  # no guidance from inside
    found = models.calls_at(pipe, arguments, 0, {1})[1]
    assert found["named"]["hidden_states"].shape == (1, 12 * 12, 16)
    assert found["named"]["encoder_hidden_states"].shape == (1, 8, 16)
    assert len(found["timesteps"]) == 5
    assert not pipe.transformer._forward_pre_hooks


def test_only_the_methods_asked_for_are_measured(tiny_sd):
    (record, *_) = models.run(str(tiny_sd), methods=["hidiffusion"], device="cpu", quick=True).records
    assert [m.contender for m in record.measurements] == ["stock", "hidiffusion"]


def test_a_whole_picture_is_timed_from_prompt_to_pixels(pipe, monkeypatch):
    monkeypatch.setitem(runner.SECONDS_PER_CASE, "cpu", 0.001)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda unet, inputs: seen.append(tuple(inputs[0].shape)))
    benchmark = models.whole_benchmark("tiny", pipe, **about())
    native, double = runner.run_benchmarks([benchmark], device="cpu").records
    assert native.case == "a whole picture, 64 px, 1x the native side, 2 steps"
    assert double.case == "a whole picture, 128 px, 2x the native side, 1 steps"
    assert all(m.status == "ok" for record in (native, double) for m in record.measurements)
    assert set(seen) == {(2, 4, 8, 8), (2, 4, 16, 16)}


def test_pictures_are_measured_along_their_side_and_the_largest_whole_ones_in_few_steps(pipe):
    sizes = models.picture_sizes(pipe, presets.Preset(native_side=64))
    assert [(size.width, size.height, size.steps, size.quick) for size in sizes] == [
        (64, 64, None, True),
        (128, 128, None, True),
        (256, 256, None, False),
        (512, 512, models.FEW_STEPS, False),
    ]


@pytest.fixture
def wan(tiny_wan):
    pipe = load.load(load.find(str(tiny_wan)), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_clips_are_measured_along_their_frames_and_at_twice_the_side(wan, tiny_wan):
    sizes = models.clip_sizes(wan, presets.read(tiny_wan))
    assert [str(size) for size in sizes] == [
        "32 px, 9 frames, 1x the native frames",
        "32 px, 17 frames, 2x the native frames",
        "32 px, 33 frames, 4x the native frames",
        "64 px, 9 frames, 2x the native side",
    ]
    assert [size.steps for size in sizes] == [None, 0, models.FEW_STEPS_OF_CLIPS, 0]
    own = models.clip_sizes(wan, presets.Preset())  # what the pipeline says
    assert str(own[1]) == "832 x 480 px, 161 frames, 2x the native frames"
    assert own[1].shape == {"width": 832, "height": 480, "frames": 161}


def test_a_sparse_step_and_a_whole_clip_of_a_video_model_are_measured(tiny_wan, monkeypatch):
    monkeypatch.setitem(runner.SECONDS_PER_CASE, "cpu", 0.001)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)
    monkeypatch.setattr(models, "FRAME_FACTORS", (1, 2))
    methods = {"adaspa": {"block": [16, 16], "min_tokens": 0, "sparsity": 0.5}}
    given = json.loads((tiny_wan / "attnswap.json").read_text()) | {"steps": 4, "methods": methods}
    monkeypatch.setattr(presets, "read", lambda folder: presets.Preset(**given))
    result = models.run(str(tiny_wan), methods=["adaspa", "hidiffusion"], device="cpu")
    assert result.records[0].shape == {"side": 32, "frames": 9}
    found = {record.case: record.measurements for record in result.records}
    # Five blocks of 16 tokens a latent frame of 64, and so on; half of them, rounded up.
    densities = {
        "32 px, 9 frames, 1x the native frames": 3 / 5,
        "32 px, 17 frames, 2x the native frames": 5 / 9,
        "64 px, 9 frames, 2x the native side": 10 / 20,
    }
    for case, density in densities.items():
        stock, sparse, other = found.pop(case)
        assert (stock.status, sparse.status, other.status) == ("ok", "ok", "unavailable"), sparse.reason
        assert sparse.contender == "adaspa, a sparse step"
        assert sparse.density == pytest.approx(density)
    # Both transformers begin dense: half of the steps.
    whole = {
        "a whole clip, 32 px, 9 frames, 1x the native frames, 4 steps": (1 + 3 / 5) / 2,
        "a whole clip, 32 px, 17 frames, 2x the native frames, 4 steps": (1 + 5 / 9) / 2,
    }
    assert found.keys() == whole.keys()
    for case, density in whole.items():
        stock, adaspa, _ = found[case]
        assert (stock.status, adaspa.status, adaspa.contender) == ("ok", "ok", "adaspa")
        assert adaspa.density == pytest.approx(density)


def test_what_is_timed_of_adaspa_is_a_call_that_neither_warms_up_nor_searches(wan, tiny_wan):
    config = attnswap.AdaSpa(block=(16, 16), min_tokens=0, sparsity=0.5)
    preset = presets.Preset(**json.loads((tiny_wan / "attnswap.json").read_text()) | {"steps": 5})
    sizes = models.clip_sizes(wan, preset)[:1]
    benchmark = models.denoiser_benchmark("tiny", wan, methods=lambda side: [config], preset=preset, sizes=sizes)
    [case], [stock, swapped] = benchmark.cases, benchmark.contenders(wan.transformer.device)
    with torch.no_grad():
        inputs = benchmark.make_inputs(case, wan.transformer.dtype, wan.transformer.device, 0)
        prepared = swapped.prepare(case, inputs)
        with prepared.around():
            recorder = installed_in(wan.transformer).recorder
            [layer] = [layer for layer in recorder.layers.values() if layer.plan.accelerated]
            before = (layer.searches, layer.dense_calls, layer.accelerated_calls)
            sparse = prepared.call()
            assert before == (1, 1, 0)
            assert (layer.searches, layer.dense_calls, layer.accelerated_calls) == (1, 1, 1)
        assert stock.prepare(case, inputs).call().shape == sparse.shape
    assert installed_in(wan.transformer) is None


@pytest.mark.parametrize(
    ("searches", "steps", "found"),
    [((10, 30), 50, (11, 10)), ((10, 30), 12, (3, 2)), ((1, 2, 3), 6, (4, 3)), ((1, 31), 50, (2, 1))],
)
def test_the_first_sparse_step_is_the_first_after_a_search_that_does_not_search(searches, steps, found):
    assert models.first_sparse_step(attnswap.AdaSpa(search_steps=searches), steps) == found


def test_a_run_without_a_sparse_step_is_said():
    with pytest.raises(Unavailable, match="a run of 2 steps that searches at 1, 2 has no step that is sparse"):
        models.first_sparse_step(attnswap.AdaSpa(search_steps=(1, 2)), 2)


def test_calls_of_later_steps_are_taken_from_the_pipeline(wan, tiny_wan):
    preset = presets.read(tiny_wan)
    arguments = models.pipeline_arguments(wan, preset, models.clip_sizes(wan, preset)[0], 4)
    assert arguments["num_frames"] == 9
    found = models.calls_at(wan, arguments, 0, {1, 3})
    timesteps = found[1]["timesteps"]
    assert [float(found[step]["named"]["timestep"][0]) for step in (1, 3)] == [timesteps[0], timesteps[2]]
    assert found[1]["named"]["encoder_hidden_states"] is found[3]["named"]["encoder_hidden_states"]  # the same branch
    assert not wan.transformer._forward_pre_hooks
    assert not wan.transformer_2._forward_pre_hooks


def test_an_unknown_method_is_refused(tiny_sd):
    with pytest.raises(BadInput, match=r"unknown method 'linfuson'\. Did you mean linfusion"):
        models.run(str(tiny_sd), methods=["linfuson"], device="cpu")


def test_an_unknown_model_is_refused():
    with pytest.raises(BadInput, match="no model"):
        models.run("./no-such-model", device="cpu")
