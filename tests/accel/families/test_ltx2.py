"""LTX-2: stock self-attention of the video by the road that methods take; sound and all other attention stay stock."""

from __future__ import annotations

import attnswap
import pytest
import torch
from attnswap.accel.families.base import Place
from attnswap.accel.families.ltx2 import layer_places
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoAttnProcessor, LTX2PerturbedAttnProcessor
from torch._dynamo.testing import CompileCounterWithBackend

from ..video_models import Case, noise
from ..video_models_more import LTX2, coordinates
from . import video_checks as checks
from .dense_strategy import dense, notes, seen
from .ranks import shared_out

CASES = pytest.mark.parametrize("case", LTX2.values(), ids=list(LTX2))
GRID = checks.GRID


@CASES
def test_plain_attention_of_ours_is_stock(case: Case) -> None:
    checks.plain_attention_of_ours_is_stock(case)


@CASES
def test_calls_without_a_plan_are_stock_bit_for_bit(case: Case) -> None:
    checks.calls_without_a_plan_are_stock_bit_for_bit(case)


@CASES
def test_under_autocast_it_is_as_exact_as_stock(case: Case) -> None:
    checks.under_autocast_it_is_as_exact_as_stock(case)


@CASES
def test_adaspa_that_keeps_all_is_stock(case: Case) -> None:
    checks.adaspa_that_keeps_all_is_stock(case)


def test_a_chosen_backend_is_that_of_dense_attention_and_stays() -> None:
    checks.a_chosen_backend_is_that_of_dense_attention_and_stays(LTX2["ltx23"])


def test_repeated_blocks_share_a_graph_as_those_of_the_stock_model_do() -> None:
    case = LTX2["ltx23"]
    model, inputs = case.make(), case.inputs(GRID, 6, 2)
    stock = checks.outputs(model, inputs)

    def graphs() -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        for x, wanted in zip(checks.outputs(model, inputs), stock, strict=True):
            torch.testing.assert_close(x, wanted, atol=1e-5, rtol=1e-4)
        return counter.frame_count

    assert graphs() == 1
    with dense(model):
        assert graphs() == 1
    torch._dynamo.reset()


def test_lora_takes_part() -> None:
    checks.lora_takes_part(LTX2["ltx23"], ["attn1.to_q", "attn1.to_out.0", "attn1.to_gate_logits"])


@CASES
def test_only_the_self_attention_of_the_video_is_exchanged(case: Case) -> None:
    model = case.make()
    originals = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    assert len(originals) == 6 * case.layers
    with dense(model) as handle:
        checks.outputs(model, case.inputs(GRID, 6, 1))
        exchanged = {name for name, original in originals.items() if model.get_submodule(name).processor != original}
        assert exchanged == set(seen(handle)) == {f"transformer_blocks.{index}.attn1" for index in range(case.layers)}
        stock = LTX2PerturbedAttnProcessor if case.name == "ltx23" else LTX2AudioVideoAttnProcessor
        assert all(isinstance(model.get_submodule(name).processor, stock) for name in exchanged)


def test_frames_given_as_a_condition_are_frames_of_the_grid() -> None:
    """Behind the video, and the sides given are those of the video alone, as its pipelines have it."""
    case = LTX2["ltx2_split"]
    positions = torch.cat([coordinates(GRID, 2), coordinates((1, *GRID[1:]), 2, 8)], dim=2)
    positions = torch.stack((positions, positions + 1), dim=-1)
    model, inputs = case.make(), case.inputs(GRID, 6, 2)
    inputs |= {"hidden_states": noise(2, positions.shape[2], 4), "video_coords": positions}
    stock = checks.outputs(model, inputs)
    with dense(model) as handle:
        checks.agree(checks.outputs(model, inputs), stock)
        assert {layer.place for layer in seen(handle).values()} == {Place((4, 5, 2))}
        assert notes(handle) == []


