"""What really ran: the report is a JSON document and one readable screen, and hides nothing."""

from __future__ import annotations

import json
import warnings
from typing import Any

import attnswap
import pytest
import torch
from attnswap.accel.report import LayerPlan, LayerRecord, Recorder, Report

from .slim import sample, slim

KEYS = {"method", "config", "density", "searches", "denoisers"}
DENOISER_KEYS = {"model", "method", "config", "calls", "searches", "remarks", "runs", "notes", "layers"}
LAYER_KEYS = {
    "name",
    "accelerated",
    "reason",
    "accelerated_calls",
    "dense_calls",
    "pairs",
    "dense_pairs",
    "backend",
}


def test_the_document_is_json_with_stable_keys(pipe: Any) -> None:
    handle = attnswap.enable(pipe, attnswap.HiDiffusion(windows=(2, 4), t1=0.5))
    sample(pipe)
    document = handle.report().to_dict()
    assert json.loads(json.dumps(document)) == document
    assert document.keys() >= KEYS
    [denoiser] = document["denoisers"]
    assert denoiser.keys() >= DENOISER_KEYS
    assert all(layer.keys() >= LAYER_KEYS for layer in denoiser["layers"])
    assert document["method"] == denoiser["method"] == ["hidiffusion"]
    assert document["searches"] == 0
    assert attnswap.HiDiffusion.from_dict(document["config"]) == attnswap.HiDiffusion(windows=(2, 4), t1=0.5)
    assert {f"{layer['name']}.processor" for layer in denoiser["layers"]} == set(pipe.unet.attn_processors)


def test_counts_are_those_of_the_calls_that_were_made(pipe: Any) -> None:
    handle = attnswap.enable(pipe, attnswap.HiDiffusion(raunet=False))
    sample(pipe, steps=3)
    sample(pipe, side=8, steps=2)  # native size: dense
    [denoiser] = handle.report().to_dict()["denoisers"]
    assert denoiser["calls"] == 5
    chosen = [layer for layer in denoiser["layers"] if layer["accelerated"]]
    assert chosen
    for layer in chosen:
        assert (layer["accelerated_calls"], layer["dense_calls"]) == (3, 2)
        level = int("XL" in type(pipe).__name__)
        windowed, native = 16 >> level, 8 >> level
        # Both guidance branches; a query sees a quarter of the tokens in windows.
        assert layer["dense_pairs"] == 2 * (3 * windowed**4 + 2 * native**4)
        assert layer["pairs"] == 2 * (3 * windowed**4 // 4 + 2 * native**4)
        assert layer["backend"]
    assert not any(x["accelerated_calls"] or x["dense_calls"] for x in denoiser["layers"] if not x["accelerated"])
    wanted = sum(x["pairs"] for x in chosen) / sum(x["dense_pairs"] for x in chosen)
    assert handle.report().density == handle.report().to_dict()["density"] == pytest.approx(wanted)


def test_density_of_quarter_windows_is_a_quarter() -> None:
    pipe = slim("sd15")
    with attnswap.enabled(pipe, attnswap.HiDiffusion(raunet=False)) as handle:
        assert handle.report().density == 1.0
        sample(pipe)
        assert handle.report().density == 0.25


def test_a_report_is_a_snapshot_and_reset_forgets_the_counts() -> None:
    pipe = slim("sd15")
    handle = attnswap.enable(pipe, "hidiffusion")
    before = handle.report()
    fresh = before.to_dict()
    sample(pipe)
    assert before.to_dict() == fresh
    after = handle.report().to_dict()
    assert after != fresh
    handle.reset()
    assert handle.report().to_dict() == fresh
    sample(pipe)
    assert handle.report().to_dict() == after
    handle.disable()
    sample(pipe)
    assert handle.report().to_dict() == after, "what ran can be read after disabling, and goes on no more"


def test_it_is_one_readable_screen(pipe: Any) -> None:
    handle = attnswap.enable(pipe, "hidiffusion")
    for side in (8, 12, 16, 17, 8, 12, 16, 17, 8, 12, 16, 17):
        sample(pipe, side=side, steps=1)
    text = str(handle.report())
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) < 200
    assert lines[0].startswith("hidiffusion on UNet2DConditionModel: 12 denoiser calls")
    assert "attention layers accelerated" in lines[0]
    for said in ("density", "backend", "not self-attention over image tokens", "run: latent"):
        assert said in text


