"""The settings of AdaSpa: what is refused, and the way to JSON and back."""

from __future__ import annotations

import json
from typing import Any

import attnswap
import pytest
import torch
from attnswap import AdaSpa

from ..slim import slim
from . import adaspa_cases as cases


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("sparsity", 1, "sparsity must be at least 0 and below 1, got 1"),
        ("sparsity", -0.1, "got -0.1"),
        ("sparsity", float("nan"), "got nan"),
        ("sparsity", True, "got True"),
        ("sparsity", "0.5", "got '0.5'"),
        ("block", 64, r"block must be \(query tokens, key tokens\), each of \(16, 32, 64, 128\), got \(64,\)"),
        ("block", (64, 48), r"got \(64, 48\)"),
        ("block", (64, 64, 64), r"got \(64, 64, 64\)"),
        ("block", (64.0, 64.0), r"got \(64.0, 64.0\)"),
        ("search_steps", (), "search_steps is empty"),
        ("search_steps", (0,), "search_steps has 0: each is a step, counted from 1, or a fraction"),
        ("search_steps", (1, -2), "has -2"),
        ("search_steps", (1.5,), "has 1.5"),
        ("search_steps", (True,), "has True"),
        ("search_steps", ("10",), "has '10'"),
        ("recall_threshold", 1.1, "recall_threshold must be from 0 to 1, got 1.1"),
        ("recall_threshold", None, "got None"),
        ("head_adaptive", 1, "head_adaptive must be true or false, got 1"),
        ("text_sink", "yes", "text_sink must be true or false, got 'yes'"),
        ("dense_layers", (-1,), r"dense_layers must be numbers of layers, from 0, got \(-1,\)"),
        ("dense_layers", (0.0,), "from 0, got"),
        ("reorder", "hilbert", "reorder must be 'none' or 'tile', got 'hilbert'"),
        ("min_tokens", -1, "min_tokens must be a whole number, at least 0, got -1"),
        ("min_tokens", 0.5, "got 0.5"),
    ],
)
def test_what_no_run_could_use_is_refused_in_one_line(setting: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        AdaSpa(**{setting: value})
    assert "\n" not in str(caught.value)


def test_the_default_is_the_papers() -> None:
    assert AdaSpa() == AdaSpa(
        sparsity=0.8, block=(64, 64), search_steps=(10, 30), head_adaptive=True, recall_threshold=0.8, text_sink=True
    )


@pytest.mark.parametrize(
    "config",
    [
        AdaSpa(),
        AdaSpa(sparsity=0, block=(128, 32), search_steps=(0.1, 0.5, 20), dense_layers=(0, 3), reorder="tile"),
        AdaSpa(search_steps=7, dense_layers=[1], min_tokens=0, text_sink=False, head_adaptive=False),  # type: ignore[arg-type]
    ],
)
def test_there_and_back_through_json(config: AdaSpa) -> None:
    document = config.to_dict()
    assert document["method"] == "adaspa"
    back = AdaSpa.from_dict(json.loads(json.dumps(document)))
    assert back == config
    assert [type(step) for step in back.search_steps] == [type(step) for step in config.search_steps]


def test_a_misspelt_setting_is_refused_with_the_right_one() -> None:
    with pytest.raises(ValueError, match=r"adaspa has no setting 'sparsty'; did you mean sparsity\?"):
        AdaSpa.from_dict({"sparsty": 0.5})


def test_the_name_stands_for_the_default() -> None:
    assert "adaspa" in attnswap.methods()
    handle = attnswap.enable(cases.flux(), "adaspa")
    assert handle.report().to_dict()["config"] == AdaSpa().to_dict()
    assert "block-sparse attention, 80% of the blocks dropped" in str(attnswap.inspect(cases.flux(), "adaspa"))


def test_dense_layers_beyond_the_model_are_refused_with_its_number() -> None:
    with pytest.raises(ValueError, match="names 4, 9, but FluxTransformer2DModel has 4 self-attention layers, 0 to 3"):
        attnswap.enable(cases.flux(), AdaSpa(dense_layers=(0, 4, 9)))
    layers = attnswap.inspect(cases.flux(), AdaSpa(dense_layers=(0, 3))).layers
    assert [layer.accelerated for layer in layers] == [False, True, True, False]
    assert {layer.reason for layer in layers if not layer.accelerated} == {"dense_layers names it"}


def test_other_methods_for_the_same_layers_and_unets_are_refused_with_the_reason() -> None:
    with pytest.raises(attnswap.UnsupportedModel, match="adaspa and clear cannot be combined: both decide what the"):
        attnswap.enable(cases.flux(), ["clear", "adaspa"])
    with pytest.raises(attnswap.UnsupportedModel, match="adaspa does not work on UNet2DConditionModel, which takes"):
        attnswap.enable(slim("sd15"), "adaspa")


def test_calls_of_few_tokens_stay_dense_and_the_report_says_so() -> None:
    """Text counts."""
    model = cases.flux(heads=2, dtype=torch.float32, num_layers=1, num_single_layers=1)
    run = cases.steps(3, grid=(6, 8), text=7, dtype=torch.float32)
    stock = run.of(model)
    settings: dict[str, Any] = {"sparsity": 0.5, "block": (16, 16), "search_steps": (1,)}
    with attnswap.enabled(model, AdaSpa(min_tokens=56, **settings)) as handle:
        with pytest.warns(attnswap.AttnswapWarning, match="attention over 55 tokens ran dense: min_tokens is 56"):
            found = run.of(model, handle)
        assert all(map(torch.equal, found, stock))
        assert cases.counts_of(handle) == (3, 0, 0)
        assert "ran dense: min_tokens is 56 (x3)" in str(handle.report())
    with attnswap.enabled(model, AdaSpa(min_tokens=55, **settings)) as handle:
        run.of(model, handle)
        assert cases.counts_of(handle) == (1, 1, 2)


def test_layers_of_more_tokens_are_not_kept_back_by_those_of_few() -> None:
    """The refiner of Z-Image sees no text."""
    case, grid = cases.image_models.CASES["z_image"], (8, 8)
    model, run = case.make(), cases.Steps(case.inputs(grid, 7, 1), 3)
    refined, whole = (case.sequences(grid, 7)[part].tokens for part in ("noise_refiner", "layers"))
    assert refined < whole
    handle = attnswap.enable(model, AdaSpa(sparsity=0.5, block=(16, 16), search_steps=(1,), min_tokens=whole))
    with pytest.warns(attnswap.AttnswapWarning, match=f"over {refined} tokens ran dense"):
        run.of(model, handle)
    for layer in cases.layers_of(handle):
        assert layer["accelerated_calls"] == (0 if layer["name"].startswith("noise_refiner") else 2)