def test_sides_are_those_before_patches_are_made() -> None:
    model = LTX2["ltx2"].make(patch_size=2, patch_size_t=2)
    inputs = {**LTX2["ltx2"].inputs(GRID, 6, 1), "num_frames": 5, "height": 10, "width": 3}
    assert set(layer_places(model)(inputs).values()) == {Place(GRID)}


def test_a_reference_in_another_size_runs_dense() -> None:
    positions = torch.cat([coordinates(GRID, 2), coordinates((1, 3, 1), 2)], dim=2)
    checks.runs_dense_because(
        LTX2["ltx2"],
        "a call ran dense: the 33 positions of video_coords are not those of frames of one size",
        lambda inputs: {**inputs, "hidden_states": noise(2, 33, 4), "video_coords": positions},
    )


def test_a_mask_between_tokens_runs_dense() -> None:
    checks.runs_dense_because(
        LTX2["ltx2"],
        r"transformer_blocks.0.attn1 ran dense: an attention mask of shape \(.*\) was given",
        lambda inputs: {**inputs, "video_self_attention_mask": torch.ones(2, 30, 30).tril()},
    )


def test_perturbed_layers_take_the_values_in_place_of_attention() -> None:
    """In one block of two: of every row of the batch, as the pipelines ask for it, or of one of them."""
    case = LTX2["ltx23"]
    model, inputs = case.make(), case.inputs(GRID, 6, 2)
    plain = checks.outputs(model, inputs)
    guided = {**inputs, "spatio_temporal_guidance_blocks": [1]}
    some = {**guided, "perturbation_mask": torch.tensor([1.0, 0.0])}
    stock, stock_of_some = checks.outputs(model, guided), checks.outputs(model, some)
    with dense(model) as handle:
        checks.agree(checks.outputs(model, some), stock_of_some)
        assert len(seen(handle)) == 2
        assert notes(handle) == []
        with pytest.warns(attnswap.AttnswapWarning, match="1.attn1 ran dense: a guider takes the values in place"):
            checks.agree(checks.outputs(model, guided), stock)
        assert set(seen(handle)) == {"transformer_blocks.0.attn1"}
    torch.testing.assert_close(stock_of_some[0][:1], plain[0][:1])
    assert (stock_of_some[0][1] - plain[0][1]).abs().max() > 1e-3


def test_a_layer_called_by_itself_finds_out_whether_it_is_perturbed() -> None:
    case = LTX2["ltx23"]
    model, inputs = case.make(), case.inputs(GRID, 6, 2)
    layer, hidden = model.transformer_blocks[0].attn1, noise(2, 30, 24)
    kept = [torch.tensor(rows)[:, None, None] for rows in ([0.0, 0.0], [0.0, 0.5], [1.0, 1.0])]
    with torch.no_grad():
        stock = [layer(hidden, perturbation_mask=mask) for mask in kept]
        with dense(model) as handle:
            checks.outputs(model, inputs)
            with pytest.warns(attnswap.AttnswapWarning, match="0.attn1 ran dense: a guider takes the values in place"):
                ours = [layer(hidden, perturbation_mask=mask) for mask in kept]
            assert len(notes(handle)) == 1
    checks.agree(tuple(ours), tuple(stock))


@CASES
def test_ranks_that_share_out_the_tokens_give_what_one_gives(case: Case) -> None:
    model, grid = case.make(), (3, 5, 1)
    layer, hidden = model.transformer_blocks[0].attn1, noise(2, 15, 24)
    rope = model.rope(coordinates(grid, 2))
    with torch.no_grad():
        stock = layer(hidden, query_rotary_emb=rope)
    tokens = 1 if case.name == "ltx2" else 2  # their dimension, in positions of all heads and of each
    with dense(model) as handle:
        checks.outputs(model, case.inputs(grid, 6, 2))
        shares = [
            (hidden.tensor_split(2, dim=1)[rank], [x.tensor_split(2, dim=tokens)[rank] for x in rope])
            for rank in range(2)
        ]
        together = shared_out(lambda rank: layer(shares[rank][0], query_rotary_emb=shares[rank][1]), 2)
        assert notes(handle) == []
    checks.agree((torch.cat(together, dim=1),), (stock,))
