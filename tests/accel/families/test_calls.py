"""What a denoiser is called with at a size: tokens lie where those of a real call do, and a call can be counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attnswap.accel.errors import UnsupportedModel
from attnswap.accel.families import family_of
from attnswap.accel.families.calls import call_arguments
from attnswap.accel.rehearsal import CallOperations, places
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .. import tiny, video_models, video_models_more
from .image_models import CASES

TEXT = 6
_CLIPS = [*video_models.WAN, *video_models.HUNYUAN, *video_models.HUNYUAN_15, *video_models_more.COGVIDEOX.values()]
CLIPS = {case.name: case for case in [*_CLIPS, *video_models_more.LTX.values(), *video_models_more.MOCHI.values()]}
# With arguments that no size tells.
OTHERS = {"wan_vace", "wan_animate", "chrono_edit", "wan_i2v", "hunyuan_i2v", "framepack", "hunyuan15_i2v"}


@pytest.mark.parametrize("name", CASES)
def test_the_places_of_a_picture_are_those_of_a_real_call(name: str) -> None:
    model, grid = CASES[name].make(), (5, 3)
    expected = family_of(model).places(model)(CASES[name].inputs(grid, TEXT, 1))
    assert places(model, call_arguments(model, (1, *grid), TEXT)) == expected


@pytest.mark.parametrize("name", sorted(CLIPS.keys() - OTHERS - {"hunyuan15"}))
def test_the_places_of_a_clip_are_those_of_a_real_call(name: str) -> None:
    model, grid = CLIPS[name].make(), (3, 5, 2)
    expected = family_of(model).places(model)(CLIPS[name].inputs(grid, TEXT, 1))
    assert places(model, call_arguments(model, grid, TEXT)) == expected


def test_hunyuan_video_15_has_other_text_and_an_image_around_the_clip() -> None:
    model = video_models.hunyuan15()
    [place] = set(places(model, call_arguments(model, (3, 5, 2), TEXT)).values())
    assert place.grid == (3, 5, 2)
    assert place.around == TEXT + 256 + 729


@pytest.mark.parametrize("make", [tiny.sd15_unet, tiny.sdxl_unet])
def test_the_places_in_a_unet_are_those_of_a_real_call(make: Any) -> None:
    unet = make()
    expected = family_of(unet).places(unet)({"sample": torch.zeros(1, 4, 9, 13)})
    assert places(unet, call_arguments(unet, (1, 9, 13), 77)) == expected


def test_a_model_that_is_called_with_more_than_a_size_is_named() -> None:
    with pytest.raises(UnsupportedModel, match="what a WanVACETransformer3DModel is called with"):
        call_arguments(video_models.wan_vace(), (3, 5, 2), TEXT)


def _counted(model: Any, arguments: dict[str, Any]) -> float:
    counter = FlopCounterMode(display=False)
    # PyTorch does not count its fused attention for CPUs.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**arguments)
    return float(counter.get_total_flops())


# Not Qwen-Image and HunyuanVideo 1.5, which look at their data.
@pytest.mark.parametrize("name", ["flux", "flux2", "sd3", "z_image", "wan", "hunyuan_video", "cogvideox_2b", "ltx"])
def test_the_operations_of_a_call_are_those_of_a_real_one(name: str) -> None:
    case = CASES.get(name) or CLIPS[name]
    grid = (5, 3) if name in CASES else (3, 5, 2)
    model = case.make()
    real = _counted(model, case.inputs(grid, TEXT, 1))
    empty = model.to("meta")
    arguments = call_arguments(empty, (1, *grid) if name in CASES else grid, TEXT)
    tokens = {layer: place.tokens for layer, place in places(empty, arguments).items()}
    operations = CallOperations(empty, arguments)
    everything = {layer: count**2 for layer, count in tokens.items()}
    assert operations.of_a_call(tokens, everything) == real
    none = operations.of_a_call(tokens, dict.fromkeys(tokens, 0))
    assert none is not None
    assert real - none == operations.attention(everything)


def test_what_looks_at_its_data_is_not_counted() -> None:
    model = video_models.hunyuan15().to("meta")
    arguments = call_arguments(model, (3, 5, 2), TEXT)
    tokens = {layer: place.tokens for layer, place in places(model, arguments).items()}
    assert CallOperations(model, arguments).of_a_call(tokens, tokens) is None


def test_attention_costs_two_products_of_the_width_for_each_pair() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel()
    arguments = call_arguments(unet, (1, 64, 64), 77)
    layers = places(unet, arguments)
    pairs = {name: float(math.prod(place.grid) ** 2) for name, place in layers.items()}
    deepest = 2 * 2 * 1280 * (8 * 8) ** 2
    only = {name: pairs[name] for name in pairs if name.startswith("mid_block")}
    assert CallOperations(unet, arguments).attention(only) == deepest
