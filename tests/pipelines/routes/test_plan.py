"""Stages begin near the native size, never more than double a side, and end at exactly the size asked for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.routes import ROUTES, Stage, plan
from attnswap.pipelines.routes.plan import base_size, every, rounded_down, rounded_up

CLIMBING = [route for route in ROUTES if route not in ("direct", "windows")]


def stages(route: str, width: int, height: int, **more: Any) -> tuple[Stage, ...]:
    return plan(route, (width, height), **{"native": 64, "multiple": 8, "steps": 50, **more})


def sizes(route: str, width: int, height: int, **more: Any) -> list[tuple[int, int]]:
    return [(stage.width, stage.height) for stage in stages(route, width, height, **more)]


class TestSizes:
    def test_direct_is_one_stage_from_noise(self) -> None:
        (stage,) = stages("direct", 256, 128)
        assert (stage.width, stage.height, stage.steps, stage.strength, stage.scale) == (256, 128, 50, None, 1)

    def test_sides_double_where_they_can(self) -> None:
        for route in ("ladder", "superres-ladder"):
            assert sizes(route, 512, 512) == [(64, 64), (128, 128), (256, 256), (512, 512)]

    def test_super_resolution_takes_one_step(self) -> None:
        assert sizes("superres", 512, 512) == [(64, 64), (512, 512)]

    def test_ratios_are_even_where_doubling_does_not_fit(self) -> None:
        assert sizes("ladder", 192, 192) == [(64, 64), (112, 112), (192, 192)]

    @pytest.mark.parametrize("multiple", [8, 16, 64])
    @pytest.mark.parametrize("width", range(128, 1088, 64))
    @pytest.mark.parametrize("height", [128, 192, 576])
    def test_any_size(self, width: int, height: int, multiple: int) -> None:
        climbed = sizes("ladder", width, height, multiple=multiple)
        assert climbed[-1] == (width, height)
        assert all(side % multiple == 0 for size in climbed for side in size)
        for below, above in itertools.pairwise(climbed):
            assert all(small <= large <= 2 * small for small, large in zip(below, above, strict=True))
            assert below != above

    def test_the_base_has_the_native_area_and_the_asked_shape(self) -> None:
        width, height = base_size((4096, 2048), 1024, 8)
        assert (width, height) == (1456, 728)
        assert width * height == pytest.approx(1024**2, rel=0.02)

    def test_the_official_16k_of_sd15(self) -> None:
        assert sizes("ladder", 16384, 8192, native=512)[-1] == (16384, 8192)
        assert len(sizes("ladder", 16384, 8192, native=512)) == 6


class TestStrengths:
    def test_of_the_ladder_fall_by_stage_and_the_last_is_repeated(self) -> None:
        found = stages("ladder", 2048, 2048)[1:]
        assert [stage.strength for stage in found] == [0.4, 0.3, 0.2, 0.1, 0.1]
        assert [stage.steps for stage in found] == [20, 15, 10, 5, 5]

    @pytest.mark.parametrize(("side", "strength"), [(96, 0.32), (128, 0.32), (256, 0.24), (512, 0.16), (2048, 0.08)])
    def test_of_super_resolution_fall_by_size(self, side: int, strength: float) -> None:
        assert stages("superres", side, side)[1].strength == strength

    def test_of_its_ladder_fall_evenly_and_never_reach_zero(self) -> None:
        found = [stage.strength for stage in stages("superres-ladder", 512, 512)[1:]]
        assert found == pytest.approx([0.32, 0.64 / 3, 0.32 / 3])

    def test_super_resolution_runs_every_step_begun(self) -> None:
        assert [stage.steps for stage in stages("superres", 2048, 2048, steps=12)] == [12, 1]  # 0.96
        assert [stage.steps for stage in stages("superres", 256, 256, steps=12)] == [12, 3]  # 2.88

    def test_the_preset_is_preferred_and_the_user_above_it(self) -> None:
        preset = {"ladder": [0.25, 0.2]}
        assert [stage.strength for stage in stages("ladder", 512, 512, preset=preset)[1:]] == [0.25, 0.2, 0.2]
        given = stages("ladder", 512, 512, preset=preset, strengths=(0.5, 0.5, 1))
        assert [stage.strength for stage in given[1:]] == [0.5, 0.5, 1]

    @pytest.mark.parametrize("steps", [1, 3, 4, 7, 49])
    def test_of_themselves_always_run_a_step(self, steps: int) -> None:
        for route in CLIMBING:
            assert all(stage.steps >= 1 for stage in stages(route, 2048, 2048, steps=steps))


class TestStepsOfTheLadder:
    @pytest.mark.parametrize(
        ("steps_run", "expected"), [(rounded_down, [12, 4, 3]), (rounded_up, [12, 5, 4]), (every, [12, 12, 12])]
    )
    def test_are_those_its_image_to_image_form_runs(self, steps_run: Any, expected: list[int]) -> None:
        found = stages("ladder", 256, 256, steps=12, steps_run=steps_run)  # 4.8 and 3.6
        assert [stage.steps for stage in found] == expected

    def test_rounded_up_are_never_less_than_one(self) -> None:
        found = stages("ladder", 128, 128, steps=12, strengths=(0.05,), steps_run=rounded_up)
        assert found[1].steps == 1

    def test_rounded_up_keep_the_usual_strengths_in_a_short_run(self) -> None:
        found = stages("ladder", 256, 256, steps=3, steps_run=rounded_up)[1:]
        assert [(stage.steps, stage.strength) for stage in found] == [(2, 0.4), (1, 0.3)]


class TestScale:
    def test_is_the_ratio_to_the_base(self) -> None:
        assert [stage.scale for stage in stages("superres-ladder", 512, 512)] == [1, 2, 4, 8]
        assert stages("superres", 384, 384)[1].scale == 6

    def test_is_whole_and_at_least_two(self) -> None:
        assert stages("superres", 96, 96)[1].scale == 2
        assert stages("superres", 224, 224)[1].scale == 4  # 3.5

    def test_is_rounded_up_but_not_by_the_rounding_of_sides(self) -> None:
        assert stages("superres", 160, 160)[1].scale == 3  # 2.5
        assert stages("superres", 136, 128)[1].scale == 2  # 2.06, of a base of 66 by 62 px
        assert stages("superres", 2056, 2056, native=1024)[1].scale == 2

    def test_the_ladder_of_pictures_has_none(self) -> None:
        assert {stage.scale for stage in stages("ladder", 512, 512)} == {1}


class TestRefusals:
    @pytest.mark.parametrize("route", CLIMBING)
    @pytest.mark.parametrize("size", [(64, 64), (32, 32), (128, 32)])
    def test_a_size_that_is_not_above_the_native_one(self, route: str, size: tuple[int, int]) -> None:
        with pytest.raises(BadInput, match=f"{size[0]}x{size[1]} is not above the native size, 64x64"):
            stages(route, *size)

    def test_a_model_without_a_native_size(self) -> None:
        with pytest.raises(BadInput, match="native size"):
            stages("ladder", 128, 128, native=0)

    @pytest.mark.parametrize("strengths", [(0.4,), (0.4, 0.3, 0.2)])
    def test_strengths_of_another_count(self, strengths: tuple[float, ...]) -> None:
        with pytest.raises(BadInput, match=f"{len(strengths)} given, 2 needed, one for each of 128x128, 256x256"):
            stages("ladder", 256, 256, strengths=strengths)

    @pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan")])
    def test_strengths_out_of_range(self, strength: float) -> None:
        with pytest.raises(BadInput, match=f"{strength:g} is out of range: above 0, at most 1"):
            stages("superres", 256, 256, strengths=(strength,))

    def test_a_strength_that_runs_no_step(self) -> None:
        with pytest.raises(BadInput, match=r"0\.05 of 12 steps is less than one step; 0\.084 is enough"):
            stages("ladder", 128, 128, steps=12, strengths=(0.05,))

    def test_strengths_without_a_route(self) -> None:
        with pytest.raises(BadInput, match=r"--strengths 0\.4: there is no --route"):
            stages("direct", 128, 128, strengths=(0.4,))

    def test_an_unknown_route(self) -> None:
        with pytest.raises(BadInput, match=r"'stairs'.*ladder"):
            stages("stairs", 128, 128)