def test_however_many_notes_there_are_it_stays_one_screen() -> None:
    recorder = Recorder("Model", ("method",), {})
    for number in range(100):
        recorder.note(f"layer {number} ran dense")
    report = Report.of([recorder])
    assert len(report.to_dict()["denoisers"][0]["notes"]) == 100
    assert len(str(report).splitlines()) <= 24
    assert "more" in str(report)


def test_density_is_told_of_each_denoiser_with_and_without_its_dense_calls() -> None:
    recorders = [Recorder("Model", ("method",), {}) for _ in range(2)]
    for recorder, pairs in zip(recorders, (25, 50), strict=True):
        recorder.layers["layer"] = LayerRecord(LayerPlan("layer", True, "why"))
        recorder.count("layer", pairs=pairs, dense_pairs=100, accelerated=True, searched=True)
    recorders[1].count("layer", pairs=100, dense_pairs=100, accelerated=False)
    report = Report.of(recorders)
    told = [line for line in str(report).splitlines() if "density" in line]
    assert [line.split(": ")[1] for line in told] == ["0.25", "0.75, 0.50 without the dense calls"]
    assert "1 accelerated, 1 dense; 1 with a search; backend none" in str(report)
    assert report.density == pytest.approx(175 / 300)


def test_tokens_that_do_not_form_the_grid_run_dense_and_are_reported_with_one_warning() -> None:
    """As with a method that merges tokens: the layer gets fewer than its place in the U-Net has."""
    pipe = slim("sd15")

    def merge(module: Any, args: Any, kwargs: Any) -> Any:
        tokens = args[0] if args else kwargs.pop("hidden_states")
        return (tokens[:, ::2], *args[1:]), kwargs

    def unmerge(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.repeat_interleave(2, dim=1)

    handle = attnswap.enable(pipe, attnswap.HiDiffusion(raunet=False))
    layers = [layer for layer in handle.report().to_dict()["denoisers"][0]["layers"] if layer["accelerated"]]
    hooks = []
    for layer in layers:
        module = pipe.unet.get_submodule(layer["name"])
        hooks.append(module.register_forward_pre_hook(merge, with_kwargs=True))
        hooks.append(module.register_forward_hook(unmerge))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = sample(pipe)
        sample(pipe)
    ours = [str(entry.message) for entry in caught if issubclass(entry.category, attnswap.AttnswapWarning)]
    assert len(ours) == 1
    assert "128 tokens do not form the expected 16x16 grid" in ours[0]
    document = handle.report().to_dict()
    notes = document["denoisers"][0]["notes"]
    assert sum(note["count"] for note in notes) == 2 * 3 * len(layers)
    assert all("do not form the expected" in note["text"] for note in notes)
    assert document["density"] == 1.0
    assert "do not form the expected" in str(handle.report())
    handle.disable()
    assert torch.equal(sample(pipe), merged), "dense is stock attention"


def test_a_handle_says_what_it_is() -> None:
    pipe = slim("sd15")
    handle = attnswap.enable(pipe, "hidiffusion")
    assert repr(handle) == "<attnswap.Handle hidiffusion on UNet2DConditionModel>"
    handle.disable()
    assert "disabled" in repr(handle)


def test_an_unknown_number_of_steps_is_said_once_with_what_to_do() -> None:
    pipe = slim("sd15")
    handle = attnswap.enable(pipe.unet, "hidiffusion")
    arguments = (torch.zeros(1, 4, 16, 16), torch.tensor(500.0), torch.zeros(1, 7, 16))
    with pytest.warns(attnswap.AttnswapWarning, match=r"handle.set_timesteps\(scheduler.timesteps\)"):
        pipe.unet(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error", attnswap.AttnswapWarning)
        pipe.unet(*arguments)
    assert "number of steps is unknown" in str(handle.report())
    handle.set_timesteps([500.0, 250.0])
    handle.reset()
    assert "unknown" not in str(handle.report())
