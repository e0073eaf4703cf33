"""What CLEAR computes in each image family, beside the stock model with its mask written out."""

from __future__ import annotations

import math
from typing import Any

import attnswap
import pytest
import torch

from .image_models import CASES, Case, run
from .masked import masked

FAMILIES = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
WITH_REFERENCES = pytest.mark.parametrize("case", [c for c in CASES.values() if c.references], ids=lambda c: c.name)
GRID, TEXT = (6, 7), 5


def agree(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=2e-6, rtol=1e-5)


def differ(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() > 1e-3


def layers_of(model: Any, handle: attnswap.Handle) -> list[dict[str, Any]]:
    return [layer for layer in handle.report().to_dict()["denoisers"][0]["layers"] if layer["accelerated"]]


def expected(model: Any, inputs: dict[str, Any], places: Any, radius: float, down: Any = None) -> Any:
    """The stock model under the mask."""
    with masked(places.values(), radius, down) as calls:
        wanted = run(model, inputs)
    chosen = attnswap.inspect(model, attnswap.Clear(radius=radius, down_factor=down)).accelerated
    assert calls() == chosen > 0
    return wanted


@FAMILIES
def test_a_circle_over_the_whole_picture_is_stock_attention(case: Case) -> None:
    model, inputs = case.make(), case.inputs(GRID, TEXT, 2)
    stock = run(model, inputs)
    with attnswap.enabled(model, attnswap.Clear(radius=math.hypot(*GRID))) as handle:
        agree(run(model, inputs), stock)
        assert all(layer["accelerated_calls"] for layer in layers_of(model, handle))
        assert handle.report().density == 1.0


@FAMILIES
def test_a_circle_is_the_mask_of_its_definition_at_any_size_and_length_of_text(case: Case) -> None:
    model = case.make()
    sizes = [((6, 7), 5, 2), ((7, 6), 5, 2), ((5, 9), 3, 1), ((6, 7), 5, 2)]
    wanted = [expected(model, case.inputs(*size), case.sequences(*size[:2]), radius=2.5) for size in sizes]
    differ(wanted[0], run(model, case.inputs(*sizes[0])))
    with attnswap.enabled(model, attnswap.Clear(radius=2.5)):
        for size, masked_model in zip(sizes, wanted, strict=True):
            agree(run(model, case.inputs(*size)), masked_model)


@FAMILIES
def test_the_circle_excludes_what_lies_on_it(case: Case) -> None:
    model, inputs, places = case.make(), case.inputs(GRID, TEXT, 1), case.sequences(GRID, TEXT)
    on, beyond = (expected(model, inputs, places, radius=radius) for radius in (2, 2.01))
    differ(on, beyond)
    with attnswap.enabled(model, attnswap.Clear(radius=2)):
        agree(run(model, inputs), on)


@FAMILIES
def test_the_pooled_far_field_is_seen_by_the_picture_and_not_by_the_text(case: Case) -> None:
    model, size = case.make(), ((6, 8), TEXT, 2)
    inputs, places = case.inputs(*size), case.sequences(*size[:2])
    wanted = expected(model, inputs, places, radius=2, down=2)
    differ(wanted, expected(model, inputs, places, radius=2))
    with attnswap.enabled(model, attnswap.Clear(radius=2, down_factor=2)):
        agree(run(model, inputs), wanted)


@WITH_REFERENCES
def test_reference_images_are_seen_from_everywhere_and_see_everything(case: Case) -> None:
    model, inputs, places = case.make(), case.inputs(GRID, TEXT, 2, (4, 5)), case.sequences(GRID, TEXT, (4, 5))
    wanted = expected(model, inputs, places, radius=2)
    with attnswap.enabled(model, attnswap.Clear(radius=2)):
        agree(run(model, inputs), wanted)


@FAMILIES
def test_pictures_of_a_batch_are_independent(case: Case) -> None:
    model, inputs = case.make(), case.inputs(GRID, TEXT, 2)
    with attnswap.enabled(model, attnswap.Clear(radius=2)):
        both = run(model, inputs)
        for index in range(2):
            agree(run(model, {name: picked(value, index) for name, value in inputs.items()}), both[index : index + 1])


@FAMILIES
def test_gradient_checkpointing_gives_the_same_gradients(case: Case) -> None:
    def gradients(model: Any) -> dict[str, torch.Tensor]:
        model.train().zero_grad()
        output = model(**case.inputs(GRID, TEXT, 1), return_dict=False)[0]
        (output[0] if isinstance(output, list) else output).square().sum().backward()
        return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}

    model = case.make()
    with attnswap.enabled(model, attnswap.Clear(radius=2)):
        plain = gradients(model)
        model.enable_gradient_checkpointing()
        recomputed = gradients(model)
    assert plain.keys() == recomputed.keys()
    assert any(x.abs().max() > 0 for name, x in plain.items() if "to_q" in name)
    for name, x in plain.items():
        torch.testing.assert_close(recomputed[name], x)


