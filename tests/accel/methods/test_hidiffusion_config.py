"""The settings of HiDiffusion: what is accepted, what is refused and in which words."""

from __future__ import annotations

import json
from typing import Any

import attnswap
import pytest
from attnswap import HiDiffusion


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows": (2,)}, r"windows must be two whole numbers of at least 1, got \(2,\)"),
        ({"windows": 2}, "windows must be two whole numbers of at least 1, got 2"),
        ({"windows": "22"}, "windows must be two whole numbers of at least 1, got '22'"),
        ({"windows": (0, 2)}, r"got \(0, 2\)"),
        ({"windows": (2.0, 2)}, r"got \(2.0, 2\)"),
        ({"shift": "block"}, r"shift must be one of step, layer or a callable .*, got 'block'"),
        ({"shift": 1}, "shift must be one of step, layer or a callable .*, got 1"),
        ({"odd_grids": "pad"}, "odd_grids must be one of exact, resize, got 'pad'"),
        ({"by": "time"}, "by must be one of steps, noise, got 'time'"),
        ({"controlnet_resize": "lanczos"}, "controlnet_resize must be one of nearest, area, bicubic"),
        ({"family": "sd3"}, "family must be one of sd15, sdxl, sdxl-turbo, got 'sd3'"),
        ({"active_above": -1}, "active_above must be a number of at least 0, got -1"),
        ({"active_above": float("nan")}, "active_above must be a number of at least 0, got nan"),
        ({"active_above": "2"}, "active_above must be a number of at least 0, got '2'"),
        ({"t1": 1.1}, "t1 must be a fraction between 0 and 1, got 1.1"),
        ({"t2": -0.1}, "t2 must be a fraction between 0 and 1, got -0.1"),
        ({"t1": 0.3, "t2": 0.4}, "t2 must not be above t1, got t1=0.3, t2=0.4"),
        ({"aggressive": 8}, "aggressive must be a fraction between 0 and 1, got 8"),
        ({"controlnet_end": 2}, "controlnet_end must be a fraction between 0 and 1, got 2"),
        ({"raunet": 1}, "raunet must be True or False, got 1"),
        ({"window_attention": "no"}, "window_attention must be True or False, got 'no'"),
        ({"round_up": None}, "round_up must be True or False, got None"),
        ({"seed": 1.5}, r"seed must be a whole number, at least 0 and below 2\*\*63, got 1.5"),
        ({"seed": -1}, "seed must be a whole number, at least 0"),
        ({"seed": 2**63}, "seed must be a whole number, .* got 9223372036854775808"),
        ({"large_side": 0}, "large_side must be a latent side of at least 1, got 0"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_value(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiDiffusion(**settings)


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(AttributeError):
        HiDiffusion().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "config",
    [
        HiDiffusion(),
        HiDiffusion(raunet=False, windows=(4, 3), shift="layer", seed=5, active_above=0),
        HiDiffusion(t1=0.5, t2=0.1, aggressive=0.2, family="sdxl", odd_grids="resize", by="noise"),
        HiDiffusion(aggressive=False, round_up=True, large_side=96, controlnet_end=0.4, controlnet_resize="area"),
    ],
    ids=repr,
)
def test_a_configuration_survives_json(config: HiDiffusion) -> None:
    assert HiDiffusion.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_shift_of_ones_own_is_named_in_json_but_cannot_come_back() -> None:
    def always_one(step: int, layer: str) -> int:
        return 1

    document = json.loads(json.dumps(HiDiffusion(shift=always_one).to_dict()))
    assert "always_one" in document["shift"]
    with pytest.raises(ValueError, match="shift must be"):
        HiDiffusion.from_dict(document)


def test_an_unknown_setting_is_answered_with_the_near_ones() -> None:
    with pytest.raises(ValueError, match=r"hidiffusion has no setting 'window'; did you mean windows"):
        HiDiffusion.from_dict({"window": [2, 2]})


def test_both_spellings_of_turbo_are_one_family() -> None:
    assert HiDiffusion(family="sdxl_turbo") == HiDiffusion(family="sdxl-turbo")
    assert HiDiffusion(family="sdxl_turbo").to_dict()["family"] == "sdxl-turbo"


def test_the_fixed_defaults() -> None:
    config = attnswap.HiDiffusion()
    assert (config.raunet, config.window_attention, config.windows) == (True, True, (2, 2))
    assert (config.shift, config.odd_grids, config.active_above) == ("step", "exact", 1.5)
    assert (config.t1, config.t2, config.aggressive, config.family) == (None,) * 4
