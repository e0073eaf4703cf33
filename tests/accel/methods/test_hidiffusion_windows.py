"""Windowed self-attention inside a real U-Net, against windows cut out one by one."""

from __future__ import annotations

from typing import Any

import attnswap
import pytest
import torch
from attnswap import HiDiffusion
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from .. import tiny
from .common import call, largest_difference, notes

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def windows_one_by_one(
    attn: nn.Module,
    tokens: Tensor,
    grid: tuple[int, int],
    windows: tuple[int, int],
    shift: tuple[int, int],
    key_bias: Tensor | None = None,
) -> Tensor:
    """Stock attention on each window by itself; tokens `[B, h * w, C]`, key bias `[B, 1, h * w]`."""
    places = torch.arange(grid[0] * grid[1]).view(grid).roll((-shift[0], -shift[1]), (0, 1))
    out = torch.empty_like(tokens)
    for rows in places.tensor_split(windows[0], dim=0):
        for window in rows.tensor_split(windows[1], dim=1):
            inside = window.flatten()
            bias = None if key_bias is None else key_bias[:, :, inside]
            out[:, inside] = AttnProcessor2_0()(attn, tokens[:, inside], attention_mask=bias)
    return out


def attn1_in_and_out(unet: UNet2DConditionModel, size: tuple[int, int], block: str = BLOCK) -> tuple[Tensor, Tensor]:
    """What one self-attention layer got and gave in a call of the whole U-Net."""
    seen: list[Tensor] = []
    attn = unet.get_submodule(f"{block}.attn1")
    hook = attn.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    call(unet, size)
    hook.remove()
    return seen[0], seen[1]


