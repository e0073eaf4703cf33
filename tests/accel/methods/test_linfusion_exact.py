"""LinFusion inside U-Nets, against its formulas in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import attnswap
import pytest
import torch
from attnswap.accel.methods.linfusion_layer import LinFusionLayer
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .. import tiny
from . import linfusion_cases as cases
from .common import call, inputs, largest_difference

A_LAYER, A_UNET = 5e-6, 2e-5


def sd21_unet() -> UNet2DConditionModel:
    """As SD 2.1 differs from 1.5: as many heads as make their width constant, and linear projections."""
    return tiny.sd15_unet(attention_head_dim=(1, 2, 2, 2), use_linear_projection=True)


UNETS: dict[str, Callable[[], UNet2DConditionModel]] = {
    "sd15": tiny.sd15_unet,
    "sd21": sd21_unet,
    "sdxl": tiny.sdxl_unet,
}


def attn1_outputs(unet: nn.Module, size: tuple[int, int], batch: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What each self-attention layer got and gave, and the prediction."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        attn.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        for attn in cases.self_attention(unet).values()
    ]
    out = call(unet, size, **inputs(unet, size, batch))
    for hook in hooks:
        hook.remove()
    return seen, out


@pytest.mark.parametrize("name", sorted(UNETS))
@pytest.mark.parametrize(
    ("size", "mid"),
    [((16, 16), None), ((24, 16), 1), ((13, 9), 5), ((8, 12), -1)],
    ids=["full width", "a sixteenth", "not a power of two, odd map", "identity"],
)
def test_every_layer_and_the_whole_unet_are_the_definition(
    name: str, size: tuple[int, int], mid: int | None, tmp_path: Path
) -> None:
    unet = UNETS[name]()
    weights = cases.write(tmp_path, unet, mid)
    stock = call(unet, size, **inputs(unet, size, 2))
    with attnswap.enabled(unet, attnswap.LinFusion(weights=str(tmp_path))) as handle:
        seen, out = attn1_outputs(unet, size, 2)
    assert handle.report().to_dict()["denoisers"][0]["calls"] == 1
    order = ["down", "mid", "up"]  # of the calls; the index has the mid block last
    names = sorted(cases.self_attention(unet), key=lambda layer: order.index(layer.partition("_")[0]))
    by_name = dict(zip(cases.self_attention(unet), weights, strict=True))
    with torch.no_grad():
        for layer, (tokens, attended) in zip(names, seen, strict=True):
            wanted = cases.layer(by_name[layer], tokens, unet.get_submodule(layer).heads)
            assert largest_difference(attended.double(), wanted) <= A_LAYER, layer
    cases.put_by_definition(unet, weights)
    wanted = call(unet, size, **inputs(unet, size, 2))
    assert largest_difference(out, wanted) <= A_UNET
    assert largest_difference(out, stock) > 100 * A_UNET


@pytest.mark.parametrize("mid", [None, 20, 17, -1])
def test_a_layer_of_trained_width_is_the_definition(mid: int | None) -> None:
    tensors = cases.random_tensors(320, mid)
    attn, layer = attention(320, 8), LinFusionLayer(tensors)
    tokens = torch.randn(2, 21 * 20, 320, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        query, key, value = layer.project(attn, tokens)
        heads = [x.unflatten(-1, (8, -1)) for x in (query, key, value)]
        out = layer.output(attn, attnswap.kernels.linear_attention(*heads).flatten(-2))
        assert largest_difference(out.double(), cases.layer(tensors, tokens, 8)) <= A_LAYER


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_projections_in_double_precision_agree_to_its_last_digits(scale: float) -> None:
    """The slope of LeakyReLU and the eps of LayerNorm are those of the published modules."""
    tensors = cases.random_tensors(24, 7)
    layer = LinFusionLayer({key: x.double() for key, x in tensors.items()})
    tokens = scale * torch.randn(2, 50, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for ours, defined in zip(
            layer.project(attention(24, 3), tokens), cases.queries_keys_values(tensors, tokens), strict=True
        ):
            torch.testing.assert_close(ours, defined, rtol=1e-12, atol=1e-12 * scale)


def test_without_a_refinement_twice_the_tokens_are_projected() -> None:
    tensors = cases.random_tensors(16, -1)
    layer, tokens = LinFusionLayer(tensors), torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0))
    query, key, value = layer.project(attention(16, 2), tokens)
    torch.testing.assert_close(query, 2 * tokens @ tensors["to_q.weight"].T)
    torch.testing.assert_close(key, 2 * tokens @ tensors["to_k.weight"].T)
    torch.testing.assert_close(value, tokens @ tensors["to_v.weight"].T)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_without_weights_it_is_linear_attention_with_the_unets_own_projections(name: str) -> None:
    unet = UNETS[name]()
    with pytest.warns(attnswap.AttnswapWarning, match="no distilled weights"):
        handle = attnswap.enable(unet, attnswap.LinFusion(weights=None))
    out = call(unet, (16, 16))
    handle.reset()
    assert "not distilled" in str(handle.report()), "also after a reset"
    handle.disable()
    cases.put_by_definition(unet, cases.own_weights(unet))
    assert largest_difference(out, call(unet, (16, 16))) <= A_UNET


@pytest.mark.filterwarnings("ignore::attnswap.AttnswapWarning")
def test_enabling_draws_no_random_numbers() -> None:
    unet = tiny.sd15_unet(layers_per_block=1)
    before = torch.random.get_rng_state()
    attnswap.enable(unet, attnswap.LinFusion(weights=None))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_eps_is_added_to_the_mean_of_the_weights(tmp_path: Path) -> None:
    unet = tiny.sd15_unet()
    weights = cases.write(tmp_path, unet)
    outs = []
    for eps in (1e-4, 0.5):
        with attnswap.enabled(unet, attnswap.LinFusion(weights=str(tmp_path), eps=eps)):
            outs.append(call(unet, (16, 16)))
        by_formulas = copy.deepcopy(unet)
        cases.put_by_definition(by_formulas, weights, eps)
        assert largest_difference(outs[-1], call(by_formulas, (16, 16))) <= A_UNET
    assert largest_difference(*outs) > 100 * A_UNET


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_errs_no_more_than_the_published_code_in_the_same_precision(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    unet = UNETS[name]()
    for tensors, attn in zip(cases.write(tmp_path, unet), cases.self_attention(unet).values(), strict=True):
        width = attn.to_q.in_features
        tokens = torch.randn(2, 16 * 24, width, generator=torch.Generator().manual_seed(width)).to(dtype)
        rounded = {key: x.to(dtype) for key, x in tensors.items()}
        layer = LinFusionLayer(rounded)
        with torch.no_grad():
            exact = cases.layer(rounded, tokens, attn.heads)
            query, key, value = layer.project(attn, tokens)
            parts = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
            ours = layer.output(attn, attnswap.kernels.linear_attention(*parts).flatten(-2))
            published = cases.as_published(rounded, tokens, attn.heads)
        assert ours.dtype == dtype
        error, allowed = ((x.double() - exact).norm() for x in (ours, published))
        assert error <= 1.2 * allowed


def attention(width: int, heads: int) -> Attention:
    return Attention(query_dim=width, heads=heads, dim_head=width // heads)
