"""`auto` in a job, whose size is known: what it becomes for the bundled models, and as text on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attnswap.accel.auto import break_even
from attnswap.pipelines import auto_method, load, presets, settings, skeleton
from attnswap.pipelines.errors import BadInput

CPU = torch.device("cpu")


def choose(name: str, width: int, height: int, frames: int | None = None, **more: Any) -> tuple[dict[str, Any], str]:
    model = load.find(name)
    pipe = more.pop("pipe", None) or skeleton.skeleton_pipe(model)
    how = {"steps": 12, "device": CPU, **more}
    return auto_method.choose(pipe, presets.read(model.folder), width=width, height=height, frames=frames, **how)


@pytest.mark.parametrize(
    ("model", "size", "expected"),
    [
        ("emoji-sd", (64, 64), []),
        ("emoji-sd", (256, 256), ["hidiffusion", "linfusion"]),
        ("emoji-flux", (128, 128), []),
        ("emoji-flux", (256, 256), ["clear"]),
        ("emoji-video", (96, 96, 5), []),
        ("emoji-video", (96, 96, 17), ["adaspa"]),
    ],
)
def test_a_bundled_model_at_a_size(model: str, size: tuple[int, ...], expected: list[str]) -> None:
    methods, why = choose(model, *size)
    assert list(methods) == expected
    assert why.startswith(f"auto: {' + '.join(expected) or 'dense attention'}: ")
    assert "(measured on cpu" in why


def test_the_pipeline_with_its_weights_gets_the_same() -> None:
    loaded = load.load(load.find("emoji-flux"), dtype=torch.float32)
    assert choose("emoji-flux", 256, 256, pipe=loaded) == choose("emoji-flux", 256, 256)


def test_the_settings_are_those_of_the_preset_for_this_size() -> None:
    methods, _ = choose("emoji-sd", 128, 128)
    assert (methods["hidiffusion"]["t1"], methods["hidiffusion"]["t2"]) == (1.0, None)
    methods, _ = choose("emoji-sd", 256, 256)
    assert (methods["hidiffusion"]["t1"], methods["hidiffusion"]["t2"]) == (1.0, 1.0)
    methods, _ = choose("emoji-flux", 256, 256)
    assert (methods["clear"]["radius"], methods["clear"]["weights"]) == (3, "emoji-flux")


def test_the_settings_make_configurations() -> None:
    for model, size in (("emoji-sd", (256, 256)), ("emoji-flux", (256, 256)), ("emoji-video", (96, 96, 17))):
        methods, _ = choose(model, *size)
        assert [config.name for config in settings.build(methods)] == list(methods)


def test_what_was_chosen_acts_at_that_size() -> None:
    """AdaSpa has a threshold of its own, which must not undo the choice."""
    methods, _ = choose("emoji-video", 96, 96, 17)
    [config] = settings.build(methods)
    assert config.min_tokens == break_even(config, "cpu")[0] < 9 * 12 * 12


def test_a_folder_that_says_less_is_adaspa_from_its_own_threshold_on(tiny_wan: Path) -> None:
    assert choose(str(tiny_wan), 32, 32, 9)[0] == {}
    methods, why = choose(str(tiny_wan), 256, 256, 9)
    assert list(methods) == ["adaspa"]
    assert "5,120 tokens, adaspa acts from 4,096 (its min_tokens)" in why


def test_a_run_of_one_step_is_dense() -> None:
    methods, why = choose("emoji-video", 96, 96, 65, steps=1)
    assert methods == {}
    assert "adaspa: 0 of 1 steps would be sparse" in why


def test_a_model_that_no_method_takes_is_left_dense_and_the_reasons_are_given(tiny_sd: Path) -> None:
    pipe = skeleton.skeleton_pipe(load.find(str(tiny_sd)))
    pipe.unet.down_blocks = pipe.unet.down_blocks[:2]
    methods, why = choose(str(tiny_sd), 64, 64, pipe=pipe)
    assert methods == {}
    assert why.startswith("auto: dense attention: hidiffusion: ")


class TestAsText:
    def test_is_taken_alone(self) -> None:
        assert settings.parse(["auto"], []) == {"auto": {}}
        assert settings.build({"auto": {}}) == [], "yet to be chosen"

    @pytest.mark.parametrize("names", [["auto", "clear"], ["clear", "auto"]])
    def test_is_refused_beside_another(self, names: list[str]) -> None:
        with pytest.raises(BadInput, match="method auto chooses by itself: name it alone, without clear"):
            settings.parse(names, [])
        with pytest.raises(BadInput, match="name it alone"):
            settings.build({name: {} for name in names})

    def test_has_no_settings(self) -> None:
        with pytest.raises(BadInput, match="--set radius=3: auto chooses the settings itself"):
            settings.parse(["auto"], ["radius=3"])
        with pytest.raises(BadInput, match="method auto has no settings, got radius"):
            settings.build({"auto": {"radius": 3}})

    def test_is_offered_where_a_name_is_like_it(self) -> None:
        with pytest.raises(BadInput, match="Did you mean auto"):
            settings.parse(["autto"], [])