@pytest.mark.parametrize("size", [(16, 16), (17, 15), (9, 12), (13, 30), (5, 33)])
@pytest.mark.parametrize("windows", [(2, 2), (3, 2), (1, 4)])
@pytest.mark.parametrize("quarter", [0, 1, 3])
def test_every_grid_is_cut_exactly_and_rolled_along_both_axes(
    size: tuple[int, int], windows: tuple[int, int], quarter: int
) -> None:
    unet = tiny.sd15_unet()
    config = HiDiffusion(raunet=False, windows=windows, shift=lambda step, layer: quarter, active_above=0)
    with attnswap.enabled(unet, config):
        tokens, attended = attn1_in_and_out(unet, size)
    shift = [-(-side // count) // 4 * quarter for side, count in zip(size, windows, strict=True)]
    with torch.no_grad():
        expected = windows_one_by_one(unet.get_submodule(f"{BLOCK}.attn1"), tokens, size, windows, (shift[0], shift[1]))
    torch.testing.assert_close(attended, expected, rtol=0, atol=1e-5)


def test_sdxl_windows_its_second_level_on_odd_grids_too() -> None:
    unet = tiny.sdxl_unet()
    block = "down_blocks.1.attentions.1.transformer_blocks.1"
    config = HiDiffusion(raunet=False, shift=lambda step, layer: 2, active_above=0)
    with attnswap.enabled(unet, config):
        tokens, attended = attn1_in_and_out(unet, (33, 38), block)
    with torch.no_grad():
        expected = windows_one_by_one(unet.get_submodule(f"{block}.attn1"), tokens, (17, 19), (2, 2), (4, 4))
    torch.testing.assert_close(attended, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("unet", "count", "where"),
    [
        (tiny.sd15_unet, 5, {"down_blocks.0", "up_blocks.3"}),
        (tiny.sdxl_unet, 10, {"down_blocks.1", "up_blocks.1"}),
    ],
)
def test_the_published_layers_are_windowed_and_no_other(unet: Any, count: int, where: set[str]) -> None:
    layers = [layer for layer in attnswap.inspect(unet(), "hidiffusion").layers if layer.accelerated]
    assert len(layers) == count
    assert {layer.name.partition(".attentions")[0] for layer in layers} == where
    assert all(layer.name.endswith("attn1") for layer in layers)


@pytest.mark.parametrize("unet", [tiny.sd15_unet, tiny.sdxl_unet])
def test_one_window_equals_stock(unet: Any) -> None:
    model = unet()
    stock = call(model, (16, 20))
    with attnswap.enabled(model, HiDiffusion(raunet=False, windows=(1, 1), active_above=0)) as handle:
        assert largest_difference(call(model, (16, 20)), stock) < 1e-5
        assert handle.report().density == 1.0


def test_two_by_two_windows_compute_a_quarter_of_the_pairs() -> None:
    unet = tiny.sd15_unet()
    with attnswap.enabled(unet, HiDiffusion(raunet=False, active_above=0)) as handle:
        call(unet, (16, 16))
        assert handle.report().density == 0.25


def test_more_windows_than_rows_runs_dense_and_says_so() -> None:
    unet = tiny.sd15_unet()
    stock = call(unet, (3, 40))
    with attnswap.enabled(unet, HiDiffusion(raunet=False, windows=(4, 2), active_above=0)) as handle:
        assert torch.equal(call(unet, (3, 40)), stock)
        assert f"{BLOCK} ran dense: a 3x40 grid has no 4x2 windows" in notes(handle)


def with_mask(unet: UNet2DConditionModel, mask: Tensor) -> None:
    """Let a mask reach the self-attention of one windowed block, as GLIGEN-like callers do."""

    def add_mask(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, {**kwargs, "attention_mask": mask}

    unet.get_submodule(BLOCK).register_forward_pre_hook(add_mask, with_kwargs=True)


def test_a_key_mask_is_cut_into_the_windows_of_its_tokens() -> None:
    size, quarter = (17, 18), 1
    unet = tiny.sd15_unet()
    bias = torch.where(torch.rand(1, 1, 17 * 18, generator=torch.Generator().manual_seed(0)) < 0.3, -10000.0, 0.0)
    with_mask(unet, bias)
    config = HiDiffusion(raunet=False, shift=lambda step, layer: quarter, active_above=0)
    with attnswap.enabled(unet, config):
        tokens, attended = attn1_in_and_out(unet, size)
    attn = unet.get_submodule(f"{BLOCK}.attn1")
    with torch.no_grad():
        expected = windows_one_by_one(attn, tokens, size, (2, 2), (2, 2), bias)
        unmasked = windows_one_by_one(attn, tokens, size, (2, 2), (2, 2))
    torch.testing.assert_close(attended, expected, rtol=0, atol=1e-5)
    assert largest_difference(expected, unmasked) > 1e-3


def test_any_other_mask_runs_that_call_dense_and_says_so() -> None:
    unet = tiny.sd15_unet()
    with_mask(unet, torch.zeros(1, 256, 256).tril())
    _, stock = attn1_in_and_out(unet, (16, 16))
    config = HiDiffusion(raunet=False, active_above=0)
    with (
        attnswap.enabled(unet, config) as handle,
        pytest.warns(attnswap.AttnswapWarning, match=r"an attention mask of shape \(1, 256, 256\) is not one of keys"),
    ):
        _, attended = attn1_in_and_out(unet, (16, 16))
    assert torch.equal(attended, stock)
    layer = next(x for x in handle.report().to_dict()["denoisers"][0]["layers"] if x["name"] == f"{BLOCK}.attn1")
    assert (layer["accelerated_calls"], layer["dense_calls"]) == (0, 1)


class Foreign(AttnProcessor):
    """A processor of somebody else, which sees the windows."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.shapes.append(tuple(hidden_states.shape))
        out: Tensor = super().__call__(attn, hidden_states, *args, **kwargs)
        return out


def test_a_foreign_processor_stays_and_gets_the_windows() -> None:
    unet = tiny.sd15_unet()
    config = HiDiffusion(raunet=False, active_above=0)
    with attnswap.enabled(unet, config):
        expected = call(unet, (16, 24))
    foreign = Foreign()
    unet.get_submodule(f"{BLOCK}.attn1").set_processor(foreign)
    with attnswap.enabled(unet, config):
        assert largest_difference(call(unet, (16, 24)), expected) < 1e-5
    assert foreign.shapes == [(4, 8 * 12, 8)]
    assert unet.get_submodule(f"{BLOCK}.attn1").processor is foreign


@pytest.mark.parametrize("value", [4, -1, 1.5, None, True])
def test_a_shift_that_is_no_quarter_is_refused(value: object) -> None:
    unet = tiny.sd15_unet()
    config = HiDiffusion(raunet=False, shift=lambda step, layer: value, active_above=0)  # type: ignore[arg-type,return-value]
    with (
        attnswap.enabled(unet, config),
        pytest.raises(ValueError, match=rf"shift\(0, '{BLOCK}'\) must be 0, 1, 2 or 3, got {value}"),
    ):
        call(unet, (16, 16))


def test_a_shift_of_ones_own_gets_the_step_from_zero_and_the_path_of_the_block() -> None:
    asked: list[tuple[int, str]] = []

    def shift(step: int, layer: str) -> int:
        asked.append((step, layer))
        return 0

    pipe = tiny.sdxl()
    with attnswap.enabled(pipe, HiDiffusion(raunet=False, shift=shift)):
        tiny.run(pipe, steps=3)
    blocks = {
        f"{side}_blocks.1.attentions.{pair}.transformer_blocks.{layer}"
        for side, pairs in (("down", 2), ("up", 3))
        for pair in range(pairs)
        for layer in range(2)
    }
    assert set(asked) == {(step, block) for step in range(3) for block in blocks}


def test_step_gives_all_layers_one_shift_and_layer_gives_each_its_own() -> None:
    def shifts(rule: str, seed: int = 0) -> list[list[tuple[int, int]]]:
        """Per step, the shift of each layer."""
        unet = tiny.sd15_unet()
        found = []
        handle = attnswap.enable(unet, HiDiffusion(raunet=False, shift=rule, seed=seed, active_above=0))
        handle.set_timesteps(list(range(12, 0, -1)))
        for timestep in range(12, 0, -1):
            call(unet, (32, 32), timestep)
            layers = [unet.get_submodule(name) for name, m in unet.named_modules() if name.endswith("attn1")]
            slots = [m.processor.slot for m in layers if hasattr(m.processor, "slot")]
            found.append([slot.layout.plan.shift for slot in slots])
        return found

    by_step, by_layer = shifts("step"), shifts("layer")
    assert all(len(set(step)) == 1 and len(step) == 5 for step in by_step)
    assert {step[0] for step in by_step} == {(0, 0), (4, 4), (8, 8), (12, 12)}
    assert any(len(set(step)) > 1 for step in by_layer)
    assert shifts("step") == by_step
    assert shifts("step", seed=1) != by_step
