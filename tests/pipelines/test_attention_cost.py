"""What attention is said to cost is what a real run then counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attnswap
import pytest
import torch
from attnswap.accel import rehearsal
from attnswap.accel.methods.base import Config
from attnswap.pipelines import attention_cost, load, presets, resolve, settings, skeleton
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.job import Job


def _rehearsed(name: str, configs: Sequence[Config], steps: int, size: tuple[int, ...]) -> rehearsal.Rehearsal:
    model = load.find(name)
    preset, pipe = presets.read(model.folder), skeleton.skeleton_pipe(model)
    width, height, frames = size[0], size[1], size[2] if len(size) > 2 else None
    arguments = attention_cost.arguments_of(pipe, preset, width=width, height=height, frames=frames)
    denoiser = attention_cost.denoiser_of(pipe)
    counts = rehearsal.CallOperations(denoiser, arguments)
    return rehearsal.rehearse(denoiser, configs, arguments, steps=steps, operations=counts, pipeline=pipe)


def _real(name: str, configs: Sequence[Config], steps: int, size: tuple[int, ...]) -> dict[str, Any]:
    """What the report says of the denoiser after a run without guidance, so that a call is of one picture."""
    model = load.find(name)
    preset = presets.read(model.folder)
    pipe = load.load(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    sides: dict[str, Any] = {"width": size[0], "height": size[1]}
    if len(size) > 2:
        sides["num_frames"] = size[2]
    if preset.max_sequence_length:
        sides["max_sequence_length"] = preset.max_sequence_length
    with attnswap.enabled(pipe, configs) as handle:
        pipe("a fox", num_inference_steps=steps, guidance_scale=1.0, output_type="latent", **sides)
    report: dict[str, Any] = handle.report().to_dict()["denoisers"][0]
    assert report["calls"] == steps
    return report


def _preset(name: str, method: str, side: int) -> list[Any]:
    return settings.build({method: presets.read(load.find(name).folder).settings_of(method, side, side)})


@pytest.mark.parametrize(
    ("name", "configs", "steps", "size"),
    [
        ("emoji-sd", [attnswap.HiDiffusion(t1=0.5)], 2, (256, 256)),
        ("emoji-sd", [attnswap.HiDiffusion(t1=1.0, t2=0.5), attnswap.LinFusion()], 2, (192, 128)),
        ("emoji-sd", [attnswap.HiDiffusion()], 1, (64, 64)),
        ("emoji-flux", [attnswap.Clear(radius=3, weights="emoji-flux")], 1, (256, 256)),
        ("emoji-flux", [attnswap.Clear(radius=4.5, down_factor=2)], 1, (160, 128)),
    ],
    ids=["hidiffusion", "hidiffusion and linfusion", "hidiffusion at rest", "clear", "clear with a far field"],
)
def test_the_pairs_of_every_layer_are_those_of_a_real_run(
    name: str, configs: list[Config], steps: int, size: tuple[int, ...]
) -> None:
    expected, real = _rehearsed(name, configs, steps, size), _real(name, configs, steps, size)
    counted = {layer["name"]: layer for layer in real["layers"] if layer["accelerated"]}
    assert {name for name, layer in expected.layers.items() if layer.accelerated} == counted.keys() != set()
    for layer, cost in expected.layers.items():
        if cost.accelerated:
            assert (cost.pairs, cost.dense_pairs) == (counted[layer]["pairs"], counted[layer]["dense_pairs"])


def test_the_density_of_adaspa_is_that_of_a_real_run_within_the_size_of_a_block() -> None:
    configs = _preset("emoji-video", "adaspa", 96)
    run: tuple[Any, ...] = ("emoji-video", configs, 4, (96, 96, 17))
    expected, real = _rehearsed(*run), _real(*run)
    [layer, *_] = [layer for layer in real["layers"] if layer["accelerated"]]
    pairs, whole = (sum(layer[key] for layer in real["layers"]) for key in ("pairs", "dense_pairs"))
    assert sum(cost.dense_pairs for cost in expected.layers.values()) == whole
    assert expected.density == pytest.approx(pairs / whole, rel=0.01)
    # One step is dense, the others are not.
    assert expected.pairs[0] == expected.dense_pairs
    assert expected.share_of_last == pytest.approx(layer["density_accelerated"], rel=0.03)


def test_a_rehearsal_leaves_the_model_as_it_was() -> None:
    model = load.find("emoji-sd")
    pipe = skeleton.skeleton_pipe(model)
    preset = presets.read(model.folder)
    arguments = attention_cost.arguments_of(pipe, preset, width=128, height=128, frames=None)
    counts = rehearsal.CallOperations(pipe.unet, arguments)
    before = [(name, type(module), dict(vars(module)).keys()) for name, module in pipe.unet.named_modules()]
    rehearsal.rehearse(pipe.unet, [attnswap.HiDiffusion()], arguments, steps=2, operations=counts)
    after = [(name, type(module), dict(vars(module)).keys()) for name, module in pipe.unet.named_modules()]
    assert after == before


def test_smaller_maps_save_more_than_attention() -> None:
    """Of HiDiffusion, which a count of attention alone would underrate."""
    steps, size = 2, (128, 128)
    dense = _rehearsed("emoji-sd", [], steps, size)
    windows = _rehearsed("emoji-sd", [attnswap.HiDiffusion(raunet=False)], steps, size)
    both = _rehearsed("emoji-sd", [attnswap.HiDiffusion(t1=1.0)], steps, size)
    assert dense.operations is not None
    assert windows.operations is not None
    assert both.operations is not None
    assert both.operations < windows.operations < dense.operations
    assert dense.share == 1.0


def _cost(name: str, methods: dict[str, list[Any]], **asked: Any) -> attention_cost.Cost:
    model = load.find(name)
    preset, pipe = presets.read(model.folder), skeleton.skeleton_pipe(model)
    job, _ = resolve.complete(Job("", model=name, **asked), pipe, preset, torch.float32)
    return attention_cost.cost_of(pipe, preset, job, methods)


def test_the_cost_of_a_clip() -> None:
    cost = _cost("emoji-video", {"adaspa": _preset("emoji-video", "adaspa", 96), "clear": [attnswap.Clear()]})
    assert (cost.width, cost.height, cost.frames, cost.steps) == (96, 96, 17, 12)
    assert cost.grid == (9, 12, 12)
    assert (cost.tokens, cost.layers) == (9 * 12 * 12, 6)
    assert cost.pairs == 6 * cost.tokens**2
    assert cost.operations == 4 * cost.pairs * 3 * 64, "heads of 64 channels"
    assert cost.all_operations is not None
    assert cost.attention_share == cost.operations / cost.all_operations
    [adaspa] = cost.methods
    assert adaspa.name == "adaspa", "clear cannot act on it"
    saved = cost.operations * (1 - adaspa.share)
    assert adaspa.most == pytest.approx(cost.all_operations / (cost.all_operations - saved))


def test_of_windows_of_a_long_clip_one_is_seen_at_a_time() -> None:
    cost = _cost("emoji-video", {}, frames=65, route="windows", window=17)
    assert cost.grid == (9, 12, 12)
    assert cost.frames == 65


def test_a_method_that_cannot_do_this_size_is_said() -> None:
    with pytest.raises(BadInput, match="clear: down_factor 3 does not divide the grid of 16x16 tokens"):
        _cost("emoji-flux", {"clear": [attnswap.Clear(down_factor=3)]})


@pytest.mark.parametrize(
    ("model", "size", "grid", "text"),
    [
        ("tiny_sdxl", (128, 64, None), (1, 8, 16), 16),
        ("tiny_flux", (64, 32, None), (1, 8, 16), 8),
        ("tiny_wan", (32, 48, 9), (5, 6, 4), 8),
    ],
)
def test_the_grid_and_the_text_of_a_folder(
    request: pytest.FixtureRequest, model: str, size: tuple[int, int, int | None], grid: tuple[int, ...], text: int
) -> None:
    folder: Path = request.getfixturevalue(model)
    found = load.find(str(folder))
    pipe, preset = skeleton.skeleton_pipe(found), presets.read(folder)
    assert attention_cost.grid_of(pipe, *size) == grid
    assert attention_cost.text_tokens(pipe, preset) == text


def test_the_text_of_stable_diffusion_is_as_long_as_its_tokenizer_makes_it() -> None:
    model = load.find("emoji-sd")
    preset, skeleton_pipe = presets.read(model.folder), skeleton.skeleton_pipe(model)
    loaded = load.load(model, dtype=torch.float32)
    loaded.register_to_config(_name_or_path="")
    assert [attention_cost.text_tokens(pipe, preset) for pipe in (skeleton_pipe, loaded)] == [16, 16]


@pytest.mark.parametrize("said", [None, "{}", '{"model_max_length": 1000000000000000019884624838656}', "[]", "no JSON"])
def test_where_no_tokenizer_says_how_long_the_text_is_it_is_that_of_the_published_clip(
    said: str | None, tmp_path: Path
) -> None:
    model = load.find("emoji-sd")
    pipe = skeleton.skeleton_pipe(model)
    pipe.register_to_config(_name_or_path=str(tmp_path))
    if said is not None:
        (tmp_path / "tokenizer").mkdir()
        (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(said)
    assert attention_cost.text_tokens(pipe, presets.read(model.folder)) == 77
