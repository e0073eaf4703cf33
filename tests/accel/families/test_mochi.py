"""Mochi: stock attention, which leaves out the padding of texts video by video, by the road that methods take."""

from __future__ import annotations

from typing import Any

import diffusers as d
import pytest
import torch

from ..video_models import noise
from ..video_models_more import MOCHI
from . import video_checks as checks
from .dense_strategy import dense, seen

CASE = MOCHI["mochi"]
# What is seen of two texts; none of one, as pipelines have it for an empty negative prompt.
MASKS = {
    "uneven": [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]],
    "holes": [[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1]],
    "no text": [[0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]],
    "all": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
}
EACH_MASK = pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))


def mochi_pipeline() -> tuple[Any, dict[str, Any]]:
    vae = d.AutoencoderKLMochi(
        latent_channels=4,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler()
    pipe: Any = d.MochiPipeline(scheduler, vae, text_encoder=None, tokenizer=None, transformer=CASE.make())
    pipe.set_progress_bar_config(disable=True)
    text = {
        "prompt_embeds": noise(1, 6, 16),
        "prompt_attention_mask": torch.tensor([[True] * 4 + [False] * 2]),
        "negative_prompt_embeds": noise(1, 6, 16, seed=1),
        "negative_prompt_attention_mask": torch.zeros(1, 6, dtype=torch.bool),
    }
    return pipe, {**text, "height": 32, "width": 48, "num_frames": 7, "guidance_scale": 2.0}


def test_plain_attention_of_ours_is_stock() -> None:
    checks.plain_attention_of_ours_is_stock(CASE)


def test_calls_without_a_plan_are_stock_bit_for_bit() -> None:
    checks.calls_without_a_plan_are_stock_bit_for_bit(CASE)


def test_under_autocast_it_is_as_exact_as_stock() -> None:
    checks.under_autocast_it_is_as_exact_as_stock(CASE)


def test_adaspa_that_keeps_all_is_stock() -> None:
    checks.adaspa_that_keeps_all_is_stock(CASE)


def test_a_pipeline_is_accelerated() -> None:
    """Both of its texts padded, in one batch."""
    found = checks.pipelines_take_part(mochi_pipeline)
    assert {layer.shape[0] for layer in found.values()} == {2}
    for layer in found.values():
        assert layer.key_mask is not None
        assert layer.key_mask.sum(1).tolist() == [12, 16]


def test_lora_takes_part() -> None:
    checks.lora_takes_part(CASE, ["to_q", "to_v", "to_out.0", "add_k_proj", "to_add_out"])


@EACH_MASK
def test_hidden_text_is_left_out_as_in_stock_attention(mask: list[list[int]]) -> None:
    """In each layer, text and padding included: in the last, whose text goes no further, and in the others."""
    model, inputs = CASE.make(), CASE.inputs(checks.GRID, checks.TEXT, 2)
    hidden, text, shown = noise(2, 30, 16), noise(2, 6, 16, seed=1), torch.tensor(mask).bool()
    rope = model.rope(model.pos_frequencies, *checks.GRID, dtype=torch.float32)

    def layers() -> list[tuple[torch.Tensor, torch.Tensor]]:
        with torch.no_grad():
            return [block.attn1(hidden, text, shown, image_rotary_emb=rope) for block in model.transformer_blocks]

    stock = layers()
    with dense(model) as handle:
        checks.outputs(model, inputs)
        seen(handle).clear()
        for ours, wanted in zip(layers(), stock, strict=True):
            checks.agree(ours, wanted)
        for layer in seen(handle).values():
            assert layer.key_mask is not None
            lengths = 30 + shown.sum(1)
            assert torch.equal(layer.key_mask, torch.arange(36) < lengths[:, None]), "what is hidden comes last"
    checks.plain_attention_of_ours_is_stock(CASE, model, encoder_attention_mask=shown)


def test_what_a_hidden_token_holds_has_no_influence() -> None:
    model, inputs = CASE.make(), CASE.inputs(checks.GRID, checks.TEXT, 2)
    layer = model.transformer_blocks[0].attn1
    hidden, text, shown = noise(2, 30, 16), noise(2, 6, 16, seed=1), inputs["encoder_attention_mask"]
    with torch.no_grad(), dense(model):
        checks.outputs(model, inputs)
        before = layer(hidden, text, shown)
        for anything in (7.0, torch.inf, torch.nan):
            text[~shown] = anything
            assert checks.same(layer(hidden, text, shown), before)
