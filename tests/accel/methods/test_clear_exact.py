"""CLEAR inside FLUX transformers, against its definition in fp64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import attnswap
import pytest
import torch
from attnswap import Clear

from .. import tiny_dit
from ..watching import unchanged
from . import clear_cases as cases
from .common import largest_difference, notes


@pytest.fixture
def model() -> Any:
    return cases.transformer()


@pytest.mark.parametrize(
    ("grid", "radius", "down_factor"),
    [((8, 8), 3, None), ((5, 13), 2.5, None), ((13, 5), 1, None), ((8, 12), 2, 4), ((12, 8), 3, 2)],
    ids=["square", "wide, any radius", "high, itself alone", "wide, pooled", "high, pooled"],
)
def test_a_transformer_is_the_definition(grid: Any, radius: float, down_factor: int | None, model: Any) -> None:
    more: dict[str, Any] = {"batch": 2, "mean": down_factor}
    wanted = cases.by_definition(model, grid, radius, **more)
    with attnswap.enabled(model, Clear(radius=radius, down_factor=down_factor)):
        out = cases.call(model, grid, batch=2)
    assert largest_difference(out, wanted) <= cases.CLOSE
    # What is nearly right is far from it: everything seen, and tokens at the very distance of the radius.
    assert largest_difference(out, cases.call(model, grid, batch=2)) > 100 * cases.CLOSE
    if radius == 3:
        assert largest_difference(out, cases.by_definition(model, grid, 3.01, **more)) > 100 * cases.CLOSE


@pytest.mark.parametrize("down_factor", [None, 2])
def test_weights_take_the_place_of_the_projections(down_factor: int | None, model: Any, tmp_path: Path) -> None:
    """One array of weights pools keys, turned by their positions, and values; it need not sum to 1."""
    weights = cases.write(tmp_path, model, 3, down_factor)
    with attnswap.enabled(model, Clear(radius=3, down_factor=down_factor, weights=str(tmp_path))):
        out = cases.call(model, (6, 8), batch=2)
    assert largest_difference(out, cases.by_definition(model, (6, 8), 3, weights, batch=2)) <= cases.CLOSE
    own = cases.by_definition(model, (6, 8), 3, batch=2, mean=down_factor)
    assert largest_difference(out, own) > 100 * cases.CLOSE
    if down_factor is not None:
        for tensors in weights.values():
            tensors["processor.spatial_weight"] = torch.full_like(tensors["processor.spatial_weight"], 1 / 4)
        means = cases.by_definition(model, (6, 8), 3, weights, batch=2)
        assert largest_difference(out, means) > 100 * cases.CLOSE


@pytest.mark.parametrize("radius", [None, 10, 1000])
def test_a_radius_beyond_the_picture_is_the_stock_model(radius: Any, model: Any) -> None:
    stock = cases.call(model, (6, 8))
    with attnswap.enabled(model, Clear(radius=radius)) as handle:
        assert largest_difference(cases.call(model, (6, 8)), stock) <= cases.CLOSE
    assert handle.report().density == 1


def test_residuals_of_a_controlnet_are_added_as_they_were(model: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    residuals: dict[str, Any] = {
        name: [torch.randn(1, 48, 32, generator=generator)]
        for name in ("controlnet_block_samples", "controlnet_single_block_samples")
    }
    wanted = cases.by_definition(model, (6, 8), 3, **residuals)
    with attnswap.enabled(model, Clear(radius=3)):
        assert largest_difference(cases.call(model, (6, 8), **residuals), wanted) <= cases.CLOSE
        assert largest_difference(cases.call(model, (6, 8)), wanted) > 100 * cases.CLOSE


@pytest.mark.parametrize("order", ["fused first", "method first"])
@pytest.mark.parametrize("own", [True, False], ids=["own weights", "a checkpoint"])
def test_fused_projections_change_nothing(own: bool, order: str, model: Any, tmp_path: Path) -> None:
    cases.write(tmp_path, model)
    config = Clear(radius=3, weights=None if own else str(tmp_path))
    stock = cases.call(model, (6, 8))
    with attnswap.enabled(model, config):
        wanted = cases.call(model, (6, 8))
    if order == "fused first":
        model.fuse_qkv_projections()
    handle = attnswap.enable(model, config)
    if order == "method first":
        model.fuse_qkv_projections()
    assert largest_difference(cases.call(model, (6, 8)), wanted) <= cases.CLOSE
    handle.disable()
    model.unfuse_qkv_projections()
    assert torch.equal(cases.call(model, (6, 8)), stock)


@pytest.mark.parametrize(
    ("settings", "with_weights"),
    [
        ({"radius": 3}, False),
        ({"radius": 3}, True),
        ({"radius": 3, "down_factor": 2}, True),
        ({"radius": 3, "ntk_factor": 10.0, "proportional_attention": True}, True),
        ({"radius": None, "ntk_factor": 2.0}, False),
    ],
    ids=["own weights", "a checkpoint", "pooled", "high resolution", "positions alone"],
)
def test_the_model_comes_out_as_it_went_in(settings: Any, with_weights: bool, model: Any, tmp_path: Path) -> None:
    if with_weights:
        cases.write(tmp_path, model, 3, settings.get("down_factor"))
        settings = {**settings, "weights": str(tmp_path)}
    stock = cases.call(model, (6, 8))
    with unchanged(model):
        handle = attnswap.enable(model, Clear(**settings))
        assert not torch.equal(cases.call(model, (6, 8)), stock)
        handle.disable()
    assert torch.equal(cases.call(model, (6, 8)), stock)
    assert model.pos_embed.theta == 10000


# For pictures larger than the model was trained for.


@pytest.mark.parametrize("down_factor", [None, 2])
@pytest.mark.parametrize("text", [7, 30])
def test_proportional_attention_goes_by_the_logarithm_of_the_tokens(
    text: int, down_factor: int | None, model: Any
) -> None:
    """The pooled keys are not among them, yet with them the published code counts each token ten times."""
    tokens = (text + 48) * (1 if down_factor is None else 10)
    sharpness = math.sqrt(math.log(tokens) / math.log(4608))
    config = Clear(radius=3, down_factor=down_factor, proportional_attention=True)
    with attnswap.enabled(model, config):
        out = cases.call(model, (6, 8), text=text)
    wanted = cases.by_definition(model, (6, 8), 3, text=text, mean=down_factor, sharpness=sharpness)
    assert largest_difference(out, wanted) <= cases.CLOSE
    assert largest_difference(out, cases.by_definition(model, (6, 8), 3, text=text, mean=down_factor)) > 1e-4


def test_proportional_attention_works_without_a_radius(model: Any) -> None:
    sharpness = math.sqrt(math.log(55) / math.log(4608))
    with attnswap.enabled(model, Clear(radius=None, proportional_attention=True)) as handle:
        out = cases.call(model, (6, 8))
    wanted = cases.by_definition(model, (6, 8), 1000, sharpness=sharpness)
    assert largest_difference(out, wanted) <= cases.CLOSE
    assert handle.report().density == 1


def test_the_ntk_factor_is_a_larger_base_of_the_rotary_positions(model: Any) -> None:
    wanted = cases.transformer()
    wanted.pos_embed.theta *= 10
    stock = cases.call(model, (6, 8))
    with attnswap.enabled(model, Clear(radius=None, ntk_factor=10)):
        out = cases.call(model, (6, 8))
        assert torch.equal(out, cases.call(wanted, (6, 8)))
        assert not torch.equal(out, stock)
    with attnswap.enabled(model, Clear(radius=3, ntk_factor=10)):
        assert largest_difference(cases.call(model, (6, 8)), cases.by_definition(wanted, (6, 8), 3)) <= cases.CLOSE
    assert torch.equal(cases.call(model, (6, 8)), stock)


def test_one_ntk_factor_replaces_another(model: Any) -> None:
    theta = model.pos_embed.theta
    for factor in (10, 4):
        handle = attnswap.enable(model, Clear(ntk_factor=factor))
        cases.call(model, (4, 4))
        assert model.pos_embed.theta == factor * theta
    handle.disable()
    assert model.pos_embed.theta is theta


def test_an_ntk_factor_decays_to_one_over_a_run() -> None:
    pipe, arguments = tiny_dit.flux()
    seen: list[float] = []
    pipe.transformer.pos_embed.register_forward_pre_hook(lambda module, args: seen.append(module.theta))
    with attnswap.enabled(pipe, Clear(ntk_factor=16, ntk_decay=True)):
        pipe(**arguments, num_inference_steps=4, output_type="latent")
    shares = [1, 4 / 9, 1 / 9, 0]
    wanted = [10000 * 16**share for share in shares for _ in range(2)]  # two branches of guidance a step
    assert seen == pytest.approx(wanted, rel=1e-12)
    assert pipe.transformer.pos_embed.theta == 10000


def test_without_a_number_of_steps_nothing_decays_and_the_report_says_so(model: Any) -> None:
    handle = attnswap.enable(model, Clear(ntk_factor=10, ntk_decay=True))
    with pytest.warns(attnswap.AttnswapWarning, match="the number of steps is unknown, so ntk_factor does not decay"):
        cases.call(model, (4, 4))
    assert model.pos_embed.theta == 100000
    handle.set_timesteps([0.5, 0.25])
    handle.reset()
    handle.set_timesteps([0.5, 0.25])
    cases.call(model, (4, 4), timestep=torch.tensor([0.25]))
    assert model.pos_embed.theta == 10000
    assert notes(handle) == {}


def test_processors_alone_leave_the_positions_and_say_so(model: Any) -> None:
    with pytest.warns(attnswap.AttnswapWarning, match="processors alone carry no ntk_factor"):
        processors = attnswap.attn_processors(model, Clear(radius=3, ntk_factor=10))
    model.set_attn_processor(processors)
    wanted = cases.by_definition(cases.transformer(), (6, 8), 3)
    assert largest_difference(cases.call(model, (6, 8)), wanted) <= cases.CLOSE


# What is said about it.


@pytest.mark.parametrize("down_factor", [None, 2])
def test_the_report_counts_the_pairs_in_sight(down_factor: int | None, model: Any) -> None:
    with attnswap.enabled(model, Clear(radius=3, down_factor=down_factor)) as handle:
        cases.call(model, (6, 8), text=7, batch=2, reference=(2, 2))
    report = handle.report().to_dict()
    pairs = int(cases.visible((6, 8), 7, 3, after=4).sum())
    if down_factor is not None:
        pairs += 48 * 12
    for layer in report["denoisers"][0]["layers"]:
        assert layer["accelerated"]
        assert (layer["pairs"], layer["dense_pairs"]) == (2 * pairs, 2 * (7 + 48 + 4) ** 2)
        assert (layer["accelerated_calls"], layer["dense_calls"]) == (1, 0)
        assert layer["backend"] == "eager"
    assert report["density"] == pairs / 59**2
    assert report["config"]["radius"] == 3


def test_the_report_says_which_weights(model: Any, tmp_path: Path) -> None:
    assert "training-free: the model's own weights" in str(attnswap.inspect(model, "clear"))
    cases.write(tmp_path, model)
    [remark] = attnswap.inspect(model, Clear(radius=3, weights=str(tmp_path))).remarks
    assert remark == f"weights: {tmp_path}"
    reasons = {x.reason for x in attnswap.inspect(model, Clear(radius=3, down_factor=2)).layers}
    assert reasons == {"local attention of radius 3 and 2x2 cells pooled"}


@pytest.mark.parametrize("wrong", ["all alike", "shuffled"])
def test_tokens_without_rows_and_columns_run_dense_and_are_reported(wrong: str, model: Any) -> None:
    stock = cases.transformer()
    table = cases.ids((6, 8))[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    more: dict[str, Any] = {"img_ids": table if wrong == "shuffled" else torch.zeros(48, 3)}
    attnswap.enable(model, Clear(radius=3))
    says = "a call ran dense: the 48 img_ids are not the rows of a grid one after the other"
    with pytest.warns(attnswap.AttnswapWarning, match=says):
        out = cases.call(model, (6, 8), **more)
    assert torch.equal(out, cases.call(stock, (6, 8), **more))
