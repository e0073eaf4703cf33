"""CLEAR's settings, and models it does not fit."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import attnswap
import numpy as np
import pytest
from attnswap import Clear

from .. import tiny, tiny_dit


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"radius": 0.5}, "radius must be a number of tokens, at least 1, or None, got 0.5"),
        ({"radius": float("nan")}, "radius must be a number"),
        ({"radius": float("inf")}, "radius must be a number"),
        ({"radius": True}, "radius must be a number"),
        ({"radius": np.int64(8)}, "radius must be a number"),
        ({"radius": np.float32(8)}, "radius must be a number"),
        ({"radius": Fraction(17, 2)}, "radius must be a number"),
        ({"ntk_factor": np.float32(2)}, "ntk_factor must be a positive number"),
        ({"radius": "16"}, "radius must be a number of tokens, at least 1, or None, got '16'"),
        ({"down_factor": 1}, "down_factor must be a whole number of tokens, at least 2, got 1"),
        ({"down_factor": 4.0}, "down_factor must be a whole number of tokens, at least 2, got 4.0"),
        ({"radius": None, "down_factor": 4}, "down_factor 4 needs a radius"),
        ({"radius": None, "weights": "some"}, "weights some needs a radius"),
        ({"weights": ""}, "weights must be a name, a path, a Hub id or None, got ''"),
        ({"weights": 3}, "weights must be"),
        ({"ntk_factor": 0}, "ntk_factor must be a positive number, got 0"),
        ({"ntk_factor": float("inf")}, "ntk_factor must be"),
        ({"ntk_factor": None}, "ntk_factor must be"),
        ({"ntk_decay": True}, "ntk_decay needs an ntk_factor other than 1"),
        ({"ntk_decay": 1, "ntk_factor": 2}, "ntk_decay must be true or false, got 1"),
        ({"proportional_attention": None}, "proportional_attention must be true or false, got None"),
    ],
)
def test_settings_no_model_could_use_are_refused(settings: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Clear(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        Clear(),
        Clear(radius=None, ntk_factor=10, ntk_decay=True, proportional_attention=True),
        Clear(radius=8, down_factor=4, weights="Huage001/CLEAR"),
        Clear(radius=np.float64(7.5), ntk_factor=np.float64(2)),
        Clear(radius=7.5, weights=Path("some") / "folder"),  # type: ignore[arg-type]
    ],
)
def test_settings_survive_json(config: Clear) -> None:
    assert Clear.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_misspelt_setting_is_refused_with_the_near_one() -> None:
    with pytest.raises(ValueError, match="clear has no setting 'radios'; did you mean radius"):
        Clear.from_dict({"radios": 8})


def test_a_unet_is_refused_with_what_it_takes_and_what_clear_takes() -> None:
    with pytest.raises(attnswap.UnsupportedModel, match="clear does not work on UNet2DConditionModel") as caught:
        attnswap.enable(tiny.sd15_unet(layers_per_block=1), "clear")
    assert "hidiffusion, linfusion" in str(caught.value)
    assert "FluxTransformer2DModel" in str(caught.value)


def test_a_model_without_rotary_positions_takes_no_ntk_factor() -> None:
    pipe, _ = tiny_dit.sd3()
    says = "ntk_factor 10 cannot act on SD3Transformer2DModel: it has no rotary positions"
    with pytest.raises(attnswap.UnsupportedModel, match=says):
        attnswap.enable(pipe, Clear(ntk_factor=10))
    attnswap.enable(pipe, Clear(radius=2)).disable()


def test_clear_is_not_combined_with_another_method() -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        attnswap.enable(tiny_dit.flux()[0], ["clear", "hidiffusion"])