@FAMILIES
def test_under_autocast_a_circle_over_the_whole_picture_is_stock_attention(case: Case) -> None:
    """Norms leave fp32 there and projections bf16, and what autocast has attention computed in is bf16."""
    model, size = case.make(), ((6, 8), TEXT, 2)
    inputs = case.inputs(*size)
    exact = run(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = run(model, inputs)
        with attnswap.enabled(model, attnswap.Clear(radius=10)) as handle:
            out = run(model, inputs)
        assert all(layer["accelerated_calls"] for layer in layers_of(model, handle))
        with attnswap.enabled(model, attnswap.Clear(radius=2, down_factor=2)):
            assert run(model, inputs).isfinite().all()
    assert out.dtype == stock.dtype
    assert (out.float() - exact).norm() <= 2 * (stock.float() - exact).norm()


def picked(value: Any, index: int) -> Any:
    batched = isinstance(value, list) or (isinstance(value, torch.Tensor) and len(value) == 2)
    return value[index : index + 1] if batched else value


def test_text_of_uneven_length_is_masked_as_in_stock_qwen_image() -> None:
    case = CASES["qwen_image"]
    model, inputs, places = case.make(), case.inputs(GRID, 6, 2), case.sequences(GRID, 6)
    unmasked = run(model, inputs)
    inputs["encoder_hidden_states_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1]])
    differ(run(model, inputs), unmasked)
    wanted = expected(model, inputs, places, radius=2)
    with attnswap.enabled(model, attnswap.Clear(radius=2)):
        agree(run(model, inputs), wanted)
        # What a masked token holds has no influence on the picture.
        inputs["encoder_hidden_states"][0, 4:] = 7.0
        agree(run(model, inputs), wanted)


def test_texts_of_uneven_length_are_padded_as_in_stock_z_image() -> None:
    case = CASES["z_image"]
    model, inputs = case.make(), case.inputs(GRID, 70, 2)
    inputs["cap_feats"][1] = inputs["cap_feats"][1][:TEXT]
    wanted = expected(model, inputs, case.sequences(GRID, 70), radius=2)
    with attnswap.enabled(model, attnswap.Clear(radius=2)):
        agree(run(model, inputs), wanted)
        inputs = {**inputs, "x": inputs["x"][1:], "t": inputs["t"][1:], "cap_feats": inputs["cap_feats"][1:]}
        agree(run(model, inputs), wanted[1:])


@pytest.mark.parametrize("name", ["flux", "flux2", "sd3"])
def test_fused_projections_take_part(name: str) -> None:
    case = CASES[name]
    model, inputs, places = case.make(), case.inputs(GRID, TEXT, 2), case.sequences(GRID, TEXT)
    stock, wanted = run(model, inputs), expected(model, inputs, places, radius=2)
    handle = attnswap.enable(model, attnswap.Clear(radius=2))
    model.fuse_qkv_projections()
    agree(run(model, inputs), wanted)
    assert all(layer["accelerated_calls"] for layer in layers_of(model, handle))
    model.unfuse_qkv_projections()
    agree(run(model, inputs), wanted)
    model.fuse_qkv_projections()
    handle.disable()
    agree(run(model, inputs), stock)
    with attnswap.enabled(model, attnswap.Clear(radius=2)):
        agree(run(model, inputs), wanted)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), stock)
