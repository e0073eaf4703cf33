"""Which U-Nets HiDiffusion takes, as what, and what it says of others."""

from __future__ import annotations

from typing import Any

import attnswap
import pytest
import torch
from attnswap import HiDiffusion

from .. import tiny
from .common import ALWAYS, call, largest_difference, last_run

TIMESTEPS = list(range(900, -1, -100))


def remark(target: Any, config: Any = "hidiffusion") -> str:
    [found] = attnswap.inspect(target, config).remarks
    return found


def test_structure_decides_and_the_report_says_so() -> None:
    assert remark(tiny.sd15_unet()) == "family sd15 (by its blocks), native latent 8x8"
    assert remark(tiny.sdxl_unet()) == "family sdxl (by its blocks), native latent 8x8, aggressive True"


def test_a_stable_diffusion_2_1_unet_is_of_the_sd15_family_with_its_own_native_size() -> None:
    unet = tiny.sd15_unet(
        attention_head_dim=(1, 2, 2, 2), use_linear_projection=True, sample_size=96, cross_attention_dim=tiny.TEXT
    )
    assert remark(unet) == "family sd15 (by its blocks), native latent 96x96"
    handle = attnswap.enable(unet, ALWAYS)
    handle.set_timesteps(TIMESTEPS)
    call(unet, (16, 16), 900)
    assert last_run(handle) == (10, 1, 0)


@pytest.mark.parametrize("unet", [tiny.sd15_unet, tiny.sdxl_unet])
@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (17, 23)])
def test_other_numbers_of_layers_a_block_work(unet: Any, pairs: int, size: tuple[int, int]) -> None:
    model = unet(layers_per_block=pairs)
    stock = call(model, size, 900)
    handle = attnswap.enable(model, HiDiffusion(aggressive=False, t1=0.5, t2=0.5, active_above=0))
    handle.set_timesteps(TIMESTEPS)
    assert largest_difference(call(model, size, 900), stock) > 1e-3
    assert last_run(handle) == (10, 1, 1)


def test_a_sdxl_structure_of_half_the_native_size_is_taken_for_turbo_and_called_a_guess() -> None:
    unet = tiny.sdxl_unet(sample_size=64)
    assert "family sdxl-turbo (a guess" in remark(unet)
    assert "family sdxl (as asked)" in remark(unet, HiDiffusion(family="sdxl"))


@pytest.mark.parametrize("family", ["sdxl-turbo", "sdxl_turbo"])
def test_turbo_can_be_asked_for(family: str) -> None:
    unet = tiny.sdxl_unet()
    handle = attnswap.enable(unet, HiDiffusion(family=family, active_above=0))
    assert "family sdxl-turbo (as asked)" in str(handle.report())
    handle.set_timesteps([999, 749, 499, 249])
    for timestep in (999, 749, 499, 249):
        call(unet, (16, 16), timestep)
    assert last_run(handle) == (4, 0, 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stabilityai/sdxl-turbo", "family sdxl-turbo (a guess"),
        ("playgroundai/playground-v2-1024px-aesthetic", "aggressive False"),
        ("somebody/finetune", "aggressive True"),
    ],
)
def test_a_name_is_a_hint_where_there_is_one(name: str, expected: str) -> None:
    pipe = tiny.sdxl()
    pipe.register_to_config(_name_or_path=name)
    assert expected in remark(pipe)


def test_what_is_asked_for_beats_every_hint() -> None:
    pipe = tiny.sdxl(tiny.sdxl_unet(in_channels=9))
    pipe.register_to_config(_name_or_path="stabilityai/sdxl-turbo")
    found = remark(pipe, HiDiffusion(family="sdxl", aggressive=0.3))
    assert "family sdxl (as asked)" in found
    assert "aggressive 0.3" in found


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        (
            {
                "block_out_channels": (8, 16),
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            },
            "CrossAttnDownBlock2D, DownBlock2D",
        ),
        (
            {
                "down_block_types": ("DownBlock2D",) * 4,
                "up_block_types": ("UpBlock2D",) * 4,
            },
            "DownBlock2D, DownBlock2D, DownBlock2D, DownBlock2D",
        ),
    ],
)
def test_an_unknown_structure_is_refused_by_name_and_nothing_is_changed(changes: dict[str, Any], blocks: str) -> None:
    unet = tiny.sd15_unet(**changes)
    stock = call(unet, (16, 16))
    with pytest.raises(attnswap.UnsupportedModel) as refused:
        attnswap.enable(unet, "hidiffusion")
    for part in ("UNet2DConditionModel", blocks, "SD 1.5/2.1", "SDXL", "four levels", "three levels"):
        assert part in str(refused.value)
    assert torch.equal(call(unet, (16, 16)), stock)
    assert not hasattr(unet, "_attnswap")


@pytest.mark.parametrize(("unet", "family"), [(tiny.sd15_unet, "sdxl"), (tiny.sdxl_unet, "sd15")])
def test_a_family_that_is_not_that_of_the_blocks_is_refused(unet: Any, family: str) -> None:
    with pytest.raises(attnswap.UnsupportedModel, match=f"asked for {family}"):
        attnswap.enable(unet(), HiDiffusion(family=family))
