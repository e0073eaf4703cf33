"""What is particular to HunyuanVideo 1.5: three streams beside the video, whose padding sees nothing."""

from __future__ import annotations

from typing import Any

import attnswap
import pytest
import torch

from ..video_models import hunyuan15, hunyuan15_i2v_inputs, hunyuan15_inputs, layer_inputs, noise, run
from .dense_strategy import dense, notes, seen

GRID, TEXT = (3, 5, 7), 6
#: Of both texts and the image.
ALL = 2 * TEXT + 4


def agree(actual: Any, wanted: Any) -> None:
    torch.testing.assert_close(actual, wanted, atol=2e-6, rtol=1e-5)


def layer_arguments(model: Any) -> dict[str, Any]:
    tokens, rope = layer_inputs(model, GRID)
    return {
        "hidden_states": tokens,
        "encoder_hidden_states": noise(2, ALL, 16, seed=1),
        "attention_mask": torch.tensor([[True] * ALL, [True] * (ALL - 2) + [False] * 2]),
        "image_rotary_emb": rope,
    }


def test_a_layer_called_by_position_or_by_name_gives_what_stock_gives_to_padding_too() -> None:
    model = hunyuan15()
    attn, arguments = model.transformer_blocks[0].attn, layer_arguments(model)
    with torch.no_grad():
        stock = attn(**arguments)
        assert torch.equal(stock[1][1, -1], attn.to_add_out.bias), "padding attends to nothing"
        unmasked = attn(**{**arguments, "attention_mask": torch.ones(2, ALL, dtype=torch.bool)})
        assert (unmasked[0] - stock[0]).abs().max() > 1e-4, "the mask counts"
        with dense(model) as handle:
            run(model, hunyuan15_inputs(GRID, TEXT, 2))
            agree(attn(**arguments), stock)
            agree(attn.processor(attn, *arguments.values()), stock)
            assert notes(handle) == []


@pytest.mark.parametrize(("inputs", "image"), [(hunyuan15_inputs, 0), (hunyuan15_i2v_inputs, 4)], ids=["t2v", "i2v"])
def test_what_is_hidden_of_either_text_and_of_a_missing_image_is_the_last_of_each_sequence(
    inputs: Any, image: int
) -> None:
    model, arguments = hunyuan15(), inputs(GRID, TEXT, 2)
    stock = run(model, arguments)
    with dense(model) as handle:
        arguments["encoder_hidden_states"][1, TEXT // 2 :] = 7.0
        arguments["encoder_hidden_states_2"][1, 1:] = 7.0
        agree(run(model, arguments), stock)
        for call in seen(handle).values():
            assert call.key_mask is not None
            assert call.key_mask.sum(1).tolist() == [105 + image + 2 * TEXT, 105 + image + TEXT // 2 + 1]
            assert torch.equal(call.key_mask, call.key_mask.sort(dim=1, descending=True).values)


def test_a_call_without_text_runs_dense_and_says_so() -> None:
    model = hunyuan15()
    attn = model.transformer_blocks[1].attn
    arguments = {**layer_arguments(model), "encoder_hidden_states": None}
    with torch.no_grad():
        stock = attn(**arguments)[0]
        with dense(model):
            run(model, hunyuan15_inputs(GRID, TEXT, 2))
            with pytest.warns(attnswap.AttnswapWarning, match=r"blocks.1.attn ran dense: there is no text"):
                assert torch.equal(attn(**arguments)[0], stock)
