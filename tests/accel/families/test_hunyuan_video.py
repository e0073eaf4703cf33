"""What is particular to HunyuanVideo and Framepack."""

from __future__ import annotations

from typing import Any

import attnswap
import pytest
import torch

from .. import tiny_dit
from ..video_models import framepack, framepack_inputs, hunyuan_inputs, hunyuan_video, layer_inputs, noise, run
from .dense_strategy import dense, notes, seen

GRID, TEXT = (3, 5, 7), 6
BLOCKS = pytest.mark.parametrize("blocks", ["transformer_blocks", "single_transformer_blocks"])


def agree(actual: Any, wanted: Any) -> None:
    torch.testing.assert_close(actual, wanted, atol=2e-6, rtol=1e-5)


def layer_arguments(model: Any) -> dict[str, Any]:
    """Of two videos, the second with two tokens of text less."""
    tokens, rope = layer_inputs(model, GRID)
    mask = torch.ones(2, 1, 1, tokens.shape[1] + TEXT, dtype=torch.bool)
    mask[1, ..., -2:] = False
    return {
        "hidden_states": tokens,
        "encoder_hidden_states": noise(2, TEXT, 20, seed=1),
        "attention_mask": mask,
        "image_rotary_emb": rope,
    }


@BLOCKS
def test_a_layer_called_by_position_or_by_name_gives_what_stock_gives(blocks: str) -> None:
    model = hunyuan_video()
    attn, arguments = getattr(model, blocks)[0].attn, layer_arguments(model)
    with torch.no_grad():
        stock = attn(**arguments)
        for part in ("attention_mask", "image_rotary_emb"):
            assert (attn(**{**arguments, part: None})[0] - stock[0]).abs().max() > 1e-4, f"{part} counts"
        with dense(model) as handle:
            run(model, hunyuan_inputs(GRID, TEXT, 2))
            agree(attn(**arguments), stock)
            agree(attn.processor(attn, *arguments.values()), stock)
            assert notes(handle) == []


def test_padding_is_the_last_of_each_sequence_and_what_it_holds_has_no_influence() -> None:
    model, inputs = hunyuan_video(), hunyuan_inputs(GRID, TEXT, 2)
    stock = run(model, inputs)
    with dense(model) as handle:
        inputs["encoder_hidden_states"][1, TEXT // 2 :] = 7.0
        agree(run(model, inputs), stock)
        for call in seen(handle).values():
            assert call.key_mask is not None
            assert call.key_mask.sum(1).tolist() == [105 + TEXT, 105 + TEXT // 2]
            assert torch.equal(call.key_mask, call.key_mask.sort(dim=1, descending=True).values)


def test_the_pipeline_gives_what_stock_gives() -> None:
    pipe, arguments = tiny_dit.hunyuan_video()

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        output: torch.Tensor = pipe(**arguments, num_inference_steps=2, output_type="latent", generator=generator)[0]
        return output

    stock = sample()
    with dense(pipe) as handle:
        torch.testing.assert_close(sample(), stock, atol=1e-5, rtol=1e-5)
        assert len(seen(handle)) == 2


# Framepack.


def test_one_text_by_itself_is_cut_where_its_padding_begins() -> None:
    model, inputs = framepack(), framepack_inputs(GRID, TEXT, 1)
    whole = run(model, inputs)
    inputs["encoder_attention_mask"][0, 4:] = 0
    stock = run(model, inputs)
    assert not torch.equal(stock, whole)
    with dense(model) as handle:
        agree(run(model, inputs), stock)
        (shape,) = {call.shape for call in seen(handle).values()}
        (place,) = {call.place for call in seen(handle).values()}
    assert shape[1] == place.tokens == 105 + place.start + 3 + 4


def test_history_grows_from_section_to_section() -> None:
    model, inputs = framepack(), framepack_inputs(GRID, TEXT, 1)
    longer = {
        **inputs,
        "latents_history_4x": noise(1, 4, 9, 10, 14, seed=5),
        "indices_latents_history_4x": torch.arange(9),
    }
    stock = [run(model, section) for section in (inputs, longer)]
    starts = []
    with dense(model) as handle:
        for section, wanted in zip((inputs, longer), stock, strict=True):
            agree(run(model, section), wanted)
            starts.append(next(iter(seen(handle).values())).place.start)
    # Frames in boxes of four, rows and columns in boxes of eight.
    assert starts[1] - starts[0] == (3 - 2) * 2 * 2


# What cannot be accelerated runs dense, and the report says why.


@BLOCKS
@pytest.mark.parametrize("part", ["attention_mask", "encoder_hidden_states"])
def test_a_call_that_is_not_one_of_the_model_s_own(blocks: str, part: str) -> None:
    model = hunyuan_video()
    attn, arguments = getattr(model, blocks)[0].attn, layer_arguments(model)
    if part == "attention_mask":
        why = r"an attention mask of shape \(2, 1, 111, 111\) and torch.bool is not one of keys"
        arguments[part] = arguments[part].expand(-1, -1, 111, -1)
    else:
        why = "there is no text"
        arguments = {**arguments, part: None, "attention_mask": None}
    with torch.no_grad():
        stock = attn(**arguments)
        with dense(model):
            run(model, hunyuan_inputs(GRID, TEXT, 2))
            with pytest.warns(attnswap.AttnswapWarning, match=f"{blocks}.0.attn ran dense: {why}"):
                out = attn(**arguments)
    assert torch.equal(out[0], stock[0])
