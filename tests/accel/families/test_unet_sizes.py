"""`unet_sizes` says beforehand what a U-Net's maps measure; here a real U-Net is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attnswap.accel.families.unet import UNetSizes, unet_sizes
from attnswap.accel.families.unet_seams import PooledSection, QuarteringDownsampler, UpsampleToSkips
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from .. import tiny

SIZES = [(8, 8), (16, 16), (17, 15), (9, 23), (30, 13), (49, 7), (5, 33), (1, 1), (2, 3)]


def map_size(x: torch.Tensor) -> tuple[int, int]:
    return int(x.shape[-2]), int(x.shape[-1])


def observed(unet: UNet2DConditionModel, size: tuple[int, int]) -> UNetSizes:
    """Sizes seen by hooks during one call."""
    skips: list[tuple[int, int]] = [size]
    adapters: list[tuple[int, int]] = []
    transformers: dict[str, tuple[int, int]] = {}
    middle: list[tuple[int, int]] = []
    hooks = []

    def after_block(module: torch.nn.Module, args: Any, output: Any) -> None:
        sample, made = output
        skips.extend(map_size(x) for x in made)
        # An adapter's features join before the downsampler where there is attention, after it where there is none.
        attends = getattr(module, "attentions", None) is not None
        adapters.append(map_size(made[len(module.resnets) - 1]) if attends else map_size(sample))

    def before_transformer(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            transformers[name] = map_size(args[0] if args else kwargs["hidden_states"])

        return hook

    for block in unet.down_blocks:
        hooks.append(block.register_forward_hook(after_block))
    hooks.append(unet.mid_block.register_forward_hook(lambda m, a, output: middle.append(map_size(output))))
    for name, module in unet.named_modules():
        if isinstance(module, Transformer2DModel):
            hooks.append(module.register_forward_pre_hook(before_transformer(name), with_kwargs=True))
    with torch.no_grad():
        call(unet, size)
    for hook in hooks:
        hook.remove()
    return UNetSizes(tuple(skips), middle[0], tuple(adapters), transformers)


def call(unet: UNet2DConditionModel, size: tuple[int, int]) -> torch.Tensor:
    more = {}
    if unet.config.addition_embed_type:
        more["added_cond_kwargs"] = {"text_embeds": torch.ones(1, tiny.TEXT), "time_ids": torch.ones(1, 6)}
    text = torch.ones(1, 3, tiny.TEXT)
    out: torch.Tensor = unet(torch.ones(1, 4, *size), 5, encoder_hidden_states=text, **more).sample
    return out


UNETS: dict[str, Callable[[], UNet2DConditionModel]] = {
    "sd15": tiny.sd15_unet,
    "sd15, one pair": lambda: tiny.sd15_unet(layers_per_block=1),
    "sd15, three pairs": lambda: tiny.sd15_unet(layers_per_block=3),
    "sdxl": lambda: tiny.sdxl_unet(transformer_layers_per_block=1),
    "sdxl, one pair": lambda: tiny.sdxl_unet(transformer_layers_per_block=1, layers_per_block=1),
}


@pytest.mark.parametrize("model", UNETS)
@pytest.mark.parametrize("quartered", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_predicted_sizes_are_those_of_a_real_call(model: str, quartered: bool, pooled: bool) -> None:
    """All four states of the resolution-aware U-Net, odd and tiny latents included."""
    unet = UNETS[model]()
    conv_level = 0 if model.startswith("sd15") else 1
    pairs = len(unet.down_blocks[1].resnets)
    QuarteringDownsampler(unet.down_blocks[conv_level].downsamplers[0], lambda: quartered)
    PooledSection(unet.down_blocks[1].attentions[0], unet.up_blocks[-2].attentions[pairs - 1], lambda: pooled)
    UpsampleToSkips(unet)
    for size in SIZES:
        found = unet_sizes(unet, size, quartered=conv_level if quartered else None, pooled=1 if pooled else None)
        assert found == observed(unet, size), size


def test_a_stock_unet_is_predicted_where_it_runs() -> None:
    unet = tiny.sd15_unet()
    for size in ((8, 8), (16, 24), (17, 15)):
        assert unet_sizes(unet, size) == observed(unet, size)


@pytest.mark.parametrize(("conv", "pool"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("side", [64, 65, 71, 97])
def test_the_skips_follow_the_closed_form(conv: bool, pool: bool, side: int) -> None:
    """Per axis, ceil divisions from the published geometry."""

    def ceil(n: int, by: int) -> int:
        return -(-n // by)

    n = side
    sd15 = unet_sizes(tiny.sd15_unet(), (n, n), quartered=0 if conv else None, pooled=1 if pool else None)
    a = ceil(n, 4 if conv else 2)
    p = ceil(a, 2) if pool else a
    q = ceil(p, 2)
    r = ceil(q, 2)
    assert [h for h, _ in sd15.skips] == [n, n, n, a, p, p, q, q, q, r, r, r]
    assert sd15.middle == (r, r)
    sdxl = unet_sizes(tiny.sdxl_unet(), (n, n), quartered=1 if conv else None, pooled=1 if pool else None)
    a = ceil(n, 2)
    p = ceil(a, 2) if pool else a
    q = ceil(p, 4 if conv else 2)
    assert [h for h, _ in sdxl.skips] == [n, n, n, a, p, p, q, q, q]
    assert sdxl.middle == (q, q)
